# SPDX-License-Identifier: Apache-2.0
"""Whole networks against the dense network and against compositions: correct first, then timed."""

from __future__ import annotations

import copy
import gc
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import amdahl, gate, low_precision, peers, record
from benchmarks.networks import NETWORKS, NetworkCase, build_network
from benchmarks.rig import COMPOSITION, DENSE, OURS, OURS_FLOAT32
from hetconv_kernels.measure import timing
from hetconv_kernels.measure.timing import Timings

_SAMPLES = 7  # runs of a network for the time of each of its layers
# The default run takes one small network, and whoever starts within seconds.
_QUICK = "resnet20-het4"
_SLOW_TO_START = {"compiled": "it compiles longer than a quick run takes: --full measures it"}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    full = metafunc.config.getoption("--full")
    chosen = [case for case in NETWORKS if full or case.name == _QUICK]
    metafunc.parametrize("case", [pytest.param(case, id=case.name) for case in chosen])


def test_network(case: NetworkCase, session: Any, benchmark: Any, tmp_path: Path) -> None:
    torch.manual_seed(1)
    x = torch.randn(case.shape)
    threads = torch.get_num_threads()
    torch.set_num_threads(case.threads or threads)
    try:
        with torch.no_grad():
            timed = session.measures(benchmark)
            skipped = {} if session.config.getoption("--full") else _SLOW_TO_START
            row = measure_case(case, x, tmp_path, session.seconds, benchmark, timed, skipped)
    finally:
        torch.set_num_threads(threads)
    if session.measures(benchmark):
        session.extra_info(benchmark, "models", row)
        session.record("models").add(row)
    if OURS in row["absent"]:
        pytest.skip(f"ours is absent: {row['absent'][OURS]}")
    assert row["match"]["ok"], f"wrong by {row['match']['worst']:.3g} times the bound; not timed"


def measure_case(
    case: NetworkCase,
    x: Tensor,
    folder: Path,
    seconds: float,
    benchmark: Any = None,
    timed: bool = True,
    skipped: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Checks and times one network, beside (a) and then beside (b); returns its row.

    Where this build has nothing that runs the case's dtype, the row says so and has no times.

    pytest-benchmark, where it is given, collects the rounds beside (a). Nothing but the check is
    done where nothing is to be timed. Who is `skipped` is absent, by the reason that is given.
    """
    ours, dense, composition = (build_network(case, form, x) for form in (OURS, DENSE, COMPOSITION))
    timings: dict[str, Timings] = {}
    absent: dict[str, dict[str, str]] = {}
    match = gate.Agreement(True, 0.0, 0.0)
    own: dict[str, partial[Tensor]] = {}
    try:
        own = low_precision.ours(case, ours, x)
    except peers.Absent as reason:
        absent[OURS] = {case.dtype: str(reason)}
    if own and case.dtype == "int8":
        match = low_precision.reference_match(own[OURS])
    # The truth is in PyTorch's own layers: what ours computes is what the composition computes.
    composed = gate.NetworkTruth(composition, x)
    matches = [_match(case, composed, name, run()) for name, run in own.items()]
    match = max([match, *matches], key=lambda m: m.worst)
    if not match.ok:
        return record.model_row(case, match, absent)
    for role, rival in ((DENSE, dense), (COMPOSITION, composition)):
        runs, absent[role] = _runs(role, rival, x, folder, case.dtype, skipped or {})
        truth = composed if role == COMPOSITION else gate.NetworkTruth(rival, x)
        matches = [_match(case, truth, name, run()) for name, run in runs.items()]
        match = max([match, *matches], key=lambda m: m.worst)
        if not match.ok:
            return record.model_row(case, match, absent)
        if not runs or not own:  # nobody to compare with; the others' matches are still worth it
            continue
        if not timed:
            if role == DENSE:
                benchmark.pedantic(own[OURS])
            continue
        timings[role] = timing.interleaved(
            runs | own, baseline=next(iter(runs)), target=OURS, rounds=12, warmup=0,
            max_seconds=4 * seconds, benchmark=benchmark if role == DENSE else None, retake=2,
        )  # fmt: skip
        runs.clear()  # they hold several copies of the network each
        gc.collect()
    if len(timings) < 2:
        return record.model_row(case, match, absent)
    if case.dtype != "float32":  # Amdahl's bound is of the layers of a dense network in float32
        return record.model_row(case, match, absent, timings)
    image = x.to(memory_format=torch.channels_last)
    names = layer_names(ours)
    layers = [amdahl.hooked_runs(net, image, names, _SAMPLES) for net in (dense, ours)]
    ratios = amdahl.layer_mac_ratios(dense, ours, image, names)
    return record.model_row(case, match, absent, timings, (layers[0], layers[1]), ratios)


def _match(case: NetworkCase, truth: gate.NetworkTruth, name: str, y: Tensor) -> gate.Agreement:
    """Judges a result by the precision that it was computed in."""
    return truth.match(y, "float32" if name == OURS_FLOAT32 else case.dtype)


def _runs(
    role: str,
    module: nn.Module,
    x: Tensor,
    folder: Path,
    dtype: str = "float32",
    skipped: Mapping[str, str] = MappingProxyType({}),
) -> tuple[dict[str, peers.Inference], dict[str, str]]:
    runs, absent = {}, {}
    for name, start in low_precision.peers_of(dtype).items():
        if name in skipped:
            absent[name] = skipped[name]
            continue
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
