# SPDX-License-Identifier: Apache-2.0
"""What can be read from a measurement: medians, quantiles, paired ratios and their intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hetconv_kernels.errors import ArgumentError
from hetconv_kernels.measure import samples


@pytest.mark.parametrize(("n", "low", "high"), [(6, 0, 5), (20, 5, 14), (9, 1, 7), (100, 39, 60)])
def test_interval_takes_the_order_statistics_of_the_binomial(n: int, low: int, high: int) -> None:
    estimate = samples.median_interval(list(range(n))[::-1])
    assert (estimate.low, estimate.high) == (low, high)
    outside = 2 * sum(math.comb(n, i) for i in range(low + 1)) / 2**n
    assert estimate.confidence == pytest.approx(1 - outside)
    assert estimate.confidence >= 0.95
    narrower = 2 * sum(math.comb(n, i) for i in range(low + 2)) / 2**n
    assert 1 - narrower < 0.95


def test_interval_covers_the_median_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(2000):
        estimate = samples.median_interval(list(generator.exponential(size=15)))
        hits += estimate.low <= math.log(2) <= estimate.high
    assert 0.945 <= hits / 2000 <= 0.99  # 0.965 for n = 15


@pytest.mark.parametrize("n", [1, 2, 5])
def test_too_few_rounds_give_the_range_and_admit_it(n: int) -> None:
    estimate = samples.median_interval([float(i) for i in range(n)])
    assert (estimate.low, estimate.high) == (0.0, n - 1)
    assert estimate.confidence < 0.95


def test_quantiles_and_dict() -> None:
    timings = samples.Timings(
        "a", {"a": (1.0, 2.0, 3.0, 4.0, 5.0), "b": (2.0, 2.0, 2.0, 2.0, 2.0)}, {"a": 1, "b": 7}
    )
    assert timings.quantile("a", 0.2) == pytest.approx(1.8)
    assert timings.quantile("a", 1.0) == 5.0
    data = timings.to_dict()
    assert data["variants"]["b"]["iterations"] == 7
    assert data["variants"]["a"]["p80_s"] == pytest.approx(4.2)
    assert str(timings.speedup("b")) == "1.50× [0.50, 2.50]"


def test_pairs_are_taken_within_a_round() -> None:
    timings = samples.Timings("a", {"a": (2.0, 4.0, 6.0), "b": (1.0, 2.0, 3.0)}, {"a": 1, "b": 1})
    ratio = timings.ratio("a", "b")
    assert (ratio.low, ratio.value, ratio.high) == (2.0, 2.0, 2.0)
    assert timings.difference("a", "b").value == 2.0
    assert timings.fastest() == "b"
    assert timings.fastest(["a"]) == "a"


def test_bad_questions() -> None:
    timings = samples.Timings("a", {"a": (1.0,)}, {"a": 1})
    with pytest.raises(ArgumentError, match=r"variant: received 'z', expected one of \['a'\]"):
        timings.speedup("z")
    with pytest.raises(ArgumentError, match="at least one"):
        samples.median_interval([])
