# SPDX-License-Identifier: Apache-2.0
"""A ``state_dict`` holds tensors only, and whoever walks it can."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from layers import IRREGULAR, NARROWER, C, F, build, image
from torch import Tensor, nn

import hetconv_kernels as hk
from hetconv_kernels.errors import SupportError
from hetconv_kernels.nn import FrequencyConv2d, SupportConv2d, SupportLinear
from hetconv_kernels.nn.extra_state import described_by, extra_state

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "support": lambda: build("support"),
    "het": lambda: build("het"),
    "frozen": lambda: build("selfgroup").freeze(),
    "frequency": lambda: FrequencyConv2d(C, F, 3),
    "linear": lambda: nn.Sequential(
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        SupportLinear(C, 6, support=hk.Support.from_mask(torch.ones(6, C, 1, 1).bool().numpy())),
    ),
    "fused": lambda: hk.nn.fuse(build("support"), nn.BatchNorm2d(F).eval(), "relu"),
}


def model(kind: str) -> nn.Module:
    return nn.Sequential(LAYERS[kind](), nn.Identity()).eval()


@pytest.fixture(params=LAYERS)
def kind(request) -> str:
    return request.param


def equal(first: nn.Module, second: nn.Module) -> None:
    with torch.no_grad():
        torch.testing.assert_close(first(image()), second(image()))


def test_a_state_dict_holds_tensors_only(kind: str) -> None:
    state = model(kind).state_dict()
    assert any(key.endswith("_extra_state") for key in state)
    assert {type(value) for value in state.values()} == {Tensor}


def test_safetensors_save_and_load_a_state_dict_and_a_model(kind: str, tmp_path) -> None:
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    first = model(kind)
    second, third = copy.deepcopy(first), copy.deepcopy(first)
    for other in (second, third):
        for tensor in other.state_dict().values():  # the extra state is a copy
            tensor.zero_()
    safetensors.save_file(first.state_dict(), str(tmp_path / "a"))
    second.load_state_dict(safetensors.load_file(str(tmp_path / "a")))
    equal(first, second)
    safetensors.save_model(first, str(tmp_path / "b"))
    assert safetensors.load_model(third, str(tmp_path / "b")) == (set(), [])
    equal(first, third)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_a_state_that_was_cast_loads(kind: str, dtype: torch.dtype) -> None:
    first = model(kind)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
    second = copy.deepcopy(first)
    second.load_state_dict({key: value.to(dtype) for key, value in first.state_dict().items()})
    for key, value in second.state_dict().items():
        if "weight" in key or "extra" in key:
            assert torch.equal(value, first.state_dict()[key].to(dtype).to(value.dtype))


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.99, 0.999, 0.9999])
@pytest.mark.parametrize("way", ["rebind", "copy", "lerp", "floating"])
def test_an_average_over_the_items_loads(kind: str, way: str, decay: float) -> None:
    """Averages of equal integers round to the same, or truncate to one less."""
    source = model(kind)
    average = {key: value.clone() for key, value in source.state_dict().items()}
    for _ in range(20):
        for key, value in source.state_dict().items():
            if way == "rebind":
                average[key] = average[key] * decay + value * (1 - decay)
            elif way == "copy":
                average[key].copy_(average[key] * decay + value * (1 - decay))
            elif way == "lerp":
                average[key] = average[key].float().lerp(value.float(), 1 - decay)
            elif value.is_floating_point():
                average[key].mul_(decay).add_(value, alpha=1 - decay)
    target = model(kind)
    target.load_state_dict(average)
    equal(target, source)


def test_the_numbers_survive_what_the_module_says() -> None:
    described = {"key": "".join(map(chr, range(32, 127))) + "é\n"}
    state = extra_state(described)
    assert state.dtype == torch.uint8
    for form in (
        state,
        state.half(),
        state.bfloat16(),
        state - 1,
        state.float() - 0.9,
        state.double() + 0.9,
    ):
        assert described_by(form, "key") == described["key"]
    with pytest.raises(SupportError, match="extra state"):
        described_by(state - 2, "key")
    with pytest.raises(SupportError, match="extra state: received dict"):
        described_by(state, "another")


def test_checkpoints_of_older_versions_load() -> None:
    layer = build("support")
    narrower = SupportConv2d(C, F, 3, support=NARROWER)
    old = {**narrower.state_dict(), "_extra_state": {"support": NARROWER.to_json()}}
    layer.load_state_dict(old)
    assert layer.support == NARROWER
    assert layer.support != IRREGULAR
    frequency = FrequencyConv2d(C, F, 3)
    state = frequency.state_dict()
    state["_extra_state"] = {"live_frequencies": list(range(9))}
    state["mix._extra_state"] = {"support": frequency.mix.support.to_json()}
    FrequencyConv2d(C, F, 3).load_state_dict(state)
    fused = LAYERS["fused"]()
    fused.load_state_dict(
        {**fused.state_dict(), "_extra_state": {"support": fused.support.to_json()}}
    )


def test_functional_call_takes_a_whole_state(kind: str) -> None:
    network = model(kind)
    with torch.no_grad():
        y = torch.func.functional_call(network, network.state_dict(), (image(),))
    torch.testing.assert_close(y, network(image()).detach())


def test_the_state_is_an_ordinary_tensor_in_every_mode() -> None:
    layer = build("het")
    with torch.inference_mode():
        state = layer.state_dict()
    assert not state["_extra_state"].is_inference()
    assert state["_extra_state"].device.type == "cpu"
    assert build("het").to("meta").state_dict()["_extra_state"].device.type == "cpu"


def test_the_tracer_of_the_jit_takes_a_network(kind: str) -> None:
    network = model(kind)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        graph, output = torch.jit._get_trace_graph(network, (image(),))
    assert "hetconv::fprop" in str(graph)
    torch.testing.assert_close(output, network(image()).detach())


@pytest.mark.parametrize("padding", [1, "same", (0, 2)], ids=str)
def test_the_exporter_that_traces_writes_convolutions_of_onnx(
    kind: str, padding: Any, tmp_path
) -> None:
    pytest.importorskip("onnx", reason="onnx is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    network = model(kind)
    if kind in ("support", "het"):
        network = nn.Sequential(build(kind, padding=padding), nn.BatchNorm2d(F), nn.ReLU()).eval()
    path = str(tmp_path / "net.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network, (image(),), path, dynamo=False, input_names=["x"],
            dynamic_axes={"x": {0: "n"}},
        )  # fmt: skip
    x = image(5, C, 9, 7)
    (y,) = runtime.InferenceSession(path).run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), network(x).detach(), rtol=1e-4, atol=1e-5)
