# SPDX-License-Identifier: Apache-2.0
"""CompressionReport: what a compression did to each layer and to the whole, measured here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from .._version import __version__
from ..measure import tables
from ..measure.disturbance import shown


@dataclass(frozen=True)
class LayerReport:
    """One layer before and after.

    Attributes:
        name: of the layer.
        kind: its class after.
        live: weights that exist, without biases: (before, after).
        macs: multiply-accumulates for the example: (before, after).
        seconds: median time of the layer alone: (before, after); None where it was not measured.
        speedup: the median of the paired ratios and its interval; None likewise.
        backend: what runs it: an engine, or ``"torch"`` for a plain layer.
        note: why the layer stayed dense; "" when it did not.
    """

    name: str
    kind: str
    live: tuple[int, int]
    macs: tuple[int, int]
    seconds: tuple[float, float] | None = None
    speedup: tuple[float, float, float] | None = None
    backend: str = "torch"
    note: str = ""


@dataclass(frozen=True)
class CompressionReport:
    """What `hk.compress` did; ``str()`` is a table, `to_json` a record.

    Attributes:
        model: the compressed network, on the device and in the mode of the given one.
        method: name of the method.
        settings: of the method.
        layers: convolutions and fully-connected layers, in the order of their calls.
        live: weights that exist in all layers, without biases: (before, after).
        macs: multiply-accumulates for the example: (before, after).
        accuracy: what ``evaluate`` returned: (before, after); None where it was not given.
        seconds: median time of the whole network: (before, after); None when not measured.
        speedup: median of the paired ratios and its interval.
        layouts: the memory format that was fastest: (before, after).
        batch: shape of the example that MACs and times are for.
        threads: that PyTorch used.
        device: where it was measured.
        difference: the largest difference from the masked dense network's output, relative to the
            largest output.
        compacted: whether removed filters were taken out physically.
        disturbed: what shows that other work spoilt the measurement; empty when nothing does, and
            nothing is to be concluded from the times otherwise.
        notes: remarks on the whole, such as why nothing was taken out physically.
        history: the rounds with their results.
    """

    model: nn.Module = field(repr=False)
    method: str
    settings: dict[str, Any]
    layers: tuple[LayerReport, ...]
    live: tuple[int, int]
    macs: tuple[int, int]
    accuracy: tuple[float, float] | None
    seconds: tuple[float, float] | None
    speedup: tuple[float, float, float] | None
    layouts: tuple[str, str] | None
    batch: tuple[int, ...]
    threads: int
    device: str
    difference: float
    compacted: bool
    notes: tuple[str, ...]
    history: tuple[dict[str, Any], ...] = field(repr=False)
    disturbed: tuple[str, ...] = ()

    @property
    def macs_saved(self) -> float:
        """The fraction of the multiply-accumulates that is gone."""
        return 1 - self.macs[1] / self.macs[0] if self.macs[0] else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Returns everything but the network as plain data for JSON."""
        values = {k: v for k, v in vars(self).items() if k not in ("model", "layers")}
        return {
            "format": "hetconv_kernels.compression/1",
            "version": __version__,
            **values,
            "layers": [asdict(layer) for layer in self.layers],
        }

    def to_json(self) -> str:
        """Returns `to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        header: tuple[str, ...] = ("layer", "is", "weights", "live", "MACs before", "after")
        timed = any(layer.seconds for layer in self.layers)
        rows: list[tuple[object, ...]] = []
        for layer in (*self.layers, self._total()):
            row: tuple[object, ...] = (layer.name, layer.kind, *layer.live, *layer.macs)
            if timed:
                row += _times(layer)
            rows.append((*row, layer.note))
        if timed:
            header += ("µs before", "after", "speed-up", "ran on")
        lines = [self.summary(), "", tables.text_table((*header, "kept dense because"), rows)]
        return "\n".join([*lines, *(f"Note: {note}" for note in self.notes)])

    def summary(self) -> str:
        """Says the totals in one or two sentences."""
        live, macs = self.live, self.macs
        text = (
            f"{self.method}: live weights {live[0]:,} -> {live[1]:,} "
            f"({_percent(1 - live[1] / max(live[0], 1))} fewer), "
            f"MACs {macs[0]:,} -> {macs[1]:,} ({_percent(self.macs_saved)} fewer)"
        )
        if self.accuracy is not None:
            text += f", accuracy {self.accuracy[0]:.4f} -> {self.accuracy[1]:.4f}"
        text += "."
        if self.seconds is not None and self.speedup is not None and self.layouts is not None:
            middle, low, high = self.speedup
            text += (
                f"\nMeasured on {self.device}, {self.threads} threads, batch {list(self.batch)}: "
                f"{self.seconds[0] * 1e3:.3f} ms ({self.layouts[0]}) -> "
                f"{self.seconds[1] * 1e3:.3f} ms ({self.layouts[1]}), "
                f"{middle:.2f}× [{low:.2f}, {high:.2f}]."
            )
            if self.disturbed:
                text += f"\nThe measurement is {shown(self.disturbed)}."
        return text

    def _total(self) -> LayerReport:
        return LayerReport("total", "", self.live, self.macs, self.seconds, self.speedup, "")


def compare(reports: Sequence[CompressionReport], names: Sequence[str] | None = None) -> str:
    """Lays several reports side by side, such as a paper's method and its hardware-aware form.

    Args:
        reports: of the same network.
        names: what to call them; by default their methods.
    """
    titles = names or [report.method for report in reports]
    rows = []
    for title, report in zip(titles, reports, strict=True):
        accuracy = report.accuracy
        times = report.seconds
        rows.append(
            (
                title,
                f"{accuracy[0]:.4f} -> {accuracy[1]:.4f}" if accuracy else "",
                report.live[1],
                _percent(1 - report.live[1] / max(report.live[0], 1)),
                report.macs[1],
                _percent(report.macs_saved),
                f"{times[0] * 1e3:.3f}" if times else "",
                f"{times[1] * 1e3:.3f}" if times else "",
                "{:.2f}× [{:.2f}, {:.2f}]".format(*report.speedup) if report.speedup else "",
            )
        )
    header = (
        "method", "accuracy", "live weights", "fewer", "MACs", "fewer", "ms before", "ms after",
        "speed-up",
    )  # fmt: skip
    return tables.text_table(header, rows)


def _times(layer: LayerReport) -> tuple[str, str, str, str]:
    if layer.seconds is None or layer.speedup is None:
        return ("", "", "", layer.backend)
    before, after = (f"{seconds * 1e6:.1f}" for seconds in layer.seconds)
    return before, after, f"{layer.speedup[0]:.2f}×", layer.backend


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"
