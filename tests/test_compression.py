# SPDX-License-Identifier: Apache-2.0
"""The protocol of compression: what goes in, what is refused, what is saved, what is reported."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compressing import Columns, assert_same_network, batches, run, tiny
from torch import nn

import hetconv_kernels as hk
from hetconv_kernels.compression import Het, Run, WeakSubnetwork, compare
from hetconv_kernels.errors import (
    ArgumentError,
    HetconvError,
    InputTypeError,
    SpeedupError,
    TraceError,
)
from hetconv_kernels.nn import HetConv2d, SelfGroupConv2d, SupportLinear


def test_compress_is_a_function_of_the_package() -> None:
    report = hk.compress(tiny(), Columns(epochs=0), example=torch.randn(2, 5, 6, 6), measure=False,
                         progress=False)  # fmt: skip
    assert report.method == "columns"


def test_report_counts_live_weights_and_macs() -> None:
    model = tiny()
    report = run(Columns(), model)
    rows = {row.name: row for row in report.layers}
    assert rows["0"].live == (270, 6 * 3 * 9)
    assert rows["3"].live == (432, 8 * 3 * 9)
    assert rows["8"].live == (192, 6 * 3)
    assert rows["0"].macs == (4 * 36 * 270, 4 * 36 * 162)
    assert rows["8"].macs == (4 * 192, 4 * 18)
    assert report.live == (270 + 432 + 192 + 18, 162 + 216 + 18 + 9)
    assert report.macs[1] == hk.stats.macs(report.model, torch.randn(4, 5, 6, 6))
    assert report.macs_saved == pytest.approx(1 - report.macs[1] / report.macs[0])
    assert isinstance(report.model[3], SelfGroupConv2d)
    assert isinstance(report.model[8], SupportLinear)
    assert isinstance(model[3], nn.Conv2d)


def test_dead_weights_stay_dead_through_training() -> None:
    for optimizer in (None, lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.1)):
        model = run(Columns(epochs=3), optimizer=optimizer).model
        assert (model[3].weight[:, 3:] == 0).all()
        assert (model[3].weight[:, :3] != 0).any()


def test_training_moves_live_weights_and_the_given_network_stays() -> None:
    model = tiny()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    report = run(Columns(), model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not torch.equal(report.model[3].weight[:, :3], before["3.weight"][:, :3])


def test_train_step_evaluate_and_optimizer_are_the_callers() -> None:
    seen: list[Any] = []

    def train_step(model: nn.Module, batch: int) -> torch.Tensor:
        seen.append((batch, model.training))
        return model(torch.ones(4, 5, 6, 6)).square().sum()

    def evaluate(model: nn.Module) -> float:
        assert not model.training
        return 0.25

    made: list[Any] = []

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        made.append(torch.optim.SGD(parameters, lr=0.5))
        return made[-1]

    report = run(
        Columns(epochs=3), data=range(2), train_step=train_step, evaluate=evaluate,
        optimizer=optimizer,
    )  # fmt: skip
    assert seen == [(0, True), (1, True)] * 3
    assert report.accuracy == (0.25, 0.25)
    # A tenth after a third, a hundredth after two thirds.
    assert made[0].param_groups[0]["lr"] == pytest.approx(0.005)


def test_one_step_of_training_is_sgd_on_the_masked_network() -> None:
    model, batch = tiny(), batches()[0]
    wanted = tiny()
    with torch.no_grad():
        for index in (0, 3, 8, 10):
            wanted[index].weight[:, 3:] = 0
    loss = nn.functional.cross_entropy(wanted(batch[0]), batch[1])
    gradient = torch.autograd.grad(loss, wanted[3].weight)[0][:, :3]
    expected = wanted[3].weight[:, :3] - 0.01 * (gradient + 1e-4 * wanted[3].weight[:, :3])
    result = run(Columns(epochs=1), model, data=[batch]).model[3].weight[:, :3]
    torch.testing.assert_close(result, expected)


def test_an_existing_support_stays_inside() -> None:
    model = tiny()
    model[3] = HetConv2d.from_conv2d(model[3], p=2)
    report = run(Columns(epochs=1), model)
    chosen = report.model[3].support
    assert chosen == model[3].support & chosen
    assert report.layers[1].live[0] == model[3].support.live


def test_same_seed_same_result_and_global_generators_are_left_alone() -> None:
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    one = run(Columns(), seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(6)
    assert_same_network(one.model, run(Columns(), seed=3).model)
    other = run(Columns(), seed=4).model
    assert not torch.equal(one.model[3].weight, other[3].weight)


def test_kept_layers_have_their_reason() -> None:
    model = tiny()
    model[3].register_forward_hook(lambda *a: None)
    report = run(Columns(epochs=0), model, skip=["10"])
    notes = {row.name: row.note for row in report.layers}
    assert notes["10"] == "left out: named in skip"
    assert "hooks" in notes["3"]
    assert notes["0"] == ""
    assert "hooks" in str(report)


# Measuring -------------------------------------------------------------------------------------


def test_report_has_measured_times_and_json() -> None:
    report = run(Columns(epochs=0), measure=True, measure_seconds=0.05)
    assert min(report.seconds) > 0
    low, high = report.speedup[1:]
    assert 0 < low <= report.speedup[0] <= high
    changed = [row for row in report.layers if not row.note]
    assert len(changed) == 4
    assert all(min(row.seconds) > 0 for row in changed)
    assert {row.backend for row in changed} <= set(hk.available_backends())
    record = json.loads(report.to_json())
    assert record["macs"] == list(report.macs)
    assert record["layers"][1]["seconds"] == list(changed[1].seconds)
    for text in ("live weights 912 -> 405", "Measured on cpu", "total"):
        assert text in str(report)
    table = compare([report, report], ["paper", "hardware"])
    assert table.count("hardware") == 1
    assert f"{report.macs[1]:,}" in table


def test_require_speedup_is_a_typed_error_with_the_report() -> None:
    with pytest.raises(SpeedupError, match=r"at least 1000\.00× was required") as caught:
        run(Columns(epochs=0), measure=True, measure_seconds=0.05, require_speedup=1000.0)
    assert caught.value.report.live == (912, 405)
    report = run(Columns(epochs=0), measure=True, measure_seconds=0.05, require_speedup=1e-6)
    assert report.speedup[0] >= 1e-6


def test_a_network_that_computes_something_else_is_an_error() -> None:
    class Wrong(Columns):
        def rule(self, run: Run) -> Any:
            with torch.no_grad():
                run.masks["3"].fill_(False)
            return super().rule(run)

    with pytest.raises(HetconvError, match="differs from its masked dense twin"):
        run(Wrong(epochs=0))


# What is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": 3}, InputTypeError, "model"),
        ({"method": Columns}, InputTypeError, "a method with its settings"),
        ({"skip": "0"}, InputTypeError, "a list of names"),
        ({"skip": ["nothing"]}, ArgumentError, "'nothing'"),
        ({"require_speedup": 0.0, "measure": True}, ArgumentError, "finite number above 0"),
        ({"require_speedup": 1.5}, ArgumentError, "since a speed-up is required"),
        ({"data": None}, ArgumentError, "since this method trains"),
        ({"data": None, "example": None}, ArgumentError, "an example input"),
        ({"data": iter(())}, InputTypeError, "read only once"),
        ({"data": []}, HetconvError, "no batches"),
        ({"data": 3}, InputTypeError, "an iterable"),
        ({"data": [1, 2]}, InputTypeError, r"a pair \(x, label\)"),
        ({"eval_data": []}, ArgumentError, "no batches"),
        ({"train_step": 3}, InputTypeError, "a callable"),
        ({"train_step": lambda m, b: 3.0}, InputTypeError, "the loss"),
        ({"train_step": lambda m, b: torch.zeros(())}, InputTypeError, "requires_grad=False"),
        ({"example": [1]}, InputTypeError, "example"),
        ({"model": nn.Sequential(nn.ReLU())}, ArgumentError, "no layer to compress"),
        ({"model": nn.Sequential(nn.Conv2d(5, 6, 3, groups=1)), "skip": ["0"]}, ArgumentError,
         "named in skip"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)  # fmt: skip
def test_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"method": Columns(epochs=1), "model": tiny()} | change
    with pytest.raises(error, match=message):
        run(**arguments)


def test_progress_tells_every_round(capsys: pytest.CaptureFixture[str]) -> None:
    run(Columns(epochs=2), progress=True)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("s  ")[1].split(":")[0] for line in lines] == [
        "accuracy before", "drop", "train, epoch 1/2", "train, epoch 2/2",
    ]  # fmt: skip


def test_removed_filters_are_taken_out_where_that_can_be_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []

    def compact(model: nn.Module, example: torch.Tensor) -> Any:
        seen.append((model.training, tuple(example.shape)))
        return SimpleNamespace(model=model)

    monkeypatch.setattr("hetconv_kernels.graph.compact.compact", compact)
    report = run(WeakSubnetwork(0.6, epochs=0), tiny().train())
    assert seen == [(False, (4, 5, 6, 6))]
    assert report.compacted
    assert report.model.training
    assert not run(WeakSubnetwork(0.6, epochs=0), compact=False).compacted
    assert not run(Columns(epochs=0)).compacted
    assert len(seen) == 1


def test_without_it_the_report_says_that_they_are_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    def compact(model: nn.Module, example: torch.Tensor) -> Any:
        raise TraceError("no graph")

    monkeypatch.setattr("hetconv_kernels.graph.compact.compact", compact)
    report = run(WeakSubnetwork(0.6, epochs=0))
    assert "stay as empty rows" in report.notes[-1]
    assert not report.compacted


def test_het_is_a_method(tmp_path: Path) -> None:
    report = run(Het(p=2, epochs=1))
    assert isinstance(report.model[3], HetConv2d)
    assert report.model[3].p == 2
