# SPDX-License-Identifier: Apache-2.0
"""The table at the end of a run, losses included."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hetconv_kernels.measure import tables

Row = dict[str, Any]
Cells = tuple[Sequence[str], list[tuple[str, ...]]]  # the header, and the lines


def layer_table(rows: Sequence[Row]) -> list[str]:
    """Lays out layer rows; ratios above 1 mean that our layer is faster."""
    return lay_out(*layer_cells(rows))


def layer_cells(rows: Sequence[Row], bold: bool = False) -> Cells:
    """Returns the texts of `layer_table`; in Markdown a ratio below 1 may be bold."""
    header = (
        "case", "backend", "ms", "roof %", "MAC ratio", "× dense", "interval", "target",
        "× compos.", "unfrozen", "× prepacked", "× float32", "target",
        "verdict",
    )  # fmt: skip
    return header, [_layer_line(row, bold) for row in rows]


def model_table(rows: Sequence[Row]) -> list[str]:
    """Lays out network rows; ratios above 1 mean that our network is faster."""
    return lay_out(*model_cells(rows))


def model_cells(rows: Sequence[Row]) -> Cells:
    """Returns the texts of `model_table`."""
    header = (
        "network", "best dense", "ms", "× dense", "interval", "target", "bound", "best compos.",
        "× compos.", "interval", "target", "× float32", "absent",
    )  # fmt: skip
    return header, [_model_line(row) for row in rows]


def _model_line(row: Row) -> tuple[str, ...]:
    case = row["case"]
    absent = ", ".join(sorted({name for role in row["absent"].values() for name in role})) or "none"
    if "dense" not in row:
        return (case["name"], untimed(row), *[""] * 10, absent)
    cells = [case["name"], row["dense"]["name"].partition(":")[2], f"{row['median_s'] * 1e3:.0f}"]
    for role in ("dense", "composition"):
        found, target = row[role], case[f"target_{role}"]
        if role == "composition":
            cells.append(found["name"].partition(":")[2])
        missed = target is not None and found["ratio"] < target and "disturbed" not in row
        cells += [
            f"{found['ratio']:.2f}" + ("  disturbed" if "disturbed" in row else ""),
            f"[{found['low']:.2f}, {found['high']:.2f}]",
            "" if target is None else f"{target:g}" + ("  missed" if missed else ""),
        ]
        if role == "dense":
            # Older rows have a bound that was none, those in low precision have none.
            limit = row.get("bound", {}).get("over_best")
            cells.append("" if limit is None else f"{limit:.2f}")
    return (*cells, _ratio(row.get("float32")), absent)


def untimed(row: Row) -> str:
    """Says why a row has no times: somebody was wrong, or we (or all others) are absent."""
    return "not timed" if row["match"]["ok"] else "MISMATCH"


def training_table(rows: Sequence[Row]) -> list[str]:
    """Lays out training steps of whole networks; ratios above 1 mean that ours is faster."""
    return lay_out(*training_cells(rows))


def training_cells(rows: Sequence[Row]) -> Cells:
    """Returns the texts of `training_table`."""
    header = ("network", "fastest dense", "ms", "× dense", "interval", "× compos.", "interval",
              "verdict")  # fmt: skip
    lines: list[tuple[str, ...]] = []
    for row in rows:
        if "dense" not in row:
            lines.append((row["case"]["name"], *[""] * 6, "MISMATCH"))
            continue
        intervals = [
            f"[{row[r]['low']:.2f}, {row[r]['high']:.2f}]" for r in ("dense", "composition")
        ]
        verdict = row["verdict"].upper() if row["verdict"] == "lose" else row["verdict"]
        lines.append(
            (row["case"]["name"], row["dense"]["name"], f"{row['median_s'] * 1e3:.1f}",
             f"{row['dense']['ratio']:.2f}", intervals[0], f"{row['composition']['ratio']:.2f}",
             intervals[1], verdict)
        )  # fmt: skip
    return header, lines


def _met(row: Row, met: bool) -> str:
    """Says whether a target was missed; nothing is said from a disturbed measurement."""
    if "disturbed" in row:
        return "  disturbed"
    return "" if met else "  missed"


def dispatch_table(rows: Sequence[Row]) -> list[str]:
    """Lays out dispatch rows: extra microseconds of a call over nn.Conv2d's."""
    return lay_out(*dispatch_cells(rows))


def dispatch_cells(rows: Sequence[Row]) -> Cells:
    """Returns the texts of `dispatch_table`."""
    header = ("dispatch", "backend", "extra µs", "interval", "target")
    lines = [
        (
            row["name"],
            row["backend"],
            f"{row['extra_us']:.2f}",
            f"[{row['low_us']:.2f}, {row['high_us']:.2f}]",
            f"≤ {row['target_us']:g}" + _met(row, row["extra_us"] <= row["target_us"]),
        )
        for row in rows
    ]
    return header, lines


def primitive_table(rows: Sequence[Row]) -> list[str]:
    """Lays out rows of single primitives: µs beside their floor, and ratios to the rivals."""
    return lay_out(*primitive_cells(rows))


def primitive_cells(rows: Sequence[Row]) -> Cells:
    """Returns the texts of `primitive_table`."""
    from benchmarks.cases import GPU_TARGETS  # needs PyTorch, which the README's tables do without

    header = (
        "case", "verb", "µs", "other engines", "floor µs", "floor %", "MAC ratio", "efficiency",
        "× dense", "× compos.", "× compiled", "target", "verdict",
    )  # fmt: skip
    lines: list[tuple[str, ...]] = []
    for row in rows:
        macs = f"{row['dense_macs'] / row['macs']:.2f}"
        if "dense" not in row:
            empty = [""] * 5
            times = ", ".join(f"{n} {s * 1e6:.2f}" for n, s in row.get("rivals", {}).items())
            cells = (row["case"]["name"], row["verb"], "", times, "", "", macs, *empty)
            lines.append((*cells, _faulty(row) or "WRONG"))
            continue
        target = GPU_TARGETS.get((row["case"]["name"], row["verb"]))
        met = target is None or row["dense"]["ratio"] >= target or "disturbed" in row
        lines.append(
            (
                row["case"]["name"],
                row["verb"],
                f"{row['median_s'] * 1e6:.2f}",
                ", ".join(f"{n} {s * 1e6:.2f}" for n, s in row.get("engines", {}).items()),
                f"{row['floor_s'] * 1e6:.2f}",
                f"{row['percent_of_roof']:.0f}",
                macs,
                f"{row['efficiency']:.0%}",
                f"{row['dense']['ratio']:.2f}",
                _ratio(row["composition"]),
                _ratio(row.get("compiled")),
                "" if target is None else f"{target:g}" + ("" if met else "  missed"),
                _faulty(row) or row["verdict"],
            )
        )
    return header, lines


def _faulty(row: Row) -> str:
    """Names the variants that a row was measured without."""
    names = list(row.get("left_out", ()))
    return f"WITHOUT {', '.join(names)}" if names else ""


def _layer_line(row: Row, bold: bool) -> tuple[str, ...]:
    asked, ran = row["backend"]["asked"], row["backend"]["ran"]
    name = asked if asked == ran else f"{asked} → {ran}"
    macs = f"{row['dense_macs'] / row['macs']:.2f}"
    if "dense" not in row:
        return (row["case"]["name"], name, "", "", macs, "MISMATCH", *[""] * 8)
    dense, float32 = row["dense"], row.get("float32")
    verdict = row["verdict"]
    if verdict == "lose":
        verdict = "lose (expected)" if row["case"]["expected"] == "lose" else "LOSE"
    return (
        row["case"]["name"],
        name,
        f"{row['median_s'] * 1e3:.3f}",
        f"{row['percent_of_roof']:.0f}",
        macs,
        _ratio(dense, bold),
        f"[{dense['low']:.2f}, {dense['high']:.2f}]",
        _target(row, dense, "target"),
        *(_ratio(row[role], bold) for role in ("composition", "unfrozen", "prepacked")),
        _ratio(float32, bold),
        _target(row, float32, "target_float32"),
        verdict,
    )


def _target(row: Row, estimate: Row | None, name: str) -> str:
    """Writes a target of a layer, and that it was missed; older files have not all of them."""
    target = row["case"].get(name)
    if target is None or estimate is None:
        return ""
    missed = estimate["ratio"] < target and "disturbed" not in row
    return f"{target:g}" + ("  missed" if missed else "")


def _ratio(estimate: Row | None, bold: bool = False) -> str:
    if estimate is None:
        return ""
    ratio = f"{estimate['ratio']:.2f}"
    return f"**{ratio}**" if bold and estimate["ratio"] < 1 else ratio


def lay_out(header: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """Lays out lines; the first two columns and the last are text, the others numbers."""
    return tables.text_table(header, lines, left=(0, 1, -1)).splitlines()
