# SPDX-License-Identifier: Apache-2.0
"""What is changed in place through a view: seen, computed right, and made smaller."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F_
from torch import Tensor, nn

import hetconv_kernels as hk
from hetconv_kernels.graph.alias import after, is_after
from hetconv_kernels.graph.channels import Channels
from hetconv_kernels.graph.constants import constants
from hetconv_kernels.graph.trace import trace

DEAD = (1, 3, 5, 6)


class Net(nn.Module):
    """Eight filters, four of them dead with a bias, what is under test, and a reader."""

    def __init__(self, middle: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.middle = middle
        with torch.no_grad():
            self.conv.weight[list(DEAD)] = 0
            self.conv.bias.normal_()
            self.last.bias.normal_()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.conv(x)))


def slice_(y):
    y[:, :4].mul_(2)
    return y


def whole_view(y):
    y.view(y.size(0), -1).relu_()
    return y


def part(y):
    y.chunk(2, 1)[0].add_(1)
    return y


def parts_swapped(y):
    first, second = y.chunk(2, 1)
    first.add_(1)
    second.mul_(3)
    return torch.cat([second, first], 1)


def view_made_before(y):
    view = y[:, :4]
    y.mul_(2)
    return torch.cat([view, y[:, 4:]], 1)


def view_of_a_view(y):
    view = y[:, :6]
    inner = view[:, 1:3]
    inner.mul_(5)
    view.add_(1)
    return y * 1


def parts_then_the_whole(y):
    parts = y.split([3, 5], 1)
    parts[0].mul_(2)
    y.add_(1)
    return torch.cat([parts[1], parts[0]], 1)


def function(y):
    F_.relu(y[:, 2:6], inplace=True)
    return y


def copied_before(y):
    z = y.clone()
    y[:, :4].sub_(3)
    return torch.cat([y[:, :4], z[:, 4:]], 1)


def two_views(y):
    y[:, 4:].mul_(y[:, :4])
    return y


def from_another_view(y):
    y[:, :4].copy_(y[:, 4:])
    return y


def zeros(y):
    y[:, 2:].zero_()
    return y


def activation_module(y):
    nn.ReLU(inplace=True)(y[:, :5])
    return y


def rows(y):
    y[:, :, 1:].mul_(2)
    return y


def images(y):
    y[:1].add_(2)
    return y


def every_other(y):
    y[:, ::2].mul_(2)
    return y


def moved(y):
    y.permute(0, 2, 3, 1)[..., :3].mul_(2)
    return y


def unbound(y):
    y.unbind(1)[1].add_(2)
    return y


def features(y):
    y.flatten(1)[:, 3:40].sub_(2)
    return y


def strided(y):
    y.as_strided((2, 4), (4, 1)).add_(1)
    return y


def indexed(y):
    y.select(1, 3).fill_(7)
    return y


# What stays of the filters: None is not said here, it has to be right only.
MIDDLES: dict[Callable[[Tensor], Tensor], int | None] = {
    slice_: 4, whole_view: 4, part: None, parts_swapped: None, view_made_before: 4,
    view_of_a_view: 4, parts_then_the_whole: None, function: 4, copied_before: 4,
    two_views: None, from_another_view: None, zeros: None, activation_module: 4, rows: None,
    images: None, every_other: None, moved: None, unbound: None, features: None, strided: None,
    indexed: None,
}  # fmt: skip


@pytest.mark.parametrize("train", [False, True], ids=["compact", "optimize"])
@pytest.mark.parametrize(("middle", "filters"), MIDDLES.items(), ids=[m.__name__ for m in MIDDLES])
@torch.no_grad()
def test_networks_that_change_views_become_smaller_and_stay_right(
    middle: Callable[[Tensor], Tensor], filters: int | None, train: bool
) -> None:
    model, x = Net(middle).eval(), torch.randn(2, 3, 6, 6)
    report = (hk.optimize if train else hk.compact)(model, x)  # both compare the outputs
    y = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(report.model(y), model(y))
    if not train:
        convs = [m for m in report.model.modules() if isinstance(m, nn.Conv2d)]
        assert filters in (None, convs[0].out_channels)


@pytest.mark.parametrize("middle", MIDDLES, ids=lambda m: m.__name__)
@torch.no_grad()
def test_what_is_said_to_be_constant_is(middle: Callable[[Tensor], Tensor]) -> None:
    """At the reader, which sees the tensor after all changes, whatever the input."""
    model = Net(middle).eval()
    traced = trace(model, torch.randn(2, 3, 6, 6))
    channels = Channels(traced)
    known = constants(channels)
    (last,) = (n for n in channels.layers if n.target == "last")
    constant = known[channels.reader(last)]
    seen: list[Tensor] = []
    model.last.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    for _ in range(3):
        model(torch.randn(2, 3, 6, 6))
        for channel in constant.known.nonzero()[0]:
            value = torch.full((2, 6, 6), constant.value[channel])
            torch.testing.assert_close(seen[-1][:, channel], value.float())


@pytest.mark.parametrize("middle", [slice_, whole_view, function], ids=lambda m: m.__name__)
@torch.no_grad()
def test_constants_are_found_through_changes(middle: Callable[[Tensor], Tensor]) -> None:
    traced = trace(Net(middle).eval(), torch.randn(2, 3, 6, 6))
    channels = Channels(traced)
    (last,) = (n for n in channels.layers if n.target == "last")
    found = constants(channels)[channels.reader(last)].known.nonzero()[0].tolist()
    assert found == list(DEAD)


def test_the_example_of_the_module() -> None:
    traced = trace(Net(slice_).eval(), torch.randn(2, 3, 6, 6))
    reader = next(n for n in traced.graph.nodes if n.target == "last")
    (node,) = reader.args
    assert is_after(node)
    tensor, change, view = node.args
    assert (tensor.target, change.target, view.name) == ("conv", "mul_", "getitem")
    assert traced.code.count("after") >= 1
    y = torch.randn(2)
    assert after(y, 1, 2) is y


def test_a_network_that_changes_nothing_says_nothing() -> None:
    traced = trace(Net(lambda y: torch.relu(y[:, :8])).eval(), torch.randn(2, 3, 6, 6))
    assert not any(is_after(n) for n in traced.graph.nodes)


@torch.no_grad()
def test_such_a_network_is_saved_and_loaded(tmp_path) -> None:
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    model, x = Net(view_of_a_view).eval(), torch.randn(2, 3, 6, 6)
    fast = hk.optimize(model, x).model
    hk.save(fast, tmp_path / "net")
    torch.testing.assert_close(hk.load(tmp_path / "net")(x), model(x))


@torch.no_grad()
def test_networks_made_in_inference_mode_are_traced_too() -> None:
    with torch.inference_mode():
        model, x = Net(slice_).eval(), torch.randn(2, 3, 6, 6)
        report = hk.compact(model, x)
        torch.testing.assert_close(report.model(x), model(x))
    assert report.shrunk


@torch.no_grad()
def test_the_exported_way_sees_changes_too() -> None:
    class Asks(Net):
        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x) if x.shape[1] == 3 else x  # torch.fx cannot tell
            y[:, :4].mul_(2)
            return self.last(y)

    model, x = Asks(lambda y: y).eval(), torch.randn(2, 3, 6, 6)
    report = hk.compact(copy.deepcopy(model), x)
    torch.testing.assert_close(report.model(x), model(x))
    assert report.shrunk
