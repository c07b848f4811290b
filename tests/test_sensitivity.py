# SPDX-License-Identifier: Apache-2.0
"""Sensitivity: rates by layer from what each layer costs, on numbers worked out by hand."""

from __future__ import annotations

import pytest

from hetconv_kernels.compression.sensitivity import DENSITIES, densities


def rising(by: float) -> list[float]:
    """Costs that rise by as much each time the density is halved."""
    return [by * (i + 1) for i in range(len(DENSITIES))]


def test_the_example_of_the_module() -> None:
    cost = {"a": rising(0.1), "b": rising(0.05)}
    found = densities(cost, {"a": 100, "b": 900}, {"a": 1.0, "b": 1.0}, 0.25)
    assert found["a"] == pytest.approx(1.0, rel=0.02)
    assert found["b"] == pytest.approx(1 / 6, rel=0.02)


def test_the_last_weights_of_layers_cost_the_same() -> None:
    cost = {"a": rising(0.1), "b": rising(0.05)}
    # n·d is as the cost of a halving: 50 and 25 of 100 each.
    found = densities(cost, {"a": 100, "b": 100}, {"a": 1.0, "b": 1.0}, 0.375)
    assert found["a"] == pytest.approx(0.5, rel=0.02)
    assert found["b"] == pytest.approx(0.25, rel=0.02)


@pytest.mark.parametrize("total", [0.9, 0.5, 0.1])
def test_the_fraction_of_all_weights_is_met(total: float) -> None:
    cost = {"a": rising(0.3), "b": rising(0.1), "c": rising(0.05)}
    sizes = {"a": 100, "b": 800, "c": 90}
    found = densities(cost, sizes, dict.fromkeys(sizes, 1.0), total)
    live = sum(sizes[name] * density for name, density in found.items())
    assert live == pytest.approx(total * 990, rel=1e-3)
    assert found["a"] >= found["c"] > found["b"]  # 0.3/100, 0.05/90, 0.1/800


def test_no_layer_has_more_than_it_has_now() -> None:
    cost = {"a": rising(9.0), "b": rising(0.1)}
    found = densities(cost, {"a": 100, "b": 100}, {"a": 0.1, "b": 1.0}, 0.3)
    assert found["a"] == pytest.approx(0.1, rel=0.02)
    assert found["b"] == pytest.approx(0.5, rel=0.02)


def test_beyond_the_last_density_all_go_by_the_same_factor_and_one_weight_stays() -> None:
    cost = {"a": rising(0.1), "b": rising(0.1)}
    sizes = {"a": 10**6, "b": 10}
    found = densities(cost, sizes, {"a": 1.0, "b": 1.0}, DENSITIES[-1] / 4)
    assert found["a"] == pytest.approx(DENSITIES[-1] / 4, rel=0.01)
    assert found["b"] >= 0.1


def test_costs_that_fall_or_are_equal_still_give_an_order() -> None:
    falling = [-0.1] * len(DENSITIES)
    found = densities({"a": falling, "b": rising(1.0)}, {"a": 8, "b": 8}, {"a": 1.0, "b": 1.0}, 0.6)
    assert found["b"] == pytest.approx(1.0, rel=1e-6)
    assert found["a"] == pytest.approx(0.2, rel=1e-3)


def test_a_layer_that_seems_to_be_needed_for_nothing_keeps_an_eighth_of_the_density() -> None:
    nothing = [0.0] * len(DENSITIES)
    found = densities({"a": nothing, "b": rising(1.0)}, {"a": 100, "b": 900},
                      {"a": 1.0, "b": 1.0}, 0.4)  # fmt: skip
    assert found["a"] == pytest.approx(0.05, rel=1e-6)
    assert found["b"] == pytest.approx((400 - 5) / 900, rel=1e-3)
