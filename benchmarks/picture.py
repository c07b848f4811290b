# SPDX-License-Identifier: Apache-2.0
"""Draws speedup.svg, README's picture: the measured speed-up of each layer against its MAC ratio.

`python -m benchmarks.readme` writes it, from a committed results file. It has no date and no font
of its own, so that the same results give the same bytes.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import summary

SVG = Path(__file__).resolve().parents[1] / "docs" / "speedup.svg"
_LEFT, _TOP, _WIDTH, _HEIGHT = 64, 24, 560, 340  # of the axes, in pixels
_MOST, _LEAST = 40.0, 0.4  # both axes are logarithmic; x begins at 1
# Colour and name of each kind of Support, legible without red and green.
DRAWN_KINDS = {
    "het": ("#00796b", "HetConv"),
    "self_group": ("#e69f00", "self-grouping"),
    "trained_group": ("#c2569b", "self-grouping, trained"),
    "grouped": ("#3f6fb5", "grouped"),
    "other": ("#777777", "others"),
}


def points(name: str = summary.LAYERS_FILE) -> Iterator[tuple[str, float, float, dict[str, Any]]]:
    """Lists the timed layers in float32: kind, MAC ratio, speed-up over dense, row."""
    for row in summary.results(name)["rows"]:
        case = row["case"]
        if row.get("dense") and case["dtype"] == "float32" and not case["amp"]:
            kind = case["support"]["kind"]
            known = kind if kind in DRAWN_KINDS else "other"
            yield known, row["dense_macs"] / row["macs"], row["dense"]["ratio"], row


def _x(ratio: float) -> float:
    return _LEFT + _WIDTH * min(max(math.log(ratio) / math.log(_MOST), 0.0), 1.0)


def _y(speedup: float) -> float:
    share = math.log(speedup / _LEAST) / math.log(_MOST / _LEAST)
    return _TOP + _HEIGHT * (1 - min(max(share, 0.0), 1.0))


def draw_svg(name: str = summary.LAYERS_FILE) -> str:
    """Composes the SVG."""
    shown = list(points(name))
    right, bottom = _LEFT + _WIDTH, _TOP + _HEIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {right + 24} {bottom + 92}" '
        f'width="{right + 24}" height="{bottom + 92}" font-family="sans-serif" font-size="13" '
        'role="img" aria-label="Measured speed-up of layers against their MAC ratio">',
        "<!-- SPDX-License-Identifier: Apache-2.0; drawn by benchmarks/picture.py -->",
        f'<rect width="{right + 24}" height="{bottom + 92}" rx="8" fill="#ffffff"/>',
    ]
    for tick in (1, 2, 4, 8, 16, 32):
        parts += [
            _line(_x(tick), _TOP, _x(tick), bottom),
            _text(_x(tick), bottom + 18, f"{tick}×"),
            _line(_LEFT, _y(tick), right, _y(tick), "#444444" if tick == 1 else "#e0e0e0"),
            _text(_LEFT - 8, _y(tick) + 4, f"{tick}×", "end"),
        ]
    parts += [
        _line(_x(1), _y(1), _x(_MOST), _y(_MOST), "#444444", dash=True),
        _text(_x(9.0), _y(12.5), "all saved work is saved time", "end"),
        _text(_x(1.05), _y(0.55), "slower than dense", "start"),
        _text(_LEFT + _WIDTH / 2, bottom + 38, "times fewer multiply-accumulates"),
        f'<text x="18" y="{_TOP + _HEIGHT / 2:.0f}" text-anchor="middle" fill="#333333" '
        f'transform="rotate(-90 18 {_TOP + _HEIGHT / 2:.0f})">times faster than dense</text>',
    ]
    for kind, ratio, speedup, row in sorted(
        shown, key=lambda found: list(DRAWN_KINDS).index(found[0])
    ):
        title = f"{row['case']['name']}: {speedup:.2f}× of {ratio:.2f}×"
        parts.append(
            f'<circle cx="{_x(ratio):.1f}" cy="{_y(speedup):.1f}" r="4.5" '
            f'fill="{DRAWN_KINDS[kind][0]}" fill-opacity="0.75" stroke="#ffffff">'
            f"<title>{html.escape(title)}</title></circle>"
        )
    place = _LEFT
    for kind, (colour, label) in DRAWN_KINDS.items():
        if any(kind == found for found, *_ in shown):
            parts += [
                f'<circle cx="{place + 6}" cy="{bottom + 66}" r="5" fill="{colour}"/>',
                _text(place + 16, bottom + 70, label, "start"),
            ]
            place += 40 + 7 * len(label)
    return "\n".join([*parts, "</svg>", ""])


def _line(
    x0: float, y0: float, x1: float, y1: float, colour: str = "#e0e0e0", dash: bool = False
) -> str:
    dashed = ' stroke-dasharray="5 4"' if dash else ""
    return (
        f'<line x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}" stroke="{colour}"{dashed}/>'
    )


def _text(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="#333333">'
        f"{html.escape(text)}</text>"
    )
