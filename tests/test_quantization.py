# SPDX-License-Identifier: Apache-2.0
"""Scale, weights and biases as integers, observers: the numbers that 8 bits stand for."""

from __future__ import annotations

import pytest
import torch

import hetconv_kernels as hk
from hetconv_kernels.errors import ArgumentError, InputTypeError
from hetconv_kernels.quantization import Scale, observers, reference, scheme

BAD_SCALES = (0.0, -0.1, float("nan"), float("inf"), 1e-45, 1e39, "0.1", None)


@pytest.mark.parametrize("scale", BAD_SCALES)
def test_a_scale_is_a_positive_number(scale) -> None:
    with pytest.raises(ArgumentError, match="positive number"):
        Scale(scale, 0)


@pytest.mark.parametrize(
    ("zero", "dtype"),
    [(-1, torch.uint8), (256, torch.uint8), (128, torch.int8), (0.0, torch.uint8)],
)
def test_a_zero_point_is_an_integer_of_the_dtype(zero, dtype) -> None:
    with pytest.raises(ArgumentError, match="zero_point"):
        Scale(0.1, zero, dtype)


@pytest.mark.parametrize("dtype", [torch.int16, torch.float32, torch.bool], ids=str)
def test_activations_are_uint8_or_int8(dtype: torch.dtype) -> None:
    with pytest.raises(InputTypeError, match="uint8 or int8"):
        Scale(0.1, 0, dtype)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8], ids=str)
@pytest.mark.parametrize(("low", "high"), [(-1.5, 3.0), (0.0, 5.1), (-2.0, -1.0), (2.0, 4.0)])
def test_a_range_is_covered_to_half_a_step_and_zero_is_exact(low, high, dtype) -> None:
    scale = Scale.of_range(low, high, dtype)
    assert scale.low <= min(low, 0) + 0.51 * scale.scale
    assert scale.high >= max(high, 0) - 0.51 * scale.scale
    x = torch.linspace(low, high, 999).view(1, -1, 1, 1)
    q = reference.quantize_tensor(x, scale.scale, scale.zero_point, dtype)
    error = (reference.dequantize(q, scale.scale, scale.zero_point) - x).abs().max()
    assert 0 < float(error) <= 0.51 * scale.scale + 0.51 * scale.scale
    zero = reference.quantize_tensor(0 * x, scale.scale, scale.zero_point, dtype)
    assert bool((zero == scale.zero_point).all())


def test_a_tensor_of_zeros_has_a_scale_too() -> None:
    assert Scale.of_range(0.0, 0.0).scale == 1.0


@pytest.mark.parametrize(("low", "high"), [(float("nan"), 1.0), (0.0, float("inf")), (2.0, 1.0)])
def test_ranges_that_are_none_are_refused(low: float, high: float) -> None:
    with pytest.raises(ArgumentError, match="range of activations"):
        Scale.of_range(low, high)


def test_a_scale_survives_json_bit_for_bit() -> None:
    import json

    scale = Scale(0.1, 7, torch.int8)  # 0.1 is no float32
    assert Scale.from_dict(json.loads(json.dumps(scale.to_dict()))) == scale
    assert torch.tensor(scale.scale, dtype=torch.float32).item() == scale.scale


@pytest.mark.parametrize(
    ("act", "bounds"), [("none", (0, 255)), ("relu", (10, 255)), ("relu6", (10, 70))]
)
def test_the_bounds_of_activations(act: str, bounds: tuple[int, int]) -> None:
    assert Scale(0.1, 10).bounds(act) == bounds


# Weights ----------------------------------------------------------------------------------------


def test_weights_are_rounded_to_half_a_step_of_their_own_filter() -> None:
    support = hk.Support.het(8, 6, 3, p=4)
    live, shift = torch.randn(support.live), torch.randn(6)
    live *= 10.0 ** scheme.filter_of(support, live.device)  # filters of very different sizes
    weight, scale, bias = scheme.quantize_weight(support, live, shift, 0.02)
    steps = scale[scheme.filter_of(support, live.device)]
    assert bool(((weight * steps - live).abs() <= 0.501 * steps).all())
    assert int(weight.abs().max()) == 127
    assert bool(((bias * scale.double() * 0.02 - shift).abs() <= 0.501 * scale * 0.02).all())


def test_a_bias_far_above_its_weights_keeps_its_value_and_fits() -> None:
    support = hk.Support.dense(3, 2, 1)
    live = torch.tensor([1e-9, 0, 0, 0, 0, 0.0])
    shift = torch.tensor([5.0, -3.0])
    weight, scale, bias = scheme.quantize_weight(support, live, shift, 0.02)
    assert torch.allclose(bias * scale.double() * 0.02, shift.double(), rtol=1e-7)
    assert int(weight.abs().max()) == 0


def test_multipliers_beyond_float32_are_refused() -> None:
    with pytest.raises(ArgumentError, match="multiplier"):
        scheme.multiplier(Scale(1e30, 0), torch.tensor([1e30]), None)


# Observers --------------------------------------------------------------------------------------


def observed(name: str, x: torch.Tensor, **options) -> tuple[float, float]:
    observer = observers.make_observer(name, **options)
    observer.see(x)
    observer.count(x)
    return observer.range(torch.uint8)


def test_min_max_covers_everything() -> None:
    x = torch.randn(1000)
    assert observed("minmax", x) == (float(x.min()), float(x.max()))


def test_a_percentile_leaves_the_tails_out() -> None:
    x = torch.linspace(-1, 1, 10001)
    low, high = observed("percentile", x, percentile=90.0)
    assert low == pytest.approx(-0.9, abs=2e-3)
    assert high == pytest.approx(0.9, abs=2e-3)
    low, high = observed("percentile", x, percentile=100.0)
    assert (low, high) == pytest.approx((-1, 1), abs=1e-6)


def errors(x: torch.Tensor, name: str) -> torch.Tensor:
    scale = Scale.of_range(*observed(name, x))
    q = reference.quantize_tensor(x.view(1, -1, 1, 1), scale.scale, scale.zero_point, torch.uint8)
    return (reference.dequantize(q, scale.scale, scale.zero_point).flatten() - x).square()


def test_a_percentile_does_not_let_an_outlier_cost_the_resolution_of_the_rest() -> None:
    x = torch.cat([torch.rand(100000), torch.tensor([8.0])])
    rest = {name: float(errors(x, name)[:-1].mean()) for name in ("percentile", "minmax")}
    assert rest["percentile"] < rest["minmax"] / 4


def test_the_least_squares_range_errs_less_than_the_whole_on_heavy_tails() -> None:
    torch.manual_seed(0)
    x = torch.randn(100000) ** 3
    assert float(errors(x, "mse").mean()) < 0.9 * float(errors(x, "minmax").mean())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", observers.OBSERVERS)
def test_observers_refuse_what_is_not_finite(name: str, bad: float) -> None:
    with pytest.raises(ArgumentError, match="NaN or Inf"):
        observers.make_observer(name).see(torch.tensor([1.0, bad, 2.0]))


def test_unknown_observers_and_percentiles_are_refused() -> None:
    with pytest.raises(ArgumentError, match="minmax, percentile, mse"):
        observers.make_observer("entropy")
    for percent in (50, 101, float("nan")):
        with pytest.raises(ArgumentError, match="percentile"):
            observers.make_observer("percentile", percent)
