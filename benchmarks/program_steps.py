# SPDX-License-Identifier: Apache-2.0
"""Where the time of a network's native program goes: each step, where the network runs it.

``python -m benchmarks.program_steps resnet18-het4 --threads 1``

Beside each step's time stands its floor: its live multiply-accumulates at the rate, or its
operands' bytes at the bandwidth, that this machine was measured to have, whichever takes longer.
That is the floor of direct sums; a layer by Winograd may be faster. On one thread the clock is that
of the thread, which other work on the machine hardly disturbs; the floors want a quiet one.
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

from benchmarks.networks import NETWORKS, build_network
from hetconv_kernels import roofline
from hetconv_kernels.graph import program_builder
from hetconv_kernels.graph.names import module_of
from hetconv_kernels.graph.program import Native
from hetconv_kernels.tables import text_table


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
        network: what `hk.optimize` gave, which has not run on such an input yet.
        x: an input.  # [N, C, H, W]
        rounds: calls that are timed.

    Returns:
        The steps in order; none where nothing of the network is native.
    """
    clock = time.thread_time_ns if torch.get_num_threads() == 1 else time.perf_counter_ns
    found: list[_Timed] = []
    bind, caller = program_builder._Builder._bound, program_builder.caller

    def bound(builder: Any, steps: Any, places: Any, called: Any, done: Any) -> Native:
        native = bind(builder, steps, places, called, done)
        parts = []
        for index, step, operands in steps:
            one = bind(builder, ((index, step, operands),), places, called, ())
            where = [native.outside.index(i) + 1 for i in one.outside]
            name = builder.record[index].node.name
            sizes = [o.spec.numel * o.spec.dtype.itemsize for o in operands if o.spec is not None]
            macs = _macs(builder.network, builder.record[index].node, operands)
            parts.append(_Timed(name, step.kind, macs, sum(sizes), one.program.run, where, clock))
        found.extend(parts)
        return native._replace(program=_Parts(parts))

    def timed_caller(module: Any, node: Any, index: Any) -> Callable[[Any], Any]:
        part = _Timed(node.name, "call", 0, 0, caller(module, node, index), None, clock)
        found.append(part)
        return part

    program_builder._Builder._bound = bound  # type: ignore[method-assign]
    program_builder.caller = timed_caller
    try:
        with torch.no_grad():
            for _ in range(3):
                network(x)
            for part in found:
                part.times.clear()
            for _ in range(rounds):
                network(x)
    finally:
        program_builder._Builder._bound = bind  # type: ignore[method-assign]
        program_builder.caller = caller
    order = {node.name: i for i, node in enumerate(network.graph.nodes)}
    ran = sorted((p for p in found if p.times), key=lambda p: order[p.name])
    return [
        StepTime(p.name, p.kind, statistics.median(p.times) / 1e9, p.macs, p.bytes) for p in ran
    ]


class _Timed:
    """One step, and what its calls took, in nanoseconds."""

    def __init__(
        self,
        name: str,
        kind: str,
        macs: int,
        size: int,
        call: Callable[[Any], Any],
        outside: list[int] | None,
        clock: Callable[[], int],
    ) -> None:
        self.name, self.kind, self.macs, self.bytes = name, kind, macs, size
        self._call, self._outside, self._clock = call, outside, clock
        self.times: list[int] = []

    def __call__(self, given: Any) -> Any:
        if self._outside is not None:  # addresses: of those of all steps, its own
            given = [given[0], *(given[i] for i in self._outside)]
        begun = self._clock()
        result = self._call(given)
        self.times.append(self._clock() - begun)
        return result


class _Parts:
    """Stands for a native program: its steps one by one."""

    def __init__(self, parts: list[_Timed]) -> None:
        self.kinds, self._parts = [part.kind for part in parts], parts

    def run(self, addresses: list[int]) -> None:
        for part in self._parts:
            part(addresses)


def _macs(network: Any, node: Any, operands: Any) -> int:
    """Counts a layer's live multiply-accumulates; none of what is no layer of ours."""
    layer = module_of(node)
    support, specs = getattr(layer, "support", None), [o.spec for o in operands]
    if support is None or specs[0] is None or len(specs[0].shape) != 4:
        return support.live * specs[0].shape[0] if support is not None and specs[0] else 0
    (n, _, h, w), geometry = specs[0].shape, layer._geometry  # type: ignore[union-attr]
    return int(support.live * n * math.prod(geometry.output_size(h, w)))


def main() -> None:
    """Prints the table of a network."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("network", choices=[c.name for c in NETWORKS if c.dtype == "float32"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    (case,) = (c for c in NETWORKS if c.name == options.network)
    torch.manual_seed(1)
    x = torch.randn(case.shape).to(memory_format=torch.channels_last)
    roof = roofline.measure_roofs()
    with torch.no_grad():
        steps = steps_of(build_network(case, "ours", x), x, options.rounds)
    rows = []
    for s in steps:
        floor = roof.floor(s.macs, s.bytes)
        share = f"{100 * floor / s.seconds:.0f}" if s.bytes else ""
        cells = (f"{1e3 * s.seconds:.3f}", f"{1e3 * floor:.3f}", share, f"{s.macs / 1e6:.1f}")
        rows.append((s.name, s.kind, *cells, f"{s.bytes / 1e6:.2f}"))
    rows.append(("sum", "", f"{1e3 * sum(s.seconds for s in steps):.3f}", "", "", "", ""))
    print(text_table(("step", "is", "ms", "floor ms", "%", "MMACs", "MB"), rows))


if __name__ == "__main__":
    main()
