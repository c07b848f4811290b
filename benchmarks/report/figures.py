# SPDX-License-Identifier: Apache-2.0
"""The figures of the report, drawn by matplotlib: as SVG inside the page and as PNG beside it."""

from __future__ import annotations

import functools
import html
import importlib.util
import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from hetconv_kernels.colours import FAMILY_MARKS, light, themed
from hetconv_kernels.errors import HetconvError
from hetconv_kernels.files import Json

from .results import Point, Roof

Drawn = TypeVar("Drawn")
_MOST_BARS = 40
_LABELLED_LOSSES = 6
# A layer this far below its ceiling stands at the edge of the roofline, with its value: it would
# press all others together.
_FAR_BELOW_PERCENT = 3.0
_RC: Any = {
    "font.family": "sans-serif",
    "font.size": 10,
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": light("muted"),
    "axes.labelcolor": light("ink"),
    "axes.grid": True,
    "axes.grid.which": "major",
    "axes.axisbelow": True,
    "grid.color": light("rule"),
    "grid.linewidth": 0.8,
    "text.color": light("ink"),
    "xtick.color": light("muted"),
    "ytick.color": light("muted"),
    "xtick.labelcolor": light("muted"),
    "ytick.labelcolor": light("muted"),
    "legend.frameon": False,
    "svg.fonttype": "none",
}


@dataclass
class Picture:
    """A drawn figure.

    Attributes:
        name: of its PNG file, without suffix; letters, digits, dots and hyphens.
        title: a heading.
        alt: what it shows, for those who do not see it.
        figure: matplotlib's.
        tips: what a mark says when it is pointed at, by the mark's id.
    """

    name: str
    title: str
    alt: str
    figure: Any
    tips: dict[str, str] = field(default_factory=dict)

    def svg(self) -> str:
        """Returns the figure as an SVG element that follows the colours of the page."""
        import matplotlib

        buffer = io.StringIO()
        # Ids in one page must differ between figures; the same figure gives the same text.
        with matplotlib.rc_context({**_RC, "svg.hashsalt": self.name, "svg.id": self.name}):
            self.figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        text = buffer.getvalue()
        text = themed(text[text.index("<svg") :])
        for mark, tip in self.tips.items():
            text = text.replace(
                f'<g id="{mark}">', f'<g id="{mark}" class="mark"><title>{html.escape(tip)}</title>'
            )
        name = html.escape(self.name)
        opening = f'<svg role="img" aria-labelledby="{name}-title {name}-alt"'
        described = (
            f'<title id="{name}-title">{html.escape(self.title)}</title>'
            f'<desc id="{name}-alt">{html.escape(self.alt)}</desc>'
        )
        text = re.sub(r'(<svg[^>]*?) width="[\d.]+pt" height="[\d.]+pt"', r"\1", text, count=1)
        text = re.sub(r"<metadata>.*?</metadata>", "", text, count=1, flags=re.S)
        head, _, rest = text.replace("<svg", opening, 1).partition(">")
        return f"{head}>{described}{rest}"

    def write_png(self, folder: Path) -> Path:
        """Writes the figure as PNG, on a light ground; returns the path."""
        import matplotlib

        path = folder / f"{self.name}.png"
        with matplotlib.rc_context(_RC):
            self.figure.savefig(path, dpi=160, facecolor="white", format="png")
        return path


def check_matplotlib() -> None:
    """Refuses to go on without matplotlib.

    Raises:
        HetconvError: it is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise HetconvError(
            "the figures of the report need matplotlib, which is not installed: "
            "pip install 'hetconv-kernels[matplotlib]'"
        )


def _styled(draw: Callable[..., Drawn]) -> Callable[..., Drawn]:
    """Lets a figure be drawn in the style of the report, and leaves matplotlib's as it was."""

    @functools.wraps(draw)
    def styled(*args: Any) -> Drawn:
        import matplotlib

        with matplotlib.rc_context(_RC):
            return draw(*args)

    return styled


@_styled
def scatter(name: str, points: Sequence[Point], where: str) -> Picture:
    """Draws speed-up against MAC ratio, with the line on which all saved work is saved time.

    Args:
        name: of the picture.
        points: timed layers, at least one.
        where: the hardware, for the description.
    """
    figure, axes = _axes(8.0, 5.4)
    right = 1.25 * max(point.mac_ratio for point in points)
    top = 1.25 * max(right, *(point.high for point in points))
    bottom = 0.8 * min(0.8, *(point.low for point in points))
    left = 0.75 * min(1.0, *(point.mac_ratio for point in points))
    axes.axhspan(bottom, 1, color=light("loss"), alpha=0.07, linewidth=0)
    axes.plot([left, top], [left, top], color=light("ink"), linewidth=1.2)
    axes.axhline(1, color=light("muted"), linewidth=1.0, linestyle=(0, (4, 3)))
    tips = _marks(axes, name, points, [(p.mac_ratio, p.speedup) for p in points], intervals=True)
    losses = sorted((p for p in points if p.verdict == "lose"), key=lambda p: p.speedup)
    for point in losses:
        axes.plot(
            point.mac_ratio, point.speedup, "o", markersize=14, fillstyle="none",
            markeredgecolor=light("loss"), markeredgewidth=1.6,
        )  # fmt: skip
    for point in losses[:_LABELLED_LOSSES]:
        axes.annotate(
            point.name, (point.mac_ratio, point.speedup), xytext=(0, -10), ha="center", va="top",
            textcoords="offset points", color=light("loss"), fontsize=9,
        )  # fmt: skip
    _log(axes, "xy")
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, top)
    axes.set_xlabel("MAC ratio: dense ÷ live multiply-accumulates")
    axes.set_ylabel("times faster than the fastest dense convolution")
    middle = left**0.3 * right**0.7
    _along(axes, middle, middle, "y = x: all saved work is saved time")
    axes.text(right * 0.98, 1.03, "as fast as dense", ha="right", va="bottom", fontsize=9,
              color=light("muted"))  # fmt: skip
    axes.text(right * 0.98, 0.97, "slower than dense", ha="right", va="top", fontsize=9,
              color=light("loss"))  # fmt: skip
    axes.legend(loc="upper left", handletextpad=0.3)
    worst = f", among them {losses[0].name} at {losses[0].speedup:.2f}" if losses else ""
    return Picture(
        name,
        "Speed-up against saved work",
        f"Scatter of {len(points)} layers on {where}: times faster than the fastest dense "
        f"convolution against the MAC ratio, both logarithmic. Speed-ups reach from "
        f"{min(p.speedup for p in points):.2f} to {max(p.speedup for p in points):.2f}; "
        f"{len(losses)} lose{worst}. The table below has every value.",
        figure,
        tips,
    )


@_styled
def roofline(name: str, points: Sequence[Point], roof: Roof, where: str) -> Picture:
    """Draws each kernel's rate against its intensity, under the measured ceilings.

    Args:
        name: of the picture.
        points: timed layers in the roof's dtype, at least one.
        roof: the ceilings.
        where: the hardware, for the description.
    """
    figure, axes = _axes(8.0, 4.8)
    peak, slope = roof.macs_per_s / 1e9, roof.bytes_per_s / 1e9
    ridge = peak / slope
    far = [point for point in points if point.percent_of_roof < _FAR_BELOW_PERCENT]
    near = [point for point in points if point not in far]
    left = 0.4 * min(ridge, *(point.intensity for point in points))
    right = 1.8 * max(ridge, *(point.intensity for point in points))
    for share in (1.0, 0.5, 0.25):
        axes.plot(
            [left, ridge, right], [share * slope * left, share * peak, share * peak],
            color=light("ink" if share == 1 else "muted"), linewidth=1.4 if share == 1 else 0.8,
            linestyle="-" if share == 1 else (0, (2, 3)),
        )  # fmt: skip
        if share < 1:
            axes.text(right * 0.98, share * peak * 0.97, f"{share:.0%} of it", ha="right",
                      va="top", fontsize=8.5, color=light("muted"))  # fmt: skip
    bottom = 0.5 * min([0.25 * slope * left, *(point.rate / 1e9 for point in near)])
    places = [(p.intensity, 1.25 * bottom if p in far else p.rate / 1e9) for p in points]
    tips = _marks(axes, name, points, places)
    for point in far:
        axes.annotate(
            f"↓ {point.name}: {point.rate / 1e9:.2g} GMAC/s", (point.intensity, 1.25 * bottom),
            xytext=(8, 0), textcoords="offset points", va="center", fontsize=9,
            color=light("loss"),
        )  # fmt: skip
    _log(axes, "xy")
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, 1.9 * peak)
    axes.set_xlabel("live multiply-accumulates a byte that must move")
    axes.set_ylabel("live GMAC a second")
    axes.text(right * 0.98, peak * 1.04, f"measured arithmetic ceiling, {peak:.0f} GMAC/s",
              ha="right", va="bottom", fontsize=9)  # fmt: skip
    start = (left * ridge) ** 0.5
    _along(axes, start, start * slope, f"measured copy rate, {slope:.0f} GB/s")
    axes.legend(loc="lower right", handletextpad=0.3)
    shares = sorted(point.percent_of_roof for point in points)
    return Picture(
        name,
        f"Roofline, {roof.dtype}",
        f"Roofline of {len(points)} {roof.dtype} layers on {where}: multiply-accumulates a second "
        f"against multiply-accumulates a byte, both logarithmic, under ceilings of {peak:.0f} "
        f"GMAC/s and {slope:.0f} GB/s. The median layer reaches "
        f"{shares[len(shares) // 2]:.0f} % of its ceiling, the lowest {shares[0]:.0f} %, the "
        f"highest {shares[-1]:.0f} %.",
        figure,
        tips,
    )


@_styled
def layer_bars(name: str, row: Json) -> Picture:
    """Draws the time of each convolution of a network, dense and ours, in the network's order."""
    layers = [(layer, *times[:2]) for layer, times in row["layers"].items()]
    shown, rest = layers, []
    if len(layers) > _MOST_BARS:
        longest = sorted(layers, key=lambda entry: -max(entry[1] or 0, entry[2]))[:_MOST_BARS]
        shown, rest = [e for e in layers if e in longest], [e for e in layers if e not in longest]
    figure, axes = _axes(8.0, 1.3 + 0.34 * len(shown))
    tips, slower = {}, 0
    for place, (layer, dense, ours) in enumerate(shown):
        lost = dense is not None and ours > dense
        slower += lost
        if dense is not None:
            axes.barh(place - 0.19, dense * 1e3, 0.36, color=light("dense"))
        (bar,) = axes.barh(place + 0.19, ours * 1e3, 0.36, color=light("loss" if lost else "blue"))
        bar.set_gid(f"{name}-{place}")
        text = "" if dense is None else f"{dense / ours:.2f}×" + (" slower" if lost else "")
        tips[f"{name}-{place}"] = f"{layer}: {_ms(dense)} dense, {_ms(ours)} ours {text}"
        axes.annotate(
            text, (max(dense or 0, ours) * 1e3, place), xytext=(5, 0), va="center", fontsize=9,
            textcoords="offset points", color=light("loss" if lost else "ink"),
        )  # fmt: skip
    axes.set_yticks(range(len(shown)), [layer for layer, *_ in shown])
    axes.tick_params(axis="y", length=0, labelcolor=light("ink"))
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xmargin(0.12)
    axes.set_xlim(0)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("ms in the running network (the number: times faster than dense)")
    for label, role in (("dense", "dense"), ("ours", "blue")):
        axes.barh(0, 0, color=light(role), label=label)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.0 + 0.45 / (0.34 * len(shown))), ncols=2)
    more = f" The {len(rest)} shortest layers are left out." if rest else ""
    case = row["case"]
    return Picture(
        name,
        f"{case['name']}: time of each layer",
        f"Bars of {len(shown)} convolutions of {case['network']}, batch {case['n']}, "
        f"{case['size']} pixels: dense and ours side by side. Slower than dense: {slower}. "
        f"All together {_ms(sum(e[1] or 0 for e in layers))} dense and "
        f"{_ms(sum(e[2] for e in layers))} ours.{more}",
        figure,
        tips,
    )


def _axes(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # A figure of its own, not pyplot's: no global state, no window, no display needed.
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def _marks(
    axes: Any,
    name: str,
    points: Sequence[Point],
    places: Sequence[tuple[float, float]],
    intervals: bool = False,
) -> dict[str, str]:
    """Draws a mark for each point, in its family's colour and shape; returns what marks say."""
    tips, seen = {}, set()
    for number, (point, (x, y)) in enumerate(zip(points, places, strict=True)):
        role, mark = FAMILY_MARKS[point.family]
        if intervals:
            axes.plot([x, x], [point.low, point.high], color=light(role), linewidth=1.2)
        (drawn,) = axes.plot(
            x, y, mark, color=light(role), markersize=7, markeredgecolor=light("page"),
            markeredgewidth=0.7, linestyle="none",
            label=point.family if point.family not in seen else None,
        )  # fmt: skip
        seen.add(point.family)
        drawn.set_gid(f"{name}-{number}")
        tips[f"{name}-{number}"] = (
            f"{point.name}: {point.speedup:.2f}× [{point.low:.2f}, {point.high:.2f}] of "
            f"{point.mac_ratio:.2f}, {point.percent_of_roof:.0f} % of the roof"
        )
    return tips


def _along(axes: Any, x: float, y: float, text: str) -> None:
    """Writes a text above a line of proportionality, along it, on logarithmic axes."""
    axes.text(
        x, y * 1.09, text, rotation=math.degrees(math.atan2(y, x)), rotation_mode="anchor",
        transform_rotates_text=True, ha="center", fontsize=9,
    )  # fmt: skip


def _log(axes: Any, which: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    for letter in which:
        getattr(axes, f"set_{letter}scale")("log", base=2)
        axis = getattr(axes, f"{letter}axis")
        axis.set_major_locator(LogLocator(base=2, numticks=12))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_locator(NullLocator())


def _ms(seconds: float | None) -> str:
    return "not there" if seconds is None else f"{seconds * 1e3:.2f} ms"
