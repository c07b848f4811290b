# SPDX-License-Identifier: Apache-2.0
"""What README and docs say of the committed results, written from the files alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

from benchmarks import table
from benchmarks.cases import CPU_CASES
from hetconv_kernels.files import Json
from hetconv_kernels.measure import tables

HERE = Path(__file__).resolve().parent
NOTES = {case.name: case.note for case in CPU_CASES}
LAYERS_FILE, PREPACKED_FILE, AVX2_FILE = "layers-full", "layers-full-prepacked", "layers-full-avx2"
# The columns of the README's table: (kind, value of the Support) and what people call it; the
# value None is p = C.
GRID_COLUMNS = {
    ("het", 4): "HetConv p=4",
    ("het", 8): "p=8",
    ("het", 16): "p=16",
    ("het", None): "p=C",
    ("self_group", 70): "self-group 70 %",
    ("self_group", 90): "90 %",
}


@cache
def results(name: str) -> Json:
    """Reads results/<name>.json."""
    return _read(HERE / "results" / f"{name}.json")


@cache
def all_results(machine: str = "") -> dict[str, Json]:
    """Reads every committed results file, by name; of a second machine, those in its folder."""
    paths = sorted((HERE / "results" / machine).glob("*.json"))
    return {path.stem: results(f"{machine}/{path.stem}".lstrip("/")) for path in paths}


@cache
def methods() -> dict[str, Json]:
    """Reads the tables of compression methods that there are, by their part."""
    files = {part: HERE / f"methods-{part}.json" for part in ("digits", "psnr", "speed")}
    return {part: _read(path) for part, path in files.items() if path.exists()}


@cache
def calibration() -> Json:
    """Reads the fit of the predictions, with how they did on layers that they had not seen."""
    return _read(HERE / "calibration-avx512.json")


def _read(path: Path) -> Json:
    data: Json = json.loads(path.read_text())
    return data


def provenance(data: Json) -> str:
    """Says what a file was measured on, when, and at which commit."""
    found = data["environment"]
    threads = "1 thread" if found["threads"] == 1 else f"{found['threads']} threads"
    processor = f"{threads} of an {found['processor']} ({found['instructions']})"
    where = found["gpu"] or processor
    commit = found["commit"] or "unknown"
    dirty = " with local changes" if commit.endswith("+") else ""
    day = data.get("started", "")[:10]
    return (
        f"{where}, PyTorch {found['torch']}, Python {found['python']}, "
        f"{day + ', ' if day else ''}commit `{commit[:9]}`{dirty}"
    )


def grid(name: str = LAYERS_FILE, rival: str = "dense") -> str:
    """Lays out the 3×3 layers of the usual networks, one line a size, one column a Support."""
    cells: dict[tuple[str, str], Json] = {}
    for row in results(name)["rows"]:
        column = _column(row)
        if column and row[rival]:
            cells[_size(row["case"]), column] = row
    sizes = list(dict.fromkeys(size for size, _ in cells))
    names = [name for name in GRID_COLUMNS.values() if any(name == column for _, column in cells)]
    header = ["3×3 layer"]
    for column in names:
        saved = [r["dense_macs"] / r["macs"] for (_, c), r in cells.items() if c == column]
        header.append(f"{column} ({value_span(saved, 1)})")
    lines = []
    for size in sizes:
        found = [cells.get((size, column)) for column in names]
        lines.append([size, *(f"{r[rival]['ratio']:.2f}" if r else "" for r in found)])
    return tables.markdown_table(header, lines)


def _column(row: Json) -> str | None:
    """Names the column that a layer row belongs to: batch 8, 3×3, stride 1, plain float32."""
    case = row["case"]
    kind, value = case["support"]["kind"], case["support"]["value"]
    plain = (
        (case["n"], case["k"], case["stride"], case["dtype"]) == (8, 3, 1, "float32")
        and case["c"] == case["f"]
        and case["name"].split("-")[0] == f"8x{case['c']}x{case['h']}"
        and case["name"].count("-") == 1  # no variant, such as -nchw or -training
        and case["c"] * case["h"] == 64 * 56  # the four stages of ResNet and VGG
        and not case["name"].split("-")[1].startswith("tsg")  # masks of a trained network
    )
    if not plain or "dense" not in row:
        return None
    if kind == "het" and value == case["c"]:
        value = None
    return GRID_COLUMNS.get((kind, value))


def speedups(column: str, name: str = LAYERS_FILE, rival: str = "dense") -> list[float]:
    """Lists how many times faster than a rival the layers of a column of `grid` are."""
    return [
        row[rival]["ratio"]
        for row in results(name)["rows"]
        if _column(row) == column and row[rival]
    ]


def mac_ratios(column: str, name: str = LAYERS_FILE) -> list[float]:
    """Lists how many times fewer multiply-accumulates the layers of a column of `grid` need."""
    rows = [row for row in results(name)["rows"] if _column(row) == column]
    return [row["dense_macs"] / row["macs"] for row in rows]


_ENGINES = {
    "eager": "PyTorch",
    "compiled": "torch.compile",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
}


def engine_title(rival: Json) -> str:
    """Names the engine of a rival as its makers write it."""
    name = str(rival["name"]).partition(":")[2]
    return _ENGINES.get(name, name)


def networks_provenance(machine: str = "") -> str:
    """Says what the whole networks were measured on; files of one machine share a sentence."""
    commits: dict[str, list[str]] = {}
    for data in all_results(machine).values():
        if any(row["kind"] == "model" for row in data["rows"]):
            where, _, commit = provenance(data | {"started": ""}).partition(", commit ")
            commits.setdefault(where, []).append(commit)
    return "; ".join(
        f"{where}, commit {', '.join(dict.fromkeys(found))}" for where, found in commits.items()
    )


def lost(name: str = LAYERS_FILE) -> str:
    """Says how many layers were slower than a dense convolution or than a composition."""
    rows = results(name)["rows"]
    counts = {
        rival: sum(1 for row in rows if row.get(rival) and row[rival]["ratio"] < 1)
        for rival in ("dense", "composition")
    }
    return (
        f"Of {len(rows)} rows of that run, {counts['dense']} are slower than dense and "
        f"{counts['composition']} slower than a composition; docs/benchmarks.md lists each of them."
    )


def _size(case: Json) -> str:
    return f"{case['c']} channels, {case['h']}²"


def losses(name: str = LAYERS_FILE) -> str:
    """Lists every layer that was slower than any of its rivals, however little."""
    header = ("layer", "what it is", "dense", "composition", "while the weights change")
    lines = []
    for row in results(name)["rows"]:
        if "dense" not in row:
            lines.append((row["case"]["name"], describe_case(row["case"]), "MISMATCH", "", ""))
        elif any(row[rival] and row[rival]["ratio"] < 1 for rival in RIVALS):
            cells = (marked(row[rival]) for rival in RIVALS)
            lines.append((row["case"]["name"], describe_case(row["case"]), *cells))
    return tables.markdown_table(header, lines, left=2)


RIVALS = ("dense", "composition", "unfrozen")


def marked(found: Json | None) -> str:
    """Writes a ratio, in bold where we are slower."""
    if found is None:
        return ""
    ratio = f"{found['ratio']:.2f}"
    return f"**{ratio}**" if found["ratio"] < 1 else ratio


def describe_case(case: Json) -> str:
    """Says what a benchmark case is, with the report that it comes from.

    A case that still exists is described in today's words, not in those of the file.
    """
    kind, value = case["support"]["kind"], case["support"]["value"]
    kinds = {
        "het": f"HetConv p={value}",
        "self_group": f"self-grouped, {value} % dropped",
        "trained_group": f"self-grouped on trained weights, {value} % dropped",
        "irregular": f"single weights, {value} % live",
        "grouped": f"{value} groups",
        "learned_groups": f"{value} learned groups",
        "dense": "dense",
    }
    channels = f"{case['c']}" if case["c"] == case["f"] else f"{case['c']} to {case['f']}"
    size = f"{channels} channels, {case['k']}×{case['k']}, {case['h']}²"
    parts = [kinds.get(kind, kind), size, "" if case["dtype"] == "float32" else case["dtype"]]
    note = NOTES.get(case["name"], case["note"])
    parts += ["under autocast" if case["amp"] else "", note]
    text = ", ".join(part for part in parts if part)
    return f"{text} ([report]({case['issue']}))" if case["issue"] else text


def training(name: str = LAYERS_FILE) -> str:
    """Lays out the training steps: fprop, dgrad and wgrad together."""
    header = ("training step", "dense", "interval", "composition")
    lines = [
        (
            describe_case(row["case"]),
            f"{row['dense']['ratio']:.2f}",
            f"{row['dense']['low']:.2f} to {row['dense']['high']:.2f}",
            marked(row["composition"]),
        )
        for row in results(name)["rows"]
        if row["case"]["training"] and "dense" in row
    ]
    return tables.markdown_table(header, lines)


def networks_summary(machine: str = "") -> str:
    """Lays out the whole networks beside the fastest of all engines."""
    header = (
        "network", "fastest dense", "times as fast", "interval",
        "fastest composition", "times as fast", "interval",
    )  # fmt: skip
    lines = []
    for data in all_results(machine).values():
        for row in data["rows"]:
            if row["kind"] != "model":
                continue
            case = row["case"]
            cells = [f"{case['name']}, {images(case)}"]
            for role in ("dense", "composition"):
                found = row.get(role)
                if found is None:
                    cells += ["", table.untimed(row), ""]
                    continue
                engine = engine_title(found)
                interval = f"{found['low']:.2f} to {found['high']:.2f}"
                cells += [engine, marked(found), interval]
            lines.append(cells)
    return tables.markdown_table(header, lines)


def images(case: Json) -> str:
    """Says how many images of what size a network is given, and on how many threads if that is
    part of the case.
    """
    width = case.get("width")
    size = f"{case['size']}×{width}" if width else f"{case['size']}²"
    number = "one image" if case["n"] == 1 else f"{case['n']} images"
    threads = f" on {case['threads']} thread" if case.get("threads") else ""
    return f"{number} of {size}{threads}"


def network(name: str, machine: str = "") -> Json | None:
    """Finds the row of a whole network by the name of its case; None where none is committed."""
    for data in all_results(machine).values():
        for row in data["rows"]:
            if row["kind"] == "model" and row["case"]["name"] == name:
                return dict(row)
    return None


def methods_table(part: str = "digits", only_papers: bool = False) -> str:
    """Lays out a table of methods, losses included.

    Args:
        part: ``"digits"`` or ``"psnr"``, which have a quality, or ``"speed"``.
        only_papers: leaves out the forms that are ours.
    """
    if part == "speed":
        return _methods_speed()
    key, name = ("test_psnr", "PSNR, dB") if part == "psnr" else ("test_accuracy", "test accuracy")
    digits = 2 if part == "psnr" else 3
    header = ["method", "form", name, "of dense", "fewer MACs", "times faster", "interval"]
    rows = methods()[part][part]
    others = list(dict.fromkeys(name for row in rows for name in row.get("elsewhere", {})))
    if others:
        header += [f"on {len(others)} other photographs", "of dense"]
    lines = []
    for row in rows:
        if only_papers and not row["paper"]:
            continue
        ratio, low, high = row["speedup"]
        dense, found = row[key]
        quality = f"{found:.{digits}f}"
        lines.append(
            (
                row["name"],
                "paper" if row["paper"] else "ours",
                f"**{quality}**" if found < dense - row["tolerance"] else quality,
                f"{row[key][0]:.{digits}f}",
                f"{100 * row['macs_saved']:.0f} %",
                marked({"ratio": ratio}),
                f"{low:.2f} to {high:.2f}",
                *(_elsewhere(row, others) if others else ()),
            )
        )
    return tables.markdown_table(header, lines, left=2)


def _elsewhere(row: Json, names: Sequence[str]) -> tuple[str, str]:
    """Averages the PSNR of a row over the other photographs: compressed, and dense."""
    if not row.get("elsewhere"):
        return "", ""
    dense, found = (sum(row["elsewhere"][n][k] for n in names) / len(names) for k in (0, 1))
    shown = f"{found:.2f}"
    return (f"**{shown}**" if found < dense - row["tolerance"] else shown), f"{dense:.2f}"


def _methods_speed() -> str:
    header = ("network", "method", "times fewer MACs", "times faster", "interval")
    lines = []
    for row in methods()["speed"]["speed"]:
        ratio, low, high = row["speedup"]
        fewer = row["macs"][0] / row["macs"][1]
        interval = f"{low:.2f} to {high:.2f}"
        lines.append(
            (row["network"], row["name"], f"{fewer:.2f}", marked({"ratio": ratio}), interval)
        )
    return tables.markdown_table(header, lines, left=2)


def methods_provenance(part: str) -> str:
    """Says what a table of methods was measured on; its lines may be of several commits."""
    data = methods()[part]
    return lines_provenance(data, data[part])


def lines_provenance(data: Json, lines: Sequence[Json]) -> str:
    """Says what lines were measured on: each on its own environment, or else on the file's."""
    own = [data | {"environment": line.get("environment", data["environment"])} for line in lines]
    return "; ".join(dict.fromkeys(map(provenance, own)))


def training_networks() -> str:
    """Lays out training steps of whole networks."""
    header = ("network", "dense", "interval", "composition")
    lines = []
    for data in all_results().values():
        for row in data["rows"]:
            if row["kind"] == "training":
                case, found = row["case"], row.get("dense")
                name = f"{case['name']}, {case['n']} images of {case['size']}²"
                interval = f"{found['low']:.2f} to {found['high']:.2f}" if found else ""
                ratio = marked(found) if found else "MISMATCH"
                lines.append((name, ratio, interval, marked(row.get("composition"))))
    return tables.markdown_table(header, lines) if lines else "None is committed yet."


def right_picks() -> str:
    """Says how often `auto` picked the faster backend, on layers that it was not fitted to."""
    unseen = calibration()["unseen"]
    return (
        f"`auto` picked a backend within 5 % of the faster one on "
        f"{100 * unseen['right_within_5_percent']:.0f} % of {unseen['cases']} layers that its "
        f"predictions were not fitted to; the worst wrong pick cost {unseen['worst_cost']:.2f}×."
    )


def value_span(values: Iterable[float], digits: int = 2) -> str:
    """Writes the least and the largest of some numbers, or the one that they all are."""
    found = sorted(f"{value:.{digits}f}" for value in values)
    ordered: Sequence[str] = sorted(set(found), key=float)
    return ordered[0] if len(ordered) == 1 else f"{ordered[0]} to {ordered[-1]}"


def ratios(name: str, rival: str, **case: object) -> list[float]:
    """Lists how many times faster than a rival the layers of a file were.

    Args:
        name: of the file.
        rival: such as ``"dense"``.
        **case: leaves out rows whose case, or Support, has other values.
    """
    found = []
    for row in results(name)["rows"]:
        facts = row["case"] | row["case"]["support"]
        if row.get(rival) and all(facts[key] == value for key, value in case.items()):
            found.append(row[rival]["ratio"])
    return found
