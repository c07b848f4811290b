# SPDX-License-Identifier: Apache-2.0
"""The committed table of measured choices, and names of choices. Imports no Triton.

``table.json`` is written by ``python -m benchmarks.tune`` on a GPU. **It is empty: no GPU has
measured an entry yet**, so every choice is the cost model's.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ...problem import Problem
from .tiles import Box, Tile

TABLE_FILE = Path(__file__).with_name("table.json")


@cache
def table_entries() -> dict[str, Any]:
    """Returns the committed entries: key -> {"name": of the choice, "seconds": measured}."""
    return dict(json.loads(TABLE_FILE.read_text())["entries"])


def table_key(problem: Problem, capability: tuple[int, int]) -> str:
    """Names the problems that share an entry: sizes within a factor of two, density within 1/16."""
    geometry, support = problem.geometry, problem.support
    oh, ow = problem.output_size
    pixels = max(1, problem.batch * oh * ow)
    parts = (
        f"sm{capability[0]}{capability[1]}",
        problem.verb,
        str(problem.dtype).removeprefix("torch."),
        "nhwc" if problem.channels_last else "nchw",
        "x".join(map(str, support.shape)),
        "s" + "x".join(map(str, geometry.stride)),
        f"p{pixels.bit_length()}",
        f"d{round(support.density * 16)}",
        f"g{len(support.groups)}",
    )
    return " ".join(parts)


def look_up(problem: Problem) -> str | None:
    """Returns the name of the choice that was measured for such a problem, None if none was."""
    if problem.device.type != "cuda" or not torch.cuda.is_available() or not table_entries():
        return None
    capability = torch.cuda.get_device_capability(problem.device)
    entry = table_entries().get(table_key(problem, capability))
    return None if entry is None else str(entry["name"])


def choice_name(tile: Tile, box: Box | None, reorder: bool, coarse: bool = False) -> str:
    """Names a choice of fprop or dgrad, as ``128x64x64 box 1x8x16 reordered`` or ``coarse``."""
    text = f"{tile.pixels}x{tile.filters}x{tile.channels}"
    if box is not None:
        text += " box " + "x".join(map(str, box))
    return text + " reordered" * reorder + " coarse" * coarse
