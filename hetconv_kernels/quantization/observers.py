# SPDX-License-Identifier: Apache-2.0
"""Observers: which range of a tensor's numbers 8 bits shall cover.

Two passes over the calibration batches: `see` notes the extremes, `count` fills a histogram
between them (only where `counts` says so), `range` answers.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ..errors import ArgumentError, mismatch
from .scheme import Scale

_BINS = 4096
# Fractions of the whole range that the search for the least error tries.
_FRACTIONS = tuple(1.0 - 0.02 * i for i in range(45))


class Observer(Protocol):
    """What calibration asks of an observer."""

    counts: bool

    def see(self, x: Tensor) -> None:
        """Takes in a tensor in the first pass."""

    def count(self, x: Tensor) -> None:
        """Takes in a tensor in the second pass."""

    def range(self, dtype: torch.dtype) -> tuple[float, float]:
        """Returns the least and the greatest number to be covered."""


class MinMax:
    """Covers everything that was seen: nothing saturates, outliers cost resolution."""

    counts = False

    def __init__(self) -> None:
        self.low, self.high = 0.0, 0.0
        self._histogram = torch.zeros(_BINS, dtype=torch.float64)

    def see(self, x: Tensor) -> None:
        """Takes in a tensor in the first pass.

        Raises:
            ArgumentError: a number is NaN or infinite.
        """
        if not x.numel():
            return
        low, high = (float(v) for v in torch.aminmax(x.detach().float()))
        # A NaN makes both NaN.
        if not -float("inf") < low <= high < float("inf"):
            raise ArgumentError(
                mismatch("activations on the calibration batches", "NaN or Inf", "finite numbers")
            )
        self.low, self.high = min(self.low, low), max(self.high, high)

    def count(self, x: Tensor) -> None:
        """Takes in a tensor in the second pass."""
        if x.numel() and self.high > self.low:
            counts = torch.histc(x.detach().float().cpu(), _BINS, self.low, self.high)
            self._histogram += counts.double()

    def range(self, dtype: torch.dtype) -> tuple[float, float]:
        """Returns the extremes."""
        return self.low, self.high

    def _centres(self) -> Tensor:
        step = (self.high - self.low) / _BINS
        return self.low + step * (torch.arange(_BINS, dtype=torch.float64) + 0.5)


class Percentile(MinMax):
    """Covers a percentage of the numbers and lets the rest saturate, in equal parts at both ends.

    Args:
        percent: how much is covered, over 50 and at most 100.

    Raises:
        ArgumentError: another percentage.
    """

    counts = True

    def __init__(self, percent: float = 99.99) -> None:
        super().__init__()
        if not 50 < percent <= 100:
            raise ArgumentError(mismatch("percentile", percent, "over 50 and at most 100"))
        self.percent = percent

    def range(self, dtype: torch.dtype) -> tuple[float, float]:
        """Returns the two quantiles, to the width of a bin; 0 is always between them."""
        total = float(self._histogram.sum())
        if not total:
            return self.low, self.high
        outside = (1 - self.percent / 100) / 2 * total
        step = (self.high - self.low) / _BINS
        below = torch.cumsum(self._histogram, 0)
        above = total - below
        first = int((below > outside).to(torch.int64).argmax())
        last = int((above <= outside).to(torch.int64).argmax())
        low, high = self.low + first * step, self.low + (last + 1) * step
        return min(low, 0.0), max(high, 0.0)


class MeanSquaredError(MinMax):
    """Covers the part of the range whose 8-bit numbers have the least mean squared error."""

    counts = True

    def range(self, dtype: torch.dtype) -> tuple[float, float]:
        """Returns the best of the ranges that are fractions of the whole."""
        if not float(self._histogram.sum()):
            return self.low, self.high
        centres = self._centres()
        best, least = (self.low, self.high), float("inf")
        for fraction in _FRACTIONS:
            low, high = fraction * self.low, fraction * self.high
            scale = Scale.of_range(low, high, dtype)
            info = torch.iinfo(dtype)
            q = (centres / scale.scale).round() + scale.zero_point
            numbers = (q.clamp(info.min, info.max) - scale.zero_point) * scale.scale
            error = float((self._histogram * (numbers - centres).square()).sum())
            if error < least:
                best, least = (low, high), error
        return best


OBSERVERS = ("minmax", "percentile", "mse")


def make_observer(name: str, percentile: float = 99.99) -> Observer:
    """Builds an observer by its name.

    Raises:
        ArgumentError: an unknown name, or a percentile out of range.
    """
    if name == "minmax":
        return MinMax()
    if name == "percentile":
        return Percentile(percentile)
    if name == "mse":
        return MeanSquaredError()
    raise ArgumentError(mismatch("observer", repr(name), f"one of {', '.join(OBSERVERS)}"))
