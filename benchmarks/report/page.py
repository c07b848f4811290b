# SPDX-License-Identifier: Apache-2.0
"""The page of the report: one HTML file that needs nothing from outside."""

from __future__ import annotations

import html
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

from hetconv_kernels._version import __version__
from hetconv_kernels.files import Json

from . import tables
from .colours import css_variables
from .figures import Picture, layer_bars, roofline, scatter
from .results import Results

_ESTIMATES = (
    "Every time is a median. A ratio is the median of paired measurements: ours and the rival took "
    "turns in one process; in brackets is its interval, which holds the true median with at least "
    "95 % confidence. <strong>Above 1 we are faster, below 1 slower.</strong> A row counts as "
    "faster or slower only when its whole interval lies on that side of 1."
)
_READ_SCATTER = (
    "Each mark is a layer. To the right, more multiply-accumulates are left out; upwards, the "
    "layer is faster than the fastest dense convolution. On the line y = x all saved work has "
    "become saved time; the distance below it is what is still lost. Below the dashed line a layer "
    "is slower than dense: such losses are ringed and named. Marks above y = x are layers on which "
    "the dense convolution itself is far from its ceiling. Point at a mark to read it."
)
_READ_ROOFLINE = (
    "Each mark is a layer; only weights that exist count as work. The line is what the machine was "
    "measured to reach: its copy rate on the left, its arithmetic on the right. A mark on the line "
    "could only get faster by less work or fewer bytes; the dotted lines are a half and a quarter "
    "of it."
)
_READ_BARS = (
    "The time of each convolution while the whole network runs, with its bias, sum and activation. "
    "Bars in the colour of losses are layers that became slower."
)


@dataclass
class Page:
    """The report while it grows.

    Attributes:
        files: what it is about.
        pictures: the figures, in the order in which they stand on the page.
    """

    files: Sequence[Results]
    pictures: list[Picture]

    def __init__(self, files: Sequence[Results]) -> None:
        self.files, self.pictures = files, []

    def html(self) -> str:
        """Writes the page and fills `pictures`."""
        self.pictures.clear()
        sections = [
            ("speed-up", "Speed-up against saved work", self._scatters()),
            ("roofline", "Against the measured ceilings", self._rooflines()),
            ("networks", "Whole networks", self._networks()),
            ("layers", "Every layer", self._layers()),
            ("dispatch", "What a call costs", self._dispatch()),
            ("files", "Where the numbers come from", self._files()),
        ]
        shown = [section for section in sections if section[2]]
        links = "".join(f'<li><a href="#{name}">{title}</a></li>' for name, title, _ in shown)
        parts = "\n".join(
            f'<section id="{name}"><h2>{title}</h2>\n{text}</section>'
            for name, title, text in shown
        )
        style = css_variables() + _asset("page.css")
        return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; \
script-src 'unsafe-inline'; img-src data:">
<title>hetconv_kernels: what was measured</title>
<style>
{style}</style>
</head>
<body>
<header>
<h1>What was measured</h1>
<p class="lead">{self._lead()}</p>
{self._tiles()}
<p>{_ESTIMATES}</p>
<nav aria-label="sections"><ul>{links}</ul></nav>
</header>
<main>
{parts}
</main>
<footer>Written by <code>python -m benchmarks.report</code> of
hetconv_kernels {html.escape(__version__)}.</footer>
<script>
{_asset("page.js")}</script>
</body>
</html>
"""

    def _lead(self) -> str:
        machines = list(dict.fromkeys(results.hardware for results in self.files))
        days = sorted(results.data["started"][:10] for results in self.files)
        when = days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}"
        return html.escape(
            "Structured-sparse convolutions beside the dense ones that they replace, and beside "
            f"compositions of PyTorch's own layers. Measured {when} on {'; on '.join(machines)}."
        )

    def _tiles(self) -> str:
        layers = [row for results in self.files for row in _layer_rows(results)]
        networks = [r for results in self.files for r in _network_rows(results)]
        verdicts = [tables.verdict_of(row) for row in (*layers, *networks)]
        ratios = [
            row["dense"]["ratio"] / (row["dense_macs"] / row["macs"])
            for row in layers
            if "dense" in row and row["dense_macs"] > row["macs"] > 0
        ]
        tiles = [
            ("layers and networks", f"{len(verdicts)}", ""),
            ("faster than dense", f"{verdicts.count('win')}", "win"),
            ("no measurable difference", f"{verdicts.count('even')}", ""),
            ("slower than dense", f"{verdicts.count('lose')}", "lose"),
            ("slower than a composition of PyTorch's layers",
             f"{sum(map(tables.lost_to_composition, (*layers, *networks)))}", "lose"),
        ]  # fmt: skip
        if ratios:
            share = f"{100 * statistics.median(ratios):.0f} %"
            tiles.append(("of the MAC ratio is reached, median layer", share, ""))
        if "disturbed" in verdicts:
            tiles.append(("disturbed, not judged", f"{verdicts.count('disturbed')}", ""))
        if "wrong" in verdicts:
            tiles.append(("wrong results, not timed", f"{verdicts.count('wrong')}", "lose"))
        inner = "".join(
            f"<div><dd{_mark(mark, value)}>{value}</dd><dt>{html.escape(text)}</dt></div>"
            for text, value, mark in tiles
        )
        return f'<dl class="tiles">{inner}</dl>'

    def _scatters(self) -> str:
        parts = []
        for results in self.files:
            points = results.points()
            if points:
                picture = scatter(f"speed-up-{results.name}", points, results.hardware)
                parts.append(_heading(results) + self._figure(picture))
        return _explained(_READ_SCATTER, parts)

    def _rooflines(self) -> str:
        parts = []
        for results in self.files:
            found = []
            for roof in results.roofs():
                points = results.points(roof.dtype, roof.device)
                if points:
                    name = f"roofline-{results.name}-{roof.device}-{roof.dtype}"
                    found.append(self._figure(roofline(name, points, roof, results.hardware)))
            if found:
                parts.append(_heading(results) + "".join(found))
        return _explained(_READ_ROOFLINE, parts)

    def _networks(self) -> str:
        parts, drawn = [], []
        for results in self.files:
            rows = _network_rows(results)
            if rows:
                parts.append(_heading(results) + tables.networks(rows))
            for row in rows:
                if row.get("layers"):
                    picture = layer_bars(f"layers-{results.name}-{row['case']['name']}", row)
                    drawn.append(f"<h4>{html.escape(picture.title)}</h4>" + self._figure(picture))
        bound = (
            "<p>The bound is Amdahl's: the speed-up over the fastest dense form if every "
            "convolution took as much less time as it has fewer multiply-accumulates, and "
            "everything else what it takes in the dense network.</p>"
        )
        if drawn:
            drawn.insert(0, f"<h3>Layer by layer</h3><p>{_READ_BARS}</p>")
        return "".join((bound, *parts, *drawn)) if parts else ""

    def _layers(self) -> str:
        parts = []
        for results in self.files:
            rows = _layer_rows(results)
            if rows:
                parts.append(_heading(results) + tables.layers(rows))
        text = (
            "× dense: over the fastest of PyTorch's dense forms. × composition: over the fastest "
            "way to write the same layer with PyTorch's own operators. × unfrozen: as × dense, "
            "with our weights packed anew at every call. × prepacked: over a dense convolution "
            "compiled with its weights packed once. Press a heading to sort by it; a name that is "
            "a link leads to the user's report of slowness that the case reproduces."
        )
        return _explained(text, parts)

    def _dispatch(self) -> str:
        parts = [
            _heading(results) + tables.dispatch(results.rows("dispatch"))
            for results in self.files
            if results.rows("dispatch")
        ]
        text = (
            "Extra microseconds of one call of a whole layer over nn.Conv2d's, on an image so "
            "small (1×8×2×2) that nothing else counts."
        )
        return _explained(text, parts)

    def _files(self) -> str:
        header = (
            "file", "started", "commit", "hardware", "torch", "python", "hetconv_kernels",
            "load before", "rows", "command",
        )  # fmt: skip
        lines = []
        for results in self.files:
            e = results.environment
            lines.append(
                (
                    f"{results.name}.json", results.data["started"], e["commit"] or "not known",
                    results.hardware, e["torch"], e["python"], e.get("hetconv_kernels", ""),
                    f"{e.get('load_before', 0):.1f} on {e.get('cores', '?')} cores",
                    len(results.data["rows"]), results.data.get("command", "not kept in this file"),
                )
            )  # fmt: skip
        text = "A + after a commit says that files differed from it."
        return _explained(text, [tables.plain(header, lines)])

    def _figure(self, picture: Picture) -> str:
        self.pictures.append(picture)
        return (
            f"<figure>{picture.svg()}<figcaption>{html.escape(picture.alt)}</figcaption></figure>\n"
        )


def _heading(results: Results) -> str:
    commit = (results.environment["commit"] or "no commit")[:10]
    where = f"{results.hardware}, {results.data['started'][:10]}, {commit}"
    return f"<h3>{html.escape(results.name)} <small>{html.escape(where)}</small></h3>\n"


def _explained(text: str, parts: Sequence[str]) -> str:
    return f"<p>{html.escape(text)}</p>\n" + "".join(parts) if parts else ""


def _layer_rows(results: Results) -> list[Json]:
    return [*results.rows("layer"), *results.rows("primitive")]


def _network_rows(results: Results) -> list[Json]:
    return [*results.rows("model"), *results.rows("training")]


def _mark(mark: str, value: str) -> str:
    return f' class="{mark}"' if mark and value != "0" else ""


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
