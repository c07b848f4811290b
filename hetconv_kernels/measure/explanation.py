# SPDX-License-Identifier: Apache-2.0
"""What `explain` answers, of layers in float and in 8 bits alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from ..packing import watched_packings
from .disturbance import far_above
from .disturbance import shown as said


@dataclass(frozen=True)
class Candidate:
    """What one backend says of a layer's forward pass.

    Attributes:
        name: of the backend.
        reasons: why it cannot run it; empty when it can.
        efficiency: useful over executed multiply-accumulates; None when it cannot run.
        predicted_s: predicted time of one call, in seconds.
        measured_s: median measured time of one call, in seconds; None when not measured.
        notes: what else the backend says of how it would run it, in sentences.
        packing_s: what of a steady call is spent on packing the weight, in seconds: 0 where the
            packed form is kept, or none is needed; None when not measured.
    """

    name: str
    reasons: tuple[str, ...]
    efficiency: float | None
    predicted_s: float | None
    measured_s: float | None
    notes: tuple[str, ...] = ()
    packing_s: float | None = None


@dataclass(frozen=True)
class Explanation:
    """The answer of `explain`; ``str()`` of it is a table.

    Attributes:
        layer: the layer's own description.
        input: shape, dtype, device and memory format of the input.
        groups: distinct mask rows, as (filters, channels read) of the largest ones first.
        group_count: how many there are.
        density: live over dense weights.
        macs: live multiply-accumulates of the call.
        dense_macs: those of the dense convolution.
        chosen: the backend that runs.
        forced: whether it was forced rather than chosen.
        candidates: every backend that is built here.
        frozen: whether the layer is frozen, so that packed forms of its weight are kept.
        disturbed: what shows that other work spoilt the measured times; empty when nothing does.
    """

    layer: str
    input: str
    groups: tuple[tuple[int, int], ...]
    group_count: int
    density: float
    macs: int
    dense_macs: int
    chosen: str
    forced: bool
    candidates: tuple[Candidate, ...]
    disturbed: tuple[str, ...] = ()
    frozen: bool = False

    @property
    def packing_s(self) -> float | None:
        """What the chosen backend spends on packing in a steady call; None if not measured."""
        return next((c.packing_s for c in self.candidates if c.name == self.chosen), None)

    @property
    def faster_than_dense(self) -> bool | None:
        """Whether the chosen backend was measured faster than `vendor`.

        None where it was not measured, or the measurement was disturbed.
        """
        times = {c.name: c.measured_s for c in self.candidates}
        chosen, vendor = times.get(self.chosen), times.get("vendor")
        if chosen is None or vendor is None or self.disturbed:
            return None
        return self.chosen != "vendor" and chosen < vendor

    def to_dict(self) -> dict[str, Any]:
        """Returns the explanation as JSON-serialisable data."""
        return asdict(self)

    def __str__(self) -> str:
        shown = ", ".join(f"{f} filters x {c} channels" for f, c in self.groups)
        more = self.group_count - len(self.groups)
        lines = [
            self.layer,
            f"input    {self.input}",
            f"groups   {self.group_count}: {shown}" + (f", and {more} more" if more else ""),
            f"work     {self.macs / 1e6:.3f} M MACs of {self.dense_macs / 1e6:.3f} M dense "
            f"({self.dense_macs / max(self.macs, 1):.2f}x fewer), density {self.density:.3g}",
            f"packing  {self._packing()}",
            "",
            f"  {'backend':<11}{'efficiency':>11}{'predicted':>13}{'measured':>13}",
        ]
        for c in self.candidates:
            mark = "*" if c.name == self.chosen else " "
            if c.reasons:
                lines.append(f"{mark} {c.name:<11}refused: {' '.join(c.reasons)}")
                continue
            efficiency = f"{c.efficiency:.0%}" if c.efficiency is not None else "-"
            lines.append(
                f"{mark} {c.name:<11}{efficiency:>11}{_micros(c.predicted_s):>13}"
                f"{_micros(c.measured_s):>13}"
            )
            lines += [f"    {note}" for note in c.notes]
        lines += ["", self._verdict()]
        for c in self.candidates:
            if c.name != self.chosen or c.measured_s is None or c.predicted_s is None:
                continue
            if far_above(c.measured_s, c.predicted_s):
                lines.append(
                    f"{c.name} took {c.measured_s / c.predicted_s:.0f} times what was predicted: "
                    "other work, or a layer too small for its threads; see docs/benchmarks.md."
                )
        if self.disturbed:
            lines.append(f"The measured times are {said(self.disturbed)}.")
        return "\n".join(lines)

    def _packing(self) -> str:
        seconds = self.packing_s
        if self.frozen and not seconds:
            return "none in a steady call: the layer is frozen, its packed weight is kept"
        if seconds is None:
            return "at each call, if the backend needs it: the layer is not frozen"
        if not seconds:
            return "none: the weight is read as it is"
        way_out = "the weight of this frozen layer is computed or trained"
        if not self.frozen:
            way_out = "layer.freeze() or hk.optimize keeps the packed weight"
        return f"{_micros(seconds)} of each call of {self.chosen}; {way_out}"

    def _verdict(self) -> str:
        how = "forced" if self.forced else "chosen"
        if self.chosen == "vendor":
            return (
                f"{how}: vendor, PyTorch's dense convolution. It executes every dense "
                "multiply-accumulate, so this layer is as fast as dense and no faster."
            )
        if self.faster_than_dense is False:
            return f"{how}: {self.chosen}. It was measured slower than the dense convolution."
        return f"{how}: {self.chosen}."


def packing_seconds(call: Callable[[], object], rounds: int = 3) -> float:
    """Returns the median time that a call spends on packing weights, in seconds.

    Args:
        call: has run before.
        rounds: how often to call it.
    """
    spent = []
    for _ in range(rounds):
        with watched_packings() as seen:
            call()
        spent.append(sum(packed.seconds for packed in seen))
    return sorted(spent)[rounds // 2]


def _micros(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e6:.1f} us"
