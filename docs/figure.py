# SPDX-License-Identifier: Apache-2.0
"""Draws the figure of the first page from real Supports: idea.svg, and for a phone idea-phone.svg.

python docs/figure.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

import hetconv_kernels as hk

FOLDER = Path(__file__).parent
F = C = 8
TAP, KERNEL = 5, 20  # pixels: a tap, and a kernel with the gap beside it
WIDTH, HEIGHT = KERNEL * C + 56, KERNEL * F + 78  # of a panel
PHONE_WIDTH, LINE = KERNEL * C + 16, 14  # of a panel on a phone; a line of its text
# One for each group; distinguishable without red and green.
COLOURS = (
    "#00796b", "#e69f00", "#3f6fb5", "#c2569b", "#56b4e9", "#8d6e63", "#7cb342", "#5e35b1",
)  # fmt: skip


def panels() -> list[tuple[str, tuple[str, ...], hk.Support]]:
    """Lists title, remark (in the lines of a phone) and Support of each panel."""
    self_grouped = hk.Support.self_grouped(
        [0, 0, 0, 1, 1, 2, 2, 2],
        # Which of the eight channels each of the three clusters reads.
        np.array([list(row) for row in ("11001000", "01100110", "00010011")]) == "1",
        3,
    )
    removed = np.ones((F, C, 3, 3), bool)
    removed[[2, 5]] = False
    removed[:, [1, 6]] = False
    single = np.random.default_rng(3).random((F, C, 3, 3)) < 0.2
    return [
        ("dense", ("every filter reads", "every column"), hk.Support.dense(C, F, 3)),
        ("grouped", ("4 equal groups",), hk.Support.grouped(C, F, 3, 4)),
        ("HetConv, p=4", ("own channels: 3×3,", "the rest: 1×1"), hk.Support.het(C, F, 3, p=4)),
        ("self-grouping", ("ragged groups", "that overlap"), self_grouped),
        ("filters removed", ("WSP, correlation, … :", "a smaller layer"), hk.Support(removed)),
        ("single weights", ("ADMM: each filter", "for itself"), hk.Support(single)),
    ]


FOOT = (
    ("One row is one filter, one square a 3×3 kernel,",
     "one dot a weight. A dot that is coloured exists;"),
    ("filters of one colour have the same columns:", "they are one group."),
)  # fmt: skip


def draw(phone: bool = False) -> str:
    """Composes the SVG.

    Args:
        phone: two panels a row and wrapped lines, for 360 pixels.
    """
    columns, pitch, high = (2, PHONE_WIDTH, HEIGHT + LINE) if phone else (3, WIDTH, HEIGHT)
    shown = panels()
    foot = [line for lines in FOOT for line in (lines if phone else [" ".join(lines)])]
    size = 13 if phone else 12
    left, bottom = (18, 12) if phone else (36, 5)
    width = columns * pitch + (12 if phone else 20)
    height = -(-len(shown) // columns) * high + (size + 3) * len(foot) + (24 if phone else 16)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" font-family="sans-serif" role="img" '
        'aria-label="Which weights exist in six kinds of convolution">',
        "<!-- SPDX-License-Identifier: Apache-2.0; drawn by docs/figure.py -->",
        f'<rect width="{width}" height="{height}" rx="8" fill="#ffffff"/>',
    ]
    for place, panel in enumerate(shown):
        x, y = left + place % columns * pitch, 14 + place // columns * high
        parts += _panel(x, y, *panel, first=place == 0, phone=phone)
    parts += [
        f'<text x="{width / 2}" y="{height - bottom - (size + 3) * back}" font-size="{size}" '
        f'fill="#37474f" text-anchor="middle">{line}</text>'
        for back, line in zip(range(len(foot) - 1, -1, -1), foot, strict=True)
    ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(
    x: int, y: int, title: str, remark: tuple[str, ...], support: hk.Support, first: bool,
    phone: bool,
) -> list[str]:  # fmt: skip
    """Draws one Support with its caption."""
    saved = f"{1 / support.density:.1f}× fewer MACs" if support.density < 1 else "all MACs"
    groups = sum(bool(group.mask.any()) for group in support.groups)
    caption = f"{groups} group{'s' * (groups > 1)}, {saved}"
    small, lines = (12.0, remark) if phone else (10.5, (" ".join(remark),))
    parts = [
        f'<text x="{x}" y="{y + 14}" font-size="14" font-weight="bold" fill="#263238">{title}'
        "</text>",
    ]
    parts += [
        f'<text x="{x}" y="{y + 29 + LINE * row}" font-size="{small:g}" fill="#607d8b">{line}'
        "</text>"
        for row, line in enumerate(lines)
    ]
    top = y + 38 + LINE * phone
    if first:
        parts += [
            f'<text x="{x - 8}" y="{top + KERNEL * F / 2}" font-size="{small:g}" fill="#607d8b" '
            f'text-anchor="middle" transform="rotate(-90 {x - 8} {top + KERNEL * F / 2})">'
            "filters</text>",
            f'<text x="{x + KERNEL * C}" y="{y + 14}" font-size="{small:g}" '
            'fill="#607d8b" text-anchor="end">channels →</text>',
        ]
    colour = {f: COLOURS[g] for g, group in enumerate(support.groups) for f in group.filters}
    live: dict[str, list[str]] = {"#e4e9eb": []}
    for (f, c, ky, kx), exists in np.ndenumerate(support.mask):
        empty = not support.mask[f].any()
        shade = colour[f] if exists and not empty else "#e4e9eb"
        left, up = x + c * KERNEL + kx * (TAP + 1), top + f * KERNEL + ky * (TAP + 1)
        live.setdefault(shade, []).append(f"M{left} {up}h{TAP}v{TAP}h-{TAP}z")
    parts += [f'<path fill="{shade}" d="{"".join(marks)}"/>' for shade, marks in live.items()]
    parts.append(
        f'<text x="{x}" y="{top + KERNEL * F + 12}" font-size="11.5" fill="#263238">{caption}'
        "</text>"
    )
    return parts


if __name__ == "__main__":
    (FOLDER / "idea.svg").write_text(draw())
    (FOLDER / "idea-phone.svg").write_text(draw(phone=True))
