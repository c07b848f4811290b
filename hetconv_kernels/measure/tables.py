# SPDX-License-Identifier: Apache-2.0
"""Tables: a header and rows, as plain text, as Markdown, or as rich draws them on a terminal."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Collection, Iterable, Sequence

_Row = Sequence[object]


def text_table(
    header: Sequence[str], rows: Iterable[_Row], left: Collection[int] | None = None
) -> str:
    """Lays out a table in plain text.

    Args:
        header: the names of the columns.
        rows: a cell for each column; integers get commas.
        left: places of the columns that are text, negative ones from the end; all others are
            numbers, and stand to the right. By default those whose cells are all numbers do.
    """
    lines = [list(row) for row in rows]
    cells = [list(map(_cell, line)) for line in (header, *lines)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    numeric = _numeric(lines, len(header), left)
    padded = [
        "  ".join(
            c.rjust(w) if n else c.ljust(w) for c, w, n in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in cells
    ]
    return "\n".join([padded[0], "-" * max(map(len, padded)), *padded[1:]])


def markdown_table(header: Sequence[str], rows: Iterable[_Row], left: int = 1) -> str:
    """Lays out a Markdown table whose first ``left`` columns are text, the others numbers."""
    rules = ["---" if place < left else "--:" for place in range(len(header))]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in (header, rules, *rows))


def show_table(
    header: Sequence[str],
    rows: Iterable[_Row],
    title: str | None = None,
    left: Collection[int] | None = None,
) -> None:
    """Prints a table; the same words with rich and without. Arguments as of `text_table`."""
    lines = [list(row) for row in rows]
    if not has_rich():
        print(*([] if title is None else [title]), text_table(header, lines, left), sep="\n")
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title)
    for name, right in zip(header, _numeric(lines, len(header), left), strict=True):
        table.add_column(name, overflow="fold", justify="right" if right else "left")
    for line in lines:
        table.add_row(*(Text(_cell(cell)) for cell in line))
    Console().print(table)


def has_rich() -> bool:
    """Tells whether to draw with rich: it is installed and a person reads along."""
    return sys.stdout.isatty() and importlib.util.find_spec("rich") is not None


def _cell(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _numeric(lines: Sequence[_Row], columns: int, left: Collection[int] | None) -> list[bool]:
    if left is None:
        return [all(isinstance(line[i], int | float) for line in lines) for i in range(columns)]
    return [i not in left and i - columns not in left for i in range(columns)]
