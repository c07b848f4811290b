# SPDX-License-Identifier: Apache-2.0
"""The tables of the wide CUDA kernel: run literally on small layers, checked on large ones.

`wide_twin` runs and checks them, from what wide.h says of their meaning.
"""

from __future__ import annotations

import doctest
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import wide_twin
from wide_layers import ALL, LAYERS, PART, chosen, tiled

from benchmarks.cases import GPU_CASES, Case
from hetconv_kernels import Support
from hetconv_kernels.backends.cuda import (
    eights,
    wide_lowering,
    wide_tiles,
    wide_wgrad_lowering,
)
from hetconv_kernels.backends.cuda.fields import (
    STEP_COUNTS,
    UNREAD,
    WideBlock,
    WideClass,
    WideHead,
    WideUnread,
)
from hetconv_kernels.backends.cuda.wide_lowering import lower_wide, wide_windows
from hetconv_kernels.backends.cuda.wide_tiles import WideTiling, choose_wide, tilings
from hetconv_kernels.backends.cuda.windows import Window
from hetconv_kernels.errors import ArgumentError, BackendError
from hetconv_kernels.problem import make_geometry
from hetconv_kernels.testing import oracle


def executed(name: str, back: bool, tiling: WideTiling, every: tuple[int, int]) -> Any:
    """Runs the tables on random integers; returns y and its truth."""
    geometry, size = LAYERS[name]
    support, batch = geometry.support, 5
    out = geometry.output_size(*size)
    rng = np.random.default_rng(1)
    c, f = support.channels, support.filters
    read, written = ((f, *out), (c, *size)) if back else ((c, *size), (f, *out))
    x = rng.integers(-4, 5, (batch, *read)).astype(np.float64)
    w = rng.integers(-4, 5, support.shape).astype(np.float64)
    where = tiling.tables.source(support, "contiguous")
    slabs = np.where(where < 0, 0.0, w.reshape(-1)[where])
    y = np.full((batch, *written[1:], written[0]), np.nan)
    seen = x.transpose(0, 2, 3, 1)[:, :: every[0], :: every[1]]
    wide_twin.execute(tiling, seen, slabs, y)
    image = torch.zeros(batch, c, *size, dtype=torch.float64, requires_grad=True)
    given, weights = torch.tensor(x), torch.tensor(w)
    if back:
        (exact,) = torch.autograd.grad(oracle(image, weights, geometry), image, given)
    else:
        exact = oracle(given, weights, geometry)
    return y.transpose(0, 3, 1, 2), exact.numpy()


@pytest.mark.parametrize(("name", "back"), ALL)
def test_tables_mean_the_convolution(name: str, back: bool) -> None:
    """Integers in float64: equal, not near."""
    found, every = tiled(name, back)
    for tiling in found:
        if tiling.shape.cluster == 1:
            y, exact = executed(name, back, tiling, every)
            assert (y == exact).all()


@pytest.mark.parametrize("batch", [0, 1, 3, 8])
@pytest.mark.parametrize(("name", "back"), ALL)
def test_small_layers_pass_the_check(name: str, back: bool, batch: int) -> None:
    geometry, size = LAYERS[name]
    found, every = tiled(name, back, batch)
    assert found
    for tiling in found:
        wide_twin.check(tiling, geometry, size, batch, back, every)


@pytest.mark.parametrize("seed", range(24))
def test_random_layers_pass_the_check_and_mean_the_convolution(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(seed)
    geometry = None
    while geometry is None:
        kernel, size = rng.integers(1, 5, 2), rng.integers(1, 24, 2)
        stride, dilation = rng.integers(1, 3, 2), rng.integers(1, 4, 2)
        pads = rng.integers(0, 5, 4)
        reach = (kernel - 1) * dilation + 1
        if (size + pads[::2] + pads[1::2] >= reach).all():
            c, f = 8 * rng.integers(1, 12, 2)
            rows = rng.random((rng.integers(1, 6), c, *kernel)) < rng.choice([0.1, 0.5, 1.0])
            support = Support.from_mask(rows[np.sort(rng.integers(0, len(rows), f))])
            geometry = make_geometry(support, stride.tolist(), pads.tolist(), dilation.tolist())
    monkeypatch.setitem(LAYERS, "random", (geometry, (int(size[0]), int(size[1]))))
    for back in (False, True):
        found, every = tiled("random", back)
        for tiling in found:
            wide_twin.check(tiling, geometry, LAYERS["random"][1], 5, back, every)
        y, exact = executed("random", back, found[0], every)
        assert (y == exact).all()


@pytest.mark.parametrize("back", [False, True], ids=["fprop", "dgrad"])
@pytest.mark.parametrize("case", [c for c in GPU_CASES if c.n == 128], ids=lambda case: case.name)
def test_tables_of_benchmarks_pass_the_check(case: Case, back: bool) -> None:
    geometry = make_geometry(case.build_support(), case.stride, case.k // 2)
    tiling, every = chosen(geometry, (case.h, case.w), case.n, back)
    assert tiling.shape.shared_bytes <= 227 * 1024
    wide_twin.check(tiling, geometry, (case.h, case.w), case.n, back, every)


@pytest.mark.parametrize("back", [False, True], ids=["fprop", "dgrad"])
@pytest.mark.parametrize(
    "layer", [(64, 256, 56, 1), (256, 64, 56, 1), (256, 512, 56, 2), (1024, 2048, 14, 2)], ids=str
)
def test_tables_of_pointwise_layers_pass_the_check(layer: tuple[int, ...], back: bool) -> None:
    c, f, size, stride = layer
    geometry = make_geometry(Support.dense(c, f, 1), stride)
    tiling, every = chosen(geometry, (size, size), 32, back)
    assert every == ((1, 1) if back or stride == 1 else (2, 2))
    wide_twin.check(tiling, geometry, (size, size), 32, back, every)
    assert len(tiling.tables.steps) * 4096 == c * f


# What the check would find -----------------------------------------------------------------------


def broken(tiling: WideTiling, mistake: str, window: Window) -> WideTiling:
    """Makes one mistake in the tables."""
    tables, classes = tiling.tables, tiling.classes.copy()
    steps, blocks, rows = tiling.steps.copy(), tables.blocks.copy(), tables.rows.copy()
    tap = tables.tap.copy()
    match mistake:
        case "step":
            steps[3] += 1
        case "far-step":
            steps[3] += 10**4
        case "taps-swapped":
            tap[[3, 4]] = tap[[4, 3]]
        case "channel":
            blocks[0, 0] = blocks[0, 1]
        case "run-twice":
            rows[0, 0, 1] = rows[0, 0, 0]
        case "step-left-out":
            blocks[0, STEP_COUNTS[0]] -= 1
        case "block-left-out":
            heads = tables.heads.copy()
            heads[0, 0, WideHead.BLOCK_COUNT] -= 1
            return tiling._replace(tables=replace(tables, heads=heads))
        case "border-left-out":
            blocks[0, WideBlock.UNREAD + WideUnread.LEFT] += 1
        case "border-below-left-out":
            blocks[-1, WideBlock.UNREAD + WideUnread.BOTTOM] += 1
        case "base":
            classes[0, WideClass.BASE_H] += 1
        case "images-too-near":
            classes[0, WideClass.IMAGE_PITCH] -= 1
        case "tile-left-out":
            classes[0, WideClass.TILES_W] -= 1
        case "first":
            classes[0, WideClass.FIRST_H] += 1
        case "halo":
            classes[0, WideClass.HALO_H] -= 1
        case "pitch":
            return tiling._replace(shape=tiling.shape._replace(plane_pitch=336))
        case "rows-too-near":
            flat_pitch = tiling.shape.flat_pitch - 1
            steps = wide_tiles.flat_steps(tables, window, flat_pitch)
            return tiling._replace(steps=steps, shape=tiling.shape._replace(flat_pitch=flat_pitch))
    tables = replace(tables, blocks=blocks, rows=rows, tap=tap)
    return tiling._replace(tables=tables, steps=steps, classes=classes)


MISTAKES = (
    *("step", "far-step", "taps-swapped", "channel", "run-twice", "step-left-out"),
    *("border-left-out", "border-below-left-out", "block-left-out", "base", "tile-left-out"),
    *("images-too-near", "first", "halo", "pitch"),
)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_tables_is_found(mistake: str) -> None:
    geometry, size = make_geometry(Support.het(128, 128, 3, p=2), 1, 1), (7, 7)
    classes, _ = wide_windows(geometry, size, False)
    tiling = next(tilings(lower_wide(geometry.support, classes), classes, size, 8, PART))
    wide_twin.check(tiling, geometry, size, 8, False)
    assert tiling.classes[0, WideClass.IMAGES] == 4  # a stack
    with pytest.raises((AssertionError, IndexError)):
        wide_twin.check(broken(tiling, mistake, classes[0]), geometry, size, 8, False)


@pytest.mark.parametrize("mistake", [*MISTAKES, "rows-too-near"])
def test_a_mistake_in_the_tables_of_flattened_rows_is_found(mistake: str) -> None:
    geometry, size = make_geometry(Support.het(128, 128, 3, p=2), 1, 1), (9, 14)
    classes, _ = wide_windows(geometry, size, False)
    found = tilings(lower_wide(geometry.support, classes), classes, size, 8, PART)
    tiling = next(t for t in found if t.shape.flat_pitch)
    assert tiling.shape.flat_pitch == 15
    wide_twin.check(tiling, geometry, size, 8, False)
    if mistake == "tile-left-out":
        tiling.classes[0, 2] -= 1
    with pytest.raises((AssertionError, IndexError)):
        wide_twin.check(broken(tiling, mistake, classes[0]), geometry, size, 8, False)


# How filters and channels are put together -------------------------------------------------------


@pytest.mark.parametrize(
    ("support", "steps"),
    [
        (Support.dense(512, 512, 3), 576),
        (Support.het(256, 256, 3, p=4), 48),
        (Support.het(512, 512, 3, p=8), 128),
        (Support.grouped(256, 512, 3, 4), 72),
        (Support.dense(128, 192, 3), 54),
    ],
    ids=str,
)
def test_whole_groups_waste_nothing(support: Support, steps: int) -> None:
    for back in (False, True):
        classes, _ = wide_windows(make_geometry(support, 1, 1), (14, 14), back)
        tables = lower_wide(support, classes, back)
        assert len(tables.steps) == steps
        assert tables.size == support.live


def test_blocks_of_the_tap_in_the_middle_bring_nothing_around_the_tile() -> None:
    classes, _ = wide_windows(make_geometry(Support.het(256, 256, 3, p=4), 1, 1), (14, 14), False)
    blocks = lower_wide(Support.het(256, 256, 3, p=4), classes).blocks
    few = blocks[:, STEP_COUNTS].sum(axis=1) == 2
    assert few.sum() == 4
    assert (blocks[few, UNREAD] == 1).all()
    assert (blocks[~few, UNREAD] == 0).all()


def test_runs_of_one_group_stand_together_wherever_they_are() -> None:
    """Groups whose runs of eight filters and of eight channels are interleaved cost no more."""
    rng = np.random.default_rng(3)
    mixed = [np.arange(256).reshape(-1, 8)[rng.permutation(32)].reshape(-1) for _ in range(2)]
    support = Support.het(256, 256, 3, p=4)
    permuted = Support.from_mask(support.mask[mixed[0]][:, mixed[1]])
    classes, _ = wide_windows(make_geometry(support, 1, 1), (14, 14), False)
    assert lower_wide(permuted, classes).size == support.live


def test_ragged_groups_cost_less_than_dense() -> None:
    classes, _ = wide_windows(make_geometry(Support.dense(512, 512, 3), 1, 1), (14, 14), False)
    sizes = np.array([80, 48, 128, 96, 104, 56])
    keep = np.zeros((6, 512), bool)
    for group in range(6):
        keep[group, 64 * group : 64 * group + 200] = True
    support = Support.self_grouped(np.repeat(np.arange(6), sizes), keep, 3)
    tables = lower_wide(support, classes)
    assert support.live < tables.size < 0.7 * 512 * 512 * 9


def test_eights_hold_everything_once_and_never_cost_more() -> None:
    rng = np.random.default_rng(0)

    def count(sets: Any) -> Any:
        return sets.sum(axis=(1, 2)).astype(float)

    for things in (1, 7, 8, 9, 40, 300):
        needs = rng.random((things, 4, 3)) < 0.3
        sets = eights.cluster_by_eight(needs, count)
        assert np.sort(np.concatenate(sets)).tolist() == list(range(things))
        assert max(len(members) for members in sets) <= 8
        plain = [np.arange(a, min(a + 8, things)) for a in range(0, things, 8)]
        assert eights.cost_together(needs, sets, count) <= eights.cost_together(needs, plain, count)


def test_long_and_short_blocks_alternate() -> None:
    support = Support.het(512, 512, 3, p=4)
    classes, _ = wide_windows(make_geometry(support, 1, 1), (7, 7), False)
    tables = lower_wide(support, classes)
    begin, count = tables.heads[0, 0]
    sums = tables.blocks[begin : begin + count, STEP_COUNTS].sum(axis=1)
    assert sums[0] > sums[1]


# Refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize(("c", "f", "name"), [(12, 16, "channels: received 12"),
                                              (16, 12, "filters: received 12")])  # fmt: skip
def test_what_is_no_multiple_of_eight_is_refused(c: int, f: int, name: str, back: bool) -> None:
    geometry = make_geometry(Support.dense(c, f, 3), 1, 1)
    classes, _ = wide_windows(geometry, (8, 8), back)
    with pytest.raises(ArgumentError, match=name + ", expected a multiple of 8"):
        lower_wide(geometry.support, classes, back)


def test_a_stride_of_three_is_refused_where_pixels_between_are_read() -> None:
    geometry = make_geometry(Support.dense(8, 8, 3), 3, 1)
    with pytest.raises(BackendError, match="stride of wide groups: received 3, expected 1 or 2"):
        wide_windows(geometry, (20, 20), False)
    assert len(wide_windows(geometry, (20, 20), True)[0]) == 9


def test_too_large_a_halo_and_too_many_steps_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    geometry = make_geometry(Support.dense(8, 8, 3), 1, 900, 900)
    classes, _ = wide_windows(geometry, (2000, 2000), False)
    tables = lower_wide(geometry.support, classes)
    with pytest.raises(BackendError, match=r"no tile with its halo.* fits in 232448 bytes"):
        choose_wide(tables, classes, (2000, 2000), 1, PART)
    monkeypatch.setattr(wide_lowering, "_MOST_STEPS", 8)
    with pytest.raises(BackendError, match="steps of wide groups: received 9, expected at most 8"):
        lower_wide(geometry.support, classes)


def test_a_halo_beyond_32_bits_is_refused_too() -> None:
    """Its size would wrap to one that fits."""
    geometry = make_geometry(Support.dense(8, 8, 3), 1, 2**29, 2**29)
    with pytest.raises(BackendError, match=r"no tile with its halo"):
        chosen(geometry, (64, 64), 1, False)


def test_more_tiles_than_32_bits_count_are_refused() -> None:
    geometry = make_geometry(Support.dense(8, 8, 1))
    with pytest.raises(BackendError, match="with at most 1073741824 tiles"):
        chosen(geometry, (1, 1), 2**37, False)
    assert chosen(geometry, (1, 1), 2**30, False)[0].classes[0, 4] == 32


def test_the_worked_examples_hold() -> None:
    for module in (eights, wide_lowering, wide_tiles, wide_wgrad_lowering):
        outcome = doctest.testmod(module)
        assert outcome.attempted
        assert not outcome.failed
