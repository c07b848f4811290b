# SPDX-License-Identifier: Apache-2.0
"""QuantizeReport: what became of each layer, and what it cost and gained, all of it measured."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..measure import tables
from ..measure.samples import Timings


@dataclass(frozen=True)
class QuantizedLayerReport:
    """What became of one layer.

    Attributes:
        name: of the layer.
        kind: ``"conv"`` or ``"linear"``, or the class of a layer that has no integer form.
        integer: whether it is computed in 8 bits.
        sqnr_db: signal-to-quantisation-noise ratio of its output on the calibration batches, its
            inputs taken from the float network; None where it has no integer form.
        reason: why it stayed in float; completes "in float because …".
    """

    name: str
    kind: str
    integer: bool
    sqnr_db: float | None
    reason: str = ""


@dataclass(frozen=True)
class QuantizeReport:
    """What `quantize` did; ``str()`` says it.

    Attributes:
        model: the network to run.
        optimized: the same network in float32, fused: what it is compared with.
        layers: what became of each layer.
        dtype: of the activations, such as ``"uint8"``.
        observer: how ranges were chosen.
        images: how many calibrated it.
        sqnr_db: signal-to-quantisation-noise ratio of the network's outputs on these.
        accuracy: what ``evaluate`` gave for float32 and for 8 bits; None without it.
        bytes: of weights and biases, in float32 and in 8 bits.
        conversions: the steps between 8 bits and float32, input and output among them.
        timings: of both on the first batch; None where nothing was timed.
        engine: what computes in 8 bits: ``"cpu"`` or ``"reference"``.
        fixed: optional arguments of the forward that the result no longer has, see `optimize`.
    """

    model: nn.Module = field(repr=False)
    optimized: nn.Module = field(repr=False)
    layers: tuple[QuantizedLayerReport, ...]
    dtype: str
    observer: str
    images: int
    sqnr_db: float
    accuracy: tuple[float, float] | None
    bytes: tuple[int, int]
    conversions: int
    timings: Timings | None
    engine: str
    fixed: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Returns what was measured as JSON-serialisable data; infinite ratios become None."""
        timings = self.timings
        return {
            "layers": [vars(row) | {"sqnr_db": _finite(row.sqnr_db)} for row in self.layers],
            "dtype": self.dtype,
            "observer": self.observer,
            "images": self.images,
            "sqnr_db": _finite(self.sqnr_db),
            "accuracy": None if self.accuracy is None else list(self.accuracy),
            "bytes": list(self.bytes),
            "conversions": self.conversions,
            "seconds": None
            if timings is None
            else {name: timings.median(name) for name in timings.samples},
            "engine": self.engine,
            "fixed": list(self.fixed),
        }

    def __str__(self) -> str:
        rows = [
            (
                row.name,
                row.kind,
                self.dtype if row.integer else "float32",
                "-" if row.sqnr_db is None else f"{row.sqnr_db:.1f}",
                row.reason,
            )
            for row in self.layers
        ]
        done = sum(row.integer for row in self.layers)
        before, after = self.bytes
        lines = [
            tables.text_table(("layer", "kind", "computed in", "SQNR dB", "because"), rows),
            "",
            f"{done} of {len(self.layers)} layers in 8 bits, {self.conversions} conversions from "
            f"or to float32; calibrated by {self.observer} on {self.images} images",
            f"output SQNR {self.sqnr_db:.1f} dB; weights {before:,} -> {after:,} bytes",
        ]
        if self.fixed:
            lines.append(
                f"fixed to their defaults, for the batches give no others: {', '.join(self.fixed)}"
            )
        if self.accuracy is not None:
            lines.append(f"accuracy {self.accuracy[0]:.4f} -> {self.accuracy[1]:.4f}")
        if self.timings is not None:
            times = {name: self.timings.median(name) * 1e3 for name in self.timings.samples}
            lines.append(
                f"measured {times['float32']:.3g} ms -> {times['int8']:.3g} ms, "
                f"{self.timings.speedup('int8')} (engine: {self.engine})"
            )
            if self.engine == "reference":
                lines.append(
                    "the compiled engine is not built here: the reference is for its integers, "
                    "not for speed"
                )
        return "\n".join(lines)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
