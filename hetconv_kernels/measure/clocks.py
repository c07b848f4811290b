# SPDX-License-Identifier: Apache-2.0
"""Clock: seconds, read when the device has done all that it was given."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable

import torch


class Clock:
    """A clock in seconds that waits for the device before every reading.

    Usable as pytest-benchmark's timer: it is a plain callable with a name.

    Args:
        device: the device whose queue has to be empty when the clock is read.
        now: reads the time, in seconds.
        synchronize: waits for the device; None picks what the device needs (nothing on a CPU).
        resolution: seconds between two readings that the clock can tell apart; None measures it.
    """

    __name__ = "synchronising_clock"

    def __init__(
        self,
        device: torch.device | str = "cpu",
        *,
        now: Callable[[], float] = time.perf_counter,
        synchronize: Callable[[], object] | None = None,
        resolution: float | None = None,
    ) -> None:
        self.device = torch.device(device)
        self._now = now
        self._synchronize = synchronize or _synchronizer(self.device)
        self._resolution = resolution

    def __call__(self) -> float:
        """Waits until the device has done all that it was given and returns the time in seconds."""
        if self._synchronize is not None:
            self._synchronize()
        return self._now()

    @property
    def resolution(self) -> float:
        """The median time between two readings with nothing in between, in seconds."""
        if self._resolution is None:
            for _ in range(10):
                self()
            readings = [self() for _ in range(102)]
            steps = [b - a for a, b in itertools.pairwise(readings)]
            self._resolution = max(statistics.median(steps), 1e-9)
        return self._resolution


_CLOCKS: dict[torch.device, Clock] = {}


def clock(device: torch.device | str = "cpu") -> Clock:
    """Returns the synchronising clock of a device, the same object at every call."""
    device = torch.device(device)
    if device not in _CLOCKS:
        _CLOCKS[device] = Clock(device)
    return _CLOCKS[device]


def _synchronizer(device: torch.device) -> Callable[[], object] | None:
    if device.type == "cpu":
        return None
    module = torch.get_device_module(device)
    return lambda: module.synchronize(device)
