# SPDX-License-Identifier: Apache-2.0
"""The page of the report: one HTML file that needs nothing from outside."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup

from hetconv_kernels._version import __version__
from hetconv_kernels.colours import css_variables
from hetconv_kernels.files import Json

from . import shares, tables
from .figures import Picture, layer_bars, roofline, scatter
from .passes import timeline
from .results import Results
from .templates import asset, render

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


_BOUND = (
    "The bound is Amdahl's: the speed-up over the fastest dense form if every convolution took as "
    "much less time as it has fewer multiply-accumulates, and everything else what it takes in the "
    "dense network."
)
_READ_SHARES = (
    "A share is a layer's speed-up over dense divided by its MAC ratio, here of HetConv and "
    "self-grouped layers in float32, in inference. The floor by bytes is the share of a layer that "
    "would take no longer than moving its bytes does at the measured rate of copying. Below the "
    "means is each layer that is below what is wanted of its family's mean."
)
_READ_LAYERS = (
    "× dense: over the fastest of PyTorch's dense forms. × composition: over the fastest way to "
    "write the same layer with PyTorch's own operators. × unfrozen: as × dense, with our weights "
    "packed anew at every call. × prepacked: over a dense convolution compiled with its weights "
    "packed once. Press a heading to sort by it; a name that is a link leads to the user's report "
    "of slowness that the case reproduces."
)
_READ_DISPATCH = (
    "Extra microseconds of one call of a whole layer over nn.Conv2d's, on an image so small "
    "(1×8×2×2) that nothing else counts."
)
_READ_FILES = "A + after a commit says that files differed from it."


@dataclass(frozen=True)
class SectionBlock:
    """A part of a section, under a heading of its own.

    Attributes:
        title: the heading; empty where it goes on under the last one.
        where: hardware, day and commit, beside it.
        level: of the heading, 3 or 4.
        text: a paragraph.
        table: as HTML.
        pictures: figures, one below the other.
    """

    title: str = ""
    where: str = ""
    level: int = 3
    text: str = ""
    table: str = ""
    pictures: Sequence[Picture] = ()


@dataclass(frozen=True)
class Section:
    """A section: what it is about, and its parts; one without parts is left out."""

    name: str
    title: str
    text: str
    blocks: Sequence[SectionBlock]


@dataclass(frozen=True)
class PageTile:
    """A number at the head of the page; ``mark`` colours it where it is not 0."""

    text: str
    value: str
    mark: str = ""


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
        sections = [section for section in self._sections() if section.blocks]
        self.pictures = [p for s in sections for block in s.blocks for p in block.pictures]
        days = sorted(results.data["started"][:10] for results in self.files)
        return render(
            "page.html",
            style=Markup(css_variables() + asset("page.css")),
            script=Markup(asset("page.js")),
            version=__version__,
            when=days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}",
            machines=list(dict.fromkeys(results.hardware for results in self.files)),
            tiles=self._tiles(),
            sections=sections,
        )

    def _sections(self) -> list[Section]:
        return [
            Section("speed-up", "Speed-up against saved work", _READ_SCATTER, self._scatters()),
            Section("shares", "How much of the saved work is saved time", _READ_SHARES,
                    self._shares()),
            Section("roofline", "Against the measured ceilings", _READ_ROOFLINE, self._rooflines()),
            Section("networks", "Whole networks", _BOUND, self._networks()),
            Section("layers", "Every layer", _READ_LAYERS,
                    self._tables(_layer_rows, tables.layers)),
            Section("dispatch", "What a call costs", _READ_DISPATCH,
                    self._tables(lambda results: results.rows("dispatch"), tables.dispatch)),
            Section("files", "Where the numbers come from", _READ_FILES, [self._files()]),
        ]  # fmt: skip

    def _tiles(self) -> list[PageTile]:
        layers = [row for results in self.files for row in _layer_rows(results)]
        networks = [r for results in self.files for r in _network_rows(results)]
        verdicts = [tables.verdict_of(row) for row in (*layers, *networks)]
        ratios = [
            row["dense"]["ratio"] / (row["dense_macs"] / row["macs"])
            for row in layers
            if "dense" in row and row["dense_macs"] > row["macs"] > 0
        ]
        tiles = [
            PageTile("layers and networks", f"{len(verdicts)}"),
            PageTile("faster than dense", f"{verdicts.count('win')}", "win"),
            PageTile("no measurable difference", f"{verdicts.count('even')}"),
            PageTile("slower than dense", f"{verdicts.count('lose')}", "lose"),
            PageTile("slower than a composition of PyTorch's layers",
                 f"{sum(map(tables.lost_to_composition, (*layers, *networks)))}", "lose"),
        ]  # fmt: skip
        if ratios:
            share = f"{100 * statistics.median(ratios):.0f} %"
            tiles.append(PageTile("of the MAC ratio is reached, median layer", share))
        if "disturbed" in verdicts:
            tiles.append(PageTile("disturbed, not judged", f"{verdicts.count('disturbed')}"))
        if "wrong" in verdicts:
            tiles.append(PageTile("wrong results, not timed", f"{verdicts.count('wrong')}", "lose"))
        return tiles

    def _scatters(self) -> list[SectionBlock]:
        return [
            _block(results, scatter(f"speed-up-{results.name}", points, results.hardware))
            for results in self.files
            if (points := results.points())
        ]

    def _shares(self) -> list[SectionBlock]:
        blocks = []
        for results in self.files:
            header, lines = shares.share_lines(results.data)
            if not lines:
                continue
            means = tables.plain_table(header, shares.without_marks(lines))
            said = shares.left_out_sentence(results.data)
            blocks.append(replace(_block(results), table=means, text=said))
            header, missed = shares.missed_lines(results.data)
            if missed:
                blocks.append(SectionBlock(table=tables.plain_table(header, missed)))
        return blocks

    def _rooflines(self) -> list[SectionBlock]:
        blocks = []
        for results in self.files:
            found = []
            for roof in results.roofs():
                points = results.points(roof.dtype, roof.device)
                if points:
                    name = f"roofline-{results.name}-{roof.device}-{roof.dtype}"
                    found.append(roofline(name, points, roof, results.hardware))
            if found:
                blocks.append(_block(results, *found))
        return blocks

    def _networks(self) -> list[SectionBlock]:
        blocks, drawn = self._tables(_network_rows, tables.networks), []
        for results in self.files:
            for row in _network_rows(results):
                if row.get("layers"):
                    name = f"{results.name}-{row['case']['name']}"
                    drawings = timeline(f"pass-{name}", row), layer_bars(f"layers-{name}", row)
                    drawn += [
                        SectionBlock(picture.title, level=4, pictures=[picture])
                        for picture in filter(None, drawings)
                    ]
        if drawn:
            drawn.insert(0, SectionBlock("Layer by layer", text=_READ_BARS))
        return [*blocks, *drawn]

    def _tables(
        self, rows: Callable[[Results], list[Json]], table: Callable[[list[Json]], str]
    ) -> list[SectionBlock]:
        return [
            replace(_block(results), table=table(found))
            for results in self.files
            if (found := rows(results))
        ]

    def _files(self) -> SectionBlock:
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
        return SectionBlock(table=tables.plain_table(header, lines))


def _block(results: Results, *pictures: Picture) -> SectionBlock:
    """Begins a part that is about one file."""
    commit = (results.environment["commit"] or "no commit")[:10]
    where = f"{results.hardware}, {results.data['started'][:10]}, {commit}"
    return SectionBlock(results.name, where, pictures=pictures)


def _layer_rows(results: Results) -> list[Json]:
    return [*results.rows("layer"), *results.rows("primitive")]


def _network_rows(results: Results) -> list[Json]:
    return [*results.rows("model"), *results.rows("training")]
