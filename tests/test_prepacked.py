# SPDX-License-Identifier: Apache-2.0
"""The vendor's frozen weights: as exact as F.conv2d, laid out once, renewed when they change."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import hetconv_kernels as hk
from hetconv_kernels import ops
from hetconv_kernels.backends import prepacked
from hetconv_kernels.packing import FrozenCache, dense_weight, frozen_caches
from hetconv_kernels.problem import Geometry, Problem, make_geometry
from hetconv_kernels.testing import error_bound, oracle

ACTS = {"none": lambda y: y, "relu": torch.relu, "gelu": F.gelu}


def image(*shape: int) -> Tensor:
    return torch.randn(*shape).to(memory_format=torch.channels_last)


def problem(geometry: Geometry, x: Tensor, w: Tensor) -> Problem:
    return ops.describe("fprop", geometry, x, x, w, tuple(x.shape[2:]))


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize(
    ("support", "stride", "dilation", "size"),
    [
        (hk.Support.dense(32, 64, 3), 1, 1, 24),
        (hk.Support.het(64, 64, 3, p=4), 2, 1, 30),
        (hk.Support.grouped(64, 64, 3, 4), 1, 2, 28),
        (hk.Support.dense(3, 64, 7), 2, 1, 50),
        (hk.Support.dense(1500, 1500, 1), 1, 1, 1),
        (hk.Support.self_grouped([0] * 900 + [1] * 700, torch.rand(2, 1500).numpy() < 0.3, 1),
         1, 1, 1),
    ],
    ids=["dense", "het", "grouped", "stem", "linear", "linear self-grouped"],
)  # fmt: skip
def test_a_frozen_weight_gives_what_conv2d_gives(
    support: hk.Support, stride: int, dilation: int, size: int, residual: bool, act: str
) -> None:
    torch.manual_seed(0)
    padding = support.kernel[0] // 2 * dilation
    geometry = make_geometry(support, stride, padding, dilation, frozen=True)
    x = image(3, support.channels, size, size)
    live = torch.randn(support.live)
    assert prepacked.takes(problem(geometry, x, live)), "the test would show nothing"
    shift = torch.randn(support.filters)
    dense = dense_weight(support, live, torch.float32)
    wide = oracle(x.double(), dense.double(), geometry, shift.double())
    added = image(*wide.shape) if residual else None
    with hk.use_backend("vendor"):
        y = hk.functional.fused_conv2d(
            x, live, geometry, hk.backends.forced_code(), shift=shift, residual=added, act=act
        )
    truth = ACTS[act](wide if added is None else wide + added)
    depth = support.live // support.filters + 2
    magnitude = oracle(x.abs().double(), dense.abs().double(), geometry, shift.abs().double())
    magnitude = magnitude if added is None else magnitude + added.abs()
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert ((y - truth).abs() <= error_bound(magnitude, depth, torch.float32)).all()


def kept(layer: hk.nn.SupportConv2d, weight: Tensor) -> list[object]:
    caches = [c for c in frozen_caches(layer.support) if isinstance(c, FrozenCache)]
    return [v for v in (c.recall(weight) for c in caches) if v is not None]


def layer_and_image() -> tuple[hk.nn.SupportConv2d, Tensor]:
    torch.manual_seed(0)
    layer = hk.nn.SupportConv2d(
        32, 64, 3, padding=1, support=hk.Support.dense(32, 64, 3), backend="vendor"
    )
    return layer.eval(), image(2, 32, 20, 20)


def test_the_weight_is_laid_out_once_and_anew_when_it_changes() -> None:
    layer, x = layer_and_image()
    layer.freeze()
    with torch.no_grad():
        first = layer(x)
        (packed,) = kept(layer, layer.weight)
        assert layer(x).equal(first)
        assert [id(v) for v in kept(layer, layer.weight)] == [id(packed)]
        layer.weight.mul_(2)
        layer.bias.zero_()
        dense = layer.weight.view(layer.support.shape)
        torch.testing.assert_close(layer(x), F.conv2d(x, dense, padding=1))


def test_another_batch_and_image_size_use_the_same_layout() -> None:
    layer, x = layer_and_image()
    layer.freeze()
    layer(x)
    before = kept(layer, layer.weight)
    for other in (image(1, 32, 33, 40), image(5, 32, 19, 20)):
        torch.testing.assert_close(
            layer(other), F.conv2d(other, layer.dense_weight(), layer.bias, padding=1)
        )
    assert [id(v) for v in kept(layer, layer.weight)] == [id(v) for v in before]


def test_a_frozen_weight_that_is_trained_after_all_goes_the_plain_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer, x = layer_and_image()
    dense = layer.dense_weight()
    layer.freeze()
    layer.weight.requires_grad_()
    monkeypatch.setattr(
        torch.ops.mkldnn, "_reorder_convolution_weight", lambda *_: pytest.fail("laid out")
    )
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), F.conv2d(x, dense, layer.bias, padding=1))


def test_what_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    support = hk.Support.dense(32, 64, 3)
    geometry = make_geometry(support, 1, 1, frozen=True)
    x, live = image(2, 32, 20, 20), torch.randn(support.live)
    assert prepacked.takes(problem(geometry, x, live))
    assert not prepacked.takes(problem(geometry, x, live.view(support.shape))), "trainable form"
    assert not prepacked.takes(problem(geometry, x.contiguous(), live)), "contiguous images"
    assert not prepacked.takes(problem(geometry, x.double(), live.double()))
    assert not prepacked.takes(problem(geometry, image(2, 32, 5, 5), live)), "too little work"
    uneven = make_geometry(support, 1, (1, 0, 0, 1), frozen=True)
    assert not prepacked.takes(problem(uneven, x, live))
    trained = make_geometry(support, 1, 1)
    assert not prepacked.takes(problem(trained, x, live)), "not of a frozen layer"
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not prepacked.takes(problem(geometry, x, live))
