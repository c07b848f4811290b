# SPDX-License-Identifier: Apache-2.0
"""Disturbance: whether other work on the machine spoilt a measurement, and how that shows.

Paired ratios cancel drift, and an interval covers noise, as long as both hit all variants alike.
Other processes do not: they take a core from whoever holds more of them, and a team of threads
waits for its slowest. So a measurement is watched, by three things that owe nothing to what is
measured: a *spin*, a fixed piece of work for one thread, between the samples; a *ceiling*, a
matrix product on all threads, at the begin and the end; and what else the machine runs. Nothing
is concluded from a disturbed measurement.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

# A spin or a ceiling this much above the best is slow; so many slow spins are a disturbance.
SLOW, SLOW_SHARE = 1.3, 0.2
# Cores that others may keep busy beyond those that the measurement leaves free.
FREE_CORES = 0.25
_SPIN, _EDGE, _TRIES = 20_000, 320, 3
_BEST: dict[str, float] = {}
# What is measured beside its prediction, and is this many times above it, is told.
FAR_ABOVE = 3.0


@dataclass(frozen=True)
class Disturbance:
    """How quiet the machine was during a measurement.

    Attributes:
        reasons: what shows that other work disturbed it, in words; empty when nothing does.
        slow_spins: the share of the spins between samples that were slow, 0…1.
        ceiling: the time of the ceiling at the begin and at the end, over the best one that this
            process has seen; None where it was not measured.
        others: cores that other processes kept busy on average; None where that is not known.
        load: the machine's load average at the end.
    """

    reasons: tuple[str, ...] = ()
    slow_spins: float = 0.0
    ceiling: tuple[float, float] | None = None
    others: float | None = None
    load: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as plain data for JSON."""
        return {**asdict(self), "reasons": list(self.reasons)}


class Watch:
    """Watches over one measurement: made before it, ticked between samples, finished after it.

    Args:
        device: what is measured; the ceiling is the CPU's, so on others there is none.
        spin: does the fixed work and returns its seconds.
        ceiling: the same on all threads.
        busy: returns seconds of cores that all processes, and that this one, have used so far;
            None where that is not known.
        load: returns the load average.
        now: reads a clock, in seconds.
    """

    def __init__(
        self,
        device: torch.device | str = "cpu",
        *,
        spin: Callable[[], float] | None = None,
        ceiling: Callable[[], float] | None = None,
        busy: Callable[[], tuple[float, float] | None] | None = None,
        load: Callable[[], float] | None = None,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._spin, self._ceiling = spin or _spin, ceiling or _ceiling
        self._busy, self._load, self._now = busy or _busy, load or _load, now
        self._on_cpu = torch.device(device).type == "cpu"
        self._spins: list[float] = []
        for _ in range(_TRIES):
            _best("spin", self._spin())
        self._first = self._measured_ceiling()
        self._began, self._before = self._now(), self._busy()

    def tick(self) -> None:
        """Takes one spin; call it between samples."""
        self._spins.append(_best("spin", self._spin()))

    def finish(self) -> Disturbance:
        """Ends the watch and says what it saw."""
        elapsed, after = self._now() - self._began, self._busy()
        last = self._measured_ceiling()
        others = None
        if self._before is not None and after is not None and elapsed > 0:
            everyone, own = (b - a for a, b in zip(self._before, after, strict=True))
            others = max(everyone - own, 0.0) / elapsed
        slow = sum(t > SLOW * _BEST["spin"] for t in self._spins) / max(len(self._spins), 1)
        pair = None
        if self._first is not None and last is not None:
            best = _BEST[_ceiling_name()]
            pair = (self._first / best, last / best)
        load, threads = self._load(), torch.get_num_threads() if self._on_cpu else 1
        # The kernel counts in hundredths of a second: less than some of them say nothing.
        known = others if elapsed >= 0.2 else None
        reasons = judged(slow, pair, known, load, threads, cores())
        return Disturbance(reasons, slow, pair, others, load)

    def _measured_ceiling(self) -> float | None:
        if not self._on_cpu:
            return None
        return _best(_ceiling_name(), min(self._ceiling() for _ in range(_TRIES)))


def judged(
    slow_spins: float,
    ceiling: tuple[float, float] | None,
    others: float | None,
    load: float,
    threads: int,
    cores: int,
) -> tuple[str, ...]:
    """Says in words what shows that a measurement was disturbed.

    Args:
        slow_spins: share of slow spins, 0…1.
        ceiling: at the begin and at the end, over the best.
        others: cores that other processes kept busy.
        load: average number of tasks that run or wait to.
        threads: that the measurement uses.
        cores: that this process may use.
    """
    reasons = []
    if slow_spins > SLOW_SHARE:
        reasons.append(
            f"{slow_spins:.0%} of the spins between samples took more than {SLOW}× the best"
        )
    if ceiling is not None and max(ceiling) > SLOW:
        reasons.append(
            f"the ceiling was {ceiling[0]:.2f}× the best time at the begin, {ceiling[1]:.2f}× at "
            "the end"
        )
    crowded = others is not None and others > max(cores - threads, 0) + FREE_CORES
    if crowded:
        reasons.append(f"others kept {others:.1f} of {cores} cores busy")
    if load > threads + cores:
        reasons.append(f"the load average was {load:.1f} on {cores} cores")
    if reasons and threads > 1 and (crowded or load > threads + cores):
        reasons.append(spinning(threads, cores))
    return tuple(reasons)


def spinning(threads: int, cores: int) -> str:
    """Says what a busy machine does to OpenMP's barrier, and the way out."""
    policy = os.environ.get("OMP_WAIT_POLICY", "").lower()
    way_out = f"use fewer than {threads} threads (OMP_NUM_THREADS, torch.set_num_threads)"
    if policy != "passive":
        way_out = f"set OMP_WAIT_POLICY=passive before Python starts, or {way_out}"
    return (
        f"{threads} threads share {cores} cores with others: OpenMP's barrier spins, and a thread "
        f"that has lost its core costs each call a time slice; {way_out}"
    )


def far_above(measured: float | None, predicted: float | None) -> bool:
    """Whether a time is so far above its prediction that something else must be the cause."""
    return bool(measured and predicted and measured > FAR_ABOVE * predicted)


def cores() -> int:
    """Returns how many cores this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def shown(reasons: Sequence[str]) -> str:
    """Says that a measurement was disturbed, and by what."""
    return "disturbed, nothing is concluded: " + "; ".join(reasons)


def _best(name: str, seconds: float) -> float:
    _BEST[name] = min(_BEST.get(name, seconds), seconds)
    return seconds


def _ceiling_name() -> str:
    return f"ceiling of {torch.get_num_threads()} threads"


def _spin() -> float:
    began = time.perf_counter()
    sum(range(_SPIN))
    return time.perf_counter() - began


def _ceiling() -> float:
    a = torch.ones(_EDGE, _EDGE)
    with torch.no_grad():
        torch.mm(a, a)
        began = time.perf_counter()
        torch.mm(a, a)
        return time.perf_counter() - began


def _load() -> float:
    try:
        return os.getloadavg()[0]
    except OSError:
        return 0.0


def _busy() -> tuple[float, float] | None:
    """Returns the seconds of cores that all, and that this process with its threads, have used."""
    try:
        with open("/proc/stat") as file:
            words = file.readline().split()[1:9]
        user, nice, system, _, _, irq, softirq, stolen = map(int, words)
    except (OSError, ValueError):
        return None
    everyone = (user + nice + system + irq + softirq + stolen) / os.sysconf("SC_CLK_TCK")
    return everyone, time.process_time()
