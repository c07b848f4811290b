# SPDX-License-Identifier: Apache-2.0
"""Plan against lowerings written out channel by channel."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from strategies import plans, random_mask

from hetconv_kernels import Support
from hetconv_kernels.backends.triton.plan import Block, Plan
from hetconv_kernels.errors import ArgumentError


def segments(p: Plan) -> list[tuple[Any, Any]]:
    """The filters and the steps of each segment."""
    return [
        (
            p.rows[p.segments[s] : p.segments[s + 1]],
            p.steps[p.starts[s] : p.starts[s + 1]],
        )
        for s in range(len(p.segments) - 1)
    ]


def covered(p: Plan, steps: Any) -> list[tuple[int, int, int]]:
    """The columns (channel, dy, dx) that steps read, one entry for each reading."""
    return [
        (int(channel), int(step["dy"]), int(step["dx"]))
        for step in steps
        for channel in p.cols[step["channel"] : step["channel"] + step["count"]]
    ]


def channel_numbers(channels: int, bits: int) -> Any:
    """Rows that spell each channel's number, so that no two channels have the same readers."""
    return np.arange(1, channels + 1) >> np.arange(bits)[:, None] & 1 == 1


def runs_by_hand(mask: Any, block: Block) -> list[tuple[int, int, int, int]]:
    """The runs (dy, dx, channel, count) of a mask [C, KH, KW] in block order, cell by cell."""
    align, gap = block.align, block.gap
    found = []
    for low in range(0, len(mask), block.channels):
        high = min(low + block.channels, len(mask))
        for dy, dx in np.ndindex(mask.shape[1:]):
            runs: list[list[int]] = []
            for start in range(low, high, align):
                end = min(start + align, high)
                if not mask[start:end, dy, dx].any():
                    continue
                if runs and start - runs[-1][1] <= gap:
                    runs[-1][1] = end
                else:
                    runs.append([start, end])
            found += [(dy, dx, start, end - start) for start, end in runs]
    return found


# Structure --------------------------------------------------------------------------------------


@given(plans())
def test_every_filter_and_channel_has_one_place(p: Plan) -> None:
    assert sorted(p.rows) == list(range(p.support.filters))
    assert sorted(p.cols) == list(range(p.support.channels))
    assert p.segments[0] == p.starts[0] == 0
    assert (p.segments[-1], p.starts[-1]) == (len(p.rows), len(p.steps))
    assert len(p.segments) == len(p.starts)
    assert (np.diff(p.segments) >= 1).all()
    assert (np.diff(p.segments) <= p.block.filters).all()


@given(plans())
def test_channels_with_the_same_readers_stand_together(p: Plan) -> None:
    readers = [p.support.mask[:, c].tobytes() for c in p.cols]
    changes = sum(a != b for a, b in itertools.pairwise(readers))
    assert changes == len(set(readers)) - 1


@pytest.mark.parametrize("s", [Support.dense(6, 4, 3), Support.het(10, 7, 3, p=3)], ids=repr)
def test_an_order_that_is_blocked_already_stays(s: Support) -> None:
    p = Plan(s, Block(4, 4))
    assert p.cols.tolist() == list(range(s.channels))
    assert p.rows.tolist() == list(range(s.filters))


@given(plans())
def test_runs_are_those_found_by_hand(p: Plan) -> None:
    for filters, steps in segments(p):
        union = p.support.mask[filters].any(0)[p.cols]
        found = [tuple(int(step[n]) for n in ("dy", "dx", "channel", "count")) for step in steps]
        assert found == runs_by_hand(union, p.block)


@given(plans())
def test_runs_stay_within_a_channel_block_and_are_aligned(p: Plan) -> None:
    align = p.block.align
    first, end = p.steps["channel"], p.steps["channel"] + p.steps["count"]
    assert (p.steps["count"] >= 1).all()
    assert (first // p.block.channels == (end - 1) // p.block.channels).all()
    assert (first % align == 0).all()
    assert ((end % align == 0) | (end == p.support.channels)).all()


@given(plans())
def test_slabs_lie_one_after_another(p: Plan) -> None:
    sizes = p.steps["count"].astype(np.int64) * p.block.filters
    assert p.steps["slab"].tolist() == [int(sizes[:i].sum()) for i in range(len(sizes))]
    assert p.slab_size == sizes.sum()


@given(plans())
def test_every_live_weight_has_exactly_one_slab_position(p: Plan) -> None:
    source = p.slab_source
    assert source.shape == (p.slab_size,)
    assert (source >= -1).all()
    assert sorted(source[source >= 0]) == np.flatnonzero(p.support.mask).tolist()


@given(plans())
def test_slab_positions_are_channel_by_filter_lane(p: Plan) -> None:
    position = np.arange(p.support.mask.size).reshape(p.support.shape)
    for filters, steps in segments(p):
        for step in steps:
            for i, c in enumerate(p.cols[step["channel"] : step["channel"] + step["count"]]):
                at = step["slab"] + i * p.block.filters
                lanes = p.slab_source[at : at + p.block.filters]
                for lane, source in enumerate(lanes):
                    index = (
                        (filters[lane], c, step["dy"], step["dx"]) if lane < len(filters) else ()
                    )
                    live = bool(index) and p.support.mask[index]
                    assert source == (position[index] if live else -1)


@given(plans())
def test_a_segment_reads_every_column_of_its_filters_once(p: Plan) -> None:
    for filters, steps in segments(p):
        columns_read = covered(p, steps)
        assert len(set(columns_read)) == len(columns_read)
        for f in filters:
            assert set(zip(*np.nonzero(p.support.mask[f]), strict=True)) <= set(columns_read)


@given(plans())
def test_merging_never_executes_more_columns(p: Plan) -> None:
    apart = 0
    for group in p.support.groups:
        pieces = -(-len(group.filters) // p.block.filters)
        runs = runs_by_hand(group.mask[p.cols], p.block)
        apart += pieces * sum(count for *_, count in runs)
    assert p.steps["count"].sum() <= apart


@given(plans())
def test_efficiency_is_live_over_executed_multiplications(p: Plan) -> None:
    executed = 0
    for _, steps in segments(p):
        for step in steps:
            lanes = -(-int(step["count"]) // p.block.align) * p.block.align
            executed += lanes * p.block.filters
    assert p.efficiency == (p.support.live / executed if executed else 1.0)
    assert 0 <= p.efficiency <= 1


# Worked examples --------------------------------------------------------------------------------


def test_tails_of_a_dense_support_cost_lanes() -> None:
    p = Plan(Support.dense(6, 5, 3), Block(filters=4, channels=4, align=2))
    assert p.segments.tolist() == [0, 4, 5]
    assert p.steps["count"].reshape(2, 2, 9).tolist() == [[[4] * 9, [2] * 9]] * 2
    assert p.efficiency == 5 / 8


def test_groups_that_fit_the_tile_are_lowered_without_waste() -> None:
    p = Plan(Support.het(16, 8, 3, p=2, order="interleaved"), Block(4, 8, align=4))
    assert p.efficiency == 1.0
    assert p.rows.tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    assert p.cols.tolist() == [*range(0, 16, 2), *range(1, 16, 2)]


def test_small_groups_are_merged() -> None:
    p = Plan(Support.grouped(8, 8, 3, 8), Block(4, 4))
    assert p.segments.tolist() == [0, 4, 8]
    assert p.steps["count"].sum() == 8 * 9


@pytest.mark.parametrize(("gap", "merged"), [(3, True), (4, False)], ids=["broken", "covered"])
def test_groups_that_would_execute_more_together_are_left_apart(gap: int, merged: bool) -> None:
    # Filters 0 and 1 read the two ends; a gap that is covered makes them costlier together.
    mask = np.zeros((8, 6, 1, 1), bool)
    mask[0, 0] = mask[1, 5] = True
    mask[2:, :, 0, 0] = np.repeat(channel_numbers(6, bits=3), 2, axis=0)
    p = Plan(Support.from_mask(mask), Block(filters=2, channels=6, gap=gap))
    assert p.cols.tolist() == list(range(6))
    assert p.segments.tolist()[:3] == ([0, 2, 4] if merged else [0, 1, 2])


@pytest.mark.parametrize(
    ("gap", "runs"),
    [(0, [(0, 2), (4, 2), (10, 1)]), (2, [(0, 6), (10, 1)]), (4, [(0, 11)])],
    ids=["broken", "one-gap-covered", "all-covered"],
)
def test_a_gap_covers_dead_channels_between_runs(gap: int, runs: list[tuple[int, int]]) -> None:
    mask = np.zeros((5, 11, 1, 1), bool)
    mask[0, [1, 4, 10]] = True
    mask[1:, :, 0, 0] = channel_numbers(11, bits=4)
    p = Plan(Support.from_mask(mask), Block(filters=1, channels=12, align=2, gap=gap))
    assert p.cols.tolist() == list(range(11))
    _, steps = segments(p)[0]
    assert steps[["channel", "count"]].tolist() == runs


def test_a_support_without_weights_has_no_steps() -> None:
    p = Plan(Support.from_mask(np.zeros((5, 3, 3, 3), bool)), Block(2, 2))
    assert (len(p.steps), p.slab_size, p.efficiency) == (0, 0, 1.0)
    assert sorted(p.rows) == list(range(5))


def test_plans_of_one_support_are_equal() -> None:
    s = Support.from_mask(random_mask())
    a, b = (Plan(s, Block(2, 2, gap=1)) for _ in range(2))
    assert a.steps.tolist() == b.steps.tolist()
    assert a.rows.tolist() == b.rows.tolist()


def test_repr_gives_the_sizes() -> None:
    text = repr(Plan(Support.dense(6, 5, 3), Block(filters=4, channels=4)))
    for part in ("dense", "filters=4", "segments=2", "steps=36", "efficiency=0.625"):
        assert part in text


@pytest.mark.parametrize(
    "sizes",
    [(0, 4), (4, 0), (4, 4, 0), (4, 4, 1, -1)],
    ids=["filters", "channels", "align", "gap"],
)
def test_a_block_without_extent_is_refused(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ArgumentError, match=r"block: received .* expected positive sizes"):
        Block(*sizes)


def test_a_block_that_its_alignment_does_not_divide_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"received 4, expected a divisor of channels=6"):
        Block(filters=4, channels=6, align=4)
