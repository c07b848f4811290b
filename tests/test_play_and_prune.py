# SPDX-License-Identifier: Apache-2.0
"""Play and Prune on numbers worked out by hand: pressure, thresholds, and when it stops."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from compressing import check_kills, run
from torch import nn

from hetconv_kernels.compression import PlayAndPrune
from hetconv_kernels.compression.methods.play_and_prune import first_threshold, headroom, mean_norms
from hetconv_kernels.errors import ArgumentError


def network() -> nn.Sequential:
    """Six filters of two weights each, whose mean absolute weights are 1, 2, … 6."""
    model = nn.Sequential(nn.Conv2d(2, 6, 1, bias=False), nn.ReLU(), nn.Conv2d(6, 2, 1, bias=False))
    with torch.no_grad():
        rows = torch.arange(1.0, 7.0)[:, None] * torch.tensor([[1.0, -1.0]])
        model[0].weight.copy_(rows[:, :, None, None])
    return model


def zero_loss(model: nn.Module, batch: int) -> torch.Tensor:
    return 0 * model[0].weight.sum()


def play(method: PlayAndPrune, accuracies: list[float], **options):
    values = iter(accuracies)
    arguments = {
        "example": torch.randn(1, 2, 1, 1),
        "evaluate": lambda m: next(values),
        "data": range(1),
        "train_step": zero_loss,
        "optimizer": lambda p: torch.optim.SGD(p, lr=1.0),
        "compact": False,
    }
    return run(method, network(), **(arguments | options))


def test_first_threshold_is_where_a_fraction_lies_under() -> None:
    norms = np.arange(1.0, 7.0)
    # Two of six are a third: just above 2 it is the first time at least 0.3.
    assert first_threshold(norms, 0.3) == pytest.approx(2.0)
    assert (norms < first_threshold(norms, 0.3)).sum() == 2
    assert first_threshold(norms, 0.34) == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("accuracy", "left"), [(0.95, 1.0), (0.97, 1.0), (0.94, 0.5), (0.93, 0.0), (0.5, 0.0)]
)
def test_headroom_is_what_is_left_of_the_tolerance(accuracy: float, left: float) -> None:
    assert headroom(accuracy, 0.95, 0.02) == left


def test_golden_trace_of_two_rounds() -> None:
    method = PlayAndPrune(
        tolerance=0.02, fraction=0.34, penalty=0.1, threshold=0.3, prune_epochs=1,
        recover_epochs=0, epochs=0, target=0.99, least=1,
    )  # fmt: skip
    # Before, baseline, after round 1 (half of the tolerance left), after round 2 (spent), result.
    report = play(method, [0.90, 0.90, 0.89, 0.88, 0.88])
    rounds = {entry["what"]: entry["result"] for entry in report.history}
    assert rounds["first thresholds"]["0"] == pytest.approx(2.0)
    # Round 1: 34 % of six filters are two; the penalty takes 0.1 off their weights; the filters of
    # mean 0.9 and 1.9 are under the threshold 2.
    assert rounds["choose 1"] == {"0": [0, 1]}
    assert rounds["drop 1"]["removed"] == {"0": 2}
    # Round 2, T = 1/2: 34 % of four is one; penalty 0.05; threshold 1, nothing is under it.
    assert rounds["choose 2"] == {"0": [2]}
    assert rounds["drop 2"]["removed"] == {"0": 0}
    assert "choose 3" not in rounds
    assert report.notes == ("the tolerance was spent after 2 rounds",
                            *report.notes[1:])  # fmt: skip
    weight = report.model[0].weight[:, :, 0, 0]
    expected = torch.tensor([[0.0, 0], [0, 0], [2.95, -2.95], [4, -4], [5, -5], [6, -6]])
    torch.testing.assert_close(weight.detach(), expected)
    assert report.model[2].support.mask.any(axis=(0, 2, 3)).tolist() == [False] * 2 + [True] * 4


def test_delta_scales_the_threshold_of_the_first_round_too() -> None:
    method = PlayAndPrune(
        tolerance=0.02, threshold=0.3, delta=2.2, penalty=0.0, prune_epochs=0, recover_epochs=0,
        epochs=0, rounds=1, least=1,
    )  # fmt: skip
    report = play(method, [0.9] * 4)
    rounds = {entry["what"]: entry["result"] for entry in report.history}
    assert rounds["drop 1"]["removed"] == {"0": 4}  # under 4.4 are 1, 2, 3 and 4


def test_a_round_that_costs_too_much_is_taken_back() -> None:
    method = PlayAndPrune(
        tolerance=0.02, threshold=0.3, prune_epochs=0, recover_epochs=0, epochs=0, least=1
    )
    report = play(method, [0.90, 0.90, 0.50, 0.90])
    assert "round 1 cost more than the tolerance" in report.notes[0]
    assert isinstance(report.model[0], nn.Conv2d)


def test_norms_are_means_over_live_weights() -> None:
    """A layer whose filters lost half of their channels must not fall under its threshold."""
    mask = torch.tensor([[True, True, False, False], [True, False, False, False], [False] * 4])
    weight = torch.tensor([[3.0, -1, 0, 0], [-4, 0, 0, 0], [0, 0, 0, 0]])
    layer = SimpleNamespace(mask=lambda name: mask, weight=lambda name: weight)
    assert mean_norms(layer, "0").tolist() == [2, 4, 0]


@pytest.mark.parametrize(
    "settings",
    [{"tolerance": 0.0}, {"fraction": 1.0}, {"penalty": -1.0}, {"threshold": 2}, {"delta": 0.0},
     {"rounds": 0}, {"multiple": 0}],
    ids=str,
)  # fmt: skip
def test_bad_settings(settings: dict) -> None:
    with pytest.raises(ArgumentError):
        PlayAndPrune(**settings)


def test_killed_and_resumed(tmp_path: Path) -> None:
    method = PlayAndPrune(
        tolerance=1.0, prune_epochs=1, recover_epochs=1, epochs=1, rounds=2, threshold=0.2
    )
    check_kills(method, tmp_path, seed=3)
