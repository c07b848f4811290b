# SPDX-License-Identifier: Apache-2.0
"""Rounds: a loop of the user's own trains between the rounds of a method, with the same result."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F_
from compressing import Columns, assert_same_network, batches, quietly, run, tiny
from torch import nn

import hetconv_kernels as hk
from hetconv_kernels.compression import (
    ADMM,
    FilterCorrelation,
    FrequencyPruning,
    Het,
    PlayAndPrune,
    Rounds,
    SelfGrouping,
    Stability,
    WeakSubnetwork,
)
from hetconv_kernels.errors import ArgumentError, HetconvError, InputTypeError

METHODS = {
    "het": Het(p=2, epochs=2),
    "wsp": WeakSubnetwork(0.5, epochs=3),
    "self-grouping": SelfGrouping(
        target=0.4, step=0.2, clusters=2, schedule="LG", local_epochs=1, epochs=2
    ),
    "correlation": FilterCorrelation(
        fraction=0.2, pair_epochs=1, tune_epochs=1, tolerance=1.0, episodes=2, epochs=1
    ),
    "frequency": FrequencyPruning(search_epochs=2, epochs=1),
    "play-and-prune": PlayAndPrune(
        tolerance=1.0, prune_epochs=1, recover_epochs=1, rounds=2, epochs=1
    ),
    "stability": Stability(
        fraction=0.2, probe_epochs=1, tune_epochs=1, tolerance=1.0, steps=2, epochs=1
    ),
    # Sensitivity is by training batches, which only the loop has; here by the weights.
    "admm": ADMM(rates=(0.5,), updates=2, admm_epochs=1, retrain_epochs=1, allocation="uniform"),
}
pytestmark = pytest.mark.one_thread


def fit(rounds: Rounds) -> int:
    """Trains as hk.compress does by default; returns how many epochs that were."""
    optimizer = torch.optim.SGD(
        rounds.network.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4
    )
    count = 0
    for epoch in rounds.epochs(optimizer):
        count += 1
        for x, label in batches():
            optimizer.zero_grad()
            loss = F_.cross_entropy(rounds.network(x), label)
            loss.backward()
            epoch.before_step()
            optimizer.step()
            epoch.after_step(loss)
    return count


@pytest.mark.parametrize("name", METHODS)
def test_a_loop_of_ones_own_gives_what_compress_gives_bit_by_bit(name: str) -> None:
    expected = run(METHODS[name])
    rounds = Rounds(tiny(), METHODS[name], **quietly())
    assert not rounds.finished
    assert fit(rounds) == sum("loss" in (e["result"] or ()) for e in expected.history
                              if isinstance(e["result"], dict))  # fmt: skip
    assert rounds.report.history == expected.history
    assert rounds.report.accuracy == expected.accuracy
    assert_same_network(rounds.report.model, expected.model)
    assert rounds.finished
    assert rounds.current is None


def test_the_given_network_is_not_changed_and_dead_weights_stay_zero() -> None:
    model = tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rounds = Rounds(model, Columns(epochs=2), **quietly())
    assert rounds.network is not model
    optimizer = torch.optim.SGD(rounds.network.parameters(), 0.1, momentum=0.9)
    for epoch in rounds.epochs(optimizer):
        rounds.network(batches()[0][0]).square().sum().backward()
        epoch.before_step()
        assert bool((rounds.network[3].weight.grad[:, 3:] == 0).all())
        optimizer.step()
        rounds.network[3].weight.data[:, 3:] = 1.0  # as an average of weights might
        epoch.after_step()
        assert bool((rounds.network[3].weight[:, 3:] == 0).all())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


def test_a_method_without_epochs_is_done_at_once() -> None:
    rounds = Rounds(tiny(), Columns(epochs=0), **quietly())
    assert list(rounds.epochs()) == []
    assert rounds.network is rounds.report.model


def test_a_loop_that_ends_early_ends_the_method_and_leaves_the_generators_as_they_were() -> None:
    threads, state = threading.active_count(), torch.random.get_rng_state()
    with Rounds(tiny(), Columns(epochs=3), **quietly()) as rounds:
        for _ in rounds.epochs():
            break
        assert threading.active_count() == threads + 1
    assert threading.active_count() == threads
    assert torch.equal(torch.random.get_rng_state(), state)
    with pytest.raises(HetconvError, match="the method asks for more epochs"):
        rounds.report  # noqa: B018
    rounds.close()


def test_what_the_method_raises_reaches_the_loop() -> None:
    def broken(model: nn.Module) -> float:
        raise KeyError("mine")

    given = quietly() | {"evaluate": broken}
    with pytest.raises(KeyError, match="mine"):
        Rounds(tiny(), Columns(), **given)
    calls = []

    def breaks_later(model: nn.Module) -> float:
        calls.append(0)
        if len(calls) > 1:
            raise KeyError("later")
        return 0.5

    rounds = Rounds(tiny(), Columns(epochs=1), **(quietly() | {"evaluate": breaks_later}))
    with pytest.raises(KeyError, match="later"):
        fit(rounds)
    assert rounds.current is None


def test_what_is_the_loops_own_is_refused() -> None:
    for name in ("data", "train_step", "optimizer", "state", "key"):
        with pytest.raises(ArgumentError, match=f"received {name}"):
            Rounds(tiny(), Columns(), **quietly(), **{name: None})
    with pytest.raises(InputTypeError, match="example"):
        Rounds(tiny(), Columns(), **(quietly() | {"example": None}))
    with pytest.raises(ArgumentError, match=r"finds no layer"):
        Rounds(nn.Sequential(nn.ReLU(), nn.Conv2d(5, 4, 1)), Het(), **quietly())


def test_an_epoch_that_was_not_asked_for_is_refused() -> None:
    with Rounds(tiny(), Columns(epochs=2), **quietly()) as rounds:
        first = rounds.current
        assert first is not None
        rounds.done(first)
        with pytest.raises(ArgumentError, match="the one in `current`"):
            rounds.done(first)


def test_the_backend_that_is_forced_around_holds_for_the_method_too() -> None:
    seen = []

    def judge(model: nn.Module) -> float:
        seen.append(hk.explain(hk.nn.HetConv2d(8, 8, 3, p=2), torch.randn(1, 8, 5, 5)).chosen)
        return 0.5

    with hk.use_backend("reference"):
        Rounds(tiny(), Columns(epochs=0), **(quietly() | {"evaluate": judge}))
    assert set(seen) == {"reference"}
