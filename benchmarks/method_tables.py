# SPDX-License-Identifier: Apache-2.0
"""The tables of methods: each part in plain text, and all of it side by side in one."""

from __future__ import annotations

from collections.abc import Sequence

from hetconv_kernels.files import Json
from hetconv_kernels.measure import tables


def part_table(part: str, records: Sequence[Json]) -> str:
    """Lays out one part."""
    if part == "speed":
        return _speed(records)
    key = quality_key(records)
    header = (
        "method", "form", "PSNR dB" if key == "test_psnr" else "accuracy", "of dense",
        "live weights", "MACs", "fewer", "ms dense", "ms", "speed-up", "within",
    )  # fmt: skip
    lines = [
        (
            r["name"],
            _form(r),
            _quality(r, 1),
            _quality(r, 0),
            r["live"][1],
            r["macs"][1],
            f"{100 * r['macs_saved']:.0f} %",
            *_times(r),
            "yes" if r["within"] else "NO",
        )
        for r in records
    ]
    tolerance = records[0]["tolerance"] if records else 0
    return (
        tables.text_table(header, lines)
        + f"\nwithin: ≥ 50 % fewer MACs, and no more than {tolerance:g} below dense"
    )


def _speed(records: Sequence[Json]) -> str:
    header = ("network", "method", "MACs", "times fewer", "ms dense", "ms", "speed-up", "compact")
    lines = [
        (
            r["network"],
            r["name"],
            r["macs"][1],
            f"{r['macs'][0] / r['macs'][1]:.2f}",
            *_times(r),
            "yes" if r["compacted"] else "",
        )
        for r in records
    ]
    return tables.text_table(header, lines)


def joined_table(parts: dict[str, Sequence[Json]]) -> Json:
    """Puts all parts side by side: the lines of quality, then those of speed, with a cell each.

    Args:
        parts: the records of each part that there is, by its name.

    Returns:
        See `schema.METHODS_TABLE_SCHEMA`.
    """
    lines: dict[str, Json] = {}
    for part, records in parts.items():
        for r in records:
            line = lines.setdefault(
                r["name"], {"name": r["name"], "method": r["method"], "form": _form(r), "cells": {}}
            )
            column = r["network"] if part == "speed" else part
            cell = {
                "macs_ratio": r["macs"][0] / max(r["macs"][1], 1),
                "speedup": r["speedup"],
                "seconds": r["seconds"],
            }
            if part != "speed":
                cell |= {"quality": r[quality_key([r])], "tolerance": r["tolerance"]}
                cell["within"] = r["within"]
            line["cells"][column] = cell
    columns = list(dict.fromkeys(c for line in lines.values() for c in line["cells"]))
    return {"format": "hetconv_kernels.methods-table/1", "columns": columns,
            "rows": list(lines.values())}  # fmt: skip


def joined_markdown(table: Json) -> str:
    """Lays out the joined table in Markdown."""
    titles = {"digits": "digits: accuracy (dense)", "psnr": "photograph: PSNR, dB (dense)"}
    header = ["method", "form"]
    for column in table["columns"]:
        if column in titles:
            header += [titles[column], "MACs", "speed-up"]
        else:
            header += [f"{column}: MACs", "speed-up"]
    rows = []
    for row in table["rows"]:
        cells = [row["name"], row["form"]]
        for column in table["columns"]:
            cells += _cells(row["cells"].get(column), column in titles)
        rows.append(cells)
    lines = [
        "<!-- Made by `python -m benchmarks.methods --publish benchmarks`; do not edit. -->",
        "",
        tables.markdown_table(header, rows, left=len(header)),
        "",
        "MACs: how many times fewer than dense. Speed-up: measured against the dense network, each "
        "in the memory format that suits it best; the median of paired ratios with its interval. "
        "**Bold**: further below dense than the tolerance, or fewer than half of the MACs saved.",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _cells(cell: Json | None, judged: bool) -> list[str]:
    if cell is None:
        return [""] * (3 if judged else 2)
    ratio = f"{cell['macs_ratio']:.2f}×"
    times = "" if cell["speedup"] is None else "{:.2f}× [{:.2f}, {:.2f}]".format(*cell["speedup"])
    if not judged:
        return [ratio, times]
    dense, found = cell["quality"]
    digits = 2 if dense > 1 else 3
    text = f"{found:.{digits}f} ({dense:.{digits}f})"
    return [text if cell["within"] else f"**{text}**", ratio, times]


def quality_key(records: Sequence[Json]) -> str:
    """Names what quality is kept under in records."""
    return "test_psnr" if records and "test_psnr" in records[0] else "test_accuracy"


def _quality(record: Json, which: int) -> str:
    key = quality_key([record])
    return f"{record[key][which]:.{2 if key == 'test_psnr' else 3}f}"


def _form(record: Json) -> str:
    # The table of speed does not say; its lines of ours name what is ours.
    paper = record.get(
        "paper", not any(word in record["name"] for word in ("of 8", "of 16", "bands"))
    )
    return "paper" if paper else "ours"


def _times(record: Json) -> tuple[str, str, str]:
    before, after = (f"{seconds * 1e3:.2f}" for seconds in record["seconds"])
    return before, after, "{:.2f}× [{:.2f}, {:.2f}]".format(*record["speedup"])
