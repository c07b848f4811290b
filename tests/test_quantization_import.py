# SPDX-License-Identifier: Apache-2.0
"""Networks that others quantised: their scales, Supports from zeros, refusals that say why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import hetconv_kernels as hk
from hetconv_kernels.errors import FileError, HetconvError
from hetconv_kernels.nn.quantized import QuantizedConv2d, QuantizedLinear
from hetconv_kernels.quantization import from_onnx, to_onnx

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper  # noqa: E402

C = 16


def image(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Files


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, C, 3, padding=1), nn.BatchNorm2d(C), nn.ReLU())
        self.a = nn.Sequential(nn.Conv2d(C, C, 3, 2, padding=1), nn.ReLU())
        self.b = nn.Conv2d(C, C, 3, padding=1)
        self.down = nn.Conv2d(C, C, 1, 2)
        self.pool, self.fc = nn.MaxPool2d(2), nn.Linear(C, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = self.pool(torch.relu(self.b(self.a(x)) + self.down(x)))
        return self.fc(x.mean((2, 3)))


@pytest.fixture(scope="module")
def network() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return hk.convert(Small().eval(), hk.rules.het(4)).model, image(4, 3, 16, 16)


@pytest.fixture(scope="module")
def written(network: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    net, x = network
    quantized = hk.quantize(net, [x], measure=False).model
    path = tmp_path_factory.mktemp("onnx") / "net.onnx"
    pytest.importorskip("onnxscript")
    to_onnx(quantized, x, path)
    return quantized, path


def test_what_we_wrote_comes_back_bit_for_bit(network: Any, written: Any) -> None:
    _, x = network
    quantized, path = written
    again = from_onnx(path)
    with torch.no_grad():
        assert torch.equal(again(x), quantized(x))
        assert torch.equal(again(2 * x[:1]), quantized(2 * x[:1]))
    before, after = (
        sorted(
            (m for m in net.modules() if isinstance(m, QuantizedConv2d)),
            key=lambda m: float(m.weight_scale[0]),
        )
        for net in (quantized, again)
    )
    assert len(after) == len(before) == 4
    for old, new in zip(before, after, strict=True):
        assert np.array_equal(old.support.mask, new.support.mask)
        assert (old.x, old.y, old.residual) == (new.x, new.y, new.residual)
        assert (old.act, old.pool) == (new.act, new.pool)
        assert torch.equal(old.weight_scale, new.weight_scale)
        assert torch.equal(old.bias, new.bias)
    assert any(m.support.density < 0.5 for m in after)
    assert not again.training


def test_what_onnx_runtime_quantised_is_computed_as_it_does(network: Any, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from benchmarks.low_precision import qdq_file
    from hetconv_kernels.export import plain

    net, x = network
    with torch.no_grad():
        path = qdq_file(plain(hk.optimize(net, x).model), x, tmp_path)
        found = from_onnx(path)
        session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        expected = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
        error = (found(x) - expected).norm()
        assert error < 0.02 * expected.norm()
        assert error < 0.5 * (net(x) - expected).norm(), "closer to the float network than to QDQ"
    layers = [m for m in found.modules() if isinstance(m, QuantizedConv2d | QuantizedLinear)]
    assert len(layers) == 5
    densities = [layer.support.density for layer in layers]
    assert sum(d < 0.5 for d in densities) == 2, "HetConv was not found again"


# Small graphs, by hand


def graph(*nodes: Any, weight: Any = None, more: Any = (), opset: int = 17, path: Path) -> Path:
    """Writes a file of nodes between x [1, 2, 4, 4] and y, with a weight and usual constants."""
    if weight is None:
        weight = np.arange(-18, 18, dtype=np.int8).reshape(2, 2, 3, 3)
    values = {
        "s": np.float32(0.1), "z": np.uint8(10), "w": weight, "sw": np.float32([0.5, 0.25]),
        "zw": np.int8([0, 0]), "b": np.int32([5, -7]), "sb": np.float32([0.05, 0.025]),
        "zb": np.int32([0, 0]), **dict(more),
    }  # fmt: skip
    made = [onnx.numpy_helper.from_array(np.asarray(v), k) for k, v in values.items()]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2, 4, 4])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", "c"])]
    whole = helper.make_graph(list(nodes), "g", inputs, outputs, made)
    model = helper.make_model(whole, opset_imports=[helper.make_opsetid("", opset)])
    onnx.save(model, str(path / "hand.onnx"))
    return path / "hand.onnx"


def node(kind: str, inputs: str, output: str, **attributes: Any) -> Any:
    return helper.make_node(kind, inputs.split(), [output], name=f"the_{output}", **attributes)


def read_x() -> list[Any]:
    return [node("QuantizeLinear", "x s z", "qx"), node("DequantizeLinear", "qx s z", "dx")]


def read_w(axis: int = 0) -> list[Any]:
    return [
        node("DequantizeLinear", "w sw zw", "dw", axis=axis),
        node("DequantizeLinear", "b sb zb", "db", axis=0),
    ]


CONV = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}


def test_a_convolution_by_hand_has_the_numbers_of_the_file(tmp_path: Path) -> None:
    nodes = [*read_x(), *read_w(), node("Conv", "dx dw db", "y", **CONV)]
    net = from_onnx(graph(*nodes, path=tmp_path))
    (layer,) = (m for m in net.modules() if isinstance(m, QuantizedConv2d))
    assert (layer.x.scale, layer.x.zero_point) == (pytest.approx(0.1), 10)
    assert layer.y is None
    assert layer.weight_scale.tolist() == [0.5, 0.25]
    assert layer.bias.tolist() == [5, -7]
    x = image(1, 2, 4, 4)
    integers = ((x / 0.1).round() + 10).clamp(0, 255) - 10
    weight = (
        torch.arange(-18, 18).reshape(2, 2, 3, 3) * torch.tensor([0.5, 0.25])[:, None, None, None]
    )
    expected = torch.conv2d(integers * 0.1, weight, torch.tensor([0.25, -0.175]), padding=1)
    assert torch.allclose(net(x), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("act", ["Relu", "Clip"])
def test_activation_and_pooling_become_part_of_the_layer(act: str, tmp_path: Path) -> None:
    pool = {"kernel_shape": [2, 2], "strides": [2, 2]}
    nodes = [
        *read_x(), *read_w(), node("Conv", "dx dw db", "c", **CONV),
        node(act, "c" if act == "Relu" else "c zero six", "r"),
        node("QuantizeLinear", "r s2 z", "q"), node("DequantizeLinear", "q s2 z", "d"),
        node("MaxPool", "d", "p", **pool), node("QuantizeLinear", "p s2 z", "q2"),
        node("DequantizeLinear", "q2 s2 z", "y"),
    ]  # fmt: skip
    more = {"s2": np.float32(0.5), "zero": np.float32(0), "six": np.float32(6)}
    net = from_onnx(graph(*nodes, path=tmp_path, more=more))
    (layer,) = (m for m in net.modules() if isinstance(m, QuantizedConv2d))
    assert layer.act == {"Relu": "relu", "Clip": "relu6"}[act]
    assert layer.pool is not None
    assert [type(m).__name__ for m in net.children()] == [
        "Quantize",
        "QuantizedConv2d",
        "Dequantize",
    ]
    found = net(image(1, 2, 4, 4))
    assert found.shape == (1, 2, 2, 2)
    assert float(found.max()) > 0
    assert float(found.min()) >= 0


def test_pooling_of_what_others_read_too_stays_apart(tmp_path: Path) -> None:
    nodes = [
        *read_x(), *read_w(), node("Conv", "dx dw db", "c", **CONV),
        node("QuantizeLinear", "c s2 z", "q"), node("DequantizeLinear", "q s2 z", "d"),
        node("MaxPool", "d", "p", kernel_shape=[3, 3], pads=[1, 1, 1, 1]), node("Add", "d p", "y"),
    ]  # fmt: skip
    net = from_onnx(graph(*nodes, path=tmp_path, more={"s2": np.float32(0.5)}))
    (layer,) = (m for m in net.modules() if isinstance(m, QuantizedConv2d))
    assert layer.pool is None
    x = image(1, 2, 4, 4)
    once = from_onnx(graph(*nodes[:-2], node("Identity", "d", "y"), path=tmp_path,
                           more={"s2": np.float32(0.5)}))(x)  # fmt: skip
    assert torch.allclose(net(x), once + torch.max_pool2d(once, 3, 1, 1))


def test_a_weight_of_minus_128_and_a_float_bias_are_taken_over(tmp_path: Path) -> None:
    weight = np.full((2, 2, 3, 3), -128, dtype=np.int8)
    nodes = [*read_x(), read_w()[0], node("Conv", "dx dw fb", "y", **CONV)]
    more = {"fb": np.float32([1.0, -2.0])}
    net = from_onnx(graph(*nodes, weight=weight, path=tmp_path, more=more))
    (layer,) = (m for m in net.modules() if isinstance(m, QuantizedConv2d))
    assert layer.bias.tolist() == [20, -80]  # 1 / (0.1 · 0.5), -2 / (0.1 · 0.25)
    x = torch.full((1, 2, 4, 4), 0.1)
    centre = float(net(x)[0, 0, 1, 1])
    assert centre == pytest.approx(18 * 0.1 * -64 + 1.0, rel=1e-5)


def test_a_matrix_product_and_the_sum_behind_it_are_one_layer(tmp_path: Path) -> None:
    weight = np.arange(-3, 3, dtype=np.int8).reshape(2, 3)  # [C, F]
    nodes = [
        node("GlobalAveragePool", "x", "g"), node("Flatten", "g", "f"),
        node("QuantizeLinear", "f s z", "q"), node("DequantizeLinear", "q s z", "d"),
        node("DequantizeLinear", "w s3 z3", "dw", axis=1), node("MatMul", "d dw", "m"),
        node("Add", "m fb", "y"),
    ]  # fmt: skip
    more = {"s3": np.float32([1, 2, 4]), "z3": np.int8([0, 0, 0]), "fb": np.float32([1, 2, 4])}
    net = from_onnx(graph(*nodes, weight=weight, path=tmp_path, more=more))
    (layer,) = (m for m in net.modules() if isinstance(m, QuantizedLinear))
    x = torch.full((1, 2, 4, 4), 0.5)
    expected = np.float32([[0.5, 0.5]]) @ (weight * np.float32([1, 2, 4])) + np.float32([1, 2, 4])
    assert torch.allclose(net(x), torch.from_numpy(expected), atol=1e-4)
    assert layer.support.shape == (3, 2, 1, 1)
    assert [type(m).__name__ for m in net.children()] == ["Quantize", "QuantizedLinear"]


def test_what_is_in_float_stays_in_float(tmp_path: Path) -> None:
    weight = np.linspace(-1, 1, 36, dtype=np.float32).reshape(2, 2, 3, 3)
    nodes = [
        *read_x(), node("Conv", "dx fw", "c", kernel_shape=[3, 3], pads=[1, 0, 1, 1]),
        node("Relu", "c", "r"), node("ReduceMean", "r", "m", axes=[2, 3], keepdims=0),
        node("Gemm", "m fl fb", "y", transB=1),
    ]  # fmt: skip
    linear = np.float32([[1, -2], [3, 4], [5, 6]])
    more = {"fw": weight, "fl": linear, "fb": np.float32([1, 2, 3])}
    net = from_onnx(graph(*nodes, path=tmp_path, more=more))
    assert {type(m) for m in net.children()} >= {nn.Conv2d, nn.Linear}
    x = image(1, 2, 4, 4)
    numbers = (((x / 0.1).round() + 10).clamp(0, 255) - 10) * 0.1
    y = torch.conv2d(nn.functional.pad(numbers, (0, 1, 1, 1)), torch.from_numpy(weight))
    expected = torch.relu(y).mean((2, 3)) @ torch.from_numpy(linear).t() + torch.tensor([1, 2, 3])
    assert torch.allclose(net(x), expected, atol=1e-4)


def test_concatenations_of_one_scale_stay_integers(tmp_path: Path) -> None:
    nodes = [
        *read_x(), node("MaxPool", "dx", "p", kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        node("QuantizeLinear", "p s z", "qp"), node("DequantizeLinear", "qp s z", "dp"),
        node("Concat", "dx dp", "y", axis=1),
    ]  # fmt: skip
    net = from_onnx(graph(*nodes, path=tmp_path))
    kinds = [type(m).__name__ for m in net.children()]
    assert kinds == ["Quantize", "QuantizedMaxPool2d", "Dequantize"]
    x = image(1, 2, 4, 4)
    numbers = (((x / 0.1).round() + 10).clamp(0, 255) - 10) * 0.1
    expected = torch.cat((numbers, torch.max_pool2d(numbers, 3, 1, 1)), 1)
    assert torch.allclose(net(x), expected, atol=1e-6)


def _asymmetric(path: Path) -> Path:
    more = {"zw": np.int8([0, 3])}
    return graph(*read_x(), *read_w(), node("Conv", "dx dw db", "y", **CONV), path=path, more=more)


def _unsigned(path: Path) -> Path:
    weight = np.ones((2, 2, 3, 3), dtype=np.uint8)
    more = {"zw": np.uint8([0, 0])}
    nodes = [*read_x(), *read_w(), node("Conv", "dx dw db", "y", **CONV)]
    return graph(*nodes, path=path, more=more, weight=weight)


def _axis(path: Path) -> Path:
    return graph(*read_x(), *read_w(axis=1), node("Conv", "dx dw db", "y", **CONV), path=path)


def _sigmoid(path: Path) -> Path:
    return graph(*read_x(), node("Sigmoid", "dx", "y"), path=path)


def _qlinear(path: Path) -> Path:
    conv = node("QLinearConv", "qx s z w sw zw s z", "q", **CONV)
    nodes = [read_x()[0], conv, node("DequantizeLinear", "q s z", "y")]
    return graph(*nodes, path=path)


def _zero_scale(path: Path) -> Path:
    more = {"s": np.float32(0)}
    return graph(*read_x(), *read_w(), node("Conv", "dx dw db", "y", **CONV), path=path, more=more)


def _zero_weight_scale(path: Path) -> Path:
    more = {"sw": np.float32([0.5, 0.0])}
    return graph(*read_x(), *read_w(), node("Conv", "dx dw db", "y", **CONV), path=path, more=more)


def _computed_weight(path: Path) -> Path:
    return graph(*read_x(), node("Conv", "dx dx", "y", kernel_shape=[4, 4]), path=path)


def _other_scale(path: Path) -> Path:
    nodes = [node("QuantizeLinear", "x s z", "q"), node("DequantizeLinear", "q s2 z", "y")]
    return graph(*nodes, path=path, more={"s2": np.float32(0.7)})


def _same_upper(path: Path) -> Path:
    conv = node("Conv", "dx dw db", "y", kernel_shape=[3, 3], auto_pad="SAME_UPPER")
    return graph(*read_x(), *read_w(), conv, path=path)


def _clip(path: Path) -> Path:
    more = {"low": np.float32(-1), "high": np.float32(1)}
    return graph(node("Clip", "x low high", "y"), path=path, more=more)


def _overflow(path: Path) -> Path:
    more = {"b": np.int32([2**31 - 1, 0])}
    return graph(*read_x(), *read_w(), node("Conv", "dx dw db", "y", **CONV), path=path, more=more)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (_asymmetric, r"the_dw.*DequantizeLinear.*zero points.*symmetrically"),
        (_unsigned, r"the_y.*Conv.*uint8.*int8"),
        (_axis, r"the_y.*Conv.*axis 1.*axis 0"),
        (_sigmoid, r"the_y.*Sigmoid.*QuantizeLinear"),
        (_qlinear, r"the_q.*QLinearConv.*not known"),
        (_zero_scale, r"the_qx.*QuantizeLinear.*scale.*0"),
        (_zero_weight_scale, r"the_y.*Conv.*scales of the weights.*positive"),
        (_computed_weight, r"the_y.*Conv.*weight.*constant"),
        (_other_scale, r"the_y.*DequantizeLinear.*as it was quantised"),
        (_same_upper, r"the_y.*Conv.*auto_pad=SAME_UPPER"),
        (_clip, r"the_y.*Clip.*0 and 6"),
        (_overflow, r"the_y.*Conv.*2\*\*31"),
    ],
    ids=lambda value: value.__name__[1:] if callable(value) else "",
)
def test_what_cannot_be_imported_is_named(
    make: Callable[[Path], Path], said: str, tmp_path: Path
) -> None:
    with pytest.raises(FileError, match=said):
        from_onnx(make(tmp_path))


def test_a_file_that_is_no_onnx_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(b"\xff no protobuf")
    with pytest.raises(FileError, match="an ONNX file"):
        from_onnx(tmp_path / "x.onnx")
    with pytest.raises(FileError, match="an ONNX file"):
        from_onnx(tmp_path / "missing.onnx")


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(HetconvError, match="pip install onnx"):
        from_onnx(tmp_path / "net.onnx")
