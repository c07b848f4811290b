# SPDX-License-Identifier: Apache-2.0
"""Draws rooms.svg, the picture of docs/design.md: the rooms of the package and the way of a call.

python docs/rooms.py

The picture is narrow, so that a phone shows it at the size it is drawn in.
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import NamedTuple

SVG = Path(__file__).with_name("rooms.svg")


class Room(NamedTuple):
    """A floor of the house: what is in it imports from it and from those below alone.

    Attributes:
        title: what it is called.
        what: what it is for.
        modules: packages and modules of hetconv_kernels; the longest that fits counts.
        call: what a call of a layer does here; empty where it does not pass.
    """

    title: str
    what: str
    modules: tuple[str, ...]
    call: str = ""


ROOMS = (
    Room(
        "Commands",
        "what the command hetconv runs",
        ("cli", "demo", "demo_data", "demo_report", "layer_options", "option_types",
         "measure.profiling.command", "measure.profiling.latency", "graph.command",
         "quantization.command", "compression.command", "__main__"),
    ),
    Room(
        "Compression and 8 bits",
        "choose a Support, or Scales; train",
        ("compression", "quantization", "datasets", "models", "factory"),
    ),
    Room(
        "Looking and keeping",
        "why it is fast or slow; files",
        ("measure.profiling", "measure.explain", "measure.explain_quantized",
         "measure.explanation", "io", "file_tensors", "export", "hub", "composition",
         "plain_network", "quantization.qdq", "quantization.qdq_layer", "quantization.onnx_qdq",
         "info"),
    ),
    Room(
        "Networks",
        "trace, convert, compact, order, fuse, plan memory; a planned network runs as one program",
        ("graph",),
    ),
    Room(
        "Layers",
        "hold weights and a Geometry; freeze",
        ("nn", "pruning"),
        "nn.HetConv2d.forward",
    ),
    Room(
        "Calls",
        "checks, derivatives, operators",
        ("functional", "autograd", "derivatives", "transforms", "ops", "geometries", "operands",
         "flops", "ranges", "quantization.engine", "quantization.ops"),
        "functional → autograd → ops",
    ),
    Room(
        "Engines",
        "what each refuses, how long it takes; the fastest is chosen once for a Problem",
        ("backends", "quantization.reference", "quantization.scheme", "quantization.checks",
         "reference", "packing", "masking", "arena", "measure.tuning", "testing"),
        "backends.choose → cpu.fprop",
    ),
    Room(
        "What is computed",
        "which weights exist; one call of them",
        ("support", "masks", "self_grouping", "problem", "pooling", "accuracy", "observers",
         "measure.stats"),
    ),
    Room(
        "Clocks, checks, words",
        "what knows nothing of convolutions",
        ("measure", "files", "colours", "json_output", "openmp", "integers", "errors", "_version"),
    ),
)  # fmt: skip
# What is compiled, below all Python: csrc's folders. capi runs saved programs without Python.
COMPILED = Room(
    "C++", "pointers, sizes, a stream; no torch", ("csrc/cpu", "csrc/cuda", "csrc/capi"), "fprop"
)


def room_of(module: str) -> int:
    """Returns the place of the room that a module is in, by its name without the package.

    Raises:
        KeyError: it is in none.
    """
    found = [
        (len(name), place)
        for place, room in enumerate(ROOMS)
        for name in room.modules
        if module == name or module.startswith(f"{name}.")
    ]
    if not found:
        raise KeyError(module)
    return max(found)[1]


# pixels
WIDTH, MARGIN, PAD, GAP = 360, 8, 10, 12
CALL, PROGRAM = WIDTH - 40, WIDTH - 20  # where the two ways go down
COLUMNS = 40  # letters in a line
INK, MUTED, WAY, OTHER, FILL = "#263238", "#546e7a", "#00796b", "#b26a00", "#eef3f4"


def draw() -> str:
    """Composes the SVG: a floor a room, and how a call, and a planned network's, go down."""
    top, boxes, dots, ends = 44, [], [], []
    for room in (*ROOMS, COMPILED):
        text, height = _room(room, top)
        boxes += text
        if room.call:
            dots.append(top + 20)
        if room.title in ("Networks", "C++"):
            ends.append(top + 20)
        top += height + GAP
    height = top + 4
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
        f'height="{height}" font-family="sans-serif" role="img" '
        'aria-label="The rooms of the package, floor by floor, and the way of one call">',
        "<!-- SPDX-License-Identifier: Apache-2.0; drawn by docs/rooms.py -->",
        f'<rect width="{WIDTH}" height="{height}" rx="8" fill="#ffffff"/>',
        _text(MARGIN + PAD, 18, 13, "●  the way of one call of a layer", WAY),
        _text(MARGIN + PAD, 36, 13, "●  of a planned network: one program", OTHER),
        *boxes,
        *_way(CALL, dots, WAY),
        *_way(PROGRAM, ends, OTHER),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _room(room: Room, top: int) -> tuple[list[str], int]:
    """Draws a room; returns its parts and its height."""
    x, y = MARGIN + PAD, top + 24
    parts = [_text(x, y, 15, room.title, INK, bold=True)]
    for line in textwrap.wrap(room.what, COLUMNS):
        y += 18
        parts.append(_text(x, y, 13, line, MUTED))
    for line in textwrap.wrap("  ".join(_shown(room)), COLUMNS, break_long_words=False):
        y += 17
        parts.append(_text(x, y, 12, line, INK, mono=True))
    if room.call:
        y += 19
        parts.append(_text(x, y, 12, room.call, WAY, mono=True))
    height = y + PAD - top
    box = (
        f'<rect x="{MARGIN}" y="{top}" width="{WIDTH - 2 * MARGIN}" height="{height}" rx="6" '
        f'fill="{FILL}"/>'
    )
    return [box, *parts], height


def _shown(room: Room) -> list[str]:
    """Names the modules of a room, but for those with an underscore."""
    return [name for name in room.modules if not name.startswith("_")]


def _text(
    x: float, y: float, size: int, text: str, fill: str, bold: bool = False, mono: bool = False
) -> str:
    style = ' font-weight="bold"' * bold + ' font-family="monospace"' * mono
    safe = text.replace("&", "&amp;").replace("<", "&lt;")
    return f'<text x="{x}" y="{y}" font-size="{size}" fill="{fill}"{style}>{safe}</text>'


def _way(x: int, stops: list[int], colour: str) -> list[str]:
    line = f'<path d="M{x} {stops[0]}V{stops[-1]}" stroke="{colour}" stroke-width="2"/>'
    return [line, *(f'<circle cx="{x}" cy="{y}" r="5" fill="{colour}"/>' for y in stops)]


if __name__ == "__main__":
    SVG.write_text(draw())
