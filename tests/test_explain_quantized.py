# SPDX-License-Identifier: Apache-2.0
"""explain and profile know layers in 8 bits: their engine, their work, their bytes."""

from __future__ import annotations

import pytest
import torch
from quantized_layers import X, Y, image, quantized
from torch import nn

import hetconv_kernels as hk
from hetconv_kernels.errors import InputTypeError
from hetconv_kernels.measure import roofline
from hetconv_kernels.nn import QuantizedLinear
from hetconv_kernels.nn.quantized_steps import QuantizedStep
from hetconv_kernels.packing import watched_packings
from hetconv_kernels.quantization import engine


@pytest.mark.parametrize("measure", [True, False])
def test_a_quantised_layer_is_explained_with_its_engines(measure: bool) -> None:
    layer, x = quantized(), image()
    found = hk.explain(layer, x, measure=measure)
    assert found.chosen == engine.engine_names()[0]
    assert tuple(c.name for c in found.candidates) == engine.engine_names()
    assert all((c.measured_s is not None) == measure for c in found.candidates)
    assert found.macs == hk.stats.macs(layer, x)
    assert "torch.uint8" in str(found)
    assert layer.backend is None


def test_packing_is_seen_once_and_not_in_a_steady_call() -> None:
    layer, x = quantized(), image()
    with watched_packings() as packed:
        layer(x)
        assert len(packed) == 1
        layer(x)
        assert len(packed) == 1
    found = hk.explain(layer, x)
    assert found.packing_s == 0.0
    assert "packed weight is kept" in str(found)
    assert hk.explain(layer, x, measure=False).packing_s is None


def test_every_step_between_integers_is_profiled() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.a(x)
            y = torch.relu(y) + self.b(y) + y
            return y.mean((2, 3))

    x = torch.randn(2, 3, 9, 9)
    made = hk.quantize(Net().eval(), [x], measure=False).model
    steps = [m for m in made.modules() if isinstance(m, QuantizedStep)]
    ceilings = {"uint8": roofline.Roofs(1e9, 1e9, "cpu", "uint8")}
    found = hk.profile(made, x, rounds=5, max_seconds=0.2, roofs=ceilings)
    profiled = [layer for layer in found.layers if layer.macs == 0]
    assert len(profiled) == len(steps) >= 3
    assert {layer.kind for layer in profiled} == {type(m).__name__ for m in steps}
    assert all(layer.seconds > 0 for layer in profiled)


def test_a_forced_engine_and_a_linear_layer() -> None:
    layer = QuantizedLinear.from_float(nn.Linear(24, 10), X, Y)
    layer.backend = "reference"
    found = hk.explain(layer, image(X, (3, 24)), measure=False)
    assert (found.chosen, found.forced, found.macs) == ("reference", True, 3 * 240)
    with pytest.raises(InputTypeError, match="uint8"):
        hk.explain(layer, torch.randn(3, 24))


def test_a_profile_says_who_runs_each_layer_and_counts_bytes_of_one() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    x = torch.randn(2, 3, 9, 9)
    made = hk.quantize(model, [x], measure=False).model
    ceilings = {"uint8": roofline.Roofs(1e9, 1e9, "cpu", "uint8")}
    found = hk.profile(made, x, rounds=5, max_seconds=0.2, roofs=ceilings)
    step, first, last = found.layers
    assert step.backend == first.backend == last.backend == engine.engine_names()[0]
    assert (step.kind, step.macs) == ("Quantize", 0)
    assert step.bytes == (4 + 1) * 2 * 3 * 81  # float32 in, one byte out
    assert "8 bits" in first.why
    assert first.macs == 2 * 49 * 8 * 27
    assert first.bytes == 2 * 3 * 81 + 2 * 8 * 49 + 8 * 27
    assert last.bytes == 2 * 8 * 49 + 4 * 2 * 4 * 49 + 8 * 4  # float32 leaves the network


def test_the_ceiling_of_8_bits_is_measured() -> None:
    measured = roofline.measure_roofs(dtype=torch.uint8, rounds=1, size=256)
    assert measured.macs_per_s > 1e6
    assert measured.dtype == "uint8"
