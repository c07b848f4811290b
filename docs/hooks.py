# SPDX-License-Identifier: Apache-2.0
"""What `mkdocs build` adds to the pages: tables of results, the command line's help, equations.

A page asks for a made part by a comment of its own line, ``<!-- made: losses layers-full -->``: the
name of a function in `MADE`, then its arguments. Equations in TeX become MathML here, so that a
page shows them without a script and without a network.
"""

from __future__ import annotations

import html
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import (  # noqa: E402 (the line above must come first)
    low_targets,
    memory,
    overhead,
    predictions,
    summary,
    table,
    throughput,
)
from benchmarks.report import shares  # noqa: E402
from hetconv_kernels.measure import tables  # noqa: E402

MARKER = re.compile(r"^<!-- made: (.+) -->$", re.M)
EQUATION = re.compile(
    r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.S
)  # what pymdownx.arithmatex leaves
# What a page would load from elsewhere; links that are only followed are fine.
LOADED = re.compile(
    r"<(?:script|img|iframe)\b[^>]*\bsrc=[\"']?(https?:)?//"
    r"|<link\b(?=[^>]*\brel=[\"']?(?:stylesheet|preconnect|icon))[^>]*\bhref=[\"']?(https?:)?//"
)


def cases(name: str) -> str:
    """Lists every layer of a results file; a ratio below 1 is bold."""
    header, lines = table.layer_cells(summary.results(name)["rows"], bold=True)
    return tables.markdown_table(header, lines, left=2)


def dispatch(name: str) -> str:
    """Lists every dispatch row of a results file."""
    header, lines = table.dispatch_cells(summary.results(name)["rows"])
    return tables.markdown_table(header, lines, left=2)


def share_tables(name: str) -> str:
    """Says how much of their MAC ratio the layers of a results file reach, with the misses."""
    if name not in summary.all_results():
        return _NONE
    data = summary.results(name)
    return f"{shares.share_page(data)}\n\n*{summary.provenance(data)}.*"


def measured(name: str, folder: str | Path = ROOT / "benchmarks") -> str:
    """Lays out what a command of its own measured and wrote into <name>.json."""
    path = Path(folder) / f"{name}.json"
    if not path.exists():
        return _NONE
    data = json.loads(path.read_text())
    lay_out: dict[str, Callable[[Any], str]] = {
        "memory": memory.memory_table,
        "overhead": overhead.overhead_table,
        "throughput": throughput.shown_rows,
    }
    return f"{lay_out[name](data['rows'])}\n\n*{summary.provenance(data)}.*"


_NONE = low_targets.NONE


def _of_networks(data: Any) -> bool:
    return any(row["kind"] in ("model", "training", "program") for row in data["rows"])


def other_results() -> str:
    """Names the results files that no page has a table of, with what they were measured on."""
    shown = {summary.LAYERS_FILE, summary.PREPACKED_FILE, summary.AVX2_FILE, "dispatch-full"}
    shown |= {"layers-held-out"}
    lines = [
        f"- `{name}.json`, {len(data['rows'])} rows: {summary.provenance(data)}."
        for name, data in summary.all_results().items()
        if name not in shown and not _of_networks(data)
    ]
    return "\n".join(lines) or "There are no others."


def network_files() -> str:
    """Says what each network was measured on, and its training."""
    return "\n".join(
        f"- `{name}.json`: {summary.provenance(data)}."
        for name, data in summary.all_results().items()
        if _of_networks(data)
    )


def routes() -> str:
    """Lays out each network's time here beside those of ONNX Runtime and OpenVINO.

    A ratio is the median of those of the rounds, in each of which both sides ran.
    """
    engines = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
    header = ("network", "here", *(f"{label}, {role}" for role in ("dense", "composition")
                                   for label in engines.values()))  # fmt: skip
    lines = []
    for row in _model_rows():
        cells = [f"{row['case']['name']}, {summary.images(row['case'])}"]
        cells.append(f"{row['median_s'] * 1e3:.1f}")
        for role in ("dense", "composition"):
            variants = row["timings"][role]["variants"]
            for engine in engines:
                found = variants.get(f"{role}:{engine}")
                if found is None:
                    cells.append("absent")
                    continue
                ratio = paired(found, variants["ours"])
                cells.append(f"{found['median_s'] * 1e3:.1f} ({ratio:.2f})")
        lines.append(cells)
    return tables.markdown_table(header, lines)


def paired(rival: dict[str, Any], ours: dict[str, Any]) -> float:
    """Returns the median over the rounds of how many times longer the rival took."""
    rounds = zip(rival["samples_s"], ours["samples_s"], strict=True)
    return statistics.median(theirs / own for theirs, own in rounds)


def _model_rows() -> list[dict[str, Any]]:
    return [
        row
        for data in summary.all_results().values()
        for row in data["rows"]
        if row["kind"] == "model" and row.get("dense") and "timings" in row
    ]


def more_methods() -> str:
    """Lays out the tables of methods beyond that of the digits, as far as they are committed."""
    titles = {
        "psnr": "A small denoiser on the two photographs that scikit-learn ships: PSNR on the one "
        "that training has not seen.",
        "speed": "Networks of the papers' shapes, untrained, compressed to the papers' rates: time "
        "alone.",
    }
    found = [
        f"{title}\n\n{summary.methods_table(part)}\n\n*{summary.methods_provenance(part)}.*"
        for part, title in titles.items()
        if part in summary.methods()
    ]
    lenet = ROOT / "benchmarks" / "lenet.md"
    if lenet.exists():
        made = summary.provenance(json.loads(lenet.with_suffix(".json").read_text()))
        title = "LeNet-5 on MNIST, mean ± deviation over seeds:"
        found.append(f"{title}\n\n{lenet.read_text()}\n*{made}.*")
    return "\n\n".join(found)


@cache
def command_help() -> str:
    """Prints the help of `hetconv` and of each of its commands."""
    done = subprocess.run(
        [sys.executable, "-c", HELP],
        cwd=ROOT,
        env={"PATH": "", "COLUMNS": "90", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    texts: dict[str, str] = json.loads(done.stdout)
    whole = texts.pop("")
    parts = [f"## hetconv\n\n```text\n{whole}\n```"]
    for name, text in texts.items():
        usage = text.partition("\nexit codes:")[0].rstrip()
        parts.append(f"## hetconv {name}\n\n```text\n{usage}\n```")
    return "\n\n".join(parts)


# One process for all commands, since each would import torch anew.
HELP = r"""
import contextlib, io, json, re
from hetconv_kernels import cli

def text(*command):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert cli.main([*command, "--help"]) == 0
    return out.getvalue().rstrip()

whole = text()
listing = whole.partition("COMMAND\n")[2].partition("\n\n")[0]
names = re.findall(r"^    ([\w-]+)", listing, re.M)
assert names, whole
print(json.dumps({"": whole} | {name: text(name) for name in names}))
"""


MADE: dict[str, Callable[..., str]] = {
    "cases": cases,
    "command-help": command_help,
    "dispatch": dispatch,
    "grid": summary.grid,
    "losses": summary.losses,
    "low-outcomes": low_targets.outcomes,
    "low-targets": low_targets.targets,
    "measured": measured,
    "methods": summary.methods_table,
    "more-methods": more_methods,
    "network-files": network_files,
    "networks": summary.networks_summary,
    "networks-provenance": lambda machine="": f"*{summary.networks_provenance(machine)}.*",
    "other-results": other_results,
    "programs": low_targets.programs,
    "predicted": lambda name: predictions.TABLES[name](),
    "provenance": lambda name: f"*{summary.provenance(summary.results(name))}.*",
    "provenance-of-methods": lambda part: f"*{summary.methods_provenance(part)}.*",
    "routes": routes,
    "right-picks": lambda: (
        f"{summary.right_picks()} (*{summary.provenance(summary.calibration())}.*)"
    ),
    "shares": share_tables,
    "training": summary.training,
    "training-networks": summary.training_networks,
}


def with_made_parts(markdown: str) -> str:
    """Puts the made parts into a page.

    Raises:
        KeyError: a page asks for something that is not in `MADE`.
    """

    def made(found: re.Match[str]) -> str:
        name, *arguments = found[1].split()
        return MADE[name](*arguments)

    return MARKER.sub(made, markdown)


def with_equations(page: str) -> str:
    """Turns the TeX that arithmatex marked into MathML."""
    from latex2mathml.converter import convert

    def one(found: re.Match[str]) -> str:
        text = html.unescape(found[3])
        if found[2] == "[":
            drawn = "".join(convert(part, display="block") for part in parted(text))
            return f'<div class="math-block">{drawn}</div>'
        inline: str = convert(text, display="inline")
        return inline

    return EQUATION.sub(one, page)


def on_config(config: Any) -> Any:
    """Is called by mkdocs first: every page says of which version it is.

    With HETCONV_DOCS_VERSIONED=1 it has the selector of versions too (docs/versions.py).
    """
    text = (ROOT / "hetconv_kernels" / "_version.py").read_text()
    number = re.findall(r'__version__ = "(.*)"', text)[0]
    config["copyright"] = f"hetconv_kernels {number}"
    if os.environ.get("HETCONV_DOCS_VERSIONED") == "1":
        config["extra"]["version"] = {"provider": "mike", "default": "latest"}
    return config


def parted(text: str) -> list[str]:
    """Parts an equation at its wide spaces, where a narrow page may begin a new line."""
    parts = [""]
    for piece in re.split(r"(\\q?quad\b)", text):
        whole = parts[-1].count("{") == parts[-1].count("}")
        whole &= parts[-1].count("\\begin") == parts[-1].count("\\end")
        ends = [len(re.findall(rf"\\{end}(?![a-z])", parts[-1])) for end in ("left", "right")]
        whole &= ends[0] == ends[1]
        if piece.endswith("quad") and whole:
            parts.append("")
        else:
            parts[-1] += piece
    return [part for part in parts if part.strip()]


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Is called by mkdocs with the text of each page."""
    return with_made_parts(markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Is called by mkdocs with the HTML of each page's text."""
    return with_equations(html)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Is called by mkdocs with each whole page; refuses one that would load from the network."""
    found = LOADED.search(output)
    if found:
        raise ValueError(f"{page.file.src_uri} loads from the network: {found[0]}")
    return output
