# SPDX-License-Identifier: Apache-2.0
"""The clock and the record: times variants of one computation beside each other, honestly.

Six rules, each against a mistake that published timings make:

* The clock waits for the device before it is read, so that the work is measured, not the queue.
* Variants take turns in one process, in a new order every round. Drift of the machine (other
  processes, clock rates, temperature) then hits all of them, and the *paired* ratio of a round
  cancels it.
* A sample holds as many calls as make it at least 100 times what the clock can resolve.
* Cold or warm is chosen, not left to chance: before a sample the cache is flushed, or the variant
  is called once, because the others' turns have pushed its operands out.
* A ratio comes with an interval. It is the order-statistics interval of the median, which assumes
  nothing of the distribution.
* Other work on the machine is watched for, since no interval covers what it does: see
  `disturbance`. A disturbed measurement says so, and no verdict is made from it.

``interleaved({"dense": dense, "sparse": sparse}).speedup("sparse")`` prints as
``2.71× [2.66, 2.74]``.
"""

from __future__ import annotations

import gc
import math
import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch

from ..errors import ArgumentError, mismatch
from ..integers import is_integer
from .cache import Flush, last_level_cache, rotations
from .clocks import Clock, clock
from .disturbance import Disturbance, Watch
from .samples import Estimate, Timings, median_interval

__all__ = [
    "Clock",
    "Estimate",
    "Timings",
    "clock",
    "interleaved",
    "last_level_cache",
    "median_interval",
    "rotations",
]

Call = Callable[[], object]
Variant = Call | Sequence[Call]

RESOLUTIONS_PER_SAMPLE = 100
_MAX_ITERATIONS = 10**7


def check_seconds(name: str, value: float, zero: bool = False) -> None:
    """Refuses what is no finite time above zero (or zero, if that is allowed).

    Raises:
        ArgumentError: see above.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not (value >= 0 if zero else value > 0) or math.isinf(value):
        raise ArgumentError(mismatch(name, value, "a finite number of seconds above 0"))


class PytestBenchmark(Protocol):
    """What `interleaved` uses of pytest-benchmark's fixture."""

    disabled: bool
    stats: Any

    def pedantic(self, target: Call, **options: Any) -> object:
        """Times ``target`` and keeps the statistics."""


def interleaved(
    variants: Mapping[str, Variant],
    *,
    baseline: str | None = None,
    rounds: int = 20,
    warmup: int = 2,
    min_time: float = 1e-3,
    max_seconds: float | None = None,
    cold: bool = False,
    graph: bool = False,
    device: torch.device | str = "cpu",
    seed: int = 0,
    timer: Clock | None = None,
    benchmark: PytestBenchmark | None = None,
    target: str | None = None,
    retake: int = 0,
    watch: Callable[[], Watch] | None = None,
) -> Timings:
    """Times variants of one computation in turns, in one process.

    Each round takes one sample of every variant, in an order drawn from ``seed``.

    Args:
        variants: name -> a call without arguments, or several calls that do the same work on
            buffers of their own (*rotating buffers*: a sample goes through them in turn, so that
            each call finds its operands outside the cache; see `rotations`).
        baseline: the variant that others are compared with; by default the first.
        rounds: samples per variant.
        warmup: rounds that are run first and not kept.
        min_time: the least length of a sample, in seconds; it is raised to 100 times the
            resolution of the clock.
        max_seconds: lowers ``rounds``, though not below 6, so that about this time is spent.
        cold: flushes the last-level cache before each sample. A variant of one call is then called
            once per sample on a CPU; on a GPU, where one launch is too short to be timed from
            outside, rotating buffers are required. Otherwise a variant of one call is called once,
            untimed, before each sample, and finds its operands where that call left them.
        graph: captures the calls of a sample in a CUDA graph and times its replay, so that the
            Python side and the launches are not measured.
        device: where the variants run.
        seed: of the order within the rounds.
        timer: replaces the device's clock (for tests).
        benchmark: pytest-benchmark's fixture; it then times and stores the samples of ``target``
            while the other variants take their turns before and after.
        target: the variant that pytest-benchmark stores; by default the first that is not the
            baseline.
        retake: how often a disturbed measurement is taken again, from the first round on; not
            where pytest-benchmark collects, which counts every sample.
        watch: makes what looks for disturbance (for tests).

    Raises:
        ArgumentError: no variants, an unknown name, fewer than one round, ``graph`` without a CUDA
            device, or ``cold`` for a call that cannot be timed so.
    """
    if not variants or not is_integer(rounds) or rounds < 1 or warmup < 0:
        received = f"{len(variants)} variants, {rounds} rounds, {warmup} warm-up rounds"
        raise ArgumentError(mismatch("interleaved", received, "at least 1, 1 and 0"))
    if max_seconds is not None:
        check_seconds("max_seconds", max_seconds)
    check_seconds("min_time", min_time, zero=True)
    names = list(variants)
    baseline = names[0] if baseline is None else baseline
    target = next((n for n in names if n != baseline), baseline) if target is None else target
    for role, name in (("baseline", baseline), ("target", target)):
        if name not in variants:
            raise ArgumentError(mismatch(role, repr(name), f"one of {names}"))
    device = torch.device(device)
    if graph and device.type != "cuda":
        raise ArgumentError(mismatch("device of a CUDA graph", device, "a CUDA device"))

    timer = clock(device) if timer is None else timer
    goal = max(min_time, RESOLUTIONS_PER_SAMPLE * timer.resolution)
    flush = Flush(device) if cold else None
    racers = {
        name: _Racer(name, _calls(name, variant), timer, goal, flush, graph)
        for name, variant in variants.items()
    }
    for _ in range(warmup):
        for racer in racers.values():
            racer.sample()
    if max_seconds is not None:
        started = timer()
        for racer in racers.values():
            racer.sample()
        affordable = int(max_seconds / max(timer() - started, 1e-9))
        rounds = min(rounds, max(6, affordable))
    for racer in racers.values():
        racer.samples.clear()

    shuffler = random.Random(seed)
    orders = [shuffler.sample(names, len(names)) for _ in range(rounds)]
    collecting = gc.isenabled()
    gc.disable()
    try:
        if benchmark is None or benchmark.disabled:
            found = _watched(racers, orders, retake, watch or partial(Watch, device))
            if benchmark is not None:
                benchmark.pedantic(racers[target].run)
        else:
            look = (watch or partial(Watch, device))()
            _pedantic(benchmark, racers, target, orders, look)
            found = look.finish()
    finally:
        if collecting:
            gc.enable()
    return Timings(
        baseline=baseline,
        samples={name: tuple(racer.samples) for name, racer in racers.items()},
        iterations={name: racer.iterations for name, racer in racers.items()},
        device=str(device),
        cold=cold,
        graph=graph,
        resolution=timer.resolution,
        disturbance=found,
    )


def _watched(
    racers: Mapping[str, _Racer],
    orders: Sequence[Sequence[str]],
    retake: int,
    watch: Callable[[], Watch],
) -> Disturbance:
    """Takes all rounds, and again while they were disturbed; says what was seen in the last."""
    while True:
        look = watch()
        for order in orders:
            look.tick()
            for name in order:
                racers[name].sample()
        found = look.finish()
        if not found.reasons or retake < 1:
            return found
        retake -= 1
        for racer in racers.values():
            racer.samples.clear()


def _pedantic(
    benchmark: PytestBenchmark,
    racers: Mapping[str, _Racer],
    target: str,
    orders: Sequence[Sequence[str]],
    look: Watch,
) -> None:
    """Lets pytest-benchmark time the target at its place in each round's order."""
    chosen, turn = racers[target], iter(orders)
    after: list[str] = []

    def before_target() -> None:
        # pytest-benchmark divides a duration by this; with a setup it is fixed to 1 otherwise.
        benchmark.stats.iterations = chosen.iterations
        look.tick()
        order = next(turn)
        place = order.index(target)
        after[:] = order[place + 1 :]
        for name in order[:place]:
            racers[name].sample()
        chosen.prepare()

    def after_target() -> None:
        for name in after:
            racers[name].sample()

    benchmark.pedantic(
        chosen.measure, setup=before_target, teardown=after_target, rounds=len(orders), iterations=1
    )


class _Racer:
    """One variant, with the number of calls that make a sample long enough."""

    def __init__(
        self,
        name: str,
        calls: tuple[Call, ...],
        timer: Clock,
        goal: float,
        flush: Flush | None,
        graph: bool,
    ) -> None:
        self.name, self.calls, self.timer, self.flush = name, calls, timer, flush
        self.graph = graph
        self.samples: list[float] = []
        for call in calls:  # compiles, allocates, fills caches; also what a capture needs
            call()
        once_cold = flush is not None and len(calls) == 1
        self.iterations = len(calls)
        self.run = self._build()
        if once_cold:
            self._check_cold()
        else:
            self._calibrate(goal)

    def prepare(self) -> None:
        """Does what has to be done before a sample and is not part of it."""
        if self.flush is not None:
            self.flush()
        elif len(self.calls) == 1:
            self.calls[0]()

    def measure(self) -> None:
        """Takes one sample and keeps it, in seconds per call."""
        self.samples.append(self._elapsed() / self.iterations)

    def sample(self) -> None:
        """Prepares and measures."""
        self.prepare()
        self.measure()

    def _elapsed(self) -> float:
        start = self.timer()
        self.run()
        return self.timer() - start

    def _calibrate(self, goal: float) -> None:
        while True:
            elapsed = min(self._elapsed(), self._elapsed())
            if elapsed >= goal or self.iterations >= _MAX_ITERATIONS:
                return
            growth = min(10.0, 1.2 * goal / elapsed) if elapsed > 0 else 10.0
            wanted = max(2 * self.iterations, math.ceil(growth * self.iterations))
            self.iterations = -(-wanted // len(self.calls)) * len(self.calls)
            self.run = self._build()

    def _check_cold(self) -> None:
        least = RESOLUTIONS_PER_SAMPLE * self.timer.resolution
        self.prepare()
        if self.timer.device.type == "cuda" or self._elapsed() < least:
            raise ArgumentError(
                mismatch(
                    f"variant {self.name!r} with cold=True",
                    "one call that is too short to be timed alone",
                    "a list of calls on rotating buffers",
                    "timing.rotations says how many buffers it takes.",
                )
            )

    def _build(self) -> Call:
        """Returns a call that does ``iterations`` calls, going through the buffers in turn."""
        calls, passes = self.calls, self.iterations // len(self.calls)
        if len(calls) == 1:
            only = calls[0]

            def run() -> None:
                for _ in range(passes):
                    only()

        else:

            def run() -> None:
                for _ in range(passes):
                    for call in calls:
                        call()

        return _captured(run) if self.graph else run


def _captured(run: Call) -> Call:
    """Captures ``run`` in a CUDA graph; the graph keeps what it allocates for its replays."""
    graph = torch.cuda.CUDAGraph()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries set up their workspaces on the capturing stream
        run()
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph, stream=side):
        run()
    return graph.replay


def _calls(name: str, variant: Variant) -> tuple[Call, ...]:
    if callable(variant):
        return (variant,)
    calls = tuple(variant) if isinstance(variant, Sequence) else ()
    if not calls or not all(callable(call) for call in calls):
        raise ArgumentError(
            mismatch(f"variant {name!r}", variant, "a call without arguments, or a list of such")
        )
    return calls
