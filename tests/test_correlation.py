# SPDX-License-Identifier: Apache-2.0
"""Filter correlation on numbers worked out by hand, episode by episode."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from compressing import check_kills, run
from torch import nn

from hetconv_kernels.compression import FilterCorrelation
from hetconv_kernels.compression.methods import correlation as module
from hetconv_kernels.compression.scores import correlation, outgoing, pair_correlation
from hetconv_kernels.errors import ArgumentError

# Filter 1 is twice filter 0: ρ = 1. Centred, filter 2 is (1, −1, 0) and filter 0 (−1, 0, 1), both
# of norm √2: ρ = −1/2. Filter 3 is (−1, −1, 2)·5/3, of norm 5√6/3: with filter 0 it has the
# product 5, ρ = 5 / (√2 · 5√6/3) = √3/2, and with filter 2 none.
WEIGHT = torch.tensor([[1.0, 2, 3], [2, 4, 6], [3, 1, 2], [0, 0, 5]])
H = math.sqrt(3) / 2
CORRELATION = [[0, 1, 0.5, H], [1, 0, 0.5, H], [0.5, 0.5, 0, 0], [H, H, 0, 0]]
NONE = {"pair_epochs": 0, "tune_epochs": 0, "epochs": 0}


def network() -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.ReLU(), nn.Conv2d(4, 2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(WEIGHT[:, :, None, None])
    return model


def test_step_1_correlation_is_pearsons() -> None:
    np.testing.assert_allclose(correlation(WEIGHT), CORRELATION, atol=1e-12)
    shifted = correlation(WEIGHT + torch.tensor([[3.0], [-1], [0], [7]]))
    np.testing.assert_allclose(shifted, CORRELATION, atol=1e-12)
    assert correlation(torch.ones(3, 4)).tolist() == [[0] * 3] * 3


@pytest.mark.parametrize(
    ("count", "least", "pairs"),
    [
        (1, 0.0, [(0, 1)]),
        # (0, 3) and (1, 3) are next, but 0 and 1 are taken; 2 and 3 are left.
        (2, 0.0, [(0, 1), (2, 3)]),
        (2, 0.1, [(0, 1)]),
    ],
)
def test_step_2_pairs_are_disjoint_and_largest_first(count, least, pairs) -> None:
    found = module.most_correlated(np.array(CORRELATION), np.ones(4, bool), count, least)
    assert found == pairs


def test_step_2_dropped_filters_are_in_no_pair() -> None:
    alive = np.array([False, True, True, True])
    assert module.most_correlated(np.array(CORRELATION), alive, 1) == [(1, 3)]


def test_step_3_penalty_falls_as_pairs_become_alike() -> None:
    weight = WEIGHT.clone().requires_grad_()
    pairs = [(0, 3), (1, 2)]
    torch.testing.assert_close(pair_correlation(weight, pairs), torch.tensor([H, 0.5]))
    network_of = SimpleNamespace(layers={"0": SimpleNamespace(weight=weight)})
    penalty = module.alike(network_of, {"0": pairs, "1": []})
    assert penalty.item() == pytest.approx(math.exp(-H) + math.exp(-0.5), rel=1e-6)
    (gradient,) = torch.autograd.grad(penalty, weight)
    moved = weight.detach() - 0.1 * gradient
    assert (pair_correlation(moved, pairs) > pair_correlation(weight, pairs)).all()


def test_step_4_the_smaller_norm_goes() -> None:
    assert outgoing(WEIGHT).tolist() == [6, 12, 6, 5]
    assert module.smaller_members([(0, 1), (2, 3)], outgoing(WEIGHT)) == [0, 3]
    assert module.smaller_members([(1, 0)], outgoing(WEIGHT)) == [0]


def test_an_episode_end_to_end() -> None:
    method = FilterCorrelation(fraction=0.25, episodes=1, tolerance=1.0, least=1, **NONE)
    x = torch.randn(1, 3, 2, 2)
    report = run(method, network(), example=x, evaluate=lambda m: 1.0, compact=False)
    rounds = {entry["what"]: entry["result"] for entry in report.history}
    assert rounds["pairs 1"]["pairs"] == {"0": [[0, 1]]}
    assert rounds["drop 1"]["removed"] == {"0": 1}
    alive = [False, True, True, True]
    assert report.model[0].support.mask.any(axis=(1, 2, 3)).tolist() == alive
    assert report.model[2].support.mask.any(axis=(0, 2, 3)).tolist() == alive


def test_training_with_the_penalty_makes_pairs_alike() -> None:
    def train_step(model: nn.Module, batch: int) -> torch.Tensor:
        return 0 * model[0].weight.sum()

    method = FilterCorrelation(
        fraction=0.25, least_correlation=0.0, pair_epochs=1, tune_epochs=0, epochs=0, weight=1.0,
        episodes=1, tolerance=1.0, least=1,
    )  # fmt: skip
    model = network()
    with torch.no_grad():  # the best pair is now (0, 3), of ρ = √3/2
        model[0].weight[1] = torch.tensor([0.0, 1, 0])[:, None, None]
    seen = []
    real = module.alike

    def spy(run, pairs):
        seen.append(real(run, pairs).item())
        return real(run, pairs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "alike", spy)
        run(
            method, model, example=torch.randn(1, 3, 1, 1), evaluate=lambda m: 1.0, data=range(20),
            train_step=train_step, optimizer=lambda p: torch.optim.SGD(p, lr=0.5), compact=False,
        )  # fmt: skip
    assert seen[0] == pytest.approx(math.exp(-H), rel=1e-5)
    assert seen[-1] < seen[0] - 0.02
    assert seen[-1] > math.exp(-1)


@pytest.mark.parametrize("filters", [20, 64, 256, 512])
def test_pairs_become_alike_at_any_width_and_the_report_says_how_much(filters: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(16, filters, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(filters, 3),
    )  # fmt: skip
    x = torch.randn(200, 4, 16, 5, 5)
    data = [(batch, batch[:, :3].mean((2, 3)).argmax(1)) for batch in x]
    method = FilterCorrelation(
        fraction=0.1, least_correlation=0.0, pair_epochs=1, tune_epochs=0, epochs=0, episodes=1,
        tolerance=1.0,
    )  # fmt: skip
    report = run(method, model, data=data, example=x[0], eval_data=data[:1])
    rounds = {entry["what"]: entry["result"] for entry in report.history}
    before, after = (rounds["drop 1"][f"mean |ρ| {when}"] for when in ("before", "after"))
    assert len(rounds["pairs 1"]["pairs"]["0"]) == filters // 10
    assert before == rounds["pairs 1"]["mean |ρ|"] < 0.4
    assert after > 0.9


def test_the_pull_on_a_pair_does_not_depend_on_how_many_there_are() -> None:
    weight = torch.randn(102, 40, generator=torch.Generator().manual_seed(0)).requires_grad_()
    network_of = SimpleNamespace(layers={"0": SimpleNamespace(weight=weight)})
    pairs = [(2 * i, 2 * i + 1) for i in range(51)]
    (many,) = torch.autograd.grad(module.alike(network_of, {"0": pairs}), weight)
    (alone,) = torch.autograd.grad(module.alike(network_of, {"0": pairs[:1]}), weight)
    torch.testing.assert_close(many[:2], alone[:2])
    assert alone[:2].norm() > 0.01


def test_a_least_correlation_that_excludes_every_pair_says_so() -> None:
    method = FilterCorrelation(fraction=0.25, least_correlation=0.9, least=1, **NONE)
    model = network()
    with torch.no_grad():  # the best pair is now (0, 3), of ρ = √3/2
        model[0].weight[1] = torch.tensor([0.0, 1, 0])[:, None, None]
    report = run(
        method, model, example=torch.randn(1, 3, 1, 1), evaluate=lambda m: 1.0, compact=False
    )
    assert "0.866" in report.notes[0]
    assert "least_correlation=0.9 excludes every pair" in report.notes[0]
    assert report.macs[0] == report.macs[1]


def test_an_episode_that_costs_too_much_is_taken_back() -> None:
    accuracies = iter([0.9, 0.9, 0.895, 0.85, 0.895])
    method = FilterCorrelation(
        fraction=0.25, least_correlation=0.0, tolerance=0.01, target=0.99, least=1, **NONE
    )
    report = run(
        method, network(), example=torch.randn(1, 3, 1, 1), evaluate=lambda m: next(accuracies),
        compact=False,
    )  # fmt: skip
    # Before, at the start, after 1 (kept), after 2 (taken back), of the result.
    assert "step 2 cost more than the tolerance" in report.notes[0]
    assert report.model[0].support.mask.any(axis=(1, 2, 3)).sum() == 3
    assert report.accuracy == (0.9, 0.895)


def test_the_target_ends_the_episodes() -> None:
    method = FilterCorrelation(fraction=0.25, least_correlation=0.0, target=0.2, least=1, **NONE)
    report = run(
        method, network(), example=torch.randn(1, 3, 1, 1), evaluate=lambda m: 1.0, compact=False
    )
    assert report.macs == (20, 15)


@pytest.mark.parametrize(
    "settings",
    [{"fraction": 1.0}, {"weight": -1.0}, {"weight": float("nan")}, {"tolerance": -0.1},
     {"episodes": 0}, {"least_correlation": 1.5}, {"pair_epochs": 0.5}],
    ids=str,
)  # fmt: skip
def test_bad_settings(settings: dict) -> None:
    with pytest.raises(ArgumentError):
        FilterCorrelation(**settings)


def test_accuracy_is_needed() -> None:
    with pytest.raises(ArgumentError, match="since accuracy decides"):
        run(FilterCorrelation(), eval_data=None)


def test_killed_and_resumed(tmp_path: Path) -> None:
    method = FilterCorrelation(
        fraction=0.2, pair_epochs=1, tune_epochs=1, epochs=1, episodes=2, tolerance=1.0
    )
    check_kills(method, tmp_path, seed=2)
