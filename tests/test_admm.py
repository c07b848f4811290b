# SPDX-License-Identifier: Apache-2.0
"""ADMM on numbers worked out by hand: W, Z, U and ρ at every step."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from compressing import assert_same_network, check_kills, run
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
        rates=(0.75,), fc_rates=(0.5,), admm_epochs=0, updates=1, retrain_epochs=0, stem=True,
        allocation="uniform",
    )  # fmt: skip
    layers = {row.name: row for row in run(method).layers}
    assert layers["3"].live == (432, 108)
    assert layers["8"].live == (192, 96)


@pytest.mark.parametrize("projection", ["kernels", "columns", "blocks"])
def test_structured_projections_leave_whole_units(projection: str) -> None:
    method = ADMM(
        rates=(0.5,), projection=projection, filters=4, channels=3, admm_epochs=0, updates=1,
        retrain_epochs=0, allocation="uniform",
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
     {"projection": "x"}, {"updates": 0}, {"rho": 0.0}, {"growth": -1.0}, {"filters": 0},
     {"allocation": "x"}, {"layer_rates": {"0": (0.5,)}}, {"layer_rates": {"0": (0.9, 0.5)}},
     {"layer_rho": {"0": 0.0}}, {"candidates": ()}, {"candidates": (0.0,)}, {"tolerance": -1.0},
     {"retries": -1}, {"entries": 0}, {"sensitivity_batches": 0}],
    ids=str,
)  # fmt: skip
def test_bad_settings(settings: dict) -> None:
    with pytest.raises(ArgumentError):
        ADMM(**settings)


def test_killed_and_resumed(tmp_path: Path) -> None:
    method = ADMM(rates=(0.5, 0.8), admm_epochs=1, updates=2, retrain_epochs=1)
    check_kills(method, tmp_path, seed=5)


NONE: dict[str, Any] = {"admm_epochs": 0, "updates": 1, "retrain_epochs": 0}


def test_a_layer_has_the_rho_that_its_pattern_names() -> None:
    whole = trace(rates=(0.5,), updates=2)
    seen = list(TRACE)
    named = trace(rates=(0.5,), updates=2, rho=1e-9, layer_rho={"?": 0.5, "0": 7.0})
    assert seen == TRACE
    assert_same_network(whole.model, named.model)


def test_a_pattern_that_fits_no_layer_is_refused() -> None:
    for settings in ({"layer_rates": {"9": (0.1, 0.2)}}, {"layer_rho": {"features.*": 1.0}}):
        with pytest.raises(ArgumentError, match="pattern that fits one"):
            run(ADMM(**settings))


def live_of(report: Any) -> dict[str, int]:
    return {row.name: row.live[1] for row in report.layers}


def test_layers_that_are_named_have_their_rates_and_the_others_share_the_rest() -> None:
    method = ADMM(rates=(0.8,), layer_rates={"8": (0.5,)}, **NONE)
    live = live_of(run(method))
    assert live["8"] == 96
    assert live["0"] + live["3"] + live["10"] == pytest.approx(0.2 * (270 + 432 + 18), abs=2)


@pytest.mark.parametrize("data", [True, False], ids=["by loss", "by error"])
def test_by_sensitivity_all_layers_together_have_the_rate(data: bool) -> None:
    method = ADMM(rates=(0.8,), stem=True, **NONE)
    report = run(method) if data else run(method, data=None, eval_data=None)
    live = live_of(report)
    assert sum(live.values()) == pytest.approx(0.2 * (270 + 432 + 192 + 18), abs=2)
    rates = next(e["result"] for e in report.history if e["what"].startswith("rates"))
    assert len(set(rates.values())) > 2


def test_what_the_loss_does_not_need_goes_first() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    x = torch.randn(16, 8)
    wanted = model[0](x).detach()

    def loss(network: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return (network[0](batch) - wanted).square().mean() + 0 * network[1].weight.sum()

    report = run(
        ADMM(rates=(0.45,), **NONE), model, train_step=loss, data=[x], example=x, eval_data=None
    )
    assert live_of(report) == {"0": 64, "1": round(0.55 * 128) - 64}


def search(accuracies: list[float], **settings: Any) -> Any:
    values = iter(accuracies)
    model = nn.Sequential(nn.Linear(100, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.arange(1.0, 101)[None])
    return run(
        ADMM(**NONE, **settings), model, example=torch.ones(1, 100), data=None, eval_data=None,
        evaluate=lambda m: next(values),
    )  # fmt: skip


def test_the_best_partial_pruning_is_kept_and_rates_between_are_tried() -> None:
    # Before, baseline, at 75 % (kept), at 99 % (not), then between 25 and 1 in a hundred: 5 (kept),
    # between 5 and 1: 2.24 (not), between 5 and 2.24: 3.34 (kept); of the result.
    accuracies = [0.9, 0.9, 0.895, 0.5, 0.895, 0.5, 0.9, 0.9]
    report = search(accuracies, rates=(0.75, 0.99), tolerance=0.01, retries=3)
    assert report.live == (100, 3)
    assert report.model[0].support.mask.flatten().nonzero()[0].tolist() == [97, 98, 99]
    rates = [e["what"] for e in report.history if e["what"].startswith("rates at")]
    assert rates == ["rates at " + r for r in ("75 %", "99 %", "95 %", "97.76 %", "96.66 %")]
    taken = [note for note in report.notes if "taken back" in note]
    assert taken == [
        f"{r} cost 0.4, more than the tolerance: taken back" for r in ("99 %", "97.76 %")
    ]


def test_without_retries_the_last_rate_that_was_good_enough_stays() -> None:
    report = search([0.9, 0.9, 0.9, 0.5, 0.9], rates=(0.75, 0.99), tolerance=0.01, retries=0)
    assert report.live == (100, 25)


def test_of_several_candidates_the_most_accurate_is_kept() -> None:
    accuracies = {0.5: 0.3, 2.0: 0.9, 1.0: 0.6}
    seen: list[float] = []

    class Marked(ADMM):
        def _prune_to(self, run: Run, rates: dict, at: str, factor: float) -> None:
            super()._prune_to(run, rates, at, factor)
            run.round("mark", lambda: run.layers["0"].weight.data.mul_(factor).sum().item())
            seen.append(factor)

    values = iter([0.1, *accuracies.values(), *accuracies.values(), 0.9])
    method = Marked(rates=(0.5, 0.75), candidates=tuple(accuracies), **NONE)
    report = run(
        method, network(), example=torch.ones(1, 4), data=None, eval_data=None,
        evaluate=lambda m: next(values),
    )  # fmt: skip
    assert seen == [*accuracies, *accuracies]
    assert report.model[0].weight.flatten().tolist() == [16, 0, 0, 0]  # twice the factor 2
    assert report.live == (4, 1)


def test_a_search_needs_what_judges() -> None:
    for settings in ({"tolerance": 0.01}, {"candidates": (1.0, 3.0)}):
        with pytest.raises(ArgumentError, match="since accuracy decides"):
            run(ADMM(**settings), eval_data=None)


def test_a_search_is_killed_and_resumed(tmp_path: Path) -> None:
    method = ADMM(
        rates=(0.5, 0.999), admm_epochs=1, updates=1, retrain_epochs=1, tolerance=0.05, retries=1,
        candidates=(1.0, 10.0), stem=True,
    )  # fmt: skip
    check_kills(method, tmp_path, seed=7)
