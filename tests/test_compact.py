# SPDX-License-Identifier: Apache-2.0
"""compact: equal to the masked network, smaller where it can be, and honest where it cannot."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from networks import NETWORKS, Branches, assert_same, interleaved, live_norms, network
from torch import nn

import hetconv_kernels as hk
from hetconv_kernels import stats
from hetconv_kernels.errors import ArgumentError, InputTypeError, TraceError, VerificationError
from hetconv_kernels.nn import SelfGroupConv2d, SupportConv2d


@pytest.mark.parametrize("name", NETWORKS)
def test_equals_the_masked_network_and_is_smaller(name: str) -> None:
    model, x = network(name)
    state = copy.deepcopy(model.state_dict())
    report = hk.compact(model, x)
    assert_same(model, report.model, x)
    assert stats.live_parameters(report.model) < stats.live_parameters(model)
    assert not any(module.training for module in report.model.modules())
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key


@pytest.mark.parametrize("name", ["resnet20", "dncnn", "mobilenet", "branches"])
def test_layers_with_a_support_shrink_too(name: str) -> None:
    model, x = network(name)
    model = interleaved(model)
    report = hk.compact(model, x)
    assert_same(model, report.model, x)
    assert stats.live_parameters(report.model) < stats.live_parameters(model)


def test_a_network_without_dead_channels_stays() -> None:
    model, x = network("branches", share=0)
    report = hk.compact(model, x)
    assert report.shrunk == report.stayed == ()
    assert type(report.model) is Branches
    assert str(report).startswith("0 layers are smaller")


@pytest.mark.parametrize("parameters", [1, 4])
def test_through_a_prelu_that_is_the_same_for_all_channels(parameters: int) -> None:
    model = chain(0, -3.0)
    model[1] = nn.PReLU(parameters, init=0.3).eval()
    x = torch.randn(2, 2, 6, 6)
    report = hk.compact(model, x)
    assert_same(model, report.model, x)
    assert report.model[2].in_channels == (2 if parameters == 1 else 4)


def chain(padding: int, bias: float, bn: bool = False) -> nn.Sequential:
    """Two convolutions; filters 1 and 2 of the first have no weights."""
    torch.manual_seed(0)
    first, second = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 3, 3, padding=padding)
    first.weight.data[1:3] = 0
    first.bias.data[1:3] = bias * torch.tensor([1.0, 2.0])
    norm = [nn.BatchNorm2d(4)] if bn else []
    model = nn.Sequential(first, *norm, nn.ReLU(), second).eval()
    live_norms(model)
    return model


@pytest.mark.parametrize(
    ("padding", "bias", "filters"),
    [(1, 0.0, 2), (1, -1.0, 2), (0, 1.0, 2), (1, 1.0, 3)],
    ids=["zero", "negative-before-relu", "folded-into-the-bias", "one-stands-for-both"],
)
def test_constants_by_hand(padding: int, bias: float, filters: int) -> None:
    model, x = chain(padding, bias), torch.randn(2, 2, 5, 5)
    report = hk.compact(model, x)
    assert type(report.model) is nn.Sequential
    first, second = report.model[0], report.model[2]
    assert (first.out_channels, second.in_channels) == (filters, filters)
    assert_same(model, report.model, x)
    if (padding, bias) == (0, 1.0):  # 1 on channel 1 and 2 on channel 2, nine taps each
        extra = model[2].weight[:, 1].sum((1, 2)) + 2 * model[2].weight[:, 2].sum((1, 2))
        torch.testing.assert_close(second.bias, model[2].bias + extra)
    if filters == 3:  # channel 2, twice as large, stays; half of the weights on 1 are added
        merged = model[2].weight[:, 2] + model[2].weight[:, 1] / 2
        torch.testing.assert_close(second.weight[:, 1], merged)
        assert "its zero padding makes them differ at the border" in str(report)


def test_a_constant_at_the_border_is_never_folded_away() -> None:
    """Only one dead filter: nothing can stand for it, so it has to stay."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 3, padding=1)).eval()
    model[0].weight.data[1] = 0
    report = hk.compact(model, torch.randn(1, 2, 4, 4))
    assert not report.shrunk
    assert report.stayed[0] == (
        "filters of 0",
        1,
        "what they are added to or what reads them is not dead",
    )
    assert report.stayed[1].name == "inputs of 1"


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_other_paddings_have_no_border(mode: str) -> None:
    model = chain(0, 1.0)
    old = model[2]
    model[2] = nn.Conv2d(4, 3, 3, padding=1, padding_mode=mode)
    model[2].load_state_dict(old.state_dict())
    x = torch.randn(2, 2, 5, 5)
    report = hk.compact(model.eval(), x)
    assert report.model[0].out_channels == 2
    assert_same(model, report.model, x)


def test_a_channel_that_nobody_reads_goes_though_its_filter_lives() -> None:
    model = chain(1, 1.0, bn=True)
    model[0].weight.data.normal_()
    model[3].weight.data[:, 2] = 0
    report = hk.compact(model, torch.randn(2, 2, 5, 5))
    assert [tuple(s[:1]) + s.filters + s.channels for s in report.shrunk] == [
        ("0", 4, 3, 2, 2),
        ("3", 3, 3, 4, 3),
    ]
    assert report.model[1].num_features == 3


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = (
            nn.Conv2d(3, 4, 1, bias=False),
            nn.Conv2d(4, 4, 3, padding=1, bias=False),
            nn.Conv2d(4, 2, 1, bias=False),
        )

    def forward(self, x):
        y = self.stem(x)
        return self.b(self.a(y) + y)


def test_residual_channels_go_together_or_not_at_all() -> None:
    torch.manual_seed(0)
    model, x = Residual().eval(), torch.randn(2, 3, 5, 5)
    model.a.weight.data[:2] = 0  # both operands are dead in channel 0, only one in channel 1
    model.stem.weight.data[0] = 0
    report = hk.compact(model, x)
    assert report.model.stem.out_channels == report.model.a.out_channels == 3
    assert report.model.b.in_channels == 3
    assert type(report.model) is Residual
    assert_same(model, report.model, x)


def test_uneven_groups_keep_a_support_even_ones_stay_groups() -> None:
    torch.manual_seed(0)

    def build(dead: list[int]) -> nn.Sequential:
        model = nn.Sequential(
            nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.Conv2d(8, 3, 1)
        ).eval()
        for place in (0, 1):
            model[place].weight.data[dead], model[place].bias.data[dead] = 0, 0
        return model

    x = torch.randn(2, 3, 5, 5)
    even, uneven = build([1, 6]), build([1])
    found = hk.compact(even, x).model
    assert (type(found[1]), found[1].groups, found[1].in_channels) == (nn.Conv2d, 2, 6)
    assert_same(even, found, x)
    found = hk.compact(uneven, x).model
    assert type(found[1]) is SupportConv2d
    assert found[1].support.mask[:, :, 0, 0].sum() == 3 * 3 + 4 * 4
    assert_same(uneven, found, x)


@pytest.mark.parametrize(
    ("dead", "width"), [((0, 1), 4), ((0, 1, 2), 4), ((0, 2), 6), ((2, 3, 4, 5), 2)], ids=str
)
def test_group_normalisation_loses_whole_groups(dead: tuple[int, ...], width: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 1), nn.GroupNorm(3, 6), nn.ReLU(), nn.Conv2d(6, 3, 3, padding=1)
    ).eval()
    with torch.no_grad():
        nn.init.normal_(model[1].weight)
        nn.init.normal_(model[1].bias)
        model[0].weight[list(dead)] = 0
        model[3].weight[:, list(dead)] = 0
    x = torch.randn(2, 2, 5, 5)
    report = hk.compact(model, x)
    assert_same(model, report.model, x)
    assert report.model[0].out_channels == report.model[1].num_channels == width
    assert report.model[1].num_groups == width // 2
    if width == 6:
        return
    partly = width == 4 and len(dead) == 3
    assert isinstance(report.model[3], nn.Conv2d)
    assert bool(report.model[3].weight.eq(0).all((0, 2, 3)).any()) is partly


def test_self_grouped_layers_lose_the_channels_that_no_group_reads() -> None:
    torch.manual_seed(0)
    keep = np.zeros((2, 8), bool)
    keep[0, :4], keep[1, 2:6] = True, True  # channels 6 and 7 are read by none
    conv = nn.Conv2d(8, 6, 3, padding=1)
    layer = SelfGroupConv2d.from_groups(conv, [0, 1, 0, 1, 0, 1], keep)
    model, x = nn.Sequential(nn.Conv2d(3, 8, 1), layer).eval(), torch.randn(2, 3, 5, 5)
    report = hk.compact(model, x)
    assert report.model[0].out_channels == 6
    assert type(report.model[1]) is SupportConv2d
    assert report.model[1].support.live == layer.support.live
    assert_same(model, report.model, x)


def test_an_empty_network_keeps_one_channel_of_everything() -> None:
    model, x = network("lenet5", share=2.0)
    report = hk.compact(model, x)
    assert report.model.features[0].out_channels == 1
    assert_same(model, report.model, x)


def test_flattened_channels_count_their_pixels() -> None:
    model, x = network("lenet5")
    report = hk.compact(model, x)
    conv, linear = report.model.features[2], report.model.classifier[1]
    assert linear.in_features == conv.out_channels * 16 < 800


class Shared(nn.Module):
    def __init__(self, build):
        super().__init__()
        self.first, self.twice, self.last = nn.Conv2d(3, 4, 1), build(), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        return self.last(self.twice(self.twice(self.first(x))))


@pytest.mark.parametrize(
    "build",
    [lambda: nn.Conv2d(4, 4, 3, padding=1), lambda: nn.GroupNorm(2, 4), lambda: nn.Softmax(1)],
    ids=["called-twice", "group-norm", "softmax"],
)
def test_what_mixes_channels_or_is_shared_stays(build) -> None:
    model, x = Shared(build).eval(), torch.randn(2, 3, 5, 5)
    model.first.weight.data[1], model.first.bias.data[1] = 0, 0
    report = hk.compact(model, x)
    assert not report.shrunk
    assert "called 2 times" in str(report) or "may mix its channels" in str(report)


def test_hooks_and_tied_weights_stay() -> None:
    model, x = chain(1, 0.0), torch.randn(2, 2, 5, 5)
    model[0].register_forward_hook(lambda *_: None)
    report = hk.compact(model, x)
    assert not report.shrunk
    assert "it has hooks" in str(report)


def test_the_result_trains() -> None:
    model, x = network("resnet20")
    smaller = hk.compact(model, x).model.train()
    smaller(x).square().mean().backward()
    assert all(p.grad is not None for p in smaller.parameters())


def test_traced_by_export() -> None:
    class Choosy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = chain(1, 0.0, bn=True)

        def forward(self, x):
            return self.inner(x if x.shape[2] > 3 else x * 2)

    model, x = Choosy().eval(), torch.randn(2, 2, 5, 5)
    model.inner[1].bias.data -= 9
    report = hk.compact(model, x)
    assert {s.name for s in report.shrunk} == {"inner.0", "inner.3"}
    assert_same(model, report.model, x)


def test_refusals() -> None:
    conv = nn.Conv2d(2, 2, 1)
    x = torch.randn(1, 2, 3, 3)
    with pytest.raises(ArgumentError, match=r"training mode at ''.*Call model.eval\(\) first"):
        hk.compact(conv, x)
    with pytest.raises(InputTypeError, match="model: received function"):
        hk.compact(lambda x: x, x)
    with pytest.raises(InputTypeError, match="example: received str"):
        hk.compact(conv.eval(), "image")


def test_a_trace_that_lies_is_found() -> None:
    class Stateful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.calls = chain(1, 0.0), 0

        def forward(self, x):
            self.calls += 1
            return self.inner(x) * self.calls

    with pytest.raises(VerificationError, match="compact changes the outputs"):
        hk.compact(Stateful().eval(), torch.randn(1, 2, 4, 4))


def test_branches_on_values_are_no_graph() -> None:
    class Fork(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(TraceError, match=r"torch.fx: TraceError.*torch.export: "):
        hk.compact(Fork().eval(), torch.randn(1, 2, 4, 4))


def test_float64_is_equal_to_float64_precision() -> None:
    model, x = network("branches")
    model, x = model.double(), x.double()
    with torch.no_grad():
        expected = model(x)
        error = (hk.compact(model, x).model(x) - expected).abs().max()
    assert error <= 1e-13 * expected.abs().max()
