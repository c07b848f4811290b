# SPDX-License-Identifier: Apache-2.0
"""Layers that nothing was tuned for: sizes, channels and batches that the table of speed lacks.

They were written down before any of them was measured, by a rule that knows no speed: each Support
meets every size and every number of channels twice, and the batches follow one another. Nobody may
choose a constant, a blocking or a kernel by them; `python -m benchmarks.report --shares` says how
much of the saved work becomes saved time here, and in the committed table.
"""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.cases import Case, SupportSpec, het_case, sg

HELD_OUT_SIZES = (40, 20, 32, 96)  # pixels, of both edges
HELD_OUT_CHANNELS = (48, 96, 160, 320)
HELD_OUT_BATCHES = (1, 2, 4)
HELD_OUT_SUPPORTS = (het_case(4), het_case(8), het_case(16), sg(70), sg(90))


def _held_out() -> Iterator[Case]:
    """Lists the layers: all 3×3 ones, then some pointwise ones that are self-grouped.

    Example: the first Support, HetConv p=4, has the sizes 40, 20, 32 and 96 with 48, 96, 160 and
    320 channels, and then the same sizes with 96, 160, 320 and 48; the second begins there.
    """
    number = 0
    for place, spec in enumerate(HELD_OUT_SUPPORTS):
        for shift in (place, place + 1):
            for row, size in enumerate(HELD_OUT_SIZES):
                channels = HELD_OUT_CHANNELS[(row + shift) % len(HELD_OUT_CHANNELS)]
                yield _layer(number, size, channels, 3, spec)
                number += 1
    for row, size in enumerate(HELD_OUT_SIZES):
        channels = HELD_OUT_CHANNELS[(row + 2) % len(HELD_OUT_CHANNELS)]
        yield _layer(number + row, size, channels, 1, (sg(70), sg(90))[row % 2])


def _layer(number: int, size: int, channels: int, kernel: int, spec: SupportSpec) -> Case:
    n = HELD_OUT_BATCHES[number % len(HELD_OUT_BATCHES)]
    shape = f"{n}x{channels}x{size}" + ("" if kernel == 3 else f"-k{kernel}")
    return Case(f"held-out-{shape}-{spec}", n, channels, channels, size, size, kernel, spec)


HELD_OUT_CASES = tuple(_held_out())
