# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernel for scattered groups on the CPU, with the engine's tables, against the oracle.

Out-of-bounds, uninitialised and racing accesses of shared memory are found on the way (see
tests/native/cuda). The tables are also read by themselves, by the words of scattered.h.
"""

from __future__ import annotations

import dataclasses
import doctest
import re
from pathlib import Path
from typing import Any

import cuda_host
import numpy as np
import pytest
import shim
import torch
from scattered_layers import LAYERS, case_of, scattered, tables_of

from benchmarks import gathers
from benchmarks.supports import self_grouped, trained
from hetconv_kernels import Support, ops
from hetconv_kernels.backends.cuda import Cuda, choice, scattered_lowering, scattered_tiles
from hetconv_kernels.backends.cuda.fields import ScatteredJob, ScatteredSegment
from hetconv_kernels.backends.cuda.scattered_lowering import lower_scattered, scattered_jobs
from hetconv_kernels.backends.cuda.scattered_tiles import choose_scattered
from hetconv_kernels.backends.gpu.devices import GPU_SPECS
from hetconv_kernels.errors import ArgumentError, BackendError
from hetconv_kernels.problem import Geometry, make_geometry

PART = GPU_SPECS[9, 0]
needs_compiler = pytest.mark.skipif(shim.compiler() is None, reason="g++ is not installed here")


# The kernel --------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("name", LAYERS)
def test_it_equals_the_oracle(name: str, tmp_path: Path) -> None:
    shim.run([case_of(name)], tmp_path)


@needs_compiler
@pytest.mark.parametrize("name", ["one-block", "several-blocks", "parts", "pointwise"])
def test_integers_are_exact(name: str, tmp_path: Path) -> None:
    shim.run([case_of(name, integers=True)], tmp_path, seed=3)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_its_epilogue_equals_the_oracle(dtype: torch.dtype, tmp_path: Path) -> None:
    every = ("scale", "shift", "residual")
    cases = [
        case_of(name, dtype=dtype, act=act, epilogue=epilogue)
        for name, act, epilogue in (
            ("one-block", "relu", every),
            ("parts", "gelu", every),
            ("pointwise", "relu6", ("scale", "residual")),
            ("several-blocks", "silu", ("shift",)),
            ("no-weights", "none", ("shift",)),
        )
    ]
    shim.run(cases, tmp_path, seed=7)


@needs_compiler
@pytest.mark.parametrize(
    ("mistake", "words"),
    [("skip-barrier", "race|nobody has written"), ("wrong-address", "outside of")],
    ids=["barrier", "address"],
)
def test_a_mistake_in_the_kernel_is_found(mistake: str, words: str, tmp_path: Path) -> None:
    done = shim.execute([case_of("several-blocks")], tmp_path, (mistake, "1"))
    assert done.returncode
    assert re.search(words, done.stderr), done.stderr


@needs_compiler
def test_a_mistake_in_the_tables_is_found(tmp_path: Path) -> None:
    case = case_of("one-block", integers=True)
    steps = case.arrays["steps"] = case.arrays["steps"].copy()
    steps[0, 3] = steps[0, 4]
    with pytest.raises(AssertionError, match="differ"):
        shim.run([case], tmp_path)


# The tables --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
def test_tables_hold_each_live_weight_once_at_its_channel(name: str) -> None:
    geometry, _, _ = LAYERS[name]
    support, (tables, _) = geometry.support, tables_of(name)
    packed = tables.positions(support)
    assert (np.sort(packed[packed >= 0]) == np.flatnonzero(support.mask)).all()
    taps, at = support.mask[0, 0].size, 0
    written: list[int] = []
    for part, begins in zip(tables.parts.tolist(), tables.begins, strict=True):
        block_begin, block_count, turns, column_begin, count, eights = part
        columns = tables.columns[column_begin : column_begin + count]
        assert (np.diff(columns) > 0).all()
        assert not eights or (columns.reshape(-1, 8)[:, 0] % 8 == 0).all()
        written += columns.tolist()
        assert turns == np.diff(begins).max()
        places = []
        for first, segments in tables.blocks[block_begin : block_begin + block_count]:
            channel_of = np.full(tables.slots, -1)
            for line in tables.segments[first : first + segments]:
                slots = line[ScatteredSegment.SLOT :]
                own = np.flatnonzero(slots >= 0)
                assert (channel_of[slots[own]] == -1).all(), "two channels in a slot"
                channel_of[slots[own]] = line[ScatteredSegment.SEGMENT_INDEX] * 32 + own
            places.append(channel_of)
        for job in range(begins[0], begins[-1]):
            filters = tables.jobs[job, ScatteredJob.COLUMN :]
            assert tables.jobs[job, ScatteredJob.FRAGMENT_BEGIN] * 128 == at
            for b, channel_of in enumerate(places):
                for step in range(tables.spans[job, b], tables.spans[job, b + 1]):
                    size = taps * 32 * 4
                    weights = packed[at : at + size].reshape(taps, 32, 4)
                    at += size
                    channels = channel_of[tables.steps[step]]
                    assert (channels >= 0).all(), "a slot that nothing is brought to"
                    for tap, lane, number in np.argwhere(weights >= 0):
                        column = filters[lane // 4]
                        row = lane % 4 * 2 + number % 2 + number // 2 * 8
                        flat = (columns[column] * support.channels + channels[row]) * taps + tap
                        assert weights[tap, lane, number] == flat
    assert at == len(packed)
    assert sorted(written) == list(range(support.filters))


@pytest.mark.parametrize("name", LAYERS)
def test_tables_of_dgrad_hold_each_live_weight_once(name: str) -> None:
    """Where they lie is seen by what the engine computes."""
    geometry, _, how = LAYERS[name]
    support, turned = geometry.support, geometry.support.transpose()
    tables = lower_scattered(turned, scattered_jobs(turned), *how, back=True)
    packed = tables.positions(support)
    assert (np.sort(packed[packed >= 0]) == np.flatnonzero(support.mask)).all()
    assert sorted(tables.columns.tolist()) == list(range(support.channels))


def test_eights_of_slots_lie_in_banks_of_their_own() -> None:
    """Nearly: of the committed self-grouped layers less than one in ten waits a turn more."""
    for channels in (128, 256, 512):
        support = self_grouped(70, channels, channels, 3, seed=0)
        tables = lower_scattered(support, scattered_jobs(support), 256, 1, 16)
        eights = 2 * len(tables.steps)
        assert eights <= tables.meetings.sum() < 1.1 * eights


@pytest.mark.parametrize(
    ("support", "least"),
    [
        (self_grouped(70, 256, 256, 3, seed=0), 0.75),
        (self_grouped(70, 512, 512, 3, seed=0), 0.75),
        (self_grouped(70, 128, 128, 3, seed=0), 0.65),  # 16 groups of 8 filters, more or less
        (trained(70, 256, 256), 0.75),
        (trained(70, 512, 512), 0.75),
    ],
    ids=["256", "512", "128", "trained-256", "trained-512"],
)
def test_scattered_channels_leave_most_products_useful(support: Support, least: float) -> None:
    """With all channels in a block; the eights of other kernels have a live one everywhere."""
    channels = support.channels
    tables = lower_scattered(support, scattered_jobs(support), channels, 1, 16)
    assert least < tables.useful(support) <= 1
    keep = support.mask.any(axis=(2, 3)).reshape(channels // 8, 8, channels // 8, 8)
    assert keep.any(axis=(1, 3)).mean() > 0.9


@pytest.mark.parametrize(
    ("rows", "together", "reordered", "share"),
    [
        (8, 1, False, 1.0),  # a group a tile, its own channels
        (8, 2, False, 0.5),  # each pair has a channel of both groups
        (8, 2, True, 1.0),
        (16, 1, False, 0.5),  # both groups in a tile
    ],
)
def test_shares_of_useful_products_are_counted(
    rows: int, together: int, reordered: bool, share: float
) -> None:
    """Two groups of eight filters in turn, that keep channels in turn, 32 of 64 each."""
    keep = np.stack([np.arange(64) % 2 == 0, np.arange(64) % 2 == 1])
    support = Support.self_grouped(np.arange(16) % 2, keep, 3)
    assert gathers.useful(support, rows, together, reordered) == share


def test_gathers_of_dgrad_and_of_single_groups_are_counted() -> None:
    """Two groups of four filters; half of the channels are kept by both, the others by one each."""
    keep = np.ones((2, 16), bool)
    keep[0, 8:12] = keep[1, 12:] = False
    support = Support.self_grouped(np.arange(8) // 4, keep, 3)
    # Eight channels by both groups, then four by one and four by the other: sixteen filters each.
    assert gathers.useful_back(support, 8) == 96 / 256
    assert gathers.useful_back(Support.dense(16, 16, 3), 8) == 1.0
    # Four filters of eight, twelve channels of sixteen.
    assert gathers.alone(support, 8) == 96 / 256


def test_the_worked_examples_hold() -> None:
    outcome = doctest.testmod(scattered_lowering)
    assert outcome.attempted
    assert not outcome.failed


def test_the_fewest_steps_of_any_division_into_tiles_are_counted() -> None:
    outcome = doctest.testmod(gathers)
    assert (outcome.attempted, outcome.failed) == (4, 0)
    # Of 28²×128 no division leaves three quarters useful; of 14²×256 the plan does.
    for channels, possible in ((128, False), (256, True)):
        support = self_grouped(70, channels, channels, 3, seed=0)
        least, own = gathers.least_steps(support), gathers.plan_steps(support)
        wanted = int(support.mask.any(axis=(2, 3)).sum()) / 0.75 / (16 * 8)
        assert (least <= wanted, own <= wanted) == (possible, possible)
        assert least <= own < 1.1 * least


def test_odd_layers_are_refused() -> None:
    for filters, channels in ((12, 16), (16, 12)):
        with pytest.raises(ArgumentError, match="12, expected a multiple of 8"):
            scattered_jobs(scattered(filters, channels, 2))


# The choice --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("geometry", "words"),
    [
        (make_geometry(scattered(64, 64, 4), 2, 1), r"stride \(2, 2\)"),
        (make_geometry(scattered(64, 64, 4), 1, 2, 2), r"dilation \(2, 2\)"),
        (make_geometry(scattered(64, 64, 4, 5), 1, 2), "5 x 5, neither"),
        (make_geometry(Support.het(64, 64, 3, p=4), 1, 1), "eights that follow each other"),
        (make_geometry(Support.dense(64, 64, 3), 1, 1), "eights that follow each other"),
    ],
    ids=["stride", "dilation", "kernel", "het", "dense"],
)
def test_layers_for_other_kernels_are_refused(geometry: Geometry, words: str) -> None:
    with pytest.raises(BackendError, match=words):
        choose_scattered(geometry, (14, 14), 128, PART)


def test_little_shared_memory_is_refused() -> None:
    geometry = make_geometry(scattered(256, 256, 8), 1, 1)
    with pytest.raises(BackendError, match="fits in 20000 bytes"):
        choose_scattered(geometry, (14, 14), 128, PART._replace(shared=20000))


def described(support: Support, size: int, verb: str = "fprop", batch: int = 128) -> Any:
    """Describes a layer of images of that size, on the CPU, which knows an H100's data."""
    geometry = make_geometry(support, 1, support.kernel[0] // 2)
    x, w, dy = (
        torch.empty(shape, dtype=torch.bfloat16, device="meta")
        for shape in (
            (batch, support.channels, size, size),
            support.shape,
            (batch, support.filters, size, size),
        )
    )
    first = (x if verb == "fprop" else dy).to(memory_format=torch.channels_last)
    problem = ops.describe(verb, geometry, first, x, w, (size, size))
    return dataclasses.replace(problem, device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("percent", "channels", "size", "verb", "share"),
    [
        (70, 128, 28, "fprop", 0.9),
        (70, 256, 14, "fprop", 0.9),
        (70, 512, 7, "fprop", 0.9),
        (70, 256, 14, "dgrad", 0.99),
        (90, 128, 28, "dgrad", 0.9),
        (90, 256, 14, "dgrad", 0.9),
    ],
)
def test_self_grouped_layers_are_predicted_to_gain(
    percent: int,
    channels: int,
    size: int,
    verb: str,
    share: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of dgrad at 70 % hardly: half of its plan is in vain, and wide groups have 14² flattened."""
    problem = described(self_grouped(percent, channels, channels, 3, seed=0), size, verb)
    seconds = {}
    for only in ("wide", "scattered"):
        monkeypatch.setattr(choice, "ONLY_KERNEL", only)
        problem.support.derived.clear()
        seconds[only] = choice.best_cuda_gather(problem).seconds
    assert seconds["scattered"] < share * seconds["wide"]


def test_its_clocks_are_no_fewer_than_those_of_its_products() -> None:
    for batch in (1, 8, 128):
        geometry = make_geometry(self_grouped(70, 256, 256, 3, seed=0), 1, 1)
        tiling = choose_scattered(geometry, (14, 14), batch, PART)
        assert tiling.executed >= batch * geometry.support.macs(14, 14)
        assert tiling.clocks * PART.processors * PART.rate * 0.625 >= tiling.executed
        assert tiling.shape.shared_bytes <= PART.shared
    assert scattered_tiles.tile_count((14, 14), 9) == 2 * 7 * 2


# The engine --------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("form", ["dense", "live"])
def test_the_engine_runs_it(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = cuda_host.install(monkeypatch, "scattered")
    assert "scattered_fprop" in module.kernels()
    geometry = make_geometry(scattered(40, 64, 3), 1, 1)
    x, w, _ = cuda_host.operands(geometry, torch.bfloat16)
    residual = torch.randn(2, 40, 6, 9).bfloat16().to(memory_format=torch.channels_last)
    scale, shift = torch.randn(40), torch.randn(40)
    mask = torch.as_tensor(np.array(geometry.support.mask))
    weight = w[mask] if form == "live" else w
    problem = ops.describe("fprop", geometry, x, x, weight, (6, 9), act="relu")
    found = Cuda().fprop(problem)(x, weight, scale, shift, residual)
    truth = shim._apply(geometry, x, w, (6, 9), False) * scale.double()[:, None, None]
    truth = torch.relu(truth + shift.double()[:, None, None] + residual.double())
    most = shim._apply(geometry, x.abs(), w.abs(), (6, 9), False)
    most = most * scale.abs().double()[:, None, None] + shift.abs().double()[:, None, None]
    bound = 1.2 * shim.error_bound(most + residual.abs().double(), 64 * 9, torch.bfloat16)
    assert ((found.double() - truth).abs() <= bound).all()


@needs_compiler
@pytest.mark.parametrize("form", ["dense", "live"])
@pytest.mark.parametrize(
    ("kernel", "padding"), [(3, 1), (3, (2, 0, 0, 3)), (3, 3), (1, 0)], ids=str
)
def test_the_engine_runs_dgrad(
    kernel: int, padding: Any, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda_host.install(monkeypatch, "scattered")
    geometry = make_geometry(scattered(72, 40, 3, kernel), 1, padding)
    x, w, dy = cuda_host.operands(geometry, torch.bfloat16)
    mask = torch.as_tensor(np.array(geometry.support.mask))
    weight = w[mask] if form == "live" else torch.where(mask, w, float("nan"))
    problem = ops.describe("dgrad", geometry, dy, dy, weight, (6, 9))
    assert isinstance(choice.best(problem), choice.ScatteredChoice)
    found = Cuda().dgrad(problem)(dy, weight)
    truth = shim._apply(geometry, dy, w, (6, 9), True)
    most = shim._apply(geometry, dy.abs(), w.abs(), (6, 9), True)
    assert found.shape == x.shape
    bound = shim.error_bound(most, 72 * kernel**2, torch.bfloat16)
    assert ((found.double() - truth).abs() <= bound).all()


def test_it_says_what_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "ONLY_KERNEL", "scattered")
    problem = described(scattered(64, 64, 4), 14)
    (note,) = Cuda().notes(problem)
    assert note.startswith("It runs the kernel for scattered groups: ")
    assert 0 < Cuda().efficiency(problem) <= 1


def test_wgrad_is_for_other_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = described(scattered(64, 64, 4), 14, "wgrad")
    monkeypatch.setattr(choice, "ONLY_KERNEL", "scattered")
    assert not isinstance(choice.best(problem), choice.ScatteredChoice)
    assert choice._scattered_reason(problem) == "it has no wgrad."
