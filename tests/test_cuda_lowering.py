# SPDX-License-Identifier: Apache-2.0
"""The tables of the narrow CUDA kernels, exhaustively: weights, addresses, banks, pixels."""

from __future__ import annotations

import doctest
import re
from enum import IntEnum
from functools import cache
from typing import Any

import numpy as np
import pytest
from tree import ROOT

from hetconv_kernels import Support
from hetconv_kernels.backends.cuda import fields as table_fields
from hetconv_kernels.backends.cuda import narrow_slots
from hetconv_kernels.backends.cuda import windows as windows_module
from hetconv_kernels.backends.cuda.fields import (
    NarrowClass,
    NarrowHead,
    NarrowList,
    WgradHead,
    WgradUnit,
)
from hetconv_kernels.backends.cuda.narrow_lowering import FRAGMENT, BlockShape, Tables, lower_narrow
from hetconv_kernels.backends.cuda.narrow_slots import TILE_RANGES, arrange, ranges
from hetconv_kernels.backends.cuda.narrow_tiles import choose_narrow, choose_wgrad, shared_bytes
from hetconv_kernels.backends.cuda.narrow_wgrad_lowering import UNIT_VALUES, lower_wgrad
from hetconv_kernels.backends.cuda.scattered_lowering import lower_scattered, scattered_jobs
from hetconv_kernels.backends.cuda.wide_lowering import lower_wide
from hetconv_kernels.backends.cuda.wide_wgrad_lowering import (
    lower_wide_wgrad,
    wide_jobs,
    wide_segments,
)
from hetconv_kernels.backends.cuda.windows import Window, windows
from hetconv_kernels.backends.gpu.devices import GPU_SPECS
from hetconv_kernels.errors import ArgumentError, BackendError
from hetconv_kernels.problem import Geometry, make_geometry

SHAPE = BlockShape(8, 16, 4, 1, 64)
HET = Support.het(64, 64, 3, p=8)


def ragged(filters: int, channels: int, groups: int) -> Support:
    rng = np.random.default_rng(filters + channels + groups)
    keep = rng.random((groups, channels)) < 0.3
    return Support.self_grouped(np.sort(rng.integers(0, groups, filters)), keep, 3)


LAYERS = {
    "het8": make_geometry(HET, 1, 1),
    "het4-interleaved": make_geometry(Support.het(64, 64, 3, p=4, order="interleaved"), 1, 1),
    "ragged": make_geometry(ragged(64, 64, 4), 1, 1),
    "wide": make_geometry(Support.het(128, 136, 3, p=8), 1, 1),
    "stride": make_geometry(Support.het(32, 32, 3, p=4), 2, 1),
    "stride-3": make_geometry(Support.het(32, 32, 3, p=4), 3, 0),
    "dilated": make_geometry(Support.grouped(16, 32, 3, 2), (1, 2), 3, (3, 2)),
    "5x5": make_geometry(Support.dense(8, 16, 5), 1, 2),
}
ALL = [(name, back) for name in LAYERS for back in (False, True)]


def lowered(
    name: str, back: bool, shape: BlockShape = SHAPE, item: int = 2
) -> tuple[Geometry, list[Window], Tables]:
    geometry = LAYERS[name]
    found = windows(geometry, (19, 30), back)
    return geometry, found, lower_narrow(geometry.support, found, shape, back, item)


@pytest.mark.parametrize("item", [2, 4])
@pytest.mark.parametrize(("name", "back"), ALL)
def test_every_live_weight_is_packed_once(name: str, back: bool, item: int) -> None:
    geometry, _, tables = lowered(name, back, SHAPE._replace(slots=3), item)
    support = geometry.support
    packed = tables.positions[tables.positions >= 0]
    assert sorted(packed) == np.flatnonzero(support.mask).tolist()
    fragments = tables.heads[..., NarrowHead.FRAGMENT_COUNT]
    assert len(tables.positions) * item == FRAGMENT * int(fragments.sum())
    live = tables.source(support, "live")
    assert sorted(live[live >= 0]) == list(range(support.live))


def test_hetconv_wastes_no_column() -> None:
    """p=8 on 64 channels: 16 halves a tile, 8 steps; the centre of all channels is shared."""
    tables = lower_narrow(HET, windows(LAYERS["het8"], (56, 56), False), SHAPE)
    assert tables.positions.min() >= 0
    begins = tables.lists[0, 0, 0, 0, : NarrowList.LIST_FRAGMENT]
    assert np.diff(begins).tolist() == [4, *[0] * 6, *[4] * 8]
    assert tables.slot_pitch == 0  # channels stay as they are


@pytest.mark.parametrize(("name", "back"), ALL)
def test_every_address_is_in_the_tile(name: str, back: bool) -> None:
    _, found, tables = lowered(name, back)
    pitch = tables.slot_pitch or tables.raw_pitch
    for index, window in enumerate(found):
        halo_h, halo_w = window.halo(SHAPE.height, SHAPE.width)
        assert halo_h * window.line(SHAPE.width) <= tables.halo_pixels
        assert halo_w <= window.line(SHAPE.width)
        for begin, count in tables.heads[index][:, [NarrowHead.WORD_BEGIN, NarrowHead.WORD_COUNT]]:
            words = tables.words[begin : begin + count].view(np.uint32)
            last = pixels(window, SHAPE).max(initial=0) * pitch
            offsets = np.concatenate([words & 0xFFFF, words >> 16])
            assert last + offsets.max(initial=0) < halo_h * window.line(SHAPE.width) * pitch


def pixels(window: Window, shape: BlockShape) -> np.ndarray:
    """The pixel in shared memory at which each pixel of a tile begins, as the kernel counts."""
    i, j = np.divmod(np.arange(shape.height * shape.width), shape.width)
    return i * window.rows.load * window.line(shape.width) + j


@pytest.mark.parametrize(("name", "back"), ALL)
def test_a_word_names_the_pixel_that_its_tap_reads(name: str, back: bool) -> None:
    """The places of the halo's pixels, worked out anew from the pixels themselves."""
    _, found, _ = lowered(name, back)
    for window in found:
        _, halo_w = window.halo(SHAPE.height, SHAPE.width)
        load, line = window.cols.load, window.line(SHAPE.width)
        where = {}  # pixel of the halo -> place in shared memory
        for r in range(window.halo(SHAPE.height, SHAPE.width)[0]):
            for place in range(line):
                residue, q = divmod(place, line // load)
                where[r, q * load + residue] = r * line + place
        for tap in window.taps:
            for m, begin in enumerate(pixels(window, SHAPE)):
                i, j = divmod(m, SHAPE.width)
                row, col = i * window.rows.load + tap.row, j * load + tap.col
                assert col < halo_w
                assert where[row, col] == begin + window.place(tap, SHAPE.width)


@pytest.mark.parametrize("width", [8, 16, 32])
@pytest.mark.parametrize("name", ["het8", "wide", "stride", "stride-3"])
def test_matrices_are_read_without_bank_conflicts(name: str, width: int) -> None:
    """Eight rows of sixteen bytes meet each of the eight groups of four banks once."""
    for back in (False, True):
        shape = BlockShape(4, width, width // 8, 1, 64)
        _, found, tables = lowered(name, back, shape)
        pitch = tables.slot_pitch or tables.raw_pitch
        for window in found:
            rows = pixels(window, shape).reshape(-1, 8) * pitch
            assert (np.sort(rows % 8, axis=1) == np.arange(8)).all()


@pytest.mark.parametrize("warps", [1, 2, 4])
def test_results_are_staged_without_bank_conflicts(warps: int) -> None:
    g, t = np.divmod(np.arange(32), 4)
    pitch = warps * 64 * 2 + 16
    assert len(set((g * pitch // 4 + t) % 32)) == 32


@pytest.mark.parametrize(("name", "back"), ALL)
def test_every_pixel_is_written_once(name: str, back: bool) -> None:
    geometry, _, tables = lowered(name, back)
    size = (19, 30) if back else geometry.output_size(19, 30)
    written = np.zeros(size, int)
    for fields in tables.classes:
        high, wide, tiles_h, tiles_w = fields[:4]
        store_h, store_w, first_h, first_w = fields[NarrowClass.STORE_H :]
        for tile in range(tiles_h * tiles_w):
            row, col = (tile // tiles_w) * SHAPE.height, (tile % tiles_w) * SHAPE.width
            rows = np.arange(row, min(row + SHAPE.height, high)) * store_h + first_h
            cols = np.arange(col, min(col + SHAPE.width, wide)) * store_w + first_w
            written[np.ix_(rows, cols)] += 1
    assert (written == 1).all()


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "wide"])
def test_every_gradient_has_one_place(name: str) -> None:
    geometry = LAYERS[name]
    (window,) = windows(geometry, (19, 30), False)
    tables = lower_wgrad(geometry.support, window, 8, 16, units=5)
    places = tables.positions[tables.positions >= 0]
    assert sorted(places) == np.flatnonzero(geometry.support.mask).tolist()
    assert len(tables.positions) == len(tables.units) * UNIT_VALUES
    assert tables.heads[:, WgradHead.UNIT_COUNT].sum() == len(tables.units)
    assert tables.heads[:, WgradHead.UNIT_COUNT].max() <= 5


def test_ranges_cover_each_half_once() -> None:
    rng = np.random.default_rng(0)
    live = rng.random((3, 8, 200)) < rng.random(200)
    taken = ranges(live)
    covered = np.zeros(live.shape, int)
    for (first, size), own in zip(TILE_RANGES, taken, strict=True):
        covered[:, first : first + size] += own[:, None]
    assert covered.max() == 1
    assert covered[live].all()
    nobody = ~live.any(axis=1)
    assert not covered.any(axis=1)[nobody].any()


def test_channels_stand_as_they_are_where_that_is_as_good() -> None:
    tiles = HET.mask.reshape(8, 8, 64, 3, 3).any(axis=1)
    assert not arrange(tiles).gather
    mixed = HET.permute(channels=np.random.default_rng(0).permutation(64))
    assert arrange(mixed.mask.reshape(8, 8, 64, 3, 3).any(axis=1)).gather
    assert narrow_slots.LANES == 8


@pytest.mark.parametrize("part", GPU_SPECS, ids=lambda part: f"sm_{part[0]}{part[1]}")
@pytest.mark.parametrize("name", ["het8", "wide", "ragged"])
@pytest.mark.parametrize("item", [2, 4])
def test_chosen_tiles_fit(name: str, part: tuple[int, int], item: int) -> None:
    geometry = LAYERS[name]
    found = windows(geometry, (28, 28), False)
    choice = choose_narrow(geometry.support, found, 8, False, GPU_SPECS[part], item=item)
    shape = choice.tables.shape
    for boxes in (False, not choice.no_tma):
        size = shared_bytes(choice.tables, choice.buffers, choice.resident, boxes)
        assert size <= GPU_SPECS[part].shared
    assert shape.height * shape.width <= shape.warps_m * 32
    assert shape.warps_m * shape.warps_n <= 8
    tables, buffers, why = choose_wgrad(geometry.support, found[0], GPU_SPECS[part])
    assert tables.shared_bytes(buffers, not why) <= GPU_SPECS[part].shared
    assert tables.height * tables.width % 16 == 0


@pytest.mark.parametrize(
    ("support", "how", "shape", "back", "words"),
    [
        (HET, (1, 1), SHAPE, False, ""),
        (HET, ((2, 1), 1), SHAPE, False, ""),
        (HET, ((1, 2), 1), SHAPE, False, "adjacent outputs do not read adjacent columns"),
        (HET, (2, 1), SHAPE, True, ""),
        (HET, (3, 1), SHAPE, True, "9 classes of pixels need more than 4 tensor maps"),
        (Support.dense(248, 8, 1), (1,), SHAPE, False, ""),
        (Support.dense(256, 8, 1), (1,), SHAPE, False, "264 places along one axis"),
        (Support.dense(256, 8, 1), (1,), SHAPE._replace(slots=8), False, ""),
        (Support.dense(8, 8, (1, 27)), (1, (0, 130), (1, 10)), SHAPE, False, "276 places"),
    ],
    ids=str,
)
def test_boxes_are_what_a_tensor_map_takes(
    support: Support, how: Any, shape: BlockShape, back: bool, words: str
) -> None:
    found = windows(make_geometry(support, *how), (19, 30), back)
    tables = lower_narrow(support, found, shape, back)
    assert (tables.no_tma == "") == (words == "")
    assert words in tables.no_tma
    for window, sides in zip(found, tables.halos, strict=True):
        assert tuple(sides) == window.halo(shape.height, shape.width)


def test_channels_apart_are_no_box() -> None:
    mask = np.zeros((8, 24, 1, 1), bool)
    mask[:, :8] = mask[:, 16:] = True
    support = Support.from_mask(mask)
    geometry = make_geometry(support)
    found = windows(geometry, (9, 9), False)
    words = "channels that are read together are not adjacent"
    assert lower_narrow(support, found, SHAPE).no_tma == words
    assert lower_narrow(support, found, SHAPE._replace(slots=1)).no_tma == ""
    assert lower_wgrad(support, found[0], 8, 16).no_tma == words
    single = lower_narrow(support, found, SHAPE._replace(slots=1), item=4)
    assert single.no_tma == "boxes are built for numbers of 16 bits"


def test_what_does_not_fit_is_refused() -> None:
    geometry = make_geometry(Support.dense(8, 8, 3), 1, 900, 900)
    found = windows(geometry, (2000, 2000), False)
    with pytest.raises(BackendError, match=r"no tile of .* fits in"):
        choose_narrow(geometry.support, found, 1, False, GPU_SPECS[8, 6])
    with pytest.raises(BackendError, match=r"no tile of .* fits in"):
        choose_wgrad(geometry.support, found[0], GPU_SPECS[8, 6])


def test_channels_that_are_no_multiple_of_eight_are_refused() -> None:
    geometry = make_geometry(Support.dense(12, 16, 3), 1, 1)
    found = windows(geometry, (8, 8), False)
    with pytest.raises(ArgumentError, match="channels: received 12, expected a multiple of 8"):
        lower_narrow(geometry.support, found, SHAPE)
    lower_narrow(geometry.support, found, SHAPE, item=4)
    lower_narrow(geometry.support, windows(geometry, (8, 8), True), SHAPE, back=True)
    with pytest.raises(ArgumentError, match="channels: received 12"):
        lower_wgrad(geometry.support, found[0], 4, 8)
    whole = make_geometry(HET, 1, 1)
    with pytest.raises(ArgumentError, match="pixels of a tile: received 21"):
        lower_wgrad(HET, windows(whole, (8, 8), False)[0], 3, 7)


def test_the_worked_examples_hold() -> None:
    for module in (table_fields, narrow_slots, windows_module):
        outcome = doctest.testmod(module)
        assert outcome.attempted
        assert not outcome.failed


@pytest.mark.parametrize(
    ("header", "enumeration", "ours"),
    [
        ("narrow.h", "ClassField", table_fields.NarrowClass),
        ("narrow.h", "HeadField", table_fields.NarrowHead),
        ("narrow.h", "RoundField", table_fields.NarrowRound),
        ("narrow.h", "ListField", table_fields.NarrowList),
        ("narrow.h", "WgradHeadField", table_fields.WgradHead),
        ("narrow.h", "UnitField", table_fields.WgradUnit),
        ("wide.h", "ClassField", table_fields.WideClass),
        ("wide.h", "HeadField", table_fields.WideHead),
        ("wide.h", "StepsField", table_fields.WideSteps),
        ("wide.h", "UnreadField", table_fields.WideUnread),
        ("wide.h", "BlockField", table_fields.WideBlock),
        ("wide_wgrad.h", "JobField", table_fields.WideWgradJob),
        ("wide_wgrad.h", "WgradBlockField", table_fields.WideWgradBlock),
        ("scattered.h", "PartField", table_fields.ScatteredPart),
        ("scattered.h", "BlockField", table_fields.ScatteredBlock),
        ("scattered.h", "SegmentField", table_fields.ScatteredSegment),
        ("scattered.h", "JobField", table_fields.ScatteredJob),
    ],
)
def test_fields_have_the_names_and_places_of_the_headers(
    header: str, enumeration: str, ours: type[IntEnum]
) -> None:
    *named, (count, _) = enumerations(header)[enumeration].items()
    assert count.endswith("Fields")
    words = r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])"
    found = [(re.sub(words, "_", name[1:]).upper(), place) for name, place in named]
    assert found == [(field.name, field.value) for field in ours]


@pytest.mark.parametrize("name", ["het4-interleaved", "stride"])
def test_lines_are_as_long_as_the_headers_say(name: str) -> None:
    geometry = LAYERS[name]
    found = windows(geometry, (19, 30), False)
    narrow, wgrad = (
        lower_narrow(geometry.support, found, SHAPE),
        lower_wgrad(geometry.support, found[0], 8, 16),
    )
    wide = lower_wide(geometry.support, found)
    segments = wide_segments(geometry.support, found[0])
    wide_wgrad = lower_wide_wgrad(wide_jobs(segments, 12, 4), found[0], 6, 153)
    scattered = lower_scattered(geometry.support, scattered_jobs(geometry.support), 32, 1, 8)
    for header, enumeration, table in (
        ("narrow.h", "ClassField", narrow.classes),
        ("narrow.h", "HeadField", narrow.heads),
        ("narrow.h", "RoundField", narrow.rounds),
        ("narrow.h", "ListField", narrow.lists),
        ("narrow.h", "WgradHeadField", wgrad.heads),
        ("narrow.h", "UnitField", wgrad.units),
        ("wide.h", "HeadField", wide.heads),
        ("wide.h", "BlockField", wide.blocks),
        ("wide_wgrad.h", "JobField", wide_wgrad.jobs),
        ("wide_wgrad.h", "WgradBlockField", wide_wgrad.blocks),
        ("scattered.h", "PartField", scattered.parts),
        ("scattered.h", "BlockField", scattered.blocks),
        ("scattered.h", "SegmentField", scattered.segments),
        ("scattered.h", "JobField", scattered.jobs),
    ):
        assert table.size
        assert table.shape[-1] == [*enumerations(header)[enumeration].values()][-1]


def test_a_line_whose_numbers_do_not_end_at_the_next_field_is_refused() -> None:
    with pytest.raises(IndexError, match=r"DY_PLACE.* would stand at place 3"):
        table_fields.table_line(WgradUnit, STEP_WORD=[5, 6, 7], DY_PLACE=[2, -1])


def enumerations(header: str) -> dict[str, dict[str, int]]:
    """Reads the enumerations of a header of csrc/cuda, and of those that it includes.

    Their values may be sums and products of what stands before them.
    """
    known: dict[str, int] = {}
    found: dict[str, dict[str, int]] = {}
    for name, body in re.findall(r"(?:constexpr int|enum (\w+)) ([^;]*);", code(header)):
        own = found[name] = {}
        for part in re.findall(r"[^,{}]*\w[^,{}]*", body):
            key, _, value = part.strip().partition(" = ")
            own[key] = eval(value, {}, known) if value else 1 + max(own.values(), default=-1)
            known[key] = own[key]
    return found


@cache
def code(header: str) -> str:
    """Reads a header of csrc/cuda without comments, behind those that it includes."""
    text = re.sub(r"//[^\n]*", "", (ROOT / "csrc" / "cuda" / header).read_text())
    return "".join(map(code, re.findall(r'#include "(\w+\.h)"', text))) + text
