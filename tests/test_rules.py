# SPDX-License-Identifier: Apache-2.0
"""Rules: what each swaps, what it keeps, and the reason it gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import hetconv_kernels as hk
from hetconv_kernels import rules
from hetconv_kernels.errors import ArgumentError, InputTypeError, SupportError


class MyConv2d(nn.Conv2d):
    def forward(self, x):
        return -super().forward(x)


def test_het_carries_everything_over():
    torch.manual_seed(0)
    conv = nn.Conv2d(
        8, 12, (3, 5), stride=(2, 1), padding=(1, 2), dilation=(1, 2), padding_mode="circular",
        dtype=torch.float64,
    )  # fmt: skip
    layer = rules.het(p=4, order="interleaved")("conv", conv)
    assert type(layer) is hk.nn.HetConv2d
    support = hk.Support.het(8, 12, (3, 5), p=4, order="interleaved")
    assert layer.support == support
    for name in ("stride", "padding", "dilation", "padding_mode", "in_channels", "out_channels"):
        assert getattr(layer, name) == getattr(conv, name), name
    masked = nn.Conv2d(
        8, 12, (3, 5), stride=(2, 1), padding=(1, 2), dilation=(1, 2), padding_mode="circular",
        dtype=torch.float64,
    )  # fmt: skip
    masked.load_state_dict(conv.state_dict())
    with torch.no_grad():
        masked.weight *= torch.from_numpy(support.mask.copy())
    x = torch.randn(2, 8, 9, 11, dtype=torch.float64)
    torch.testing.assert_close(layer(x), masked(x))


KEPT_BY_HET = {
    "pointwise": (lambda: nn.Conv2d(8, 8, 1), "it is 1×1: it has nothing but the centre tap"),
    "depthwise": (lambda: nn.Conv2d(8, 16, 3, groups=8), "it is depthwise"),
    "grouped": (lambda: nn.Conv2d(8, 8, 3, groups=2), "it has 2 groups"),
    "even": (lambda: nn.Conv2d(8, 8, (3, 4)), "its kernel is 3×4: an even kernel has no centre"),
    "stem": (lambda: nn.Conv2d(3, 8, 3), "it is a stem: it reads an image of 3 channels"),
    "few channels": (lambda: nn.Conv2d(6, 16, 3), "p=8 is more than its 6 channels"),
    "few filters": (lambda: nn.Conv2d(16, 6, 3), "p=8 is more than its 6 filters"),
    "subclass": (lambda: MyConv2d(8, 8, 3), "MyConv2d, a subclass of Conv2d, may do other"),
    "transposed": (lambda: nn.ConvTranspose2d(8, 8, 3), "ConvTranspose2d is not a 2-D convolution"),
    "1-D": (lambda: nn.Conv1d(8, 8, 3), "a Conv1d is not a 2-D convolution"),
    "lazy": (lambda: nn.LazyConv2d(8, 3), "it is lazy and has no weights yet"),
    "parametrised": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3)),
        "it is parametrised",
    ),
    "pruned": (
        lambda: prune.l1_unstructured(nn.Conv2d(8, 8, 3), "weight", 0.5),
        "its weight is not a parameter of its own",
    ),
    "ours": (lambda: hk.nn.HetConv2d(8, 8, 3, p=2), "it is a HetConv2d already"),
    "ours, fused": (lambda: hk.nn.fuse(nn.Conv2d(8, 8, 3)), "it is a FusedConv2d already"),
    "ours, grouped": (lambda: hk.nn.GroupedConv2d(8, 8, 3, groups=2), "it is a GroupedConv2d"),
}


@pytest.mark.parametrize("case", KEPT_BY_HET)
def test_het_keeps_with_a_reason(case):
    make, reason = KEPT_BY_HET[case]
    answer = rules.het(p=8)("name", make())
    assert isinstance(answer, rules.Keep)
    assert reason in answer.reason


def test_a_replaced_forward_is_kept():
    conv = nn.Conv2d(8, 8, 3)
    conv.forward = lambda x: x  # type: ignore[method-assign]
    assert "its forward was replaced" in rules.het()("name", conv).reason


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantised_convolutions_are_kept():
    from torch.ao.nn.quantized import Conv2d

    if torch.backends.quantized.engine == "none":
        pytest.skip("this build of PyTorch has no engine for quantised layers")
    answer = rules.het(p=4)("name", Conv2d(8, 8, 3))
    assert "it is quantised" in answer.reason


@pytest.mark.parametrize("module", [nn.ReLU(), nn.Linear(8, 8), nn.Sequential()], ids=str)
def test_het_has_nothing_to_say_about_other_modules(module):
    assert rules.het()("name", module) is None


def test_het_options():
    stem = nn.Conv2d(3, 8, 3)
    assert isinstance(rules.het(p=3, skip_stem=False)("name", stem), hk.nn.HetConv2d)
    narrow = nn.Conv2d(16, 8, 3)
    assert isinstance(rules.het(p=4, min_channels=8)("name", narrow), hk.nn.HetConv2d)
    assert "under min_channels=9" in rules.het(p=4, min_channels=9)("name", narrow).reason


@pytest.mark.parametrize(
    "arguments",
    [{"p": 0}, {"p": -2}, {"p": 2.0}, {"p": True}, {"order": "sorted"}, {"min_channels": 0}],
    ids=str,
)
def test_het_refuses_bad_options(arguments):
    with pytest.raises(ArgumentError, match="received"):
        rules.het(**arguments)


@pytest.mark.parametrize("groups", [2, 8], ids=["grouped", "depthwise"])
def test_grouped_swaps_grouped_convolutions(groups):
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 16, 3, groups=groups, padding=1)
    layer = rules.grouped()("name", conv)
    assert type(layer) is hk.nn.GroupedConv2d
    x = torch.randn(2, 8, 7, 7)
    torch.testing.assert_close(layer(x), conv(x))
    assert rules.grouped()("name", nn.Conv2d(8, 8, 3)).reason == "it has one group"


def test_supports_swaps_named_layers_only():
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    conv, linear = nn.Conv2d(4, 6, 3), nn.Linear(10, 5)
    chosen = {
        "conv": hk.Support.from_mask(rng.random((6, 4, 3, 3)) < 0.5),
        "head": hk.Support.from_mask(rng.random((5, 10, 1, 1)) < 0.5),
    }
    rule = rules.supports(chosen)
    swapped = rule("conv", conv)
    assert type(swapped) is hk.nn.SelfGroupConv2d
    assert swapped.support == chosen["conv"]
    head = rule("head", linear)
    assert type(head) is hk.nn.SupportLinear
    mask = torch.from_numpy(chosen["head"].mask.copy())[:, :, 0, 0]
    x = torch.randn(3, 10)
    torch.testing.assert_close(head(x), x @ (linear.weight * mask).T + linear.bias)
    assert rule("other", nn.Conv2d(4, 6, 3)) is None
    assert "ReLU has no Support" in rule("conv", nn.ReLU()).reason
    assert "it has 2 groups" in rule("conv", nn.Conv2d(4, 6, 3, groups=2)).reason
    assert "a subclass of Conv2d" in rule("conv", MyConv2d(4, 6, 3)).reason


def test_supports_refuses_what_does_not_fit():
    rule = rules.supports({"conv": hk.Support.dense(4, 6, 3)})
    with pytest.raises(SupportError, match=r"shape of the Support of 'conv': received \(6, 4, 3"):
        rule("conv", nn.Conv2d(4, 8, 3))
    with pytest.raises(InputTypeError, match="support of 'conv': received ndarray"):
        rules.supports({"conv": np.ones((6, 4, 3, 3), bool)})


def test_dense_undoes_every_layer():
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    layers = [
        (hk.nn.HetConv2d(8, 8, 3, p=4), torch.randn(1, 8, 5, 5), nn.Conv2d),
        (hk.nn.GroupedConv2d(8, 8, 3, groups=4), torch.randn(1, 8, 5, 5), nn.Conv2d),
        (
            hk.nn.SupportLinear(6, 4, support=hk.Support.from_mask(rng.random((4, 6, 1, 1)) < 0.5)),
            torch.randn(2, 6),
            nn.Linear,
        ),
    ]
    for layer, x, kind in layers:
        plain = rules.dense()("name", layer)
        assert type(plain) is kind
        torch.testing.assert_close(plain(x), layer(x))
    assert rules.dense()("name", nn.Conv2d(4, 4, 3)) is None


def test_first_of_takes_the_first_replacement_and_joins_reasons():
    rule = rules.first_of(rules.grouped(), rules.het(p=4))
    assert type(rule("a", nn.Conv2d(8, 8, 3, groups=2))) is hk.nn.GroupedConv2d
    assert type(rule("b", nn.Conv2d(8, 8, 3))) is hk.nn.HetConv2d
    kept = rule("c", nn.Conv2d(8, 8, 1))
    assert kept.reason == "it has one group; it is 1×1: it has nothing but the centre tap"
    twice = rules.first_of(rules.het(), rules.het())("c", nn.Conv2d(8, 8, 1))
    assert twice.reason.count("centre tap") == 1
    assert rule("d", nn.ReLU()) is None
    with pytest.raises(ArgumentError, match="first_of: received no rules"):
        rules.first_of()
