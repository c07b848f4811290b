# SPDX-License-Identifier: Apache-2.0
"""Whole networks against the dense network and against compositions: correct first, then timed."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import amdahl, gate, peers, record
from benchmarks.networks import NETWORKS, NetworkCase, build
from benchmarks.rig import COMPOSITION, DENSE, OURS
from hetconv_kernels import timing

_SAMPLES = 7  # runs of a network for the time of each of its layers


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    full = metafunc.config.getoption("--full")
    chosen = NETWORKS if full else NETWORKS[1:2]
    metafunc.parametrize("case", [pytest.param(case, id=case.name) for case in chosen])


def test_network(case: NetworkCase, session: Any, benchmark: Any, tmp_path: Path) -> None:
    torch.manual_seed(1)
    x = torch.randn(case.n, case.channels, case.size, case.size)
    with torch.no_grad():
        row = measure(case, x, tmp_path, session.seconds, benchmark, session.measures(benchmark))
    if session.measures(benchmark):
        session.extra_info(benchmark, "models", row)
        session.record("models").add(row)
    assert row["match"]["ok"], f"wrong by {row['match']['worst']:.3g} times the bound; not timed"


def measure(
    case: NetworkCase,
    x: Tensor,
    folder: Path,
    seconds: float,
    benchmark: Any = None,
    timed: bool = True,
) -> dict[str, Any]:
    """Checks and times one network, beside (a) and then beside (b); returns its row.

    pytest-benchmark, where it is given, collects the rounds beside (a). Nothing but the check is
    done where nothing is to be timed.
    """
    ours, dense, composition = (build(case, form, x) for form in (OURS, DENSE, COMPOSITION))
    image = x.to(memory_format=torch.channels_last)
    timings, absent = {}, {}
    match = gate.Match(True, 0.0, 0.0)
    for role, rival, truth_of in ((DENSE, dense, dense), (COMPOSITION, composition, ours)):
        runs, absent[role] = _runs(role, rival, x, folder)
        matches = [gate.network_match(truth_of, x, run()) for run in runs.values()]
        runs[OURS] = lambda: ours(image)
        matches.append(gate.network_match(ours, x, ours(image)))
        match = max(match, *matches, key=lambda m: m.worst)
        if not match.ok:
            return record.model_row(case, match, absent)
        if not timed:
            if role == DENSE:
                benchmark.pedantic(runs[OURS])
            continue
        timings[role] = timing.interleaved(
            runs, baseline=f"{role}:eager", target=OURS, rounds=12, warmup=0,
            max_seconds=4 * seconds, benchmark=benchmark if role == DENSE else None, retake=2,
        )  # fmt: skip
        runs.clear()  # they hold several copies of the network each
        gc.collect()
    if not timed:
        return record.model_row(case, match, absent)
    names = layer_names(ours)
    runs = [amdahl.hooked_runs(net, image, names, _SAMPLES) for net in (dense, ours)]
    ratios = amdahl.mac_ratios(dense, ours, image, names)
    return record.model_row(case, match, absent, timings, (runs[0], runs[1]), ratios)


def _runs(
    role: str, module: nn.Module, x: Tensor, folder: Path
) -> tuple[dict[str, peers.Run], dict[str, str]]:
    runs, absent = {}, {}
    for name, start in peers.PEERS.items():
        try:
            runs[f"{role}:{name}"] = start(copy.deepcopy(module), x, folder)
        except peers.Absent as reason:
            absent[name] = str(reason)
    return runs, absent


def layer_names(network: nn.Module) -> list[str]:
    """Lists the convolutions of a network, as `optimize` left them or as `export.plain` did.

    A layer is what stands at the name of a convolution: with its bias, sum and activation.
    """
    kinds = ("FusedConv2d", "PlainConv2d")
    return [name for name, m in network.named_modules() if type(m).__name__ in kinds]
