# SPDX-License-Identifier: Apache-2.0
"""The largest parts of a network that can be traced, and networks that are made smaller by them."""

from __future__ import annotations

import copy

import pytest
import torch
from detecting import Detector, FrozenBatchNorm2d, detector
from torch import Tensor, nn

import hetconv_kernels as hk
from hetconv_kernels.compression import WeakSubnetwork, measure
from hetconv_kernels.compression.interfaces import Reader, find_interfaces
from hetconv_kernels.errors import ArgumentError, HetconvError, VerificationError
from hetconv_kernels.graph import compact as compacting
from hetconv_kernels.graph.parts import same_around, traced_parts

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def same(one: nn.Module, two: nn.Module) -> bool:
    with torch.no_grad():
        pairs = list(zip(one(X), two(X), strict=True))
    return all(a.shape == b.shape and torch.allclose(a, b, atol=1e-5) for a, b in pairs)


def test_the_parts_of_a_detector() -> None:
    found = traced_parts(detector(), (X,))
    assert {part.name: len(part.calls) for part in found.parts} == {"backbone": 1, "towers.0": 2}
    assert set(found.untraced) == {""}
    assert found.whole is None
    assert found.part_of("towers.0.2").name == "towers.0"
    assert found.part_of("head") is None
    assert "'the network' cannot be traced" in found.why_not("head")


def test_what_can_be_traced_is_one_part() -> None:
    found = traced_parts(detector().backbone, (X,))
    assert [part.name for part in found.parts] == [""]
    assert not found.untraced


def test_the_interfaces_inside_of_parts() -> None:
    model = detector()
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    found = find_interfaces(model, layers, X)
    assert found.readers == {
        "backbone.0": (Reader("backbone.3", 1),),
        "towers.0.0": (Reader("towers.0.2", 1),),
    }
    assert "channel of the output (of the part 'backbone')" in found.fixed["backbone.3"]
    assert "Methods that keep filters work without a graph" in found.fixed["head"]


class Peeking(Detector):
    """Its own code calls a layer of the backbone too."""

    def forward(self, x: Tensor) -> list[Tensor]:
        self.backbone[0](x)
        return super().forward(x)


class Tied(Detector):
    """Another layer has the weight of the backbone's first one."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Conv2d(3, 8, 3, padding=1)
        self.other.weight = self.backbone[0].weight


@pytest.mark.parametrize(
    ("kind", "reason"),
    [(Peeking, "called outside of 'backbone' too"), (Tied, "shared with another module")],
)
def test_a_layer_that_is_used_elsewhere_stays(kind: type[Detector], reason: str) -> None:
    model = kind().eval()
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    found = find_interfaces(model, layers, X)
    assert set(found.readers) == {"towers.0.0"}
    assert reason in found.fixed["backbone.0"]


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, FrozenBatchNorm2d])
def test_dead_filters_leave_the_parts(norm: type[nn.Module]) -> None:
    model = detector(norm=norm)
    with torch.no_grad():
        model.backbone[0].weight[2:5] = 0
        model.backbone[0].bias[2:5] = 0
        model.backbone[1].weight[2:5] = 0
        model.backbone[1].bias[2:5] = 0
        model.towers[0][0].weight[:4] = 0
        model.towers[0][0].bias[:4] = 0
    report = hk.compact(model, X)
    assert {row.name: (*row.filters, *row.channels) for row in report.shrunk} == {
        "backbone.0": (8, 5, 3, 3),
        "backbone.3": (6, 6, 8, 5),
        "towers.0.0": (8, 4, 6, 6),
        "towers.0.2": (4, 4, 8, 4),
    }
    assert type(report.model) is Detector
    assert type(report.model.backbone[1]) is norm
    assert len(report.model.backbone[1].running_mean) == 5
    assert same(report.model, model)
    assert report.match is not None
    assert report.match.ok
    assert "the network" in str(report)


def test_a_part_whose_code_counts_channels_stays() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1)

        def forward(self, x: Tensor) -> Tensor:
            one, two = self.first(x).split((4, 4), 1)
            return self.last(torch.cat([one, two], 1))

    model = detector()
    model.backbone = Halves().eval()
    with torch.no_grad():
        model.backbone.first.weight[:2] = 0
        model.backbone.first.bias[:2] = 0
    report = hk.compact(model, X)
    assert not report.shrunk
    assert ("backbone", "its own code says how many channels there are") in report.untraced
    assert same(report.model, model)


def test_code_around_the_parts_that_reads_their_widths_is_found() -> None:
    class Reading(Detector):
        def forward(self, x: Tensor) -> list[Tensor]:
            return [one * self.backbone[0].out_channels for one in super().forward(x)]

    model = Reading().eval()
    with torch.no_grad():
        model.backbone[0].weight[:2] = 0
        model.backbone[0].bias[:2] = 0
    with pytest.raises(VerificationError, match="changes what is around backbone"):
        hk.compact(model, X)


def test_a_part_that_comes_out_wrong_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = detector()
    with torch.no_grad():
        model.towers[0][0].weight[:4] = 0
        model.towers[0][0].bias[:4] = 0

    def refuse(*arguments: object) -> None:
        raise VerificationError("they differ")

    monkeypatch.setattr(compacting, "verify", refuse)
    report = hk.compact(model, X)
    assert not report.shrunk
    assert ("towers.0", "they differ") in report.untraced
    assert report.model.towers[0][0].out_channels == 8


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return torch.stack([one.square().sum() for one in model(batch)]).sum()


def test_a_detector_is_compressed_by_removing_filters() -> None:
    report = hk.compress(
        detector(), WeakSubnetwork(0.5, epochs=1), data=[X], train_step=loss, example=X,
        measure=False, progress=False,
    )  # fmt: skip
    assert report.compacted
    assert isinstance(report.model, Detector)
    assert report.model.backbone[0].out_channels < 8
    assert report.model.towers[0][0].out_channels < 8
    assert report.macs[1] < report.macs[0]


def test_where_no_part_can_be_traced_the_error_names_the_way() -> None:
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return y if float(y.sum()) > 0 else -y

    with pytest.raises(ArgumentError, match=r"cannot be traced.*keep filters work without"):
        hk.compress(Fork(), WeakSubnetwork(0.5), data=[X], train_step=loss, example=X)


# Outputs that turn small differences into large ones -------------------------------------------


class Sawtooth(Detector):
    """Gives digits of its scores that rounding decides."""

    def forward(self, x: Tensor) -> list[Tensor]:
        return [(one * 1e7).remainder(1.0) for one in super().forward(x)]


def sawtooths() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    before = Sawtooth().eval()
    after = copy.deepcopy(before)
    with torch.no_grad():
        after.backbone[0].weight.mul_(1 + 1e-6)
        after.head.weight.mul_(1 + 1e-6)
    return before, after


def test_networks_that_choose_are_compared_by_their_parts() -> None:
    before, after = sawtooths()
    with torch.no_grad():
        assert (
            max(float((a - b).abs().max()) for a, b in zip(before(X), after(X), strict=True)) > 0.1
        )
    assert 0 < measure.difference(before, after, X) < 1e-4


@pytest.mark.parametrize("where", ["backbone.0", "head", "around"])
def test_what_differs_in_a_part_or_around_it_is_found(where: str) -> None:
    before, after = sawtooths()
    if where == "around":
        after.scale = 1.001
    else:
        with torch.no_grad():
            after.get_submodule(where).weight[0].mul_(1.1)
    with pytest.raises(HetconvError, match="differs from its masked dense twin"):
        measure.difference(before, after, X)


def test_the_same_around_parts_is_bit_for_bit() -> None:
    before, after = sawtooths()
    names = ["backbone", "towers.0", "head"]
    assert same_around(before, after, names, (X,))
    assert not same_around(before, after, names[:2], (X,))  # the heads differ


class Choosing(Detector):
    """Chooses otherwise for the least difference from what the backbone once gave."""

    def remember(self) -> Choosing:
        with torch.no_grad():
            self.known = self.backbone(X)
        return self

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = self.backbone(x)
        other = maps.dtype == torch.float32 and not torch.equal(maps, self.known)
        return [maps + self.step if other else maps, *super().forward(x)]


def choosing(step: float = 1.0) -> Choosing:
    torch.manual_seed(0)
    model = Choosing().eval()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 1.5)
    model.step = step
    return model.remember()


def test_an_optimised_network_may_choose_otherwise_by_a_rounding() -> None:
    model = choosing()
    report = hk.optimize(model, X)
    assert [part.name for part in report.parts] == ["backbone", "towers.0"]
    with torch.no_grad():
        own, fast = model(X)[0], report.model(X)[0]
        assert (fast - own).abs().max() > 0.5  # it does
        assert torch.allclose(report.model.backbone(X), model.backbone(X), atol=1e-5)
    assert report.match.ok
    assert report.match.error < 1e-5


def test_what_is_around_optimised_parts_has_to_be_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Reading(Choosing):
        def forward(self, x: Tensor) -> list[Tensor]:
            plain = type(self.backbone) is nn.Sequential
            return [one if plain else one + 1 for one in super().forward(x)]

    model = choosing()
    model.__class__ = Reading
    with pytest.raises(VerificationError, match="optimize changes the outputs"):
        hk.optimize(model, X)
