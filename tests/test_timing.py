# SPDX-License-Identifier: Apache-2.0
"""The clock measures work and not queues, and the record says what was measured.

Almost everything runs on a clock whose time is made of the calls themselves, so that it is exact.
The self-test that reads a real clock is the only one, as the rule-book has it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hetconv_kernels.errors import ArgumentError
from hetconv_kernels.measure import timing


class World:
    """A machine whose time passes only by work: a host, and a device with a queue."""

    def __init__(self) -> None:
        self.time = 0.0
        self.device_free_at = 0.0
        self.log: list[str] = []

    def clock(self, **options: Any) -> timing.Clock:
        options = {"resolution": 1e-6, "synchronize": self.synchronize} | options
        return timing.Clock("cpu", now=lambda: self.time, **options)

    def work(self, name: str, seconds: float) -> Callable[[], None]:
        """A call that keeps the host busy."""

        def call() -> None:
            self.log.append(name)
            self.time += seconds

        return call

    def launch(self, seconds: float, overhead: float = 1e-6) -> Callable[[], None]:
        """A call that only queues work on the device."""

        def call() -> None:
            self.time += overhead
            self.device_free_at = max(self.device_free_at, self.time) + seconds

        return call

    def synchronize(self) -> None:
        self.time = max(self.time, self.device_free_at)


@pytest.fixture
def world() -> World:
    return World()


def test_a_variant_that_works_twice_as_long_reads_two(world: World) -> None:
    timings = timing.interleaved(
        {"once": world.work("once", 1e-3), "twice": world.work("twice", 2e-3)},
        timer=world.clock(),
    )
    assert timings.ratio("twice", "once").value == pytest.approx(2.0)
    assert timings.speedup("twice").value == pytest.approx(0.5)
    assert timings.difference("twice", "once").value == pytest.approx(1e-3)
    assert timings.fastest() == "once"


def test_drift_that_hits_all_variants_cancels_in_the_paired_ratio(world: World) -> None:
    def drifting(seconds: float) -> Callable[[], None]:
        def call() -> None:  # the machine gets three times slower on the way
            world.time += seconds * (1 + 2 * min(world.time, 1.0))

        return call

    timings = timing.interleaved(
        {"once": drifting(1e-3), "twice": drifting(2e-3)}, rounds=100, timer=world.clock()
    )
    spread = timings.quantile("once", 1.0) / timings.quantile("once", 0.0)
    assert spread > 1.3
    assert timings.ratio("twice", "once").value == pytest.approx(2.0, rel=0.02)


def test_the_queue_of_an_asynchronous_device_is_not_what_is_measured(world: World) -> None:
    variants = {"once": world.launch(1e-3), "twice": world.launch(2e-3)}
    timings = timing.interleaved(variants, timer=world.clock())
    assert timings.median("once") == pytest.approx(1e-3, rel=0.01)
    assert timings.ratio("twice", "once").value == pytest.approx(2.0, rel=0.01)
    # The trap: the same with a clock that does not wait sees launches, all alike.
    blind = timing.interleaved(variants, timer=world.clock(synchronize=lambda: None))
    assert blind.ratio("twice", "once").value == pytest.approx(1.0, rel=0.01)


def test_self_test_on_the_real_clock() -> None:
    timings = timing.interleaved(
        {"once": lambda: time.sleep(0.02), "twice": lambda: time.sleep(0.04)}, rounds=9, warmup=1
    )
    assert timings.ratio("twice", "once").value == pytest.approx(2.0, rel=0.05)


@pytest.mark.gpu
@pytest.mark.parametrize("graph", [False, True], ids=["launches", "graph"])
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_self_test_with_asynchronous_launches(graph: bool) -> None:
    cycles = 2_000_000
    timings = timing.interleaved(
        {
            "once": lambda: torch.cuda._sleep(cycles),
            "twice": lambda: torch.cuda._sleep(2 * cycles),
        },
        device="cuda",
        graph=graph,
    )
    assert timings.ratio("twice", "once").value == pytest.approx(2.0, rel=0.05)


@pytest.mark.parametrize("seconds", [1e-7, 3e-5, 5e-3])
def test_samples_are_long_enough_for_the_clock(world: World, seconds: float) -> None:
    timings = timing.interleaved(
        {"short": world.work("short", seconds)}, min_time=0.0, timer=world.clock(resolution=1e-5)
    )
    assert timings.iterations["short"] * seconds >= 100 * 1e-5 * 0.999
    assert timings.iterations["short"] <= max(1, 10 * 100 * 1e-5 / seconds)
    assert timings.median("short") == pytest.approx(seconds)


def test_min_time_lengthens_samples(world: World) -> None:
    timings = timing.interleaved(
        {"short": world.work("short", 1e-4)}, min_time=0.1, timer=world.clock()
    )
    assert timings.iterations["short"] >= 1000


def test_every_round_takes_every_variant_in_changing_order(world: World) -> None:
    names = "abcd"
    variants = {name: world.work(name, 1e-3) for name in names}

    def orders(seed: int) -> list[str]:
        world.log.clear()
        timing.interleaved(
            variants, rounds=12, warmup=0, min_time=0, timer=world.clock(), seed=seed
        )
        turns = world.log[-2 * 12 * len(names) :]  # an untimed call, then the sample
        assert turns[::2] == turns[1::2]
        measured = "".join(turns[1::2])
        return [measured[i : i + len(names)] for i in range(0, len(measured), len(names))]

    first = orders(0)
    assert all(sorted(order) == list(names) for order in first)
    assert len(set(first)) > 1
    assert orders(0) == first
    assert orders(1) != first


def test_max_seconds_lowers_the_rounds_but_keeps_an_interval(world: World) -> None:
    variants = {"a": world.work("a", 0.1), "b": world.work("b", 0.1)}
    few = timing.interleaved(variants, rounds=50, max_seconds=4.1, timer=world.clock())
    assert len(few.samples["a"]) == 10  # of two turns, each with an untimed call before it
    least = timing.interleaved(variants, rounds=50, max_seconds=0.01, timer=world.clock())
    assert len(least.samples["a"]) == 6
    assert least.speedup("b").confidence >= 0.95


def test_rotating_buffers_are_all_used(world: World) -> None:
    calls = [world.work(f"buffer{i}", 1e-3) for i in range(3)]
    timings = timing.interleaved(
        {"a": calls, "b": world.work("b", 1e-3)},
        rounds=1,
        warmup=0,
        min_time=0.0,
        timer=world.clock(),
    )
    assert timings.iterations["a"] % 3 == 0
    assert world.log[-4:] in (["buffer0", "buffer1", "buffer2", "b"], ["b", *world.log[-3:]])
    assert timings.median("a") == pytest.approx(1e-3)


def test_cold_flushes_before_each_sample_and_outside_of_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "Flush", lambda device: world.work("flush", 0.5))
    timings = timing.interleaved(
        {"a": world.work("a", 1e-3), "b": world.work("b", 1e-3)},
        rounds=5,
        warmup=0,
        cold=True,
        timer=world.clock(),
    )
    measured = world.log[-20:]
    assert measured[0::2] == ["flush"] * 10
    assert timings.iterations == {"a": 1, "b": 1}
    assert timings.median("a") == pytest.approx(1e-3)
    with pytest.raises(ArgumentError, match=r"too short.*rotating buffers"):
        timing.interleaved({"a": world.work("a", 1e-6)}, cold=True, timer=world.clock())


def test_clock_is_one_object_per_device_and_fits_pytest_benchmark() -> None:
    assert timing.clock() is timing.clock("cpu")
    assert timing.clock().__name__ == "synchronising_clock"
    assert 0 < timing.clock().resolution < 1e-4
    assert timing.clock()() <= timing.clock()()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"variants": {}}, "0 variants"),
        ({"rounds": 0}, "0 rounds"),
        ({"baseline": "c"}, "baseline: received 'c'"),
        ({"target": "c"}, "target: received 'c'"),
        ({"graph": True}, "CUDA device"),
        ({"variants": {"a": []}}, "a call without arguments"),
        ({"variants": {"a": 3}}, "a call without arguments"),
    ],
    ids=["no-variants", "no-rounds", "baseline", "target", "graph-on-cpu", "no-calls", "no-call"],
)
def test_bad_input(world: World, arguments: dict[str, Any], message: str) -> None:
    options = {"variants": {"a": world.work("a", 1e-3)}, "timer": world.clock()} | arguments
    with pytest.raises(ArgumentError, match=message):
        timing.interleaved(**options)


class FakeBenchmark:
    """What pytest-benchmark's pedantic does, as far as `interleaved` relies on it."""

    def __init__(self, timer: timing.Clock, disabled: bool = False) -> None:
        self.timer, self.disabled = timer, disabled
        self.durations: list[float] = []
        self.stats: Any = None

    def pedantic(self, target: Callable[[], object], **options: Any) -> object:
        if self.disabled:
            return target()
        self.stats = type("Metadata", (), {"iterations": 1})()
        for _ in range(options["rounds"]):
            options["setup"]()
            start = self.timer()
            target()
            self.durations.append((self.timer() - start) / self.stats.iterations)
            options["teardown"]()
        return None


def test_pytest_benchmark_times_the_target_in_its_turn(world: World) -> None:
    clock = world.clock()
    benchmark = FakeBenchmark(clock)
    variants = {
        "dense": world.work("dense", 2e-5),
        "ours": world.work("ours", 1e-5),
        "other": world.work("other", 3e-5),
    }
    timings = timing.interleaved(
        variants, baseline="dense", rounds=10, timer=clock, benchmark=benchmark
    )
    assert benchmark.durations == pytest.approx([1e-5] * 10)
    assert timings.samples["ours"] == pytest.approx(benchmark.durations)
    assert {len(samples) for samples in timings.samples.values()} == {10}
    assert timings.speedup("ours").value == pytest.approx(2.0)


def test_disabled_pytest_benchmark_still_gives_timings(world: World) -> None:
    benchmark = FakeBenchmark(world.clock(), disabled=True)
    timings = timing.interleaved(
        {"a": world.work("a", 1e-3)}, rounds=4, timer=world.clock(), benchmark=benchmark
    )
    assert len(timings.samples["a"]) == 4
