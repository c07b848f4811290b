# SPDX-License-Identifier: Apache-2.0
"""The tables of the report, as HTML: every row of the files, losses included and marked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

from markupsafe import Markup

from hetconv_kernels.files import Json

from .results import computed_dtype, verdict
from .templates import render

_SIGNS = {
    "win": ("win", "▲ faster"),
    "even": ("even", "≈ the same"),
    "lose": ("lose", "▼ slower"),
    "wrong": ("lose", "✕ wrong result, not timed"),
    "disturbed": ("", "? disturbed, not judged"),
}


@dataclass(frozen=True)
class Cell:
    """One cell of a table.

    Attributes:
        text: what it says; it is escaped.
        key: what the column is sorted by; None for the text itself.
        mark: ``win``, ``even`` or ``lose``, for its colour.
        link: where it leads; only http and https are followed.
    """

    text: str
    key: float | None = None
    mark: str = ""
    link: str | None = None

    @property
    def classes(self) -> str:
        """What the style knows it by."""
        return " ".join(n for n in ("number" if self.key is not None else "", self.mark) if n)

    @property
    def sorted_by(self) -> str:
        """The key, exactly."""
        return repr(self.key)

    @property
    def href(self) -> str | None:
        """The link, if it may be followed."""
        followed = self.link is not None and self.link.startswith(("https://", "http://"))
        return self.link if followed else None


Line = tuple[str, Sequence[Cell]]


def layers(rows: Sequence[Json]) -> Markup:
    """Writes the table of timed layers or primitives."""
    header = (
        "layer", "against dense", "ran on", "dtype", "ms", "% of roof", "MAC ratio", "× dense",
        "target", "× composition", "× unfrozen", "× prepacked",
    )  # fmt: skip
    return _table("layers", header, [_layer(row) for row in rows])


def networks(rows: Sequence[Json]) -> Markup:
    """Writes the table of whole networks and of training steps."""
    header = (
        "network", "what", "ms", "× dense", "over", "target", "bound", "× composition", "over",
        "target", "not here",
    )  # fmt: skip
    return _table("networks", header, [_network(row) for row in rows])


def dispatch(rows: Sequence[Json]) -> Markup:
    """Writes the table of what a call costs beyond the convolution."""
    header = ("call", "ran on", "extra µs", "interval", "target µs", "target met")
    return _table("calls", header, [_dispatch(row) for row in rows])


def verdict_of(row: Json) -> str:
    """Says ``win``, ``even``, ``lose`` against dense.

    Or ``wrong`` for a row that did not match, or ``disturbed`` for one from which nothing is to be
    concluded, since other work on the machine spoilt it.
    """
    if not row["match"]["ok"] or "dense" not in row:
        return "wrong"
    return "disturbed" if "disturbed" in row else verdict(row["dense"])


def lost_to_composition(row: Json) -> bool:
    """Tells whether the whole interval against the fastest composition lies below 1."""
    judged = bool(row.get("composition")) and "disturbed" not in row
    return judged and verdict(row["composition"]) == "lose"


def _layer(row: Json) -> Line:
    case, verdict = row["case"], verdict_of(row)
    asked, ran = row["backend"]["asked"], row["backend"]["ran"]
    verb = f" {row['verb']}" if "verb" in row else ""
    name = Cell(case["name"] + verb, link=case["issue"])
    on = Cell(ran if asked == ran else f"{asked} → {ran}")
    dtype = Cell(computed_dtype(row))
    ratio = _number(row["dense_macs"] / max(row["macs"], 1), "{:.2f}")
    mark, said = _SIGNS[verdict]
    if verdict == "lose" and case["expected"] == "lose":
        said += " (expected)"
    if verdict == "wrong":
        empty = [_EMPTY] * 2
        return verdict, [name, Cell(said, mark=mark), on, dtype, *empty, ratio, *[_EMPTY] * 5]
    target = case.get("target")
    judged = verdict != "disturbed"
    missed = judged and target is not None and row["dense"]["ratio"] < target
    cells = [
        name,
        Cell(said, mark=mark),
        on,
        dtype,
        _number(row["median_s"] * 1e3, "{:.3f}"),
        _number(row["percent_of_roof"], "{:.0f}"),
        ratio,
        _ratio_and_interval(row["dense"], judged),
        _EMPTY if target is None else Cell(f"{target:g}{' missed' * missed}", target),
        *(_ratio(row.get(role), judged) for role in ("composition", "unfrozen", "prepacked")),
    ]
    return verdict, cells


def _network(row: Json) -> Line:
    case, verdict = row["case"], verdict_of(row)
    what = "inference" if row["kind"] == "model" else "training step"
    absent = sorted({n for role in row.get("absent", {}).values() for n in role})
    size = f"{case['size']}×{case['width']}" if case.get("width") else f"{case['size']}²"
    cells = [Cell(case["name"]), Cell(f"{what}, batch {case['n']}, {size}")]
    if verdict == "wrong":
        return verdict, [*cells, Cell(_SIGNS["wrong"][1], mark="lose"), *[_EMPTY] * 8]
    cells.append(_number(row["median_s"] * 1e3, "{:.1f}"))
    for role in ("dense", "composition"):
        found, target = row[role], case.get(f"target_{role}")
        judged = verdict != "disturbed"
        missed = judged and target is not None and found["ratio"] < target
        cells += [
            _ratio_and_interval(found, judged),
            Cell(found["name"].partition(":")[2] or "eager"),
            _EMPTY if target is None else Cell(f"{target:g}{' missed' * missed}", target),
        ]
        if role == "dense":
            # Rows of older files have a bound that was none.
            bound = row.get("bound", {}).get("over_best")
            cells.append(_EMPTY if bound is None else _number(bound, "{:.2f}"))
    verdict = "lose" if lost_to_composition(row) else verdict
    return verdict, [*cells, Cell(", ".join(absent) or "none")]


def _dispatch(row: Json) -> Line:
    met = row["extra_us"] <= row["target_us"]
    cells = [
        Cell(row["name"]),
        Cell(row["backend"]),
        _number(row["extra_us"], "{:.2f}"),
        Cell(f"[{row['low_us']:.2f}, {row['high_us']:.2f}]", row["low_us"]),
        _number(row["target_us"], "{:g}"),
        Cell("yes" if met else "▼ no", mark="win" if met else "lose"),
    ]
    if "disturbed" in row:
        mark, said = _SIGNS["disturbed"]
        return "disturbed", [*cells[:-1], Cell(said, mark=mark)]
    return "win" if met else "lose", cells


_EMPTY = Cell("")


def _number(value: float, form: str) -> Cell:
    return Cell(form.format(value), value)


def _ratio(estimate: Json | None, judged: bool = True) -> Cell:
    if estimate is None:
        return _EMPTY
    lost = judged and verdict(estimate) == "lose"
    text = f"{estimate['ratio']:.2f}" + " ▼" * lost
    return Cell(text, estimate["ratio"], mark="lose" if lost else "")


def _ratio_and_interval(estimate: Json, judged: bool = True) -> Cell:
    ratio = _ratio(estimate, judged)
    text = f"{ratio.text} [{estimate['low']:.2f}, {estimate['high']:.2f}]"
    return Cell(text, ratio.key, ratio.mark)


def _table(what: str, header: Sequence[str], lines: Sequence[Line]) -> Markup:
    columns = list(zip(*(cells for _, cells in lines), strict=True))
    said = [any(cell.text for cell in column) for column in columns]  # an empty column says nothing
    numbers = [any(cell.key is not None for cell in column) for column in columns]
    names = [{"name": n, "number": k} for n, k in zip(header, numbers, strict=True)]
    return render(
        "table.html",
        what=what,
        sortable=True,
        columns=list(compress(names, said)),
        lines=[
            {"lost": verdict in ("lose", "wrong"), "cells": list(compress(cells, said))}
            for verdict, cells in lines
        ],
    )


def plain_table(header: Sequence[str], lines: Sequence[Sequence[Any]]) -> Markup:
    """Writes a table that cannot be sorted, such as the one of the files."""
    return render(
        "table.html",
        what="files",
        sortable=False,
        columns=[{"name": name, "number": False} for name in header],
        lines=[{"lost": False, "cells": [Cell(str(v)) for v in line]} for line in lines],
    )
