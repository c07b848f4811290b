# SPDX-License-Identifier: Apache-2.0
"""``hetconv run``: what one call of a network takes, as a server would call it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from ...errors import ArgumentError, mismatch
from ...graph.trace import as_inputs, check_network
from ...integers import is_integer
from ...option_types import real, whole
from .. import disturbance
from ..stats import fitting
from ..timing import interleaved, median_interval
from . import command


@dataclass(frozen=True)
class Latency:
    """What a call took on so many threads.

    Attributes:
        threads: of PyTorch and of the engine.
        batch: images in a call.
        median_s: seconds of a call, the median; ``low_s`` and ``high_s`` are its 95 % interval.
        low_s: see ``median_s``.
        high_s: see ``median_s``.
        p99_s: what 99 of 100 calls did not exceed, of those timed.
        calls: how many samples were timed.
        images_per_s: batch over median.
        disturbed: what shows other work on the machine meanwhile; empty when nothing.
    """

    threads: int
    batch: int
    median_s: float
    low_s: float
    high_s: float
    p99_s: float
    calls: int
    images_per_s: float
    disturbed: tuple[str, ...] = ()

    def __str__(self) -> str:
        text = (
            f"{self.threads} threads, batch {self.batch}: median {1e3 * self.median_s:.3f} ms "
            f"[{1e3 * self.low_s:.3f}, {1e3 * self.high_s:.3f}], 99 % within "
            f"{1e3 * self.p99_s:.3f} ms, {self.images_per_s:.1f} images/s ({self.calls} samples)"
        )
        return f"{text}\n  {disturbance.shown(self.disturbed)}" if self.disturbed else text


def latency(
    model: nn.Module,
    example: Any,
    *,
    threads: Sequence[int] = (),
    rounds: int = 100,
    max_seconds: float = 5.0,
) -> list[Latency]:
    """Times calls of a network without gradients, for each number of threads.

    Args:
        model: in evaluation mode; it is only called.
        example: an input [N, …], or a tuple of inputs; N is the batch.
        threads: numbers of threads to try; by default as many as PyTorch has now, which it has
            again afterwards.
        rounds: samples for each, at least 6.
        max_seconds: about how long each may take.

    Raises:
        InputTypeError: no nn.Module, or no tensor in the example.
        ArgumentError: a number of threads or rounds that cannot be.
    """
    check_network(model)
    inputs = as_inputs(example)
    if not is_integer(rounds) or rounds < 6:
        raise ArgumentError(mismatch("rounds", rounds, "an integer of at least 6"))
    for number in threads:
        if not is_integer(number) or number < 1:
            raise ArgumentError(mismatch("threads", number, "an integer of at least 1"))
    batch = next(int(x.shape[0]) for x in inputs if isinstance(x, torch.Tensor))
    device = next(x.device for x in inputs if isinstance(x, torch.Tensor))
    before = torch.get_num_threads()
    found = []
    try:
        for number in threads or (before,):
            torch.set_num_threads(number)
            with torch.no_grad():
                timed = interleaved(
                    {"run": lambda: model(*inputs)},
                    rounds=rounds,
                    max_seconds=max_seconds,
                    device=device,
                )
            middle = median_interval(timed.samples["run"])
            found.append(
                Latency(
                    threads=number,
                    batch=batch,
                    median_s=middle.value,
                    low_s=middle.low,
                    high_s=middle.high,
                    p99_s=timed.quantile("run", 0.99),
                    calls=len(timed.samples["run"]),
                    images_per_s=batch / middle.value,
                    disturbed=timed.disturbed,
                )
            )
    finally:
        torch.set_num_threads(before)
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command to a parser."""
    command.add_runnable(parser)
    add = parser.add_argument
    add("--threads", type=whole(1, 4096), action="append", metavar="N",
        help="threads to run on (repeatable; as many as PyTorch takes)")  # fmt: skip
    add("--rounds", type=whole(6), default=100, help="samples that are timed (100)")
    add("--seconds", type=real(0), default=5.0, help="about how long they may take (5)")


def run(options: argparse.Namespace, show: Callable[[str], None]) -> int:
    """Runs the command.

    Args:
        options: as `add_arguments` describes them.
        show: prints a text.

    Returns:
        The exit code, 0.

    Raises:
        HetconvError: the target is unknown or cannot be built.
    """
    model, example = command.runnable(options)
    with fitting(example), torch.no_grad():
        model(example)
    found = latency(
        model,
        example,
        threads=options.threads or (),
        rounds=options.rounds,
        max_seconds=options.seconds,
    )
    if options.json:
        print(json.dumps([asdict(row) for row in found], indent=2))
    else:
        show("\n".join(map(str, found)))
    return 0
