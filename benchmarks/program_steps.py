# SPDX-License-Identifier: Apache-2.0
"""Where the time of a network's native program goes: each step, where the network runs it.

``python -m benchmarks.program_steps resnet18-het4 --threads 1``

Beside each step's time stands its floor: its live multiply-accumulates at the rate, or its
operands' bytes at the bandwidth, that this machine was measured to have, whichever takes longer.
That is the floor of direct sums; a layer by Winograd may be faster. Steps that call PyTorch have
none. On one thread the clock is that of the thread, which other work on the machine hardly
disturbs; the floors want a quiet one.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import low_precision
from benchmarks.networks import NETWORKS
from hetconv_kernels.graph.names import module_of
from hetconv_kernels.graph.planned import observe_steps
from hetconv_kernels.graph.program_builder import ProgramStep
from hetconv_kernels.measure import roofline
from hetconv_kernels.measure.tables import text_table


class StepTime(NamedTuple):
    """What one step of a program took.

    Attributes:
        name: of the graph's step.
        kind: what is run; ``call`` where PyTorch is called.
        seconds: median.
        macs: live multiply-accumulates.
        bytes: of its operands; 0 where they are not known.
    """

    name: str
    kind: str
    seconds: float
    macs: int
    bytes: int


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
            statistics.median(taken) / 1e9,
            _macs(step),
            sum(s.numel * s.dtype.itemsize for s in step.specs if s is not None),
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


def main() -> None:
    """Prints the table of a network."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("network", choices=[c.name for c in NETWORKS])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    (case,) = (c for c in NETWORKS if c.name == options.network)
    torch.manual_seed(1)
    roof = roofline.measure_roofs(dtype=getattr(torch, case.dtype))
    with torch.no_grad():
        network, x = low_precision.our_network(case, torch.randn(case.shape))
        steps = steps_of(network, x, options.rounds)
    rows, floors = [], 0.0
    for s in steps:
        floor = roof.floor(s.macs, s.bytes)
        floors += floor
        share = f"{100 * floor / s.seconds:.0f}" if s.bytes else ""
        cells = (f"{1e3 * s.seconds:.3f}", f"{1e3 * floor:.3f}", share, f"{s.macs / 1e6:.1f}")
        rows.append((s.name, s.kind, *cells, f"{s.bytes / 1e6:.2f}"))
    seconds = sum(s.seconds for s in steps)
    share = f"{100 * floors / seconds:.0f}"
    rows.append(("sum", "", f"{1e3 * seconds:.3f}", f"{1e3 * floors:.3f}", share, "", ""))
    print(text_table(("step", "is", "ms", "floor ms", "%", "MMACs", "MB"), rows))


if __name__ == "__main__":
    main()
