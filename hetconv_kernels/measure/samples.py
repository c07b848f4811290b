# SPDX-License-Identifier: Apache-2.0
"""Timings and Estimate: the record of a measurement, and what can be read from it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ArgumentError, mismatch
from .disturbance import Disturbance

_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A median with its interval.

    Attributes:
        value: the median of the per-round values.
        low: the lower end of the interval.
        high: the upper end of the interval.
        confidence: the probability that the interval covers the true median, at least 0.95 from 6
            rounds on; with fewer the interval is the whole range and this says what it is worth.
        n: the number of rounds.
    """

    value: float
    low: float
    high: float
    confidence: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.2f}× [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class Timings:
    """What `interleaved` measured.

    Attributes:
        baseline: the variant that `speedup` compares with.
        samples: seconds per call of each variant; index i is the same round for all.
        iterations: calls per sample of each variant.
        device: where it ran.
        cold: whether the last-level cache was flushed before each sample.
        graph: whether the calls were replayed from a CUDA graph.
        resolution: what the clock resolves, in seconds.
        disturbance: what other work on the machine did meanwhile; None where nobody watched.
    """

    baseline: str
    samples: dict[str, tuple[float, ...]]
    iterations: dict[str, int]
    device: str = "cpu"
    cold: bool = False
    graph: bool = False
    resolution: float = 0.0
    disturbance: Disturbance | None = None

    @property
    def disturbed(self) -> tuple[str, ...]:
        """What shows that nothing can be concluded from this measurement; empty when nothing."""
        return self.disturbance.reasons if self.disturbance is not None else ()

    def median(self, name: str) -> float:
        """Returns the median seconds per call of a variant."""
        return statistics.median(self._of(name))

    def quantile(self, name: str, q: float) -> float:
        """Returns the q-quantile (0…1, linear between samples) of the seconds per call."""
        values = sorted(self._of(name))
        place = q * (len(values) - 1)
        below = math.floor(place)
        above = min(below + 1, len(values) - 1)
        return values[below] + (place - below) * (values[above] - values[below])

    def ratio(self, slow: str, fast: str) -> Estimate:
        """Returns how many times longer ``slow`` took than ``fast``, round by round."""
        pairs = zip(self._of(slow), self._of(fast), strict=True)
        return median_interval([s / f for s, f in pairs])

    def difference(self, slow: str, fast: str) -> Estimate:
        """Returns how many seconds longer a call of ``slow`` took than one of ``fast``."""
        pairs = zip(self._of(slow), self._of(fast), strict=True)
        return median_interval([s - f for s, f in pairs])

    def speedup(self, name: str, over: str | None = None) -> Estimate:
        """Returns how many times faster a variant is than another one (the baseline by default)."""
        return self.ratio(self.baseline if over is None else over, name)

    def fastest(self, names: Sequence[str] | None = None) -> str:
        """Returns the variant with the least median, among ``names`` if given."""
        return min(names or self.samples, key=self.median)

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as plain data for JSON, the samples included."""
        return {
            "baseline": self.baseline,
            "device": self.device,
            "cold": self.cold,
            "graph": self.graph,
            "clock_resolution_s": self.resolution,
            "variants": {
                name: {
                    "median_s": self.median(name),
                    "p20_s": self.quantile(name, 0.2),
                    "p80_s": self.quantile(name, 0.8),
                    "n": len(samples),
                    "iterations": self.iterations[name],
                    "samples_s": list(samples),
                }
                for name, samples in self.samples.items()
            },
        } | ({} if self.disturbance is None else {"disturbance": self.disturbance.to_dict()})

    def _of(self, name: str) -> tuple[float, ...]:
        if name not in self.samples:
            raise ArgumentError(mismatch("variant", repr(name), f"one of {list(self.samples)}"))
        return self.samples[name]


def median_interval(values: Sequence[float], confidence: float = _CONFIDENCE) -> Estimate:
    """Returns the median of independent values with its order-statistics interval.

    The number of values below the true median is binomial(n, 1/2), so the interval from the k-th
    smallest to the k-th largest covers it with probability 1 - 2·P(fewer than k below). The largest
    k that keeps ``confidence`` is taken. Worked example: n = 6 gives k = 1, the whole range, at
    1 - 2/64 = 0.969; n = 20 gives the 6th smallest to the 6th largest at 0.959.

    Raises:
        ArgumentError: there are no values.
    """
    if not values:
        raise ArgumentError(mismatch("values of an interval", "none", "at least one"))
    ordered, n = sorted(values), len(values)
    outside, tail = 0.0, 0.0
    k = 1
    for below in range(n // 2):
        tail += math.comb(n, below) / 2**n
        if 2 * tail > 1 - confidence and below > 0:
            break
        outside, k = 2 * tail, below + 1
    low, high = ordered[k - 1], ordered[n - k]
    return Estimate(statistics.median(ordered), low, high, 1 - outside if n > 1 else 0.0, n)
