# SPDX-License-Identifier: Apache-2.0
"""What running a network depth-first could gain: its time by the size of the pieces it is run in.

``python -m benchmarks.depth_first resnet18-het4``

Depth-first, a chain of layers takes one piece of its input through all of them, so that what lies
between two layers stays in a core's cache. The same network on fewer images, or on fewer rows of
one image, has activations as small, and recomputes no halo: what a piece takes, times the number of
pieces, is the least that the chain would take depth-first. One thread, by the clock of the thread.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace
from typing import NamedTuple

import torch

from benchmarks import low_precision
from benchmarks.networks import NETWORKS, NetworkCase
from hetconv_kernels.measure.tables import text_table

_FEWEST_ROWS = 16


class Piece(NamedTuple):
    """What a network takes in pieces of one size.

    Attributes:
        images: of a piece.
        rows: of each of its images.
        seconds: of all pieces of the input, one after another.
    """

    images: int
    rows: int
    seconds: float


def piece_sizes(case: NetworkCase) -> list[tuple[int, int]]:
    """Lists images and rows of ever smaller pieces, from the whole input down by halves.

    Args:
        case: a network and its images. A single one is cut into bands of rows, of 16 at least.
    """
    sizes = [(case.n, case.size)]
    while sizes[-1][0] > 1:
        sizes.append((sizes[-1][0] // 2, case.size))
    while case.n == 1 and sizes[-1][1] >= 2 * _FEWEST_ROWS:
        sizes.append((1, sizes[-1][1] // 2))
    return sizes


def times_by_piece(case: NetworkCase, rounds: int = 7) -> list[Piece]:
    """Times a network on pieces of its input, one thread.

    Args:
        case: a network and its images; its size on a single image has to be a multiple of the
            bands' rows, as a power of two is.
        rounds: calls of each size; the median counts.
    """
    found = []
    for images, rows in piece_sizes(case):
        piece = replace(case, n=images, size=rows, width=case.width or case.size)
        torch.manual_seed(1)
        times = []
        with torch.no_grad():
            network, x = low_precision.our_network(piece, torch.randn(piece.shape))
            for _ in range(rounds + 2):
                begun = time.thread_time()
                network(x)
                times.append(time.thread_time() - begun)
        pieces = (case.n // images) * (case.size / rows)
        found.append(Piece(images, rows, pieces * statistics.median(times[2:])))
    return found


def main() -> None:
    """Prints the table of a network."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("network", choices=[c.name for c in NETWORKS])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    (case,) = (c for c in NETWORKS if c.name == options.network)
    pieces = times_by_piece(case, options.rounds)
    whole = pieces[0].seconds
    rows = [
        (str(p.images), str(p.rows), f"{1e3 * p.seconds:.1f}", f"{whole / p.seconds:.2f}")
        for p in pieces
    ]
    print(text_table(("images", "rows", "ms in all", "× the whole"), rows))


if __name__ == "__main__":
    main()
