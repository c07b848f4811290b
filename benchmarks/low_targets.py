# SPDX-License-Identifier: Apache-2.0
"""How much faster than our own float32 each layer in low precision is, and what can be had at all.

    python -m benchmarks.low_targets

writes ``int8_counts.json`` anew: the vector operations that the 8-bit engine counts for the layers
of the benchmark, with the instructions that both measured processors have. They are no times, and
the same on every machine that has those instructions.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import summary
from benchmarks.cases import CPU_CASES
from hetconv_kernels.files import Json, write_text
from hetconv_kernels.measure import tables
from hetconv_kernels.measure.roofline import Roofs

FILE = Path(__file__).with_name("int8_counts.json")
ISA = "avx512vnni"
NONE = "None is committed yet."  # what a page says in the place of a table
# Of the processor, as Linux names them: with them the engine sorts channels and results at once.
NEEDED = ("avx512_vnni", "avx512vbmi", "avx512_vbmi2")


def counts() -> dict[str, Json]:
    """Asks the engine what it counts for each layer in 8 bits.

    Raises:
        UnsupportedError: the processor has not the instructions.
    """
    from hetconv_kernels import _cpu

    found = {}
    for case in CPU_CASES:
        if case.dtype == "int8":
            mask: Any = np.ascontiguousarray(case.build_support().mask).view(np.uint8)
            plan = _cpu.Int8Plan(mask, ISA)
            cost = round(plan.cost, 3)
            found[case.name] = {"form": plan.form, "operations": cost, "products": plan.useful}
    return found


def times_counted(case: str) -> float | None:
    """Says how many times the operations of its live products a layer takes; None: not counted."""
    found = json.loads(FILE.read_text())["layers"].get(case)
    return found and float(found["operations"] / found["products"])


def targets(name: str = summary.LAYERS_FILE) -> str:
    """Lays out every layer that has a target over our own float32, met or not.

    *At the ceiling* is the float32 time over the floor of direct sums in low precision: what the
    ratio would be if the layer took no longer than its live products, or its bytes, at the measured
    rates. *As counted* has all the operations that the engine counts instead, in 8 bits only.
    """
    header = (
        "layer",
        "× float32",
        "interval",
        "target",
        "at the ceiling",
        "as counted",
        "so it is",
    )
    lines = []
    for row, most in _rows(name):
        found = row["float32"]
        cells = [f"{found['ratio']:.2f}", f"{found['low']:.2f} to {found['high']:.2f}"]
        cells += [f"{row['case']['target_float32']:g}", *(f"{each:.2f}" for each in most)]
        cells += [""] * (2 - len(most))
        lines.append((row["case"]["name"], *cells, _outcome(row, most)))
    return tables.markdown_table(header, lines, left=1)


def _rows(name: str) -> list[tuple[Json, list[float]]]:
    """Lists the rows with a target, each with the ratio at the ceiling and as counted."""
    data = summary.results(name)
    roofs = {found["dtype"]: Roofs(**found) for found in data["roofs"]}
    found = []
    for row in data["rows"]:
        if row["case"].get("target_float32") is None or row.get("float32") is None:
            continue
        roof, more = roofs[row["case"]["dtype"]], times_counted(row["case"]["name"])
        floors = [roof.floor(row["macs"] * n, row["bytes"]) for n in (1.0, more) if n is not None]
        found.append((row, [row["float32"]["median_s"] / floor for floor in floors]))
    return found


def _outcome(row: Json, most: list[float]) -> str:
    """Says whether a target is met, and if not, whether anything is known to be in its way."""
    target = row["case"]["target_float32"]
    if "disturbed" in row:
        return "disturbed"
    if row["float32"]["ratio"] >= target:
        return "met"
    if most[0] < target:
        return "missed, beyond direct sums"
    return "missed, beyond this lowering" if min(most) < target else "missed, open"


_OUTCOMES = {
    "met": "meet it",
    "missed, beyond direct sums": "would miss it at the ceiling too",
    "missed, beyond this lowering": "would with all that the engine counts at the ceiling",
    "missed, open": "miss it though no count is in the way",
    "disturbed": "were disturbed",
}


def outcomes(name: str = summary.LAYERS_FILE) -> str:
    """Says in a sentence how many of the targets over float32 are met, and why others are not."""
    found = [_outcome(row, most) for row, most in _rows(name)]
    parts = [f"{found.count(end)} {said}" for end, said in _OUTCOMES.items() if end in found]
    return f"Of {len(found)} layers {', '.join(parts)}."


def programs(machine: str = "") -> str:
    """Lays out the programs of whole networks that are committed, beside what bounds them."""
    header = ("program", "ms", "floor ms", "counted ms", "over the composition", "as counted")
    lines = []
    for data in summary.all_results(machine).values():
        for row in data["rows"]:
            if row["kind"] != "program":
                continue
            case = row["case"]
            times = [row[key] for key in ("median_s", "floor_s", "counted_s")]
            beside = summary.network(case["name"], machine)
            rival = beside and beside.get("composition")
            ratios = [rival["median_s"] / times[i] for i in (0, 2)] if rival else []
            cells = [f"{1e3 * each:.1f}" for each in times] + [f"{each:.2f}" for each in ratios]
            lines.append(
                (f"{case['name']}, {summary.images(case)}", *cells, *[""] * (5 - len(cells)))
            )
    return tables.markdown_table(header, lines) if lines else NONE


def main() -> None:
    """Writes what the engine counts."""
    data = {"instructions": list(NEEDED), "layers": counts()}
    write_text(FILE, json.dumps(data, indent=1) + "\n")
    print(f"written to {FILE.name}")


if __name__ == "__main__":
    main()
