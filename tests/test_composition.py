# SPDX-License-Identifier: Apache-2.0
"""Compositions: every Support that has one, out of ordinary convolutions that multiply less."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import hetconv_kernels as hk
from hetconv_kernels import export
from hetconv_kernels.composition import MOST_PARTS, ComposedConv2d, compose
from hetconv_kernels.errors import ArgumentError
from hetconv_kernels.nn import FusedConv2d
from hetconv_kernels.problem import make_geometry

C, F = 12, 16


def self_grouped(sizes: tuple[int, ...]) -> hk.Support:
    """Filters dealt out to as many groups as there are sizes, of so many channels each."""
    mask = np.zeros((F, C, 3, 3), dtype=bool)
    draw = np.random.default_rng(7)
    for g, size in enumerate(sizes):
        mask[g :: len(sizes), draw.permutation(C)[:size]] = True
    return hk.Support.from_mask(mask)


SUPPORTS = {
    "het": hk.Support.het(C, F, 3, p=4),
    "het-interleaved": hk.Support.het(C, F, 3, p=4, order="interleaved"),
    "het-uneven": hk.Support.het(C, F, 3, p=5),
    "self-grouped": self_grouped((3, 5, 2)),
    "self-grouped-equal": self_grouped((4, 4, 4, 4)),
    "a-group-without-weights": self_grouped((3, 0)),
}
GEOMETRIES: dict[str, dict[str, Any]] = {
    "same": {"padding": 1},
    "strided": {"stride": 2, "padding": 1},
    "dilated": {"dilation": 2, "padding": 2},
    "uneven-pads": {"padding": (2, 1, 1, 3), "stride": (1, 2)},
}


def layer_of(support: hk.Support, settings: dict[str, Any], act: str = "relu") -> FusedConv2d:
    geometry = make_geometry(
        support, settings.get("stride", 1), settings["padding"], settings.get("dilation", 1)
    )
    draw = torch.Generator().manual_seed(3)
    weight = torch.randn(support.live, generator=draw)
    return FusedConv2d(geometry, weight, torch.randn(F, generator=draw), act, None).eval()


def convolutions(module: nn.Module) -> list[nn.Conv2d]:
    return [m for m in module.modules() if isinstance(m, nn.Conv2d)]


@pytest.mark.parametrize("where", GEOMETRIES)
@pytest.mark.parametrize("kind", SUPPORTS)
def test_a_composition_computes_its_support_and_multiplies_less(kind: str, where: str) -> None:
    support = SUPPORTS[kind]
    layer = layer_of(support, GEOMETRIES[where])
    found = compose(layer._geometry)
    assert found is not None
    assert found.multiplies < support.mask.size
    composed = export.plain(layer, form="composition")
    inner = next(m for m in composed.modules() if isinstance(m, ComposedConv2d))
    weights = sum(conv.weight.numel() for conv in convolutions(inner))
    assert weights == found.multiplies, "what is counted is not what is convolved"
    x = torch.randn(2, C, 9, 11, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        torch.testing.assert_close(composed(x), layer(x), rtol=1e-4, atol=1e-4)


def test_hetconv_is_a_grouped_convolution_and_a_pointwise_one() -> None:
    composed = export.plain(layer_of(SUPPORTS["het"], GEOMETRIES["same"]), form="composition")
    grouped, pointwise = convolutions(composed)
    assert (grouped.groups, grouped.kernel_size) == (4, (3, 3))
    assert (pointwise.groups, pointwise.kernel_size) == (1, (1, 1))
    assert grouped.bias is None, "the bias would be added twice"
    assert pointwise.bias is not None


def test_equal_groups_of_gathered_channels_are_one_convolution() -> None:
    layer = layer_of(SUPPORTS["self-grouped-equal"], GEOMETRIES["same"])
    (one,) = convolutions(export.plain(layer, form="composition"))
    assert one.groups == 4


@pytest.mark.parametrize(
    "support",
    [
        hk.Support.dense(C, F, 3),
        hk.Support.grouped(C, F, 3, 4),
        hk.Support.from_mask(np.random.default_rng(0).random((F, C, 3, 3)) < 0.5),
        hk.Support.het(C, F, 3, p=1),
    ],
    ids=["dense", "grouped", "irregular", "het-of-one-group"],
)
def test_what_no_composition_makes_cheaper_stays_one_convolution(support: hk.Support) -> None:
    layer = layer_of(support, GEOMETRIES["same"])
    assert compose(layer._geometry) is None
    assert len(convolutions(export.plain(layer, form="composition"))) == 1


def test_more_groups_than_calls_are_worth_stay_one_convolution() -> None:
    count = MOST_PARTS + 1
    mask = np.zeros((count, count, 1, 1), dtype=bool)
    mask[np.arange(count), np.arange(count)] = True
    mask[np.arange(count), 0] = True
    assert compose(make_geometry(hk.Support.from_mask(mask), 1, 0)) is None


def test_a_pointwise_part_that_would_need_cropping_stays_within_the_dense_form() -> None:
    layer = layer_of(SUPPORTS["het"], {"padding": 0})
    assert compose(layer._geometry) is None
    x = torch.randn(1, C, 6, 6)
    with torch.no_grad():
        torch.testing.assert_close(export.plain(layer, form="composition")(x), layer(x))


def test_layers_and_networks_leave_as_compositions() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(hk.nn.HetConv2d(C, F, 3, padding=1, p=4), nn.BatchNorm2d(F), nn.ReLU())
    model = model.eval()
    x = torch.randn(2, C, 8, 8)
    for network in (model, hk.optimize(model, x).model):
        composed = export.plain(network, form="composition")
        assert export.support_layers(composed) == []
        assert any(isinstance(m, ComposedConv2d) for m in composed.modules())
        assert not any(m.training for m in composed.modules())
        with torch.no_grad():
            torch.testing.assert_close(composed(x), network(x), rtol=1e-4, atol=1e-5)


def test_what_trains_goes_on_training_as_a_composition() -> None:
    composed = export.plain(hk.nn.HetConv2d(C, F, 3, padding=1, p=4), form="composition")
    assert composed.training
    composed(torch.randn(1, C, 5, 5)).sum().backward()
    assert all(p.grad is not None for p in composed.parameters())


def test_onnx_runtime_computes_a_composition(tmp_path: Any) -> None:
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    layer = layer_of(SUPPORTS["het"], GEOMETRIES["strided"])
    x = torch.randn(2, C, 9, 9)
    path = tmp_path / "net.onnx"
    export.to_onnx(nn.Sequential(layer).eval(), x, path, form="composition")
    kinds = [node.op_type for node in onnx.load(str(path)).graph.node]
    assert kinds.count("Conv") == 2
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), layer(x), rtol=1e-4, atol=1e-4)


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"form.*dense, composition"):
        export.plain(nn.ReLU(), form="sparse")
