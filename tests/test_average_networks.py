# SPDX-License-Identifier: Apache-2.0
"""AveragePool in networks: `optimize` brings it in, and it goes wherever they go."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F_
from averages import LAST, POOLINGS, STEPS, Step, image
from networks import kinds as modules_of
from networks import network
from planning import needs_engine, unplanned
from programs import assert_equal_calls, kinds, program_of
from torch import Tensor, fx, nn

import hetconv_kernels as hk
from hetconv_kernels.nn import AveragePool, QuantizedAvgPool2d, SupportLinear

pytestmark = needs_engine


class Ends(nn.Module):
    """Two convolutions, an average, and a layer on what it gives."""

    def __init__(self, step: Any, features: int) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(4, 16, 3, padding=1), nn.Conv2d(16, 8, 1)
        self.step, self.head = step, nn.Linear(features, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.flatten(self.step(self.two(F_.relu(self.one(x)))), 1))


def ends(name: str) -> tuple[nn.Module, Tensor]:
    x = image(2, 4, 9, 6)
    features = STEPS[name](torch.randn(2, 8, 9, 6)).flatten(1).shape[1]
    torch.manual_seed(1)
    return Ends(STEPS[name], features).eval(), x


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("layout", [LAST, torch.contiguous_format])
@pytest.mark.parametrize("name", STEPS)
def test_optimize_brings_it_in_and_programs_compute_what_layers_do(
    name: str, layout: torch.memory_format, dtype: torch.dtype | None
) -> None:
    model, x = ends(name)
    x = x.contiguous(memory_format=layout)
    report = hk.optimize(model, x, dtype)
    assert len(modules_of(report.model, AveragePool)) == 1
    (average,) = report.parts[0].averages
    assert f"{average.name} is averaged by the engine" in str(report)
    (part,) = (m for m in report.model.modules() if isinstance(m, fx.GraphModule))
    for special in (None, torch.nan, torch.inf):
        if special is not None:
            x[0, 1, 2, 3] = special
        assert_equal_calls(report.model, unplanned(report.model), x)
    assert "average pool" in kinds(part)
    if name.startswith(("global", "mean")):  # of whatever size the image is
        for shape in ((1, 4, 5, 7), (3, 4, 1, 1), (2, 4, 70, 70)):
            given = torch.randn(shape).to(memory_format=layout)
            assert_equal_calls(report.model, unplanned(report.model), given)
            with torch.no_grad():
                eps = torch.finfo(dtype or torch.float32).eps
                wanted = model(given)
                bound = {"rtol": 8 * eps, "atol": 8 * eps * float(wanted.abs().max())}
                torch.testing.assert_close(report.model(given), wanted, **bound)


@pytest.mark.parametrize("name", ["resnet20", "resnet50"])
def test_the_end_of_a_resnet_is_native_and_views_are_no_steps(name: str) -> None:
    model, x = network(name, share=0.0)
    with hk.use_backend("cpu"):
        fast = hk.optimize(model, x.to(memory_format=LAST)).model
        assert_equal_calls(fast, unplanned(fast), x.to(memory_format=LAST))
    assert isinstance(fast.fc, SupportLinear)
    assert kinds(fast)[-2:] == ["average pool", "conv"]
    assert "call" not in kinds(fast)
    assert len(program_of(fast)._pieces) == 1


def test_where_the_engine_takes_no_image_nothing_is_replaced() -> None:
    model, x = ends("global module")
    averages: Callable[..., Any] = lambda *given: hk.optimize(*given).parts[0].averages  # noqa: E731
    assert averages(model, x)
    assert not averages(copy.deepcopy(model).double(), x.double())
    assert not averages(model, x, torch.float16)
    assert not averages(model, image(1, 4, 70, 70))
    assert not averages(Step(nn.AdaptiveAvgPool2d(1)).eval(), x.contiguous())
    with hk.use_backend("vendor"):
        assert not averages(model, x)
    hooked = copy.deepcopy(model)
    hooked.step.register_forward_hook(lambda module, args, output: output * 2)
    report = hk.optimize(hooked, x)
    assert not report.parts[0].averages
    with torch.no_grad():
        torch.testing.assert_close(report.model(x), hooked(x))


def test_the_comparison_knows_how_deep_an_average_is() -> None:
    """A network of nothing else: of 4096 numbers of one sign a sum errs more than of a layer's."""
    x = torch.rand(4, 64, 64, 64).to(memory_format=LAST)
    report = hk.optimize(Step(nn.AdaptiveAvgPool2d(1)).eval(), x)
    assert [average.taps for average in report.parts[0].averages] == [4096]
    assert not report.untraced


def test_a_module_that_is_called_twice_is_replaced_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.pool = nn.Conv2d(4, 8, 3, padding=1), nn.AdaptiveAvgPool2d(1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.pool(y) - self.pool(y[:, :, ::2])

    model, x = Twice().eval(), image(2, 4, 8, 6)
    fast = hk.optimize(model, x).model
    assert isinstance(fast.pool, AveragePool)
    assert_equal_calls(fast, unplanned(fast), x)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x))


@pytest.mark.parametrize("name", ["global module", "mean", "windows"])
def test_it_is_optimised_again(name: str) -> None:
    model, x = ends(name)
    fast = hk.optimize(model, x).model
    again = hk.optimize(fast, x)
    assert len(modules_of(again.model, AveragePool)) == 1
    assert [average.taps for average in again.parts[0].averages] == [4 if name == "windows" else 54]
    with torch.no_grad():
        torch.testing.assert_close(again.model(x), fast(x))
    assert_equal_calls(again.model, unplanned(again.model), x)


@pytest.mark.parametrize("name", POOLINGS)
def test_dead_channels_leave_through_it(name: str) -> None:
    conv, x = nn.Conv2d(4, 8, 3, padding=1), image(2, 4, 9, 6)
    with torch.no_grad():
        conv.weight[:3], conv.bias[:3] = 0, 0
    features = POOLINGS[name]()(conv(x)).flatten(1).shape[1]
    layers = [conv, nn.ReLU(), POOLINGS[name]()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, 5)).eval()
    report = hk.compact(model, x)
    assert report.model.get_submodule("0").out_channels == 5
    with torch.no_grad():
        torch.testing.assert_close(report.model(x), model(x))


@pytest.mark.parametrize("name", STEPS)
def test_networks_with_it_go_everywhere(name: str, tmp_path: Path) -> None:
    model, x = ends(name)
    fast = hk.optimize(model, x).model
    buffer = io.BytesIO()
    torch.save(fast, buffer)
    buffer.seek(0)
    hk.save(fast, tmp_path / "fast.safetensors")
    with torch.no_grad():
        wanted = fast(x)
        for twin in (
            torch.load(buffer, weights_only=False),
            copy.deepcopy(fast),
            hk.load(tmp_path / "fast.safetensors"),
        ):
            assert len(modules_of(twin, AveragePool)) == 1
            assert torch.equal(twin(x), wanted)
            assert torch.equal(twin(x), wanted)
        plain = hk.export.plain(fast)
        assert not modules_of(plain, AveragePool)
        torch.testing.assert_close(plain(x), wanted)
        exported = torch.export.export(fast, (x,))
        torch.testing.assert_close(hk.export.decompose(exported).module()(x), wanted)
        double = copy.deepcopy(fast).double()
        torch.testing.assert_close(double(x.double()).float(), wanted, rtol=1e-4, atol=1e-5)
    given = x.clone().requires_grad_()
    fast(given).sum().backward()
    own = x.clone().requires_grad_()
    model(own).sum().backward()
    torch.testing.assert_close(given.grad, own.grad, rtol=1e-4, atol=1e-6)
    saved = hk.export.program(fast, x, tmp_path / "fast.hc")
    assert saved.steps.count("average pool") == 1
    assert sum("average pooling of the engine" in line for line in saved.changed) == 1


@pytest.mark.parametrize("name", ["global", "mean", "mean of an image", "windows"])
def test_onnx_files_have_one_operator_for_it(name: str, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    model, x = ends(name)
    hk.export.to_onnx(hk.optimize(model, x).model, x, tmp_path / "network.onnx")
    found = [node.op_type for node in onnx.load(tmp_path / "network.onnx").graph.node]
    own = "AveragePool" if name == "windows" else "ReduceMean"
    assert [kind for kind in found if kind != "Reshape"] == ["Conv", "Relu", "Conv", own, "Gemm"]


def test_a_program_sees_that_the_engine_of_an_average_is_another() -> None:
    model, x = ends("global module")
    with hk.use_backend("cpu"):
        fast = hk.optimize(model, x).model
        assert_equal_calls(fast, unplanned(fast), x)
        assert "call" not in kinds(fast)
        fast.step.backend = "vendor"
        assert_equal_calls(fast, unplanned(fast), x)
        assert "average pool" not in kinds(fast)


@pytest.mark.parametrize("name", ["global", "global module", "mean", "mean of an image"])
def test_in_8_bits_it_is_the_integers_mean(name: str) -> None:
    model, x = ends(name)
    report = hk.quantize(model, [x], measure=False, min_sqnr=0.0)
    assert modules_of(report.optimized, AveragePool)
    assert not modules_of(report.model, AveragePool)
    (step,) = modules_of(report.model, QuantizedAvgPool2d)
    assert step.keepdim is (name not in ("mean",))
