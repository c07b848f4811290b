# SPDX-License-Identifier: Apache-2.0
"""Profile: where the time of a network goes, layer by layer."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .. import tables
from ..disturbance import far_above, shown


@dataclass(frozen=True)
class LayerProfile:
    """One layer with weights, in one forward pass of the network; its calls are summed.

    Attributes:
        name: in the network; "" is the network itself.
        kind: its class.
        calls: how often it is called.
        seconds: median time.
        share: of the whole network's time, 0…1.
        macs: live multiply-accumulates.
        dense_macs: those of the same layer with every weight.
        bytes: the fewest that must move: inputs, outputs and live weights, once a call.
        percent_of_roof: the least time for this work on this machine over the median, in per cent.
        backend: what runs it: an engine of this package, or ``"torch"`` for a plain layer.
        why: in words.
        dense_seconds: median time of the dense layer in its place; None when not asked for.
        speedup: how many times longer dense takes, and its interval; None likewise.
        packing_seconds: what of ``seconds`` goes into packing weights that are not frozen.
        predicted_seconds: what the cost model says of the engine; None of a plain layer.
    """

    name: str
    kind: str
    calls: int
    seconds: float
    share: float
    macs: int
    dense_macs: int
    bytes: int
    percent_of_roof: float
    backend: str
    why: str
    dense_seconds: float | None = None
    speedup: tuple[float, float, float] | None = None
    packing_seconds: float = 0.0
    predicted_seconds: float | None = None


@dataclass(frozen=True)
class Profile:
    """The answer of `hk.profile`; ``str()`` of it is a table.

    Attributes:
        model: class of the network.
        input: shape, dtype, device and memory format of the example.
        seconds: median time of a forward pass.
        rest_seconds: what is outside of the layers: normalisation, activations, pooling, Python.
        layers: in the order of their first calls.
        roofs: the measured ceilings, by dtype: multiply-accumulates and bytes a second.
        threads: that PyTorch used.
        disturbed: what shows that other work spoilt the times; empty when nothing does.
    """

    model: str
    input: str
    seconds: float
    rest_seconds: float
    layers: tuple[LayerProfile, ...]
    roofs: dict[str, tuple[float, float]]
    threads: int
    disturbed: tuple[str, ...] = ()

    @property
    def packing_seconds(self) -> float:
        """What of a pass goes into packing weights: nothing where all layers are frozen."""
        return sum(layer.packing_seconds for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as plain data for JSON."""
        return {"format": "hetconv_kernels.profile/1", **asdict(self)}

    def __str__(self) -> str:
        with_dense = any(layer.speedup for layer in self.layers)
        header: tuple[str, ...] = (
            "layer", "is", "µs", "share", "% of roof", "MMACs", "of dense", "MB", "ran on",
        )  # fmt: skip
        header += ("dense µs", "speed-up") if with_dense else ()
        rows = [self._line(layer, with_dense) for layer in self.layers]
        rows.append(self._part("everything else", self.rest_seconds, len(header), ""))
        why = "at each call, for weights that are not frozen: hk.optimize or freeze() ends it"
        if not self.packing_seconds:
            why = "no weight is packed in a steady call"
        rows.append(self._part("packing, of the above", self.packing_seconds, len(header), why))
        total = ("whole", self.model, f"{self.seconds * 1e6:.1f}", "100.0%", "")
        macs = f"{sum(layer.macs for layer in self.layers) / 1e6:.2f}"
        rows.append((*total, macs, *[""] * (len(header) - 6), ""))
        ceilings = ", ".join(
            f"{dtype} {macs / 1e9:.0f} GMAC/s and {moved / 1e9:.0f} GB/s"
            for dtype, (macs, moved) in self.roofs.items()
        )
        return "\n".join(
            (
                f"{self.model} on {self.input}, {self.threads} threads",
                f"measured ceilings: {ceilings}",
                "",
                tables.text_table((*header, "because"), rows),
                *self._remarks(),
            )
        )

    def _part(self, name: str, seconds: float, columns: int, why: str) -> tuple[object, ...]:
        share = f"{seconds / self.seconds:.1%}" if self.seconds else ""
        return (name, "", f"{seconds * 1e6:.1f}", share, *[""] * (columns - 4), why)

    def _remarks(self) -> list[str]:
        """Says which layers are far above their prediction, and that the times are disturbed."""
        far = [la for la in self.layers if far_above(la.seconds, la.predicted_seconds)]
        lines = []
        if far:
            names = ", ".join(
                f"{la.name or '(itself)'} ({la.seconds / la.predicted_seconds:.0f} times)"
                for la in far
                if la.predicted_seconds
            )
            lines.append(
                f"Far above what is predicted: {names}. Other work, or layers too small for their "
                "threads; see docs/benchmarks.md."
            )
        if self.disturbed:
            lines.append(f"The times are {shown(self.disturbed)}.")
        return lines

    def _line(self, layer: LayerProfile, with_dense: bool) -> tuple[object, ...]:
        saved = layer.dense_macs / layer.macs if layer.macs else 1.0
        cells: tuple[object, ...] = (
            layer.name or "(itself)",
            layer.kind,
            f"{layer.seconds * 1e6:.1f}",
            f"{layer.share:.1%}",
            f"{layer.percent_of_roof:.0f}",
            f"{layer.macs / 1e6:.2f}",
            f"1/{saved:.2f}" if saved > 1 else "all",
            f"{layer.bytes / 1e6:.2f}",
            layer.backend,
        )
        if with_dense:
            dense = "" if layer.dense_seconds is None else f"{layer.dense_seconds * 1e6:.1f}"
            speedup = ""
            if layer.speedup is not None:
                speedup = "{:.2f}× [{:.2f}, {:.2f}]".format(*layer.speedup)
                speedup += " slower" if layer.speedup[2] < 1 and not self.disturbed else ""
            cells += (dense, speedup)
        return (*cells, layer.why)
