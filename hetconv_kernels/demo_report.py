# SPDX-License-Identifier: Apache-2.0
"""What the demo shows: a progress bar, a table, and a picture."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from .measure import tables

# The dense network is plain nn.Conv2d; no backend of this package runs it.
TORCH = "torch"
_HEADER = ("network", "PSNR dB", "live weights", "MACs", "ms per image", "speed-up", "ran on")
_PLAIN_LINES = 20


@dataclass(frozen=True)
class DemoRow:
    """What was measured of one network.

    Attributes:
        name: of the network.
        psnr_db: quality on the held-out photograph, in dB.
        live_weights: weights of convolutions that exist, without biases.
        macs: multiply-accumulates for the photograph.
        seconds: median time for the photograph.
        speedup: over the dense network: median of the paired ratios, and its interval.
        backends: what ran its layers.
        difference: largest difference of a pixel (0…1) from the masked dense twin; in 8 bits, from
            the same network in float32.
    """

    name: str
    psnr_db: float
    live_weights: int
    macs: int
    seconds: float
    speedup: tuple[float, float, float]
    backends: tuple[str, ...]
    difference: float


class TrainingBar:
    """A progress bar over all trainings: rich's on a terminal that has it, lines otherwise.

    Args:
        total: steps of all stages together.
    """

    def __init__(self, total: int) -> None:
        self.total, self.done, self.shown = total, 0, 0
        self.started = time.perf_counter()
        self._bar: Any = None
        if tables.has_rich():
            from rich import progress

            self._bar = progress.Progress(
                progress.TextColumn("{task.description:24}"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TextColumn("loss {task.fields[loss]:.5f}"),
                progress.TimeElapsedColumn(),
                progress.TimeRemainingColumn(),
            )
            self._task = self._bar.add_task("", total=total, loss=float("nan"))

    def __enter__(self) -> TrainingBar:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def stage(self, name: str) -> Callable[[float], None]:
        """Names the stage that begins, and returns what to call with the loss after each step."""

        def step(loss: float) -> None:
            self.done += 1
            if self._bar is not None:
                self._bar.update(self._task, advance=1, description=name, loss=loss)
            elif self.done * _PLAIN_LINES // self.total > self.shown:
                self.shown = self.done * _PLAIN_LINES // self.total
                seconds = time.perf_counter() - self.started
                print(
                    f"[{100 * self.done // self.total:3d} %] {seconds:5.0f} s  {name}: "
                    f"loss {loss:.5f}, {seconds * (self.total / self.done - 1):.0f} s left",
                    flush=True,
                )

        return step


def show(rows: Sequence[DemoRow], noisy_psnr_db: float) -> None:
    """Prints the table, and below it what the times do not say by themselves."""
    cells: list[tuple[str, ...]] = [("noisy", f"{noisy_psnr_db:.2f}", "", "", "", "", "")]
    for row in rows:
        middle, low, high = row.speedup
        dense = row is rows[0]
        cells.append(
            (
                row.name,
                f"{row.psnr_db:.2f}",
                f"{row.live_weights:,}",
                f"{row.macs / 1e9:.3g} G",
                f"{row.seconds * 1e3:.1f}",
                "1" if dense else f"{middle:.2f}× [{low:.2f}, {high:.2f}]",
                ", ".join(row.backends),
            )
        )
    tables.show_table(_HEADER, cells, left=(0, -1))
    print(remark(rows))


def remark(rows: Sequence[DemoRow]) -> str:
    """Says what to expect of the times, given the backends that ran."""
    explained = "Speed-up: the median ratio of paired runs, with its 95 % interval."
    by_vendor = [
        row.name if row.backends == ("vendor",) else f"part of {row.name}"
        for row in rows
        if "vendor" in row.backends
    ]
    if not by_vendor:
        return explained
    return (
        f"{explained}\n`vendor` ran {' and '.join(by_vendor)}: the dense convolution on masked "
        "weights, from which no speed-up is to be expected."
    )


def draw_photographs(
    path: Path,
    truth: Tensor,
    noisy: Tensor,
    noisy_psnr_db: float,
    results: Mapping[DemoRow, Tensor],
) -> None:
    """Writes the picture: noisy and denoised photographs side by side, a detail under each.

    Args:
        path: where to write, as PNG.
        truth: the clean photograph, shown last.  # [1, H, W]
        noisy: what the networks were given.  # [1, H, W]
        noisy_psnr_db: its quality.
        results: what each network made of it.  # [1, H, W] each
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [(f"noisy\n{noisy_psnr_db:.2f} dB", noisy)]
    for row, image in results.items():
        title = f"{row.name}\n{row.psnr_db:.2f} dB, {row.seconds * 1e3:.0f} ms ({row.backends[0]})"
        panels.append((title, image))
    panels.append(("original\n", truth))
    height, width = truth.shape[-2:]
    part = (
        slice(height // 3, height // 3 + height // 4),
        slice(width // 3, width // 3 + width // 4),
    )
    # A figure of its own, not pyplot's: no global state, no window, no display needed.
    inches = (3.2 * len(panels), 2 * 3.2 * height / width + 0.7)
    figure = Figure(figsize=inches, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(panels), squeeze=False)
    for (title, image), (whole, detail) in zip(panels, axes.T, strict=True):
        whole.set_title(title, fontsize=10)
        for axis, shown in ((whole, image[0]), (detail, image[0][part])):
            axis.imshow(shown.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axis.set_axis_off()
    figure.savefig(path, dpi=150, format="png")
