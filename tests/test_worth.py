# SPDX-License-Identifier: Apache-2.0
"""worth: a layer stays plain where no Support pays, and auto counts what a whole call takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from planning import needs_engine
from torch import nn

import hetconv_kernels as hk
from hetconv_kernels import ops
from hetconv_kernels.backends import cost_model, cpu_plans, dense_cost, get_backend, vendor
from hetconv_kernels.compression import Het
from hetconv_kernels.graph import worth
from hetconv_kernels.graph.worth import leave_plain
from hetconv_kernels.nn import GroupedConv2d, HetConv2d, SupportConv2d, SupportLinear
from hetconv_kernels.packing import watched_packings

C, F = 16, 24


def mask(f: int = F, c: int = C, k: int = 1) -> hk.Support:
    return hk.Support.from_mask(np.random.default_rng(0).random((f, c, k, k)) < 0.4)


LAYERS: dict[str, Any] = {
    "linear": (lambda: SupportLinear(C, F, support=mask()), (3, C), nn.Linear),
    "rows of rows": (lambda: SupportLinear(C, F, support=mask()), (2, 3, C), nn.Linear),
    "conv": (lambda: SupportConv2d(C, F, 3, padding=1, support=mask(k=3)), (1, C, 4, 4), nn.Conv2d),
    "het": (lambda: HetConv2d(C, F, 3, padding=1, p=2), (1, C, 4, 4), nn.Conv2d),
    "grouped": (lambda: GroupedConv2d(C, F, 3, padding=1, groups=4), (1, C, 4, 4), nn.Conv2d),
}


def plant(monkeypatch: pytest.MonkeyPatch, ours: float, plain: float) -> None:
    """Plants what both sides are predicted to take, in seconds."""
    monkeypatch.setattr(worth, "predict", lambda engine, problem: ours)
    monkeypatch.setattr(worth, "plain_seconds", lambda problem: plain)


@pytest.mark.parametrize("name", LAYERS)
def test_the_faster_of_plain_and_support_is_taken(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, shape, kind = LAYERS[name]
    model, x = nn.Sequential(make(), nn.ReLU()).eval(), torch.randn(shape)
    layer, wanted = model[0], model(x)
    plant(monkeypatch, ours=1.0, plain=2.0)
    assert leave_plain(model, [(x,)]) == ()
    assert model[0] is layer
    plant(monkeypatch, ours=2e-6, plain=1e-6)
    (left,) = leave_plain(model, [(x,)])
    assert type(model[0]) is kind
    assert (left.name, left.live) == ("0", layer.support.live)
    assert "no Support pays; predicted are 1.0 µs with zeros and 2.0 µs" in left.reason
    torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)
    if name != "grouped":
        assert int((model[0].weight != 0).sum()) == left.live


def test_a_layer_is_left_plain_only_if_that_pays_on_every_input(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = nn.Sequential(HetConv2d(C, F, 3, p=2), nn.ReLU()).eval()
    inputs = [(torch.randn(1, C, 4, 4),), (torch.randn(2, C, 4, 4),)]
    plant(monkeypatch, 1.0, 0.0)
    monkeypatch.setattr(worth, "plain_seconds", lambda problem: float(problem.batch))
    assert leave_plain(model, [*inputs]) == ()
    assert len(leave_plain(model, inputs[:1])) == 1


def test_what_a_user_has_fixed_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, ours=2.0, plain=1.0)
    hooked, forced = HetConv2d(C, C, 3, p=2), HetConv2d(C, C, 3, p=2, backend="vendor")
    hooked.register_forward_hook(lambda *_: None)
    one, two = HetConv2d(C, C, 1, p=1), HetConv2d(C, C, 1, p=1)
    two.weight = one.weight
    twice = HetConv2d(C, C, 1, p=1)
    basis = hk.nn.FrequencyConv2d(C, C, 3)
    model = nn.Sequential(hooked, forced, one, two, twice, nn.ReLU(), twice, basis).eval()
    assert leave_plain(model, [(torch.randn(1, C, 9, 9),)]) == ()
    free = nn.Sequential(HetConv2d(C, C, 3, p=2)).eval()
    with hk.use_backend("vendor"):
        assert leave_plain(free, [(torch.randn(1, C, 9, 9),)]) == ()
    assert len(leave_plain(free, [(torch.randn(1, C, 9, 9),)])) == 1


def frequency_layer(c: int, path: str = "auto") -> hk.nn.FrequencyConv2d:
    kept = np.random.default_rng(0).random((c, c, 3, 3)) < 0.3
    return hk.nn.FrequencyConv2d(c, c, 3, padding=1, coefficients=kept, path=path)


def test_a_small_frequency_layer_is_left_plain_whole_and_one_with_a_path_is_not() -> None:
    model, x = nn.Sequential(frequency_layer(4), nn.ReLU()).eval(), torch.randn(1, 4, 8, 8)
    coefficients, wanted = model[0].mix.support.live, model(x)
    (left,) = leave_plain(model, [(x,)])
    assert type(model[0]) is nn.Conv2d
    assert (left.name, left.live) == ("0", coefficients)
    torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)
    for fixed in (frequency_layer(4, "spatial"), frequency_layer(4), frequency_layer(4)):
        if fixed.path == "auto":
            fixed.backend = "vendor"
        kept = nn.Sequential(fixed, nn.ReLU()).eval()
        assert leave_plain(kept, [(x,)]) == ()
        assert kept[0] is fixed


def test_a_frequency_layer_that_pays_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Sequential(frequency_layer(4)).eval(), torch.randn(1, 4, 8, 8)
    monkeypatch.setattr(worth, "plain_seconds", lambda problem: 1.0)
    assert leave_plain(model, [(x,)]) == ()
    monkeypatch.setattr(worth, "plain_seconds", lambda problem: 0.0)
    (left,) = leave_plain(model, [(x,)])
    assert "by the " in left.reason


def test_optimize_leaves_a_small_frequency_layer_plain() -> None:
    x = torch.randn(1, 4, 8, 8)
    report = hk.optimize(nn.Sequential(frequency_layer(4), nn.Sigmoid()).eval(), x)
    assert [left.name for left in report.parts[0].plain] == ["0"]
    assert not [m for m in report.model.modules() if isinstance(m, hk.nn.FrequencyConv2d)]


@needs_engine
@pytest.mark.parametrize("engine", ["cpu", "vendor"])
def test_in_a_program_the_engine_takes_no_python_and_a_plain_layer_is_a_call(
    engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seconds(problem: Any, plan: Any, around: bool = True) -> float:
        return 3.0 if around else 2.1

    plant(monkeypatch, ours=3.0, plain=2.0)
    monkeypatch.setattr(worth, "choose", lambda *_: SimpleNamespace(backend=get_backend(engine)))
    monkeypatch.setattr("hetconv_kernels.backends.cpu.plan_seconds", seconds)
    monkeypatch.setattr(worth, "outside_program", lambda problem, plain: plain + 0.2)
    x, stays = torch.randn(2, C), engine == "cpu"
    for program in (True, False):
        model = nn.Sequential(SupportLinear(C, F, support=mask()), nn.ReLU()).eval()
        left = leave_plain(model, [(x,)], program=program)
        assert (left == ()) is (program and stays)
    report = hk.optimize(nn.Sequential(nn.Linear(C, F), nn.ReLU()).eval(), x)
    assert [one.name for one in report.parts[0].plain] == ([] if stays else ["0"])


@needs_engine
def test_what_a_step_of_the_engine_takes_is_less_by_the_layers_python() -> None:
    problem = SupportLinear(C, F, support=mask()).problem(torch.randn(1, C), frozen=True)
    plan = cpu_plans.chosen_plan(problem)
    apart = cpu_plans.plan_seconds(problem, plan) - cpu_plans.plan_seconds(problem, plan, False)
    around = [cost_model.OVERHEAD[f"{form} rows"] for form in ("filters", "pixels")]
    assert any(abs(apart - one) < 1e-9 for one in around)


def test_where_nothing_was_measured_every_support_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, ours=2.0, plain=1.0)
    model = nn.Sequential(HetConv2d(C, F, 3, p=2)).eval().double()
    assert leave_plain(model, [(torch.randn(1, C, 4, 4, dtype=torch.float64),)]) == ()


def test_small_layers_are_predicted_plain_and_large_sparse_ones_not() -> None:
    small = nn.Sequential(SupportLinear(C, F, support=mask())).eval()
    assert len(leave_plain(small, [(torch.randn(1, C),)])) == 1
    thin = hk.Support.from_mask(np.random.default_rng(0).random((2048, 1024, 1, 1)) < 0.02)
    large = nn.Sequential(SupportLinear(1024, 2048, support=thin)).eval()
    assert leave_plain(large, [(torch.randn(64, 1024),)]) == ()
    het = nn.Sequential(HetConv2d(64, 64, 3, padding=1, p=8)).eval()
    assert leave_plain(het, [(torch.randn(4, 64, 28, 28),)]) == ()


# Reports and files ------------------------------------------------------------------------------


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(5, 8, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    )


def compressed(model: nn.Module, x: torch.Tensor, **more: Any) -> Any:
    method = Het(p=2, epochs=0, stem=True)
    return hk.compress(model, method, example=x, measure=False, progress=False, **more)


def test_compress_says_what_it_left_plain_and_counts_by_the_mask(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = torch.randn(1, 5, 4, 4)
    kept = compressed(small(), x, leave_plain=False)
    assert type(kept.model[0]) is HetConv2d
    plant(monkeypatch, ours=2.0, plain=1.0)
    report = compressed(small().train(), x)
    layer = report.layers[0]
    assert type(report.model[0]) is nn.Conv2d
    assert report.model[0].weight.requires_grad
    assert report.model[0].training
    assert layer.kind == "Conv2d"
    assert layer.note.startswith("left plain: on [1, 5, 4, 4]")
    assert (layer.live, layer.macs) == (kept.layers[0].live, kept.layers[0].macs)
    assert (report.live, report.macs) == (kept.live, kept.macs)
    assert layer.live[1] == int((report.model[0].weight != 0).sum()) < layer.live[0]
    # The plain layer multiplies its zeros, and the statistics of the network say so.
    assert hk.stats.macs(report.model, x) == report.macs[0]
    assert "left plain: " in str(report)
    assert "left plain: " in report.to_json()
    torch.testing.assert_close(report.model(x), kept.model(x), rtol=1e-4, atol=1e-5)


def test_a_network_with_plain_layers_survives_files_and_leaves_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, ours=2.0, plain=1.0)
    x = torch.randn(2, 5, 4, 4)
    with torch.no_grad():
        for model in (compressed(small(), x).model.eval(), hk.optimize(small().eval(), x).model):
            wanted = model(x)
            hk.save(model, tmp_path / "m.safetensors")
            again = hk.load(tmp_path / "m.safetensors")
            assert any(type(m) is nn.Linear for m in again.modules())
            assert torch.equal(again(x), wanted)
            torch.testing.assert_close(hk.export.plain(model)(x), wanted, rtol=1e-4, atol=1e-5)


def test_optimize_leaves_small_linear_layers_to_pytorch_and_says_so() -> None:
    x = torch.randn(2, 5, 4, 4)
    report = hk.optimize(small().eval(), x)
    (part,) = report.parts
    assert [left.name for left in part.plain] == ["3"]
    assert "3 left plain: on [2, 8] no Support pays" in str(report)
    assert [m for m in report.model.modules() if isinstance(m, SupportLinear)] == []


# What auto counts -------------------------------------------------------------------------------


@pytest.mark.parametrize(("module", "engine"), [(dense_cost, "vendor"), (cpu_plans, "cpu")])
def test_what_a_call_takes_around_an_engine_decides(
    module: Any, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = SupportLinear(256, 256, support=mask(256, 256)).problem(
        torch.randn(4, 256), frozen=True
    )
    other = "cpu" if engine == "vendor" else "vendor"
    dear = dict.fromkeys(module.OVERHEAD, 1.0)
    free = dict.fromkeys(module.OVERHEAD, 0.0)
    before = get_backend(engine).estimate(problem)
    monkeypatch.setattr(module, "OVERHEAD", dear)
    assert get_backend(engine).estimate(problem) >= 1.0 > before
    assert hk.backends.choose(problem, 0).backend.name == other
    monkeypatch.setattr(module, "OVERHEAD", free)
    assert get_backend(engine).estimate(problem) < before


def test_the_plain_layer_has_none_of_our_overhead(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = SupportLinear(C, F, support=mask()).problem(torch.randn(1, C), frozen=True)
    before = dense_cost.plain_seconds(problem)
    monkeypatch.setattr(dense_cost, "OVERHEAD", dict.fromkeys(dense_cost.OVERHEAD, 1.0))
    assert dense_cost.plain_seconds(problem) == before < vendor.Vendor().estimate(problem)


NARROW = {
    "depthwise": (128, 128, 14, "vendor"),
    "pairs": (64, 32, 28, "cpu"),
    "fours": (256, 64, 14, "cpu"),
}


@pytest.mark.parametrize("name", NARROW)
def test_groups_of_few_channels_have_rates_of_their_own(name: str) -> None:
    """What `benchmarks.calibrate_calls` measured as faster, in NCHW on two threads, is chosen."""
    channels, groups, side, faster = NARROW[name]
    layer = GroupedConv2d(channels, channels, 3, padding=1, groups=groups).eval().freeze()
    x, threads = torch.randn(8, channels, side, side), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        problem = ops.describe("fprop", layer._geometry, x, x, layer.weight, (side, side), {})
        if get_backend("cpu").measured(problem):  # elsewhere its predictions are a guess
            assert hk.backends.choose(problem, 0).backend.name == faster
    finally:
        torch.set_num_threads(threads)


def test_masking_a_trained_weight_is_counted_and_a_live_one_costs_more() -> None:
    layer = SupportConv2d(64, 64, 3, padding=1, support=mask(64, 64, 3)).eval()
    x = torch.randn(1, 64, 8, 8)

    def seconds(weight: torch.Tensor, frozen: bool) -> float:
        geometry = replace(layer._geometry, frozen=frozen)
        problem = ops.describe("fprop", geometry, x, x, weight, (8, 8), {})
        return get_backend("vendor").estimate(problem)

    live = torch.randn(layer.support.live)
    frozen, dense, expanded = (
        seconds(live, True), seconds(layer.weight, False), seconds(live, False)
    )  # fmt: skip
    assert frozen + cost_model.MASK_CALL < dense < expanded


# Rows of features -------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [None, "vendor", "cpu"])
@pytest.mark.parametrize("shape", [(C,), (3, C), (2, 3, C), (0, C), (512, C)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_frozen_rows_compute_what_linear_computes(
    backend: str | None, shape: tuple[int, ...], bias: bool
) -> None:
    torch.manual_seed(0)
    layer = SupportLinear(C, F, bias, support=mask(), backend=backend).eval().freeze()
    twin, x = layer.to_linear(), torch.randn(shape)
    apart = torch.randn(*shape[:-1], 2 * C)[..., ::2]
    with torch.no_grad():
        for each in (x, x, apart):
            assert layer(each).shape == twin(each).shape
            torch.testing.assert_close(layer(each), twin(each), rtol=1e-4, atol=1e-5)
        with watched_packings() as packed:
            layer(x)
        assert packed == []


@pytest.mark.parametrize("backend", ["vendor", "cpu"])
def test_rows_see_every_change_of_a_frozen_weight_and_of_the_layer(backend: str) -> None:
    layer = SupportLinear(C, F, support=mask(), backend=backend).eval().freeze()
    x = torch.randn(3, C)
    with torch.no_grad():
        layer(x)
        layer.weight.mul_(2)
        layer.bias.add_(1)
        torch.testing.assert_close(layer(x), layer.to_linear()(x), rtol=1e-4, atol=1e-5)
        layer.bias = None
        torch.testing.assert_close(layer(x), layer.to_linear()(x), rtol=1e-4, atol=1e-5)
        layer.double()
        torch.testing.assert_close(layer(x.double()), layer.to_linear()(x.double()))
        with pytest.raises(hk.errors.InputTypeError, match="input dtype"):
            layer(x)
        layer.weight = nn.Parameter(torch.ones(2).double(), requires_grad=False)
        with pytest.raises(hk.errors.ArgumentError, match="weight shape"):
            layer(x.double())
