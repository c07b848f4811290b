# SPDX-License-Identifier: Apache-2.0
"""HetConv2d: the two channel orders, its refusals, and folding of public HetConvs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressing import check_kills, run, tiny
from layers import C, F, assert_equals_conv2d, image
from torch import Tensor, nn

import hetconv_kernels as hk
from hetconv_kernels.compression import Het
from hetconv_kernels.errors import ArgumentError, InputTypeError, SupportError
from hetconv_kernels.nn import HetConv2d, SupportConv2d, fold_het
from hetconv_kernels.support import Support


@pytest.mark.parametrize("order", ["blocked", "interleaved"])
@pytest.mark.parametrize("p", [1, 2, 3, 4, 5, 8, 12])
def test_weights_exist_where_the_paper_says(p: int, order: str) -> None:
    layer = HetConv2d(C, F, 3, p=p, order=order)
    assert (layer.p, layer.order) == (p, order)
    for f in range(F):
        for c in range(C):
            full = (c - f) % p == 0 if order == "interleaved" else f * p // F == c * p // C
            assert (layer.weight[f, c] != 0).sum() == (9 if full else 1)
            assert layer.weight[f, c, 1, 1] != 0
    assert_equals_conv2d(layer, image())


def test_defaults_are_four_parts_blocked() -> None:
    layer = HetConv2d(16, 32, 3)
    assert layer.support == hk.Support.het(16, 32, 3, p=4, order="blocked")
    assert layer.live_parameters() == 32 * (9 * 4 + 12) + 32
    assert "support=het(p=4, blocked)" in repr(layer)


def test_p_equal_to_c_is_depthwise_plus_pointwise() -> None:
    layer = HetConv2d(F, F, 3, padding=1, bias=False, p=F)
    depthwise = nn.Conv2d(F, F, 3, padding=1, groups=F, bias=False)
    pointwise = nn.Conv2d(F, F, 1, bias=False)
    with torch.no_grad():
        depthwise.weight.copy_(layer.weight.diagonal().permute(2, 0, 1)[:, None])
        pointwise.weight.copy_(layer.weight[:, :, 1:2, 1:2])
        # The centre of a filter's own channel is in both; it counts once.
        pointwise.weight.diagonal().zero_()
    x = image(2, F, 9, 7)
    torch.testing.assert_close(layer(x), depthwise(x) + pointwise(x))


@pytest.mark.parametrize(
    ("kernel", "keywords", "message"),
    [
        (3, {"p": 0}, "p of a HetConv: received 0, expected an integer from 1 to C=12"),
        (3, {"p": 13}, "received 13, expected an integer from 1 to C=12"),
        (3, {"p": 2.0}, "received 2.0"),
        (3, {"order": "random"}, "received 'random', expected 'blocked' or 'interleaved'"),
        (2, {}, r"received \(2, 2\), expected odd sizes"),
        ((3, 4), {}, r"received \(3, 4\), expected odd sizes"),
    ],
    ids=["p-0", "p-over-C", "p-float", "order", "even", "half-even"],
)
def test_refusals(kernel: Any, keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(SupportError, match=message):
        HetConv2d(C, F, kernel, **keywords)
    with pytest.raises(SupportError, match=message):
        HetConv2d.from_conv2d(nn.Conv2d(C, F, kernel), **keywords)


def test_from_conv2d_projects() -> None:
    conv = nn.Conv2d(C, F, 3, stride=2, padding=1)
    layer = HetConv2d.from_conv2d(conv, p=3, order="interleaved", backend="vendor")
    mask = torch.tensor(hk.Support.het(C, F, 3, 3, "interleaved").mask)
    assert torch.equal(layer.weight, conv.weight * mask)
    assert (layer.p, layer.order, layer.backend) == (3, "interleaved", "vendor")
    assert_equals_conv2d(layer, image())
    with pytest.raises(InputTypeError, match="received Linear"):
        HetConv2d.from_conv2d(nn.Linear(C, F))  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="fold_het"):
        HetConv2d.from_conv2d(nn.Conv2d(C, F, 3, groups=2))


# Folding ------------------------------------------------------------------------------------------


def pair(
    groups: int = 4, kernel: Any = 3, biases: tuple[bool, bool] = (True, True), **kw: Any
) -> tuple[nn.Conv2d, nn.Conv2d]:
    """Builds the grouped and the pointwise half of a public HetConv."""
    shared = {name: kw[name] for name in ("stride", "device", "dtype") if name in kw}
    return (
        nn.Conv2d(C, F, kernel, groups=groups, bias=biases[0], **{"padding": 1, **kw}),
        nn.Conv2d(C, F, 1, bias=biases[1], **shared),
    )


FOLDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one-group": {"groups": 1},
    "two-groups": {"groups": 2},
    "stride": {"stride": 2},
    "stride-pair": {"stride": (1, 2)},
    "dilation": {"dilation": 2, "padding": 2},
    "rectangular": {"kernel": (3, 5), "padding": (1, 2)},
    "same": {"padding": "same"},
    "same-dilated": {"padding": "same", "dilation": (2, 3)},
    "no-bias": {"biases": (False, False)},
    "grouped-bias": {"biases": (True, False)},
    "pointwise-bias": {"biases": (False, True)},
}


@pytest.mark.parametrize("keywords", FOLDS.values(), ids=FOLDS.keys())
def test_fold_equals_the_sum(keywords: dict[str, Any]) -> None:
    grouped, pointwise = (conv.double() for conv in pair(**keywords))
    x = image().double()
    layer = fold_het(grouped, pointwise)
    assert isinstance(layer, HetConv2d)
    assert (layer.p, layer.order) == (keywords.get("groups", 4), "blocked")
    torch.testing.assert_close(layer(x), grouped(x) + pointwise(x), rtol=1e-12, atol=1e-12)
    # In-block 1×1 weights are no longer written twice.
    before = grouped.weight.numel() + pointwise.weight.numel()
    assert layer.support.live == before - F * C // layer.p


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fold_keeps_dtype_mode_and_flags(dtype: torch.dtype) -> None:
    grouped, pointwise = pair(dtype=dtype)
    grouped.requires_grad_(False).eval()
    layer = fold_het(grouped, pointwise, backend="reference")
    assert {(p.dtype, p.requires_grad) for p in layer.parameters()} == {(dtype, False)}
    assert (layer.training, layer.backend) == (False, "reference")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g, w: (g, nn.Conv2d(C, F, 3)), "kernel sizes"),
        (lambda g, w: (nn.Conv2d(C, F, 4, groups=4, padding=1), w), "kernel sizes"),
        (lambda g, w: (g, nn.Conv2d(C, F + 1, 1)), "channels"),
        (lambda g, w: (g, nn.Conv2d(C, F, 1, groups=2)), "groups"),
        (lambda g, w: (g, nn.Conv2d(C, F, 1, stride=2)), "strides"),
        (lambda g, w: (nn.Conv2d(C, F, 3, groups=4), w), "paddings"),
        (lambda g, w: (nn.Conv2d(C, F, 3, groups=4, padding="valid"), w), "paddings"),
        (lambda g, w: (g, nn.Conv2d(C, F, 1, padding=1)), "paddings"),
        (
            lambda g, w: (nn.Conv2d(C, F, 3, groups=4, padding=1, padding_mode="reflect"), w),
            "padding modes",
        ),
        (lambda g, w: (g, w.double()), "dtypes and devices"),
        (lambda g, w: (g, w.to("meta")), "dtypes and devices"),
    ],
    ids=[
        *("pointwise-kernel", "even-kernel", "channels", "pointwise-groups", "strides"),
        *("no-padding", "valid", "pointwise-padding", "padding-mode", "dtypes", "devices"),
    ],
)
def test_fold_refuses(change: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=rf"no HetConv \({message}\): received Conv2d.* and "):
        fold_het(*change(*pair()))


def test_fold_refuses_what_is_no_conv2d() -> None:
    grouped, pointwise = pair()
    with pytest.raises(InputTypeError, match="received Identity, expected"):
        fold_het(grouped, nn.Identity())  # type: ignore[arg-type]
    with pytest.raises(InputTypeError, match="received HetConv2d, expected"):
        fold_het(HetConv2d(C, F, 3), pointwise)  # type: ignore[arg-type]


def test_folding_a_trained_network_keeps_its_output() -> None:
    class Public(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.grouped, self.pointwise = pair()

        def forward(self, x: Tensor) -> Tensor:
            return self.grouped(x) + self.pointwise(x)

    model = nn.Sequential(Public(), nn.BatchNorm2d(F), nn.ReLU())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(2):
        model(image(seed=step)).square().mean().backward()
        optimizer.step()
    model.eval()
    folded = nn.Sequential(fold_het(model[0].grouped, model[0].pointwise), *model[1:]).eval()
    torch.testing.assert_close(folded(image()), model(image()))


def test_orders_agree_up_to_a_permutation() -> None:
    """A network trained in one order runs in the other with its channels permuted."""
    p, channels, filters = 4, 12, 8
    paper = HetConv2d(channels, filters, 3, padding=1, p=p, order="interleaved")
    by_residue_c = np.argsort(np.arange(channels) % p, kind="stable")
    by_residue_f = np.argsort(np.arange(filters) % p, kind="stable")
    assert paper.support.permute(by_residue_f, by_residue_c) == hk.Support.het(
        channels, filters, 3, p
    )
    blocked = HetConv2d.from_conv2d(
        _permuted(paper.to_conv2d(), by_residue_f, by_residue_c), p=p, order="blocked"
    )
    x = image(2, channels, 9, 7)
    torch.testing.assert_close(blocked(x[:, by_residue_c]), paper(x)[:, by_residue_f])


def _permuted(conv: nn.Conv2d, filters: np.ndarray, channels: np.ndarray) -> nn.Conv2d:
    assert conv.bias is not None
    with torch.no_grad():
        conv.weight.copy_(conv.weight[filters][:, channels])
        conv.bias.copy_(conv.bias[filters])
    return conv


def test_a_subclass_stays_itself() -> None:
    class Mine(HetConv2d):
        pass

    assert type(Mine.from_conv2d(nn.Conv2d(C, F, 3))) is Mine
    assert isinstance(HetConv2d(C, F, 3), SupportConv2d)


# The method ------------------------------------------------------------------------------------


def test_projection_keeps_the_weights_that_hetconv_has() -> None:
    model = tiny()
    report = run(Het(p=2, epochs=0), model)
    layer, support = report.model[3], Support.het(6, 8, 3, 2)
    assert layer.support == support
    expected = model[3].weight.detach() * torch.tensor(support.mask)
    assert torch.equal(layer.weight.detach(), expected)
    assert report.layers[1].macs[1] == 4 * 36 * 8 * (9 * 3 + 3)


def test_from_scratch_begins_anew_with_the_live_fan_in() -> None:
    model = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1))
    settings = {"example": torch.randn(1, 64, 4, 4), "eval_data": None}
    layer = run(Het(p=64, scratch=True, epochs=0), model, **settings).model[0]
    weight = layer.weight.detach()
    live = weight[torch.tensor(layer.support.mask)]
    # Uniform within 1/sqrt(live fan-in): 9 + 63 weights a filter.
    assert 0.95 / 72**0.5 < live.abs().max() <= 1 / 72**0.5
    assert not torch.equal(live, model[0].weight.detach()[torch.tensor(layer.support.mask)])


def test_a_checkpoint_of_the_method_belongs_to_its_order() -> None:
    report = run(Het(p=2, order="interleaved", epochs=0))
    assert report.model[3].support == Support.het(6, 8, 3, 2, "interleaved")
    notes = {row.name: row.note for row in report.layers}
    assert "fully connected" in notes["8"]


def test_the_method_killed_and_resumed(tmp_path: Path) -> None:
    check_kills(Het(p=2, scratch=True, epochs=3), tmp_path, seed=7)
