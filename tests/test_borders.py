# SPDX-License-Identifier: Apache-2.0
"""Tiles of boxes run the steps that some of their pixels need, and skip the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hetconv_kernels as hk
from hetconv_kernels import ops
from hetconv_kernels.backends.gpu import axes as gpu_axes
from hetconv_kernels.backends.triton import borders, choice, lowering
from hetconv_kernels.backends.triton.tiles import Box, Tile
from hetconv_kernels.backends.triton.words import tap_cols, tap_rows
from hetconv_kernels.problem import Problem, make_geometry

SCATTERED = hk.Support.het(20, 24, (3, 5), p=3, order="interleaved")


def described(verb: str, support: hk.Support, batch: int, where: Any, size: Any) -> Problem:
    geometry = make_geometry(support, *where)
    last = {"memory_format": torch.channels_last}
    shapes = (
        (batch, support.channels, *size),
        (batch, support.filters, *geometry.output_size(*size)),
    )
    x, dy = (torch.empty(s, dtype=torch.bfloat16, device="meta").to(**last) for s in shapes)
    w = torch.empty(support.shape, dtype=x.dtype, device="meta")
    first = x if verb == "fprop" else dy
    return ops.describe(verb, geometry, first, first, w, size)


@pytest.mark.parametrize("cut", [None, "words", "classes"])
@pytest.mark.parametrize("verb", ["fprop", "dgrad"])
@pytest.mark.parametrize(
    "where", [(1, 1, 1), (2, 1, 1), (3, (4, 0, 2, 5), (1, 2)), ((1, 2), 9, (4, 6))], ids=str
)
@pytest.mark.parametrize("box", [Box(8, 1, 1), Box(2, 2, 2), Box(1, 1, 4), Box(1, 16, 8)], ids=str)
def test_tiles_run_the_steps_that_some_pixel_needs(
    box: Box, where: Any, verb: str, cut: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Follows the tables as the kernel does, and asks each pixel of a tile what it reads."""
    if cut:
        monkeypatch.setattr(borders, f"MOST_{cut.upper()}", 0)
    p = described(verb, SCATTERED, 8, where, (5, 7))
    axes, image = gpu_axes.axes_of(p)
    classes = gpu_axes.dgrad_classes(p.geometry) if verb == "dgrad" else None
    low = lowering.Lowering(SCATTERED, 16, 16, classes=classes)
    found = borders.borders(low, axes, image, box)
    run, all_steps = 0, 0
    for kind, (rows, cols) in enumerate(axes):
        of_row = found.starts[found.places[kind] :]
        of_col = of_row[-(-rows.pixels // box.rows) :]
        heads = low.starts[kind * low.segments :]
        for h in range(0, rows.pixels, box.rows):
            for w in range(0, cols.pixels, box.cols):
                number = of_row[h // box.rows] + of_col[w // box.cols]
                for segment in range(low.segments):
                    first = number * low.segments + segment
                    words = found.words[found.starts[first] : found.starts[first + 1]]
                    listed = [(int(word >> 32), int(word & 0xFFFFFFFF)) for word in words]
                    assert listed == sorted(listed)
                    own = range(heads[segment], heads[segment + 1])
                    assert all(s in own and low.words[s] == word for s, word in listed)
                    needed = {
                        s for s in own if _reads(low.words[s], rows, cols, (h, w), box, image)
                    }
                    assert needed <= {s for s, _ in listed}
                    # With one list for all, everything is run.
                    assert len(listed) == (len(own) if cut else len(needed))
                    run, all_steps = run + len(listed), all_steps + len(own)
    count = borders.steps_run(low, axes, image)(box)
    assert count >= all_steps if cut == "classes" else count <= all_steps
    assert cut or count == run


def _reads(word: int, rows: Any, cols: Any, first: Any, box: Box, image: Any) -> bool:
    """Whether a pixel of a tile has the tap of a step inside the image, rows and columns apart."""
    return all(
        any(
            0 <= axis.base + i * axis.load + tap * axis.tap < size
            for i in range(at, min(at + edge, axis.pixels))
        )
        for axis, tap, at, edge, size in zip(
            (rows, cols), (tap_rows(word), tap_cols(word)), first, box[1:], image, strict=True
        )
    )


@pytest.mark.parametrize(("size", "taps"), [(7, 7.37), (14, 8.16), (28, 8.58)])
def test_batch_major_boxes_skip_taps_at_the_border(size: int, taps: float) -> None:
    p = described("fprop", hk.Support.dense(8, 8, 3), 128, (1, 1), (size, size))
    axes, image = gpu_axes.axes_of(p)
    low = lowering.Lowering(p.support, 8, 8)
    run = borders.steps_run(low, axes, image)(Box(128, 1, 1))
    assert run / size**2 == pytest.approx(taps, abs=0.005)


def test_boxes_are_chosen_by_the_steps_that_their_tiles_run() -> None:
    chosen = {}
    for size in (7, 14, 56):
        p = described("fprop", hk.Support.dense(64, 64, 3), 128, (1, 1), (size, size))
        low = choice.lowering_of(p, 64, 64, False)
        work = borders.steps_run(low, *gpu_axes.axes_of(p))
        chosen[size] = choice.boxes_of(p, Tile(128, 64, 64, 4), False, work)
    assert chosen[7] == chosen[14] == [Box(128, 1, 1)]
    # Where little is skipped the pixels of a box are neighbours.
    assert chosen[56] == [Box(2, 8, 8)]
