# SPDX-License-Identifier: Apache-2.0
"""Where the time of a network's native program goes: each step, where the network runs it.

``python -m benchmarks.program_steps resnet18-het4 --threads 1``

Beside each step's time stands its floor: its live multiply-accumulates at the rate, or its
operands' bytes at the bandwidth, that this machine was measured to have (`benchmarks.ceilings`),
whichever takes longer. That is the floor of direct sums; a layer by Winograd may be faster. Steps
that call PyTorch have none. *Counted* is the same with what the 8-bit engine itself counts of a
layer: its vector operations, with those that requantise, shuffle or leave lanes idle, in place of
the live products alone. That is a bound of how this engine lowers the layer, of no other. Of other
steps and in other dtypes it is the floor.

On one thread the clock is that of the thread, which other work on the machine hardly disturbs; the
floors want a quiet one. ``--results benchmarks/results`` writes ``steps-NETWORK.json`` there.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import low_precision
from benchmarks.ceilings import ceilings
from benchmarks.networks import NETWORKS, NetworkCase
from benchmarks.record import Record
from benchmarks.rig import OURS
from hetconv_kernels.backends import cpu_int8
from hetconv_kernels.files import Json
from hetconv_kernels.graph.names import module_of
from hetconv_kernels.graph.planned import observe_steps
from hetconv_kernels.graph.program_builder import ProgramStep
from hetconv_kernels.measure.roofline import Roofs
from hetconv_kernels.measure.tables import text_table
from hetconv_kernels.measure.timing import Timings
from hetconv_kernels.nn.quantized import QuantizedConv2d, QuantizedLinear


class StepTime(NamedTuple):
    """What one step of a program took.

    Attributes:
        name: of the graph's step.
        kind: what is run; ``call`` where PyTorch is called.
        samples: seconds of each call.
        macs: live multiply-accumulates.
        bytes: of its operands; 0 where they are not known.
        executed: how many times as much the 8-bit engine counts for the layer; 1 for all others.
    """

    name: str
    kind: str
    samples: tuple[float, ...]
    macs: int
    bytes: int
    executed: float = 1.0

    @property
    def seconds(self) -> float:
        """The median of the samples."""
        return statistics.median(self.samples)

    def row(self, roofs: Roofs) -> Json:
        """Returns it as plain data, with its floor and what is counted for it."""
        return {
            "name": self.name,
            "is": self.kind,
            "median_s": self.seconds,
            "macs": self.macs,
            "bytes": self.bytes,
            "floor_s": roofs.floor(self.macs, self.bytes),
            "counted_s": roofs.floor(self.macs * self.executed, self.bytes),
        }


def steps_of(network: Any, x: Tensor, rounds: int = 9) -> list[StepTime]:
    """Times each step of an optimised network in its place.

    Args:
        network: what `hk.optimize` gave.
        x: an input.  # [N, C, H, W]
        rounds: calls that are timed.

    Returns:
        The steps in order; none where nothing of the network is native.
    """
    clock = time.thread_time_ns if torch.get_num_threads() == 1 else time.perf_counter_ns
    times: dict[ProgramStep, list[int]] = {}

    def timed(step: ProgramStep, run: Callable[[], Any]) -> Any:
        begun = clock()
        result = run()
        times.setdefault(step, []).append(clock() - begun)
        return result

    with torch.no_grad(), observe_steps(network, timed):
        for _ in range(3):
            network(x)
        times.clear()
        for _ in range(rounds):
            network(x)
    return [
        StepTime(
            step.node.name,
            step.kind,
            tuple(ns / 1e9 for ns in taken),
            _macs(step),
            sum(s.numel * s.dtype.itemsize for s in step.specs if s is not None),
            _executed(step),
        )
        for step, taken in times.items()
    ]


def _macs(step: ProgramStep) -> int:
    """Counts a layer's live multiply-accumulates; none of what is no layer of ours."""
    layer = module_of(step.node)
    support = getattr(layer, "support", None)
    if support is None or not step.specs or step.specs[0] is None:
        return 0
    n, _, *size = step.specs[0].shape
    positions = math.prod(layer._geometry.output_size(*size)) if size else 1  # type: ignore[union-attr]
    return int(support.live * n * positions)


def _executed(step: ProgramStep) -> float:
    """Says how many times the vector operations of its live products a layer in 8 bits takes."""
    layer = module_of(step.node)
    if not isinstance(layer, QuantizedConv2d | QuantizedLinear) or not cpu_int8.is_built():
        return 1.0
    plan = cpu_int8.plan_of(layer.support)
    return float(plan.cost / plan.useful) if plan.useful else 1.0


def program_row(case: NetworkCase, steps: Sequence[StepTime], roofs: Roofs) -> Json:
    """Makes the row of a network's program."""
    found = [step.row(roofs) for step in steps]
    rounds = len(steps[0].samples)
    sums = tuple(sum(step.samples[i] for step in steps) for i in range(rounds))
    return {
        "kind": "program",
        "case": case.to_dict(),
        "clock": "thread" if torch.get_num_threads() == 1 else "wall",
        "rounds": rounds,
        **{key: sum(one[key] for one in found) for key in ("median_s", "floor_s", "counted_s")},
        "steps": found,
        "timings": Timings(OURS, {OURS: sums}, {OURS: 1}).to_dict(),
    }


def program_table(row: Json) -> str:
    """Lays out the row of a program as text, its sums last."""
    lines = []
    for step in (*row["steps"], row | {"name": "sum", "is": "", "macs": 0, "bytes": 0}):
        times = [step[key] for key in ("median_s", "floor_s", "counted_s")]
        known = step["bytes"] or step["name"] == "sum"
        shares = [f"{100 * floor / times[0]:.0f}" if known else "" for floor in times[1:]]
        lines.append(
            (
                step["name"],
                step["is"],
                *(f"{1e3 * seconds:.3f}" for seconds in times[:2]),
                shares[0],
                f"{1e3 * times[2]:.3f}",
                shares[1],
                f"{step['macs'] / 1e6:.1f}" if known and step["macs"] else "",
                f"{step['bytes'] / 1e6:.2f}" if step["bytes"] else "",
            )
        )
    header = ("step", "is", "ms", "floor ms", "%", "counted ms", "%", "MMACs", "MB")
    return text_table(header, lines)


def main() -> None:
    """Prints the table of a network, and writes it where it is asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("network", choices=[c.name for c in NETWORKS])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--results", type=Path, help="folder for steps-NETWORK.json; default: none")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    (case,) = (c for c in NETWORKS if c.name == options.network)
    torch.manual_seed(1)
    dtype = getattr(torch, case.dtype)
    # The best rates, measured before and after: what the machine can do while others do not work.
    before = ceilings("cpu", dtype)
    with torch.no_grad():
        network, x = low_precision.our_network(case, torch.randn(case.shape))
        steps = steps_of(network, x, options.rounds)
    after = ceilings("cpu", dtype)
    rates = (max(getattr(r, n) for r in (before, after)) for n in ("macs_per_s", "bytes_per_s"))
    roofs = Roofs(*rates, before.device, before.dtype)
    row = program_row(case, steps, roofs)
    print(program_table(row))
    if options.results is not None:
        kept = Record(options.results, f"steps-{case.name}")
        kept.add_roofs(roofs)
        kept.add(row)
        print(f"written to {kept.path}")


if __name__ == "__main__":
    main()
