# SPDX-License-Identifier: Apache-2.0
"""Stability-based pruning on numbers worked out by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from compressing import check_kills, run
from torch import nn

from hetconv_kernels.compression import Stability
from hetconv_kernels.compression.scores import instability
from hetconv_kernels.errors import ArgumentError


def network() -> nn.Sequential:
    """Four filters whose two weights sum, in absolute value, to 2, 4, 6 and 8."""
    model = nn.Sequential(nn.Conv2d(2, 4, 1, bias=False), nn.ReLU(), nn.Conv2d(4, 2, 1, bias=False))
    with torch.no_grad():
        rows = torch.tensor([3.0, 1, 2, 4])[:, None] * torch.tensor([[1.0, -1.0]])
        model[0].weight.copy_(rows[:, :, None, None])
    return model


def test_score_is_the_relative_change_of_the_norm() -> None:
    before = torch.tensor([[1.0, -1], [2, 2], [-5, 0], [0, 0], [0, 0]])
    after = torch.tensor([[0.5, 0.5], [-4, 0], [3, -3], [0, 0], [1, 0]])
    np.testing.assert_allclose(instability(before, after), [0.5, 0, 0.2, 0, np.inf])


@pytest.mark.parametrize(
    ("settings", "gone"),
    [
        # ℓ1 of weight 0.1 at rate 1 takes 0.1 off each weight: the norms 6, 2, 4, 8 change by 0.2,
        # relative to themselves by 1/30, 1/10, 1/20, 1/40. The least stable is filter 1.
        ({"regulariser": "l1"}, 1),
        # ℓ2 shrinks all by the same factor; ties go by number.
        ({"regulariser": "l2", "weight": 0.125}, 0),
        ({"score": "norm"}, 1),
    ],
    ids=str,
)
def test_golden_trace(settings: dict, gone: int) -> None:
    drawn = []

    def train_step(model: nn.Module, batch: int) -> torch.Tensor:
        drawn.append(float(torch.rand(())))
        return 0.25 * model[0].weight[3].sum()

    method = Stability(
        **({"weight": 0.1, "fraction": 0.25, "probe_epochs": 1, "tune_epochs": 0, "epochs": 0,
            "steps": 1, "tolerance": 1.0, "least": 1} | settings)
    )  # fmt: skip
    report = run(
        method, network(), example=torch.randn(1, 2, 1, 1), evaluate=lambda m: 1.0, data=range(1),
        train_step=train_step, optimizer=lambda p: torch.optim.SGD(p, lr=1.0), compact=False,
    )  # fmt: skip
    alive = [f != gone for f in range(4)]
    assert report.model[0].support.mask.any(axis=(1, 2, 3)).tolist() == alive
    # What goes on is the network trained *without* the regulariser: filter 3 moved by the loss
    # alone, from the same point.
    weight = report.model[0].weight[:, :, 0, 0].detach()
    torch.testing.assert_close(weight[3], torch.tensor([3.75, -4.25]))
    if gone != 0:
        torch.testing.assert_close(weight[0], torch.tensor([3.0, -3.0]))
    # Both trainings drew the same.
    assert len(drawn) == 2
    assert drawn[0] == drawn[1]


def test_steps_draw_differently() -> None:
    drawn = []

    def train_step(model: nn.Module, batch: int) -> torch.Tensor:
        drawn.append(float(torch.rand(())))
        return 0 * model[0].weight.sum()

    method = Stability(
        fraction=0.25, probe_epochs=1, tune_epochs=0, epochs=0, steps=2, tolerance=1.0, least=1
    )
    run(
        method, network(), example=torch.randn(1, 2, 1, 1), evaluate=lambda m: 1.0, data=range(1),
        train_step=train_step, compact=False,
    )  # fmt: skip
    assert drawn[0] == drawn[1] != drawn[2] == drawn[3]


@pytest.mark.parametrize(
    "settings",
    [{"fraction": 1.0}, {"weight": 0.0}, {"regulariser": "l3"}, {"score": "x"},
     {"probe_epochs": 0}, {"steps": 0}],
    ids=str,
)  # fmt: skip
def test_bad_settings(settings: dict) -> None:
    with pytest.raises(ArgumentError):
        Stability(**settings)


def test_killed_and_resumed(tmp_path: Path) -> None:
    method = Stability(
        fraction=0.2, probe_epochs=1, tune_epochs=1, epochs=1, steps=2, tolerance=1.0
    )
    check_kills(method, tmp_path, seed=4)
