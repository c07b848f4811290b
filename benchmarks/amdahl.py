# SPDX-License-Identifier: Apache-2.0
"""Amdahl's bound of a network, from the times of its layers within whole runs.

A run of the dense network takes its layers' times and the rest. If every layer took as much less
time as it has fewer multiply-accumulates, and the rest stayed, the network would be faster by

    bound = (rest + Σ time of a layer) / (rest + Σ time of a layer / its MAC ratio)

All times of one bound come from the same run, so that parts and whole belong together; of several
runs the median bound counts. It is a bound for whoever computes at the dense layers' own speed: a
layer that is faster for each multiply-accumulate than its dense form, or a rest that was fused
away, can exceed it.

Example: 10 s, of which a takes 6 s and b 2 s; a has a third of its MACs left, b half: 10 / (2 + 2 +
1) = 2.

    >>> speedup(TimedRun(10.0, {"a": 6.0, "b": 2.0}), {"a": 3.0, "b": 2.0})
    2.0
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from hetconv_kernels import stats
from hetconv_kernels.files import Json
from hetconv_kernels.graph.hooks import LayerCall, hooked
from hetconv_kernels.measure import timing


class TimedRun(NamedTuple):
    """One run of a network.

    Attributes:
        total: seconds of all of it.
        layers: of those, seconds in each layer, by name.
    """

    total: float
    layers: dict[str, float]

    @property
    def rest(self) -> float:
        """Seconds outside of the layers."""
        return self.total - sum(self.layers.values())


def hooked_runs(
    network: nn.Module,
    x: Tensor,
    names: Iterable[str],
    count: int,
    clock: Callable[[], float] | None = None,
) -> list[TimedRun]:
    """Runs a network and notes when its layers begin and end; the first run is not counted.

    Args:
        network: what is run.
        x: its input.
        names: of the layers; none may be inside of another one.
        count: runs.
        clock: seconds; None is the clock that suits the input's device.
    """
    now = clock or timing.clock(x.device)
    started: dict[str, float] = {}
    spent: dict[str, float] = {}

    def before(name: str, _call: LayerCall) -> None:
        started[name] = now()

    def after(name: str, _call: LayerCall, _y: object) -> None:
        spent[name] = spent.get(name, 0.0) + now() - started[name]

    runs = []
    with hooked({name: network.get_submodule(name) for name in names}, before, after):
        for _ in range(count + 1):
            spent.clear()
            begin = now()
            network(x)
            runs.append(TimedRun(now() - begin, dict(spent)))
    return runs[1:]


def speedup(run: TimedRun, ratios: Mapping[str, float]) -> float:
    """Computes the bound of one run.

    Args:
        run: of the dense network.
        ratios: for each layer how many times fewer multiply-accumulates it has when sparse.
    """
    after = run.rest + sum(time / ratios.get(name, 1.0) for name, time in run.layers.items())
    return run.total / after


def bound(runs: Sequence[TimedRun], ratios: Mapping[str, float]) -> Json:
    """Describes the run whose bound is the median one.

    Returns:
        ``total_s``, ``layers_s``, ``rest_s`` of that run, and its ``speedup``.
    """
    ordered = sorted(runs, key=lambda run: speedup(run, ratios))
    middle = ordered[(len(ordered) - 1) // 2]
    return {
        "total_s": middle.total,
        "layers_s": sum(middle.layers.values()),
        "rest_s": middle.rest,
        "speedup": speedup(middle, ratios),
    }


def layer_mac_ratios(
    dense: nn.Module, sparse: nn.Module, x: Tensor, names: Iterable[str]
) -> dict[str, float]:
    """Counts for each layer how many times fewer multiply-accumulates the sparse network does."""
    sides = []
    for network in (dense, sparse):
        rows = stats.layer_macs(network, x)
        sides.append(
            {
                # A layer may do its work in parts of itself.
                name: sum(r.macs for r in rows if f"{r.name}.".startswith(f"{name}."))
                for name in names
            }
        )
    return {name: macs / sides[1][name] for name, macs in sides[0].items() if sides[1][name]}


def medians(runs: Sequence[TimedRun]) -> dict[str, float]:
    """Returns the median seconds of each layer."""
    return {name: statistics.median(run.layers[name] for run in runs) for name in runs[0].layers}
