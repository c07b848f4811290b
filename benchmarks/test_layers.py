# SPDX-License-Identifier: Apache-2.0
"""Layers against the dense convolution and against compositions: correct first, then timed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import record
from benchmarks.cases import CPU_CASES, GPU_CASES, Case
from benchmarks.held_out import HELD_OUT_CASES
from benchmarks.int8_rig import Int8Rig
from benchmarks.rig import OURS, Rig
from hetconv_kernels.errors import BackendError
from hetconv_kernels.measure import timing

_CASES = (*CPU_CASES, *(GPU_CASES if torch.cuda.is_available() else ()))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    full = metafunc.config.getoption("--full")
    held_out = metafunc.config.getoption("--held-out")
    chosen = [
        pytest.param(case, id=case.name, marks=[pytest.mark.gpu] if case.device == "cuda" else [])
        for case in (HELD_OUT_CASES if held_out else _CASES)
        if full or held_out or case.quick
    ]
    metafunc.parametrize("case", chosen)


def test_layer(case: Case, backend: str, benchmark: Any, session: Any) -> None:
    topic = "gpu" if case.device == "cuda" else "layers"
    options = session.config
    cache = options.getoption("--cache") or ("cold" if case.device == "cuda" else "warm")
    dtype = torch.bfloat16 if case.amp else getattr(torch, case.dtype)
    measures = session.measures(benchmark)
    roofs = session.ceiling(topic, case.device, dtype) if measures else None
    with torch.set_grad_enabled(case.training):
        try:
            bench: Rig | Int8Rig
            if case.dtype == "int8":
                bench = Int8Rig(case, backend)
            else:
                bench = Rig(
                    case,
                    backend,
                    rotate=cache == "cold" and case.device == "cuda",
                    with_prepacked=options.getoption("--prepacked"),
                )
            match = bench.check()
        except BackendError as refusal:
            pytest.skip(str(refusal))
        if not match.ok:
            if measures:
                session.record(topic).add(record.layer_row(bench, match))
            pytest.fail(f"wrong by {match.worst:.3g} times the bound; not timed")
        if not measures:
            benchmark.pedantic(bench.variants[OURS][0])
            return
        timings = timing.interleaved(
            bench.variants,
            baseline=next(name for name in bench.variants if name.startswith("dense")),
            target=OURS,
            rounds=50 if session.thorough else 25,
            max_seconds=session.seconds,
            cold=cache == "cold",
            graph=case.device == "cuda",
            device=case.device,
            benchmark=benchmark,
        )
        row = record.layer_row(bench, match, timings, roofs)
    session.extra_info(benchmark, topic, row)
    session.record(topic).add(row)
