# SPDX-License-Identifier: Apache-2.0
"""Training steps of whole networks against dense and compositions: correct first, then timed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import record, steps
from benchmarks.networks import NetworkCase
from benchmarks.rig import OURS
from hetconv_kernels.measure import timing


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    chosen = steps.STEP_CASES if metafunc.config.getoption("--full") else steps.STEP_CASES[:1]
    metafunc.parametrize("case", [pytest.param(case, id=case.name) for case in chosen])


def test_training(case: NetworkCase, session: Any, benchmark: Any) -> None:
    torch.manual_seed(1)
    x = torch.randn(case.n, case.channels, case.size, case.size)
    networks = steps.build_step_networks(case)
    match = steps.check(networks, x)
    measures = session.measures(benchmark)
    if not match.ok:
        if measures:
            session.record("training").add(record.training_row(case, match))
        pytest.fail(f"wrong by {match.worst:.3g} times the bound; not timed")
    if not measures:
        ours = steps.variants(networks, x)[OURS]
        benchmark.pedantic(ours)
        return
    timings = timing.interleaved(
        steps.variants(networks, x),
        baseline="dense:nchw",
        target=OURS,
        warmup=1,
        max_seconds=4 * session.seconds,
        benchmark=benchmark,
    )
    row = record.training_row(case, match, timings)
    session.extra_info(benchmark, "training", row)
    session.record("training").add(row)
