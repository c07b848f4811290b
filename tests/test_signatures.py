# SPDX-License-Identifier: Apache-2.0
"""What goes into a network and what comes out of it stays what it was, or the report says so."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn

import hetconv_kernels as hk
from hetconv_kernels.errors import ArgumentError, TraceError
from hetconv_kernels.graph.trace import check_network, trace


class Two(nn.Module):
    """Gives its features in a structure."""

    def __init__(self, structure: Any) -> None:
        super().__init__()
        self.conv, self.head, self.structure = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), structure
        with torch.no_grad():
            self.conv.weight[2] = 0
            self.conv.bias[2] = 0

    def forward(self, x):
        y = self.conv(x).relu()
        return self.structure(self.head(y), y.mean())


def ordered(a, b):
    return OrderedDict(out=a, aux=b)


STRUCTURES = {
    "ordered": ordered,
    "plain": lambda a, b: {"out": a, "aux": b},
    "nested": lambda a, b: (a, OrderedDict(z=b, inner=OrderedDict(b=a)), [b]),
    "in-a-dict": lambda a, b: {"x": OrderedDict(b=a, a=b)},
    "tuple": lambda a, b: (a, [b]),
}


def kinds(value: Any) -> Any:
    if isinstance(value, dict):
        return type(value), [(key, kinds(v)) for key, v in value.items()]
    if isinstance(value, tuple | list):
        return type(value), [kinds(v) for v in value]
    return "tensor"


@pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES.keys())
@torch.no_grad()
def test_outputs_keep_their_classes_and_order(structure: Any) -> None:
    model, x = Two(structure).eval(), torch.randn(2, 3, 6, 6)
    for change in (hk.compact, hk.optimize):
        fast = change(model, x).model
        assert kinds(fast(x)) == kinds(model(x))
        torch.testing.assert_close(fast(x), model(x))


@torch.no_grad()
def test_an_ordered_output_is_saved_and_loaded(tmp_path) -> None:
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    model, x = Two(ordered).eval(), torch.randn(2, 3, 6, 6)
    hk.save(hk.optimize(model, x).model, tmp_path / "net")
    assert kinds(hk.load(tmp_path / "net")(x)) == kinds(model(x))


class Output(dict):
    pass


@torch.no_grad()
def test_an_output_of_a_class_that_a_graph_cannot_give_keeps_the_network() -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())

        def forward(self, x):
            return Output(out=self.body(x))

    model, x = Whole().eval(), torch.randn(2, 3, 6, 6)
    with pytest.raises(TraceError):
        trace(model, x)
    report = hk.optimize(model, x)
    assert type(report.model(x)) is Output
    assert [part.name for part in report.parts] == ["body"]


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x, scale=None, power=1.0):
        y = self.conv(x)
        return y if scale is None else y * scale


@torch.no_grad()
def test_optional_arguments_that_are_fixed_are_reported() -> None:
    model, x = Optional().eval(), torch.randn(2, 3, 6, 6)
    report = hk.optimize(model, x)
    assert report.fixed == ("scale", "power")
    assert "fixed to their defaults, for the example gives no others: scale, power" in str(report)
    torch.testing.assert_close(report.model(x), model(x))
    with pytest.raises(TypeError):
        report.model(x, torch.tensor(2.0), 3.0, 4.0)
    scale = torch.tensor(2.0)
    given = hk.optimize(model, (x, scale))
    assert given.fixed == ("power",)
    torch.testing.assert_close(given.model(x, scale), model(x, scale))
    assert hk.optimize(nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), x).fixed == ()


@torch.no_grad()
def test_optional_arguments_that_8_bits_fix_are_reported() -> None:
    model, x = Optional().eval(), torch.randn(2, 3, 6, 6)
    report = hk.quantize(model, [x])
    assert report.fixed == ("scale", "power")
    assert "the batches give no others: scale, power" in str(report)
    assert report.to_dict()["fixed"] == ["scale", "power"]
    with pytest.raises(TypeError):
        report.model(x, torch.tensor(2.0))
    assert hk.quantize(nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), [x]).fixed == ()


@torch.no_grad()
def test_parts_that_are_called_with_keywords_keep_their_arguments() -> None:
    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

        def forward(self, x, scale=1.0):
            return self.norm(self.conv(x)) * scale

    class Forks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.other = Body(), Body()

        def forward(self, x):
            x = self.body(x, scale=3.0)
            return self.other(x) if x.sum() > 1e9 else self.other(x) + 1

    model, x = Forks().eval(), torch.randn(2, 3, 6, 6)
    report = hk.optimize(model, x)
    torch.testing.assert_close(report.model(x), model(x))
    assert [part.name for part in report.parts] == ["other"]
    assert ("body", "it is called with keyword arguments") in list(report.untraced)


@torch.no_grad()
def test_a_part_whose_mode_means_nothing_may_be_in_training_mode() -> None:
    """As torch builds quantised layers, and users new heads."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    model.append(nn.Conv2d(4, 2, 1))
    assert model[3].training
    check_network(model)
    report = hk.optimize(model, torch.randn(1, 3, 6, 6))
    assert not any(m.training for m in report.model.modules())
    for part in (nn.BatchNorm2d(2), nn.Dropout(), nn.InstanceNorm2d(2), nn.RReLU(), Two(ordered)):
        with pytest.raises(
            ArgumentError, match=r"training mode at '4' \(.*once more after putting"
        ):
            check_network(_with(model, part))
    with pytest.raises(ArgumentError, match="training mode at ''"):
        check_network(nn.Sequential(nn.Conv2d(3, 3, 1)))


def _with(model: nn.Sequential, part: nn.Module) -> nn.Sequential:
    whole = nn.Sequential(*model, nn.Identity()).eval()
    whole[4] = part.train()
    return whole
