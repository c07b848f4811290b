# SPDX-License-Identifier: Apache-2.0
"""What the tiles of the wide CUDA kernel are predicted to take, and which are chosen."""

from __future__ import annotations

import numpy as np
import pytest
from wide_layers import PART, chosen

from hetconv_kernels import Support
from hetconv_kernels.backends.cuda import wide_tiles
from hetconv_kernels.backends.cuda.wide_lowering import lower_wide, wide_windows
from hetconv_kernels.backends.cuda.wide_tiles import tilings
from hetconv_kernels.problem import make_geometry


def test_fewer_weights_are_predicted_to_take_less() -> None:
    clocks = []
    for support in (Support.dense(256, 256, 3), *(Support.het(256, 256, 3, p=p) for p in (2, 4))):
        tiling, _ = chosen(make_geometry(support, 1, 1), (14, 14), 128, False)
        clocks.append(tiling.clocks)
        assert tiling.executed >= 128 * support.macs(14, 14)
        assert tiling.clocks * PART.processors * PART.rate >= tiling.executed
    assert clocks == sorted(clocks, reverse=True)
    assert clocks[0] > 2 * clocks[2]


def test_rounds_count_the_busiest_processor() -> None:
    spans = [(5, np.array([1.0, 2.0])), (1, np.array([4.0]))]
    # In turn over three: 1 2 1 | 2 1 2 | 1 2 1 | 2 4 0.
    assert wide_tiles._rounds(spans, 3) == 9.0
    assert wide_tiles._rounds([], 3) == 0.0
    many = [(2**16, np.array([3.0, 1.0]))]
    assert wide_tiles._rounds(many, 4) == 2**16


def test_bringing_halos_counts_where_a_block_has_few_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the 53 instructions for a pixel that there once were, one tap is brought too slowly."""
    layers = [Support.dense(256, 64, 1), Support.dense(256, 256, 3)]
    clocks = []
    for piece in (wide_tiles._PIECE_CLOCKS, 53.0):
        monkeypatch.setattr(wide_tiles, "_PIECE_CLOCKS", piece)
        monkeypatch.setattr(wide_tiles, "FLAT_PIXELS", ())
        geometries = [make_geometry(s, 1, s.kernel[0] // 2) for s in layers]
        clocks.append([chosen(g, (14, 14), 128, False)[0].clocks for g in geometries])
    assert clocks[1][0] > 1.1 * clocks[0][0]  # L2, at 30 bytes a clock, bounds the other
    assert clocks[1][1] == clocks[0][1]


def test_pixels_in_turn_are_counted_as_the_kernel_takes_them() -> None:
    """Against its loops, written out: bands of eight columns, their rows by each lane's step."""
    for rows, cols in ((8, 8), (30, 10), (34, 17), (13, 12), (9, 15), (1, 25), (5, 3)):
        most = 0
        for lane in range(8):
            turns = 0
            for band in range(0, cols, 8):
                width = min(cols - band, 8)
                step = 8 // width if width <= 4 else 1
                first, column = divmod(lane, width) if width <= 4 else (0, lane)
                if first < step and column < width:
                    turns += len(range(first, rows, step))
            most = max(most, turns)
        (found,) = wide_tiles.producer_clocks(np.array([rows]), np.array([cols]))
        assert found == most * wide_tiles._PIECE_CLOCKS + wide_tiles._BEGIN_CLOCKS


def test_one_warpgroup_multiplies_while_the_other_writes_results(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Results count once, at the end; each time where one of the two has nothing to multiply."""
    clocks: dict[int, list[float]] = {64: [], 256: []}
    monkeypatch.setattr(wide_tiles, "FLAT_PIXELS", ())
    for stage in (0.0, 94.0):
        monkeypatch.setattr(wide_tiles, "_RESULT_CLOCKS", stage)
        for filters, found in clocks.items():
            geometry = make_geometry(Support.dense(256, filters, 3), 1, 1)
            tiling, _ = chosen(geometry, (14, 14), 2 * PART.processors * 2, False)
            found.append(tiling.clocks)
    written = 94.0 * 256 / 32
    assert clocks[256][1] - clocks[256][0] == written
    assert clocks[64][1] - clocks[64][0] > 2 * written


def test_among_equals_two_blocks_share_slabs() -> None:
    """Where arithmetic is all that counts, clusters change nothing that is predicted."""
    geometry = make_geometry(Support.dense(256, 256, 3), 1, 1)
    classes, _ = wide_windows(geometry, (14, 14), False)
    found = list(tilings(lower_wide(geometry.support, classes), classes, (14, 14), 264, PART))
    best = min(t.clocks for t in found)
    assert {t.shape.cluster for t in found if t.clocks == best} == {1, 2}
    assert chosen(geometry, (14, 14), 264, False)[0].shape.cluster == 2


def test_tiles_on_small_images_are_filled() -> None:
    """Four images of 7 × 7 in 32 rows; a column of 56 × 56 in two tiles; the others as lines."""
    for size, shape, pitch in ((7, 256, 0), (14, 224, 15), (28, 208, 29), (56, 224, 0)):
        geometry = make_geometry(Support.dense(512, 512, 3), 1, 1)
        tiling, _ = chosen(geometry, (size, size), 128, False)
        assert (tiling.shape.pixels, tiling.shape.flat_pitch) == (shape, pitch)
        if not pitch:
            assert tiling.classes[0, 4] == {7: 4, 56: 1}[size]


@pytest.mark.parametrize(("size", "useful", "faster"), [(28, 0.93, 1.06), (14, 0.86, 1.1)])
def test_flattened_rows_are_predicted_to_be_faster(size: int, useful: float, faster: float) -> None:
    """Where eights of columns are 7/8 of pixels: by as much as fewer places of tiles are none."""
    support = Support.dense(256, 256, 3)
    classes, _ = wide_windows(make_geometry(support, 1, 1), (size, size), False)
    found = list(tilings(lower_wide(support, classes), classes, (size, size), 128, PART))
    flat, eights = (
        min((t for t in found if bool(t.shape.flat_pitch) == kind), key=lambda t: t.clocks)
        for kind in (True, False)
    )
    assert eights.clocks > faster * flat.clocks
    assert 128 * support.macs(size, size) > useful * flat.executed
    assert flat.executed < eights.executed


def test_rows_are_flattened_only_where_neighbours_are_read() -> None:
    dense, size = Support.dense(64, 64, 3), (14, 14)
    for geometry, back in (
        (make_geometry(dense, 2, 1), False),  # columns two apart
        (make_geometry(dense, 2, 1), True),  # four classes
        (make_geometry(Support.dense(64, 64, 1)), False),
    ):
        classes, _ = wide_windows(geometry, size, back)
        found = wide_tiles.flat_line(classes, 208, size, 8)
        assert (found is None) == (geometry.stride != (1, 1))
    # A kernel of one tap needs no padding: all places are pixels.
    assert found is not None
    assert found[0] == 14
    assert found[1][0, 2] == -(-8 * 14 * 14 // 208)
    small, _ = wide_windows(make_geometry(dense, 1, 1), (6, 6), False)
    assert wide_tiles.flat_line(small, 208, (6, 6), 8) is None  # 7 places a row


def test_rows_of_a_halo_are_counted_as_the_kernel_takes_them() -> None:
    """Against its loops, written out: of each row, eight lanes take places eight apart."""
    for places, pitch, begin in ((268, 29, 0), (268, 29, 28), (255, 15, 7), (224, 14, 0)):
        most = 0
        for lane in range(8):
            at, clocks = lane, wide_tiles._BEGIN_CLOCKS
            while at < places:
                end = at + pitch - (begin + at) % pitch
                turns = len(range(at, min(end, places), 8))
                at += 8 * turns
                clocks += wide_tiles._FLAT_ROW_CLOCKS + turns * wide_tiles._FLAT_PIECE_CLOCKS
            most = max(most, clocks)
        (found,) = wide_tiles.flat_producer_clocks(np.array([places]), pitch)
        assert most <= found < 1.35 * most
