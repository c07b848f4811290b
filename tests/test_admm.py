# SPDX-License-Identifier: Apache-2.0
"""ADMM on numbers worked out by hand: W, Z, U and ρ at every step."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from compressing import check_kills, run
from torch import nn

from hetconv_kernels.compression import ADMM, Run
from hetconv_kernels.errors import ArgumentError


def network() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[4.0, -3.0, 2.0, 1.0]]))
    return model


class Traced(ADMM):
    """Notes W, Z and U after each step that changes them."""

    def _start(self, run: Run, step: int) -> None:
        super()._start(run, step)
        self._note(run, "start")

    def _update(self, run: Run, step: int) -> Any:
        result = super()._update(run, step)
        self._note(run, "update")
        return result

    def _note(self, run: Run, what: str) -> None:
        rows = [run.layers["0"].weight, run.tensors["z/0"], run.tensors["u/0"]]
        TRACE.append((what, *[[round(v, 6) for v in row.flatten().tolist()] for row in rows]))


TRACE: list[Any] = []


def trace(**settings: Any) -> Any:
    TRACE.clear()
    method = Traced(**({"admm_epochs": 1, "retrain_epochs": 0, "rho": 0.5} | settings))
    return run(
        method, network(), example=torch.ones(1, 4), data=range(1), eval_data=None,
        train_step=lambda model, batch: 0 * model[0].weight.sum(),
        optimizer=lambda p: torch.optim.SGD(p, lr=1.0),
    )  # fmt: skip


def test_golden_trace_of_one_rate() -> None:
    report = trace(rates=(0.5,), updates=2)
    assert TRACE == [
        ("start", [4, -3, 2, 1], [4, -3, 0, 0], [0, 0, 0, 0]),
        # The gradient of 0.25·‖W − Z + U‖² is 0.5·(0, 0, 2, 1); Z = Π(W + 0), U = W − Z.
        ("update", [4, -3, 1, 0.5], [4, -3, 0, 0], [0, 0, 1, 0.5]),
        # ρ = 0.65: 0.65·(0, 0, 1 + 1, 0.5 + 0.5) off; U adds (−0.3, −0.15).
        ("update", [4, -3, -0.3, -0.15], [4, -3, 0, 0], [0, 0, 0.7, 0.35]),
    ]
    results = [e["result"] for e in report.history if e["what"].startswith("update")]
    assert results[0]["distance"] == pytest.approx(math.sqrt(1.25 / 26.25))
    assert results[1]["distance"] == pytest.approx(math.sqrt(0.1125 / 25.1125))
    assert report.model[0].weight.flatten().tolist() == [4, -3, 0, 0]
    assert report.model[0].support.mask.flatten().tolist() == [True, True, False, False]


def test_z_is_the_projection_of_w_plus_u() -> None:
    """After the first update W + U ranks another weight second than W does."""
    trace(rates=(0.5,), updates=2, rho=1e-9)
    # Hardly trained, W − Z = (0, 0, 2, 1) is in U, and W + U = (4, −3, 4, 2): Z drops the −3.
    assert TRACE[2][2] == [4, 0, 4, 0]
    assert TRACE[2][3] == [0, -3, 0, 2]


def test_rescaling_keeps_rho_times_u() -> None:
    trace(rates=(0.5,), updates=2, rescale=True, growth=2.0)
    # U = (0, 0, 1, 0.5) after the first update. Second training, ρ = 1: W = (4, −3, −1, −0.5);
    # U / 2 + W − Z = (0, 0, 0.5 − 1, 0.25 − 0.5).
    assert TRACE[2][1:] == ([4, -3, -1, -0.5], [4, -3, 0, 0], [0, 0, -0.5, -0.25])


def test_progressive_rates_freeze_what_was_pruned() -> None:
    report = trace(rates=(0.5, 0.75), updates=1)
    start = [entry for entry in TRACE if entry[0] == "start"][1]
    assert start == ("start", [4, -3, 0, 0], [4, 0, 0, 0], [0, 0, 0, 0])
    assert TRACE[-1] == ("update", [4, -1.5, 0, 0], [4, 0, 0, 0], [0, -1.5, 0, 0])
    assert report.live == (4, 1)


def test_retraining_leaves_pruned_weights_alone() -> None:
    method = ADMM(rates=(0.5,), admm_epochs=0, updates=1, retrain_epochs=1)
    report = run(
        method, network(), example=torch.ones(1, 4), data=range(1), eval_data=None,
        train_step=lambda model, batch: model[0].weight.sum(),
        optimizer=lambda p: torch.optim.SGD(p, lr=1.0),
    )  # fmt: skip
    assert report.model[0].weight.flatten().tolist() == [3, -4, 0, 0]


def test_fully_connected_layers_have_their_own_rates() -> None:
    method = ADMM(
        rates=(0.75,), fc_rates=(0.5,), admm_epochs=0, updates=1, retrain_epochs=0, stem=True
    )
    layers = {row.name: row for row in run(method).layers}
    assert layers["3"].live == (432, 108)
    assert layers["8"].live == (192, 96)


@pytest.mark.parametrize("projection", ["kernels", "columns", "blocks"])
def test_structured_projections_leave_whole_units(projection: str) -> None:
    method = ADMM(
        rates=(0.5,), projection=projection, filters=4, channels=3, admm_epochs=0, updates=1,
        retrain_epochs=0,
    )  # fmt: skip
    mask = run(method).model[3].support.mask  # [8, 6, 3, 3]
    assert mask.sum() == 216
    if projection == "columns":
        rows = mask.reshape(2, 4, 54)
        assert (rows == rows[:, :1]).all()
    else:
        kernels = mask.reshape(8, 6, 9)
        assert (kernels.all(-1) == kernels.any(-1)).all()
    if projection == "blocks":
        blocks = mask.reshape(2, 4, 2, 3, 9).transpose(0, 2, 1, 3, 4).reshape(4, -1)
        assert (blocks.all(1) == blocks.any(1)).all()


@pytest.mark.parametrize(
    "settings",
    [{"rates": ()}, {"rates": (0.9, 0.7)}, {"rates": (1.0,)}, {"fc_rates": (0.5,)},
     {"projection": "x"}, {"updates": 0}, {"rho": 0.0}, {"growth": -1.0}, {"filters": 0}],
    ids=str,
)  # fmt: skip
def test_bad_settings(settings: dict) -> None:
    with pytest.raises(ArgumentError):
        ADMM(**settings)


def test_killed_and_resumed(tmp_path: Path) -> None:
    method = ADMM(rates=(0.5, 0.8), admm_epochs=1, updates=2, retrain_epochs=1)
    check_kills(method, tmp_path, seed=5)
