# SPDX-License-Identifier: Apache-2.0
"""A timeline of one forward pass as a page: layers, primitives and operators, one below the other.

The page is one HTML file that needs nothing from outside: no script, no font, no network.
"""

from __future__ import annotations

import html
import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ... import ranges
from ...colours import css_variables
from ...files import write_text
from .timeline import _named

_WARM_UP = 2
_WIDTH, _ROW = 1200.0, 24.0
# Bars that would be narrower than this are left out of the picture, and counted.
_LEAST = 0.6
_ROWS = 8
# Characters of the labels, at 11 pixels, are about so wide.
_CHARACTER = 6.3
_PASS = "hetconv pass"
_ROLES = {"layer": "blue", "primitive": "green", "operator": "dense"}
_STYLE = """
body { background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif;
  margin: 0 auto; max-width: 80rem; padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; }
.wide { overflow-x: auto; }
svg { display: block; min-width: 60rem; width: 100%; height: auto; }
svg text { font: 11px system-ui, sans-serif; fill: var(--page); pointer-events: none; }
svg text.axis { fill: var(--muted); }
svg rect { stroke: var(--page); stroke-width: .5; }
svg line { stroke: var(--rule); }
table { border-collapse: collapse; font-size: .9rem; }
td, th { border-bottom: 1px solid var(--rule); padding: .2rem .8rem .2rem 0; text-align: left; }
td:not(:first-child), th { white-space: nowrap; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
"""


@dataclass(frozen=True)
class Bar:
    """One bar of the timeline.

    Attributes:
        name: what ran.
        kind: layer, primitive (of this package) or operator (of PyTorch).
        start: since the pass began, in microseconds.
        length: in microseconds.
        own: of that, what no bar below it has.
        row: how many bars it is in.
    """

    name: str
    kind: str
    start: float
    length: float
    own: float
    row: int


def write_timeline(model: nn.Module, example: Tensor, path: str | os.PathLike[str]) -> Path:
    """Writes a page with the timeline of a network's forward pass.

    Of three passes it shows the shortest. Where a GPU computes, it shows what the CPU launches;
    `write_trace` has both.

    Args:
        model: any network, also one that ``torch.compile`` gave, whose layers have no names.
        example: its input.
        path: of the HTML file.

    Returns:
        The path.

    Raises:
        HetconvError: the file cannot be written.
    """
    bars = min((_pass(model, example) for _ in range(3)), key=lambda found: found[0].length)
    path = Path(path)
    write_text(path, page(type(model).__name__, f"{tuple(example.shape)}", bars))
    return path


def _pass(model: nn.Module, example: Tensor) -> list[Bar]:
    """Runs the network once under torch.profiler; its bars, the first that of the whole."""
    with torch.no_grad(), ranges.enabled(nvtx=False):
        for _ in range(_WARM_UP):
            model(example)
        with (
            torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler,
            _named(model, "layer "),
            torch.profiler.record_function(_PASS),
        ):
            model(example)
    events = profiler.events()
    assert events is not None
    (whole,) = (event for event in events if event.name == _PASS)
    begin = whole.time_range.start
    bars = [Bar("the whole", "operator", 0.0, whole.time_range.elapsed_us(), 0.0, 0)]
    for event in sorted(events, key=lambda event: event.time_range.start):
        row, above = 0, event
        while above is not None and above is not whole:
            row, above = row + 1, above.cpu_parent
        if above is None or not row:
            continue  # of another thread, or outside of the pass
        name, kind = event.name, "operator"
        if name.startswith("layer "):
            name, kind = name.removeprefix("layer "), "layer"
        elif name.startswith("hetconv."):
            name, kind = name.removeprefix("hetconv."), "primitive"
        length = event.time_range.elapsed_us()
        inner = sum(child.time_range.elapsed_us() for child in event.cpu_children)
        start = event.time_range.start - begin
        bars.append(Bar(name, kind, start, length, max(0.0, length - inner), row))
    return bars


def page(model: str, shape: str, bars: list[Bar]) -> str:
    """Writes the page of a pass.

    Args:
        model: the network's class.
        shape: of the input.
        bars: the whole first.
    """
    whole, *inner = bars
    scale = _WIDTH / whole.length
    drawn = [bar for bar in inner if bar.length * scale >= _LEAST and bar.row <= _ROWS]
    title = html.escape(f"{model} on {shape}")
    left = len(inner) - len(drawn)
    note = f" {left} bars are too short to be drawn or too far below." if left else ""
    legend = ", ".join(
        f'<span style="color: var(--{role})">■</span> {kind}s' for kind, role in _ROLES.items()
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}: timeline</title>
<style>
{css_variables()}{_STYLE}</style>
</head>
<body>
<h1>{title}: {whole.length / 1e3:.3f} ms under the profiler</h1>
<p>Time runs to the right; what stands below a bar runs inside of it. {legend}. The profiler itself
takes a microsecond or two an event. Point at a bar to read it.{note}</p>
<div class="wide">
{svg(whole, drawn)}</div>
<h2>Where the time is</h2>
<p>What a bar takes without those below it, summed by name.</p>
{_table(whole, inner)}
</body>
</html>
"""


def svg(whole: Bar, bars: list[Bar]) -> str:
    """Draws bars as an SVG element."""
    scale, rows = _WIDTH / whole.length, max((bar.row for bar in bars), default=0)
    height = (rows + 1) * _ROW
    parts = [
        f'<svg role="img" aria-label="Timeline of {len(bars)} bars over {whole.length:.0f} '
        f'microseconds" viewBox="0 0 {_WIDTH:g} {height:g}" xmlns="http://www.w3.org/2000/svg">'
    ]
    for tick in range(5):
        x = _WIDTH * tick / 5
        parts.append(f'<line x1="{x:g}" x2="{x:g}" y1="0" y2="{height:g}"/>')
        parts.append(
            f'<text class="axis" x="{x + 3:g}" y="15">{whole.length * tick / 5e3:.3g} ms</text>'
        )
    for bar in bars:
        x, width, y = bar.start * scale, bar.length * scale, bar.row * _ROW
        said = html.escape(f"{bar.name}: {bar.length:.1f} µs, {bar.own:.1f} µs of its own")
        parts.append(
            f'<g><title>{said}</title><rect x="{x:.1f}" y="{y:g}" width="{width:.1f}" '
            f'height="{_ROW - 1:g}" fill="var(--{_ROLES[bar.kind]})"/>'
        )
        room = int((width - 6) / _CHARACTER)
        if room >= 3:
            label = bar.name if len(bar.name) <= room else f"{bar.name[: room - 1]}…"
            parts.append(f'<text x="{x + 3:.1f}" y="{y + 16:g}">{html.escape(label)}</text>')
        parts.append("</g>")
    return "\n".join([*parts, "</svg>\n"])


def _table(whole: Bar, bars: list[Bar], most: int = 15) -> str:
    """Lists the names with the most time of their own, and all others together."""
    own: dict[tuple[str, str], float] = defaultdict(float)
    for bar in bars:
        own[bar.kind, bar.name] += bar.own
    ranked = sorted(own.items(), key=lambda item: -item[1])
    rows = [(kind, name, time) for (kind, name), time in ranked[:most]]
    rows.append(("", f"{len(ranked) - len(rows)} others", sum(t for _, t in ranked[most:])))
    rows.append(("", "between them", max(0.0, whole.length - sum(own.values()))))
    lines = "\n".join(
        f'<tr><td>{html.escape(name)}</td><td>{kind}</td><td class="number">{time:.1f}</td>'
        f'<td class="number">{time / whole.length:.1%}</td></tr>'
        for kind, name, time in rows
    )
    head = "<tr><th>what</th><th>is</th><th>µs</th><th>share</th></tr>"
    return f'<div class="wide"><table>\n{head}\n{lines}\n</table></div>'
