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
from hetconv_kernels.compression.methods.play_and_prune import (
    headroom,
    mean_norms,
    next_pressure,
    threshold_of,
)
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


def test_threshold_of_is_where_a_fraction_lies_under() -> None:
    norms = np.arange(1.0, 7.0)
    # Two of six are a third: just above 2 it is the first time at least 0.3.
    assert threshold_of(norms, 0.3) == pytest.approx(2.0)
    assert (norms < threshold_of(norms, 0.3)).sum() == 2
    assert threshold_of(norms, 0.34) == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("accuracy", "left"), [(0.95, 1.0), (0.97, 1.0), (0.94, 0.5), (0.93, 0.0), (0.5, 0.0)]
)
def test_headroom_is_what_is_left_of_the_tolerance(accuracy: float, left: float) -> None:
    assert headroom(accuracy, 0.95, 0.02) == left


@pytest.mark.parametrize(
    ("left", "after"), [(1.0, 3.0), (0.8, 2.4), (2 / 3, 2.0), (0.4, 1.2), (0.1, 1.0), (0.0, 1.0)]
)
def test_the_pressure_rises_and_falls_and_is_halved_at_most(left: float, after: float) -> None:
    assert next_pressure(2.0, left, 1.5) == pytest.approx(after)


def rounds_of(report) -> dict:
    return {entry["what"]: entry["result"] for entry in report.history}


def test_golden_trace_of_three_rounds() -> None:
    method = PlayAndPrune(
        tolerance=0.02, fraction=0.34, penalty=0.1, threshold=0.3, delta=1.5, prune_epochs=1,
        recover_epochs=0, rounds=3, epochs=0, target=0.99, least=1,
    )  # fmt: skip
    # Before, baseline, after round 1 (half of the tolerance left), 2 and 3 (all left), result.
    report = play(method, [0.90, 0.90, 0.89, 0.90, 0.90, 0.90])
    rounds = rounds_of(report)
    # Round 1: 34 % of six filters are two, of mean magnitude 1.5; the penalty takes a tenth of it
    # off their weights; the filters of mean 0.85 and 1.85 are under 2, where 30 % lie under.
    chosen = rounds["choose 1"]["0"]
    assert chosen == {"filters": [0, 1], "magnitude": 1.5, "threshold": pytest.approx(2.0)}
    assert rounds["drop 1"]["removed"] == {"0": 2}
    assert rounds["pressure after 1"] == 0.75
    # Round 2: 34 % · 0.75 of four is one, of magnitude 3, and 30 % · 0.75 lie under 3; it loses
    # 0.075 · 3 and is under it.
    chosen = rounds["choose 2"]["0"]
    assert chosen == {"filters": [2], "magnitude": 3, "threshold": pytest.approx(3.0)}
    assert rounds["drop 2"]["removed"] == {"0": 1}
    assert rounds["pressure after 2"] == 1.125
    # Round 3: one of magnitude 4 loses a tenth of it; two of three lie under 5 (and a little).
    chosen = rounds["choose 3"]["0"]
    assert chosen == {"filters": [3], "magnitude": 4, "threshold": pytest.approx(5.0)}
    assert rounds["drop 3"]["removed"] == {"0": 2}
    weight = report.model[0].weight[:, :, 0, 0].detach()
    torch.testing.assert_close(weight, torch.tensor([[0.0, 0]] * 5 + [[6, -6]]))
    assert report.model[2].support.mask.any(axis=(0, 2, 3)).tolist() == [False] * 5 + [True]


def test_the_threshold_rises_while_the_tolerance_is_not_touched() -> None:
    method = PlayAndPrune(
        tolerance=0.02, threshold=0.15, delta=2.2, penalty=0.0, prune_epochs=0, recover_epochs=0,
        epochs=0, rounds=2, target=0.99, least=1,
    )  # fmt: skip
    rounds = rounds_of(play(method, [0.9] * 5))
    assert rounds["drop 1"]["removed"] == {"0": 1}  # of six 15 % lie under 1 (and a little)
    assert rounds["drop 2"]["removed"] == {"0": 2}  # of five 33 % lie under 3


def test_a_round_over_the_tolerance_is_taken_back_and_a_smaller_one_tried() -> None:
    method = PlayAndPrune(
        tolerance=0.02, threshold=0.3, penalty=0.0, prune_epochs=0, recover_epochs=0, epochs=0,
        rounds=2, target=0.99, least=1,
    )  # fmt: skip
    report = play(method, [0.90, 0.90, 0.50, 0.90, 0.90])
    rounds = rounds_of(report)
    assert rounds["drop 1"]["removed"] == {"0": 2}
    assert report.notes[0] == "round 1 cost more than the tolerance and was taken back"
    assert rounds["pressure after 1"] == 0.5
    assert rounds["drop 2"]["removed"] == {"0": 1}
    assert report.model[0].support.mask.any(axis=(1, 2, 3)).tolist() == [False] + [True] * 5


def test_pruning_ends_after_as_many_vain_rounds_as_it_may_retry() -> None:
    method = PlayAndPrune(
        tolerance=0.02, threshold=0.3, prune_epochs=0, recover_epochs=0, epochs=0, retries=2,
        least=1,
    )  # fmt: skip
    report = play(method, [0.90, 0.90, 0.50, 0.50, 0.50, 0.90])
    assert "3 rounds in a row could not remove a filter" in report.notes[-1]
    assert isinstance(report.model[0], nn.Conv2d)
    assert "choose 4" not in rounds_of(report)


@pytest.mark.parametrize(
    "data",
    [range(1), range(7), lambda epoch: range(7), lambda epoch: iter(range(3 + epoch))],
    ids=["one batch", "seven", "of unknown length", "of changing length"],
)
@pytest.mark.parametrize("rate", [1.0, 1e-3])
def test_the_penalty_takes_the_same_in_any_number_of_steps_at_any_rate(data, rate) -> None:
    method = PlayAndPrune(
        tolerance=0.02, fraction=0.34, penalty=0.5, threshold=0.0, prune_epochs=2,
        recover_epochs=0, epochs=0, rounds=1,
    )  # fmt: skip
    report = play(method, [0.9] * 4, data=data, optimizer=lambda p: torch.optim.SGD(p, lr=rate))
    # Half of 1.5 from the two filters of least norm.
    norms = report.model[0].weight.detach().abs().mean((1, 2, 3))
    torch.testing.assert_close(norms, torch.tensor([0.25, 1.25, 3, 4, 5, 6]))


def test_where_the_loss_opposes_a_pressed_filter_stays() -> None:
    def loss(model: nn.Module, batch: int) -> torch.Tensor:
        return (model[0].weight[0].abs() - 1).square().sum()

    method = PlayAndPrune(
        tolerance=0.02, fraction=0.34, penalty=0.5, threshold=0.0, prune_epochs=1,
        recover_epochs=0, epochs=0, rounds=1,
    )  # fmt: skip
    report = play(
        method, [0.9] * 4, data=range(100), train_step=loss,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
    )  # fmt: skip
    norms = report.model[0].weight.detach().abs().mean((1, 2, 3))
    assert norms[0] > 0.9
    assert norms[1] == pytest.approx(1.25, rel=1e-4)


def test_a_round_is_judged_after_the_learning_rate_has_fallen() -> None:
    rates: list[float] = []

    class Noted(torch.optim.SGD):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    method = PlayAndPrune(
        tolerance=0.02, threshold=0.0, prune_epochs=2, recover_epochs=3, epochs=0, rounds=1
    )
    play(method, [0.9] * 4, optimizer=lambda p: Noted(p, lr=1.0))
    assert rates == pytest.approx([1, 1, 1, 0.1, 0.01])


def test_norms_are_means_over_live_weights() -> None:
    """A layer whose filters lost half of their channels must not fall under its threshold."""
    mask = torch.tensor([[True, True, False, False], [True, False, False, False], [False] * 4])
    weight = torch.tensor([[3.0, -1, 0, 0], [-4, 0, 0, 0], [0, 0, 0, 0]])
    layer = SimpleNamespace(mask=lambda name: mask, weight=lambda name: weight)
    assert mean_norms(layer, "0").tolist() == [2, 4, 0]


@pytest.mark.parametrize(
    "settings",
    [{"tolerance": 0.0}, {"fraction": 1.0}, {"penalty": -1.0}, {"threshold": 2}, {"delta": 0.0},
     {"retries": -1}, {"rounds": 0}, {"multiple": 0}],
    ids=str,
)  # fmt: skip
def test_bad_settings(settings: dict) -> None:
    with pytest.raises(ArgumentError):
        PlayAndPrune(**settings)


def test_killed_and_resumed(tmp_path: Path) -> None:
    method = PlayAndPrune(
        tolerance=1.0, prune_epochs=2, recover_epochs=1, epochs=1, rounds=2, threshold=0.2
    )
    check_kills(method, tmp_path, seed=3)
