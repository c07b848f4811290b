# SPDX-License-Identifier: Apache-2.0
"""Quantised networks as ONNX QDQ files: others compute the same, within one step of rounding."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import hetconv_kernels as hk
from hetconv_kernels import export
from hetconv_kernels.errors import ArgumentError, HetconvError, InputTypeError
from hetconv_kernels.nn import FusedConv2d
from hetconv_kernels.nn.quantized import QuantizedConv2d, QuantizedLinear
from hetconv_kernels.nn.quantized_steps import (
    Dequantize,
    Quantize,
    QuantizedAdd,
    QuantizedAvgPool2d,
    QuantizedMaxPool2d,
    QuantizedPad,
    Requantize,
)
from hetconv_kernels.pooling import Pool
from hetconv_kernels.problem import make_geometry
from hetconv_kernels.quantization import Scale, to_onnx, to_qdq

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
C = 16
SUPPORTS = {
    "dense": hk.Support.dense(C, C, 3),
    "het": hk.Support.het(C, C, 3, p=4),
    "grouped": hk.Support.grouped(C, C, 3, 4),
    "depthwise": hk.Support.grouped(C, C, 3, C),
    "irregular": hk.Support.from_mask(
        torch.rand(C, C, 3, 3, generator=torch.Generator().manual_seed(0)).lt(0.3).numpy()
    ),
}
X, Y = Scale(0.02, 120), Scale(0.05, 117)


def image(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    """One layer or step between a Quantize and a Dequantize."""

    def __init__(self, step: nn.Module, x: Scale = X, y: Scale | None = Y, two: Any = None) -> None:
        super().__init__()
        self.first, self.step = Quantize(x), step
        self.second = None if two is None else Quantize(two)
        self.last = nn.Identity() if y is None else Dequantize(y)

    def forward(self, x: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
        if self.second is None:
            return self.last(self.step(self.first(x)))
        return self.last(self.step(self.first(x), self.second(other)))


class Beside(nn.Module):
    """Networks of one input beside one another: one file holds them all."""

    def __init__(self, *nets: Net) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nets)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(net(x) for net in self.nets)


def conv(
    support: hk.Support, *, stride: Any = 1, padding: Any = 1, act: str = "none",
    pool: Pool | None = None, y: Scale | None = Y, residual: Scale | None = None, x: Scale = X,
) -> QuantizedConv2d:  # fmt: skip
    geometry = make_geometry(support, stride, padding)
    layer = QuantizedConv2d(geometry, x=x, y=y, residual=residual, act=act, pool=pool)
    return layer.set_float_(image(support.live) / 8, image(support.filters, seed=2)).eval()


@pytest.fixture
def runtime(tmp_path: Path) -> Any:
    """Writes a network and returns a runner of the file by ONNX Runtime, and the graph."""
    ort = pytest.importorskip("onnxruntime")

    def write(net: nn.Module, *inputs: torch.Tensor) -> tuple[Any, Any]:
        path = tmp_path / "net.onnx"
        to_onnx(net.eval(), inputs if len(inputs) > 1 else inputs[0], path)
        session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        feed = {i.name: x.numpy() for i, x in zip(session.get_inputs(), inputs, strict=True)}
        found = [torch.from_numpy(y) for y in session.run(None, feed)]
        return found if isinstance(net, Beside) else found[0], onnx.load(str(path))

    return write


def within_a_step(found: torch.Tensor, expected: torch.Tensor, step: float) -> bool:
    return bool((found - expected).abs().max() <= step * 1.001)


# Layers and steps


def test_onnx_runtime_computes_the_layer_of_every_support(runtime: Any) -> None:
    x = image(2, C, 9, 7)
    net = Beside(*(Net(conv(support)) for support in SUPPORTS.values()))
    with torch.no_grad():
        every = net(x)
        outputs, model = runtime(net, x)
    nodes = [n for n in model.graph.node if n.op_type == "Conv"]
    for kind, node, found, expected in zip(SUPPORTS, nodes, outputs, every, strict=True):
        assert within_a_step(found, expected, Y.scale), kind
        right = float((found == expected).float().mean())
        assert right > 0.99, f"{kind}: off by a step nearly everywhere"
        (groups,) = [a.i for a in node.attribute if a.name == "group"]
        assert groups == (SUPPORTS[kind].uniform_groups or 1), kind


EPILOGUES: dict[str, dict[str, Any]] = {
    "relu": {"act": "relu"},
    "relu6": {"act": "relu6", "y": Scale(0.03, 0)},
    "uneven pads": {"stride": 2, "padding": (1, 1, 1, 0), "act": "relu"},
    "pool": {"pool": Pool((3, 3), (2, 2), (1, 1)), "act": "relu"},
    "float": {"y": None},
    "float, pool": {"y": None, "act": "relu", "pool": Pool((2, 2), (2, 2), (0, 0))},
    "int8": {"x": Scale(0.02, -3, torch.int8), "y": Scale(0.05, 4, torch.int8)},
}


def test_onnx_runtime_computes_the_epilogue(runtime: Any) -> None:
    layers = {name: conv(SUPPORTS["het"], **how) for name, how in EPILOGUES.items()}
    net = Beside(*(Net(one, EPILOGUES[n].get("x", X), one.y) for n, one in layers.items()))
    x = image(2, C, 9, 7)
    with torch.no_grad():
        every = net(x)
        outputs, _ = runtime(net, x)
    for (name, layer), found, expected in zip(layers.items(), outputs, every, strict=True):
        step = 1e-4 if layer.y is None else layer.y.scale
        assert expected.std() > 10 * step, f"{name}: there is nothing to compare"
        assert within_a_step(found, expected, step), name


def test_onnx_runtime_adds_the_residual(runtime: Any) -> None:
    residual = Scale(0.03, 100)
    net = Net(conv(SUPPORTS["het"], residual=residual, act="relu"), two=residual)
    x, other = image(2, C, 6, 6), image(2, C, 6, 6, seed=5)
    with torch.no_grad():
        expected = net(x, other)
        found, _ = runtime(net, x, other)
        assert not within_a_step(net(x, -other), expected, Y.scale)
    assert within_a_step(found, expected, Y.scale)


STEPS = {
    "mean": QuantizedAvgPool2d(X, Y),
    "mean, flat": QuantizedAvgPool2d(X, Y, keepdim=False),
    "max-pool": QuantizedMaxPool2d(Pool((3, 3), (2, 2), (1, 1))),
    "pad": QuantizedPad(X, (1, 2, 0, 1)),
    "requantize": Requantize(X, Y, "relu"),
    "average of 3×3": QuantizedAvgPool2d(X, X, size=(3, 3)),
}


def test_onnx_runtime_computes_the_steps(runtime: Any) -> None:
    scales = [getattr(step, "y", X) for step in STEPS.values()]
    net = Beside(*(Net(step, y=y) for step, y in zip(STEPS.values(), scales, strict=True)))
    x = image(2, C, 6, 6)
    with torch.no_grad():
        every = net(x)
        outputs, _ = runtime(net, x)
    for name, scale, found, expected in zip(STEPS, scales, outputs, every, strict=True):
        assert found.shape == expected.shape, name
        assert within_a_step(found, expected, scale.scale), name


def test_onnx_runtime_adds_and_multiplies_matrices(runtime: Any) -> None:
    other = Scale(0.03, 100)
    x = image(4, C)
    with torch.no_grad():
        net = Net(QuantizedAdd(X, other, Y, "relu"), two=other)
        expected = net(x, x.flip(0))
        found, _ = runtime(net, x, x.flip(0))
        assert within_a_step(found, expected, Y.scale)
        linear = nn.Linear(C, 8)
        net = Net(QuantizedLinear.from_float(linear, X, Y, "relu"))
        expected = net(x)
        found, model = runtime(net, x)
    assert within_a_step(found, expected, Y.scale)
    assert "Gemm" in [node.op_type for node in model.graph.node]


# Networks


class Small(nn.Module):
    """A residual block, a layer that stays in float, a pooling and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, C, 3, padding=1), nn.BatchNorm2d(C), nn.ReLU())
        self.a = nn.Sequential(nn.Conv2d(C, C, 3, padding=1), nn.ReLU())
        self.b = nn.Conv2d(C, C, 3, padding=1)
        self.c = nn.Sequential(nn.Conv2d(C, C, 3, padding=1), nn.SiLU())
        self.pool, self.fc = nn.MaxPool2d(2), nn.Linear(C, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = self.c(self.pool(torch.relu(self.b(self.a(x)) + x)))
        return self.fc(x.mean((2, 3)))


@pytest.fixture(scope="module")
def quantized() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    net = hk.convert(Small().eval(), hk.rules.het(4)).model
    x = image(4, 3, 16, 16)
    return hk.quantize(net, [x], measure=False).model, x


def test_the_network_is_one_of_integers_and_floats(quantized: Any) -> None:
    kinds = Counter(type(m) for m in quantized[0].modules())
    assert kinds[QuantizedConv2d] == 3
    assert kinds[FusedConv2d] == 1


def test_the_qdq_form_computes_the_network(quantized: Any) -> None:
    net, x = quantized
    with torch.no_grad():
        expected = net(x)
        form = to_qdq(net)
        found = form(x)
    assert (found - expected).norm() < 0.01 * expected.norm()
    assert export.support_layers(form) == []
    kinds = {type(m).__name__ for m in form.modules()}
    assert kinds >= {"QdqLayer", "QdqStep", "PlainConv2d"}
    assert any(isinstance(m, QuantizedConv2d) for m in net.modules()), "the original was changed"


def test_onnx_runtime_and_openvino_compute_the_network(quantized: Any, tmp_path: Path) -> None:
    net, x = quantized
    path = tmp_path / "net.onnx"
    export.to_onnx(net, x, path)
    results = []
    with torch.no_grad():
        expected = net(x)
    try:
        import onnxruntime
    except ImportError:
        pass
    else:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        results.append(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
        # The batch is dynamic.
        (one,) = session.run(None, {session.get_inputs()[0].name: x[:1].numpy()})
        assert one.shape == (1, 5)
    try:
        import openvino
    except ImportError:
        pass
    else:
        core = openvino.Core()
        compiled = core.compile_model(core.read_model(str(path)), "CPU")
        results.append(next(iter(compiled([x.numpy()]).values())))
    if not results:
        pytest.skip("neither ONNX Runtime nor OpenVINO is installed")
    for found in results:
        # Steps that differ in the last bit go through the layers behind them.
        assert (torch.from_numpy(found) - expected).norm() < 0.02 * expected.norm()


class Seen(nn.Module):
    """A stem and two residual blocks of integers, and what each of their layers hands on."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, C, 3, padding=1)
        self.layers = nn.ModuleList(nn.Conv2d(C, C, 3, padding=1) for _ in range(4))
        self.last = nn.Conv2d(C, C, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        seen = [torch.relu(self.stem(x))]
        for first, second in zip(self.layers[::2], self.layers[1::2], strict=True):
            seen.append(torch.relu(first(seen[-1])))
            seen.append(torch.relu(second(seen[-1]) + seen[-2]))
        return *seen, self.last(seen[-1])


@pytest.mark.parametrize("runtime_name", ["onnxruntime", "openvino"])
def test_every_tensor_of_the_network_is_within_its_steps(runtime_name: str, tmp_path: Path) -> None:
    """Nearly all numbers are equal or a step away; each is within a bound that is exact.

    A layer's own rounding is a step at most; a step of its input moves its output by the weights'
    share of it, and one of its residual by that scale's. No clamp can make more of either.
    """
    library = pytest.importorskip(runtime_name, reason=f"`make peers` installs {runtime_name}")
    torch.manual_seed(0)
    net = hk.convert(Seen().eval(), hk.rules.het(4)).model
    x = image(4, 3, 24, 24)
    net = hk.quantize(net, [x], measure=False).model
    path = tmp_path / "net.onnx"
    to_onnx(net, x, path)
    with torch.no_grad():
        expected = net(x)
    if runtime_name == "openvino":
        core = library.Core()
        exact = {"INFERENCE_PRECISION_HINT": "f32"}
        results = core.compile_model(core.read_model(str(path)), "CPU", exact)([x.numpy()])
        found = [results[port] for port in results]
    else:
        session = library.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    off = [(torch.from_numpy(f) - e).abs() for f, e in zip(found, expected, strict=True)]
    layers = [net.get_submodule(name) for name in ("stem", *(f"layers.{i}" for i in range(4)))]
    assert all(type(layer) is QuantizedConv2d for layer in layers)
    steps = [one / layer.y.scale for one, layer in zip(off, layers, strict=False)]
    assert all(float((one < 1.001).float().mean()) > 0.999 for one in steps)
    assert all(float((one < 1e-3).float().mean()) > 0.99 for one in steps)
    for i, layer in enumerate(layers):
        bound = torch.full_like(steps[i], 1.001)
        if i > 0:
            weight = layer.dequantized()[0].abs()
            bound += functional.conv2d(off[i - 1], weight, padding=1) / layer.y.scale
        if layer.residual is not None:
            bound += off[i - 2] / layer.y.scale
        assert bool((steps[i] <= bound).all()), i
    assert sum(layer.residual is not None for layer in layers) == 2


def test_openvino_computes_a_layer_within_one_step(tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino", reason="`make peers` installs openvino")
    x = image(2, C, 9, 7)
    net = Net(conv(SUPPORTS["het"], act="relu")).eval()
    to_onnx(net, x, tmp_path / "net.onnx")
    core = openvino.Core()
    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(core.read_model(str(tmp_path / "net.onnx")), "CPU", exact)
    found = torch.from_numpy(next(iter(compiled([x.numpy()]).values())))
    with torch.no_grad():
        assert within_a_step(found, net(x), Y.scale)


def test_the_file_keeps_integers(quantized: Any, tmp_path: Path) -> None:
    net, x = quantized
    to_onnx(net, x, tmp_path / "net.onnx")
    model = onnx.load(str(tmp_path / "net.onnx"))
    assert {o.domain: o.version for o in model.opset_import}[""] >= 17
    kinds = Counter(onnx.TensorProto.DataType.Name(i.data_type) for i in model.graph.initializer)
    assert kinds["INT8"] >= 4
    weights = [i for i in model.graph.initializer if len(i.dims) == 4]
    # Three quantised convolutions and the one that stayed in float.
    names = [onnx.TensorProto.DataType.Name(i.data_type) for i in weights]
    assert sorted(names) == ["FLOAT", "INT8", "INT8", "INT8"]


# Refusals


def test_a_float_network_is_refused() -> None:
    with pytest.raises(InputTypeError, match=r"in float.*export\.plain"):
        to_qdq(nn.Conv2d(3, 4, 3))
    with pytest.raises(InputTypeError, match=r"nn\.Module"):
        to_qdq("net")  # type: ignore[arg-type]


def test_an_uncalibrated_layer_is_refused() -> None:
    layer = QuantizedConv2d(make_geometry(SUPPORTS["het"]))
    with pytest.raises(InputTypeError, match="not calibrated"):
        to_qdq(layer)


def test_a_network_in_training_mode_is_refused(quantized: Any, tmp_path: Path) -> None:
    net = Net(conv(SUPPORTS["het"])).train()
    with pytest.raises(ArgumentError, match=r"training|eval"):
        to_onnx(net, image(1, C, 5, 5), tmp_path / "net.onnx")


def test_a_missing_library_is_named(
    quantized: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(HetconvError, match="pip install onnx onnxscript"):
        to_onnx(*quantized, tmp_path / "net.onnx")
