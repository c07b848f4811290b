# SPDX-License-Identifier: Apache-2.0
"""The forms of a QDQ file: who computes them in integers, and how many steps they are off."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import hetconv_kernels as hk
from hetconv_kernels.errors import ArgumentError
from hetconv_kernels.models.resnet import BasicBlock, ResNet
from hetconv_kernels.nn import Dequantize, Quantize, QuantizedConv2d
from hetconv_kernels.pooling import Pool
from hetconv_kernels.problem import make_geometry
from hetconv_kernels.quantization import Scale, from_onnx, to_onnx, to_qdq
from hetconv_kernels.quantization.qdq_layer import QdqLayer

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.one_thread
C = 16
X, R = Scale(0.02, 120), Scale(0.03, 100)
FORMS = [(form, sums) for form in ("dense", "composition") for sums in ("fused", "rounded")]


def unequal_groups() -> hk.Support:
    mask = np.zeros((C, C, 3, 3), dtype=bool)
    draw = np.random.default_rng(1)
    for g, size in enumerate((3, 5, 4)):
        mask[g::3, draw.permutation(C)[:size]] = True
    return hk.Support.from_mask(mask)


SUPPORTS = {
    "het": hk.Support.het(C, C, 3, p=4),
    "het-interleaved": hk.Support.het(C, C, 3, p=4, order="interleaved"),
    "grouped": hk.Support.grouped(C, C, 3, 4),
    "unequal-groups": unequal_groups(),
    "dense": hk.Support.dense(C, C, 3),
}
# Convolutions that a layer becomes as a composition: rings and, for HetConv, a 1×1.
PARTS = {"het": 2, "het-interleaved": 2, "grouped": 1, "unequal-groups": 3, "dense": 1}


class Layer(nn.Module):
    """One layer between a Quantize and a Dequantize, with a residual where it has a Scale of one.

    It is calibrated on its input, so that compositions see their whole range.
    """

    def __init__(
        self, support: hk.Support, act: str, residual: Scale | None, seed: int = 1, **rest: Any
    ) -> None:
        super().__init__()
        y = Scale(0.04, 0 if act == "relu" else 117)
        layer = QuantizedConv2d(
            make_geometry(support, rest.pop("stride", 1), 1),
            x=X, y=y, residual=residual, act=act, **rest,
        )  # fmt: skip
        weight = image(support.live, seed=seed) / float(support.live / support.filters) ** 0.5
        self.layer = layer.set_float_(weight, image(support.filters, seed=2))
        self.first, self.second, self.last = Quantize(X), Quantize(R), Dequantize(y)

    def forward(self, x: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
        r = None if other is None else self.second(other)
        return self.last(self.layer(self.first(x), r))


def image(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Layers(nn.Module):
    """Layers beside one another, some of which add the second input: one file shows them all."""

    def __init__(self, layers: dict[str, Layer]) -> None:
        super().__init__()
        self.each = nn.ModuleDict(layers)

    def forward(
        self, x: torch.Tensor, other: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ...]:
        found = []
        for layer in self.each.values():
            adds = layer.layer.residual is not None
            found.append(layer(x, other if adds else None))
        return tuple(found)


def every_kind() -> Layers:
    """Makes a layer of each Support alone, and one that adds a residual.

    Their weights differ, or a runtime computes equal products once.
    """
    return Layers(
        {
            f"{kind}, {'residual' if residual else 'alone'}": Layer(support, "relu", residual, seed)
            for seed, residual in enumerate((None, R), start=1)
            for kind, support in SUPPORTS.items()
        }
    )


def by_onnxruntime(
    path: Path, inputs: tuple[torch.Tensor, ...]
) -> tuple[list[torch.Tensor], Counter]:
    """Runs a file and counts the operators that ONNX Runtime makes of it."""
    ort = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(path.with_suffix(".optimised.onnx"))
    options.log_severity_level = 3  # that such a file is for this machine only
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {i.name: x.numpy() for i, x in zip(session.get_inputs(), inputs, strict=True)}
    found = [torch.from_numpy(y) for y in session.run(None, feed)]
    optimised = onnx.load(options.optimized_model_filepath)
    return found, Counter(node.op_type for node in optimised.graph.node)


def by_openvino(
    path: Path, inputs: tuple[torch.Tensor, ...]
) -> tuple[list[torch.Tensor], list[str]]:
    """Runs a file and lists the precisions in which OpenVINO convolves."""
    openvino = pytest.importorskip("openvino", reason="`make peers` installs openvino")
    core = openvino.Core()
    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(core.read_model(str(path)), "CPU", exact)
    results = compiled([x.numpy() for x in inputs])
    found = [torch.from_numpy(results[output]) for output in compiled.outputs]
    infos = [op.get_rt_info() for op in compiled.get_runtime_model().get_ops()]
    convs = [i for i in infos if i["layerType"].astype(str) == "Convolution"]
    return found, [i["runtimePrecision"].astype(str) for i in convs]


def floats(kinds: Counter) -> int:
    """Counts the convolutions in float that ONNX Runtime is left with."""
    return kinds["Conv"] + kinds["FusedConv"] + kinds["NhwcFusedConv"]


@pytest.mark.parametrize(("form", "sums"), FORMS)
def test_every_form_is_within_its_steps_in_both_runtimes(
    form: str, sums: str, tmp_path: Path
) -> None:
    net = every_kind().eval()
    inputs = image(2, C, 9, 7), image(2, C, 9, 7, seed=5)
    path = tmp_path / "net.onnx"
    to_onnx(net, inputs, path, form, sums)
    qdq = to_qdq(net, form, sums, [inputs])
    parts = [m for m in qdq.modules() if isinstance(m, QdqLayer)]
    assert len(parts) == len(net.each) == 2 * len(SUPPORTS)
    if sums == "fused":
        assert all(part.steps == 1 for part in parts)
    assert all(part.steps <= 4 for part in parts), "steps that say nothing"
    with torch.no_grad():
        expected = net(*inputs)
    (scale,) = {layer.last.x.scale for layer in net.each.values()}
    assert all(y.std() > 10 * scale for y in expected), "there is nothing to compare"

    def check(found: list[torch.Tensor]) -> None:
        for kind, part, own, wanted in zip(net.each, parts, found, expected, strict=True):
            off = ((own - wanted) / scale).abs()
            assert float(off.max()) < part.steps + 1e-3, kind
            if sums == "fused":
                right = float((off < 1e-3).float().mean())
                assert right > 0.99, f"{kind}: off by a step nearly everywhere"

    found, kinds = by_onnxruntime(path, inputs)
    check(found)
    count = 2 * (sum(PARTS.values()) if form == "composition" else len(SUPPORTS))
    convs = [node.op_type for node in onnx.load(str(path)).graph.node].count("Conv")
    assert convs == count
    if sums == "rounded":
        assert (kinds["QLinearConv"], floats(kinds)) == (count, 0)
    found, precisions = by_openvino(path, inputs)
    check(found)
    assert precisions == ["u8"] * count


SETTINGS: dict[str, dict[str, Any]] = {
    "none": {"act": "none"},
    "relu6": {"act": "relu6"},
    "strided": {"act": "relu", "stride": 2},
    "pooled": {"act": "relu", "pool": Pool((3, 3), (2, 2), (1, 1))},
}


def test_a_rounded_composition_keeps_its_epilogue(tmp_path: Path) -> None:
    net = Layers(
        {
            name: Layer(SUPPORTS["het"], residual=None, seed=seed, **each)
            for seed, (name, each) in enumerate(SETTINGS.items())
        }
    ).eval()
    x = image(2, C, 9, 7)
    to_onnx(net, x, tmp_path / "net.onnx", "composition", "rounded")
    form = to_qdq(net, "composition", "rounded", [x])
    parts = [m for m in form.modules() if isinstance(m, QdqLayer)]
    with torch.no_grad():
        expected = net(x)
    found, kinds = by_onnxruntime(tmp_path / "net.onnx", (x,))
    for name, part, own, wanted in zip(SETTINGS, parts, found, expected, strict=True):
        assert own.shape == wanted.shape, name
        steps = (own - wanted).abs().max() / net.each[name].last.x.scale
        assert float(steps) < part.steps + 1e-3, name
    assert (kinds["QLinearConv"], floats(kinds)) == (2 * len(SETTINGS), 0)


def test_what_is_added_to_a_residual_saturates_no_sooner_than_the_sum() -> None:
    """The ends of the residual's range bring the ends of the partial sum's beyond the output's."""
    net = Layer(SUPPORTS["dense"], "relu", R).eval()
    form = to_qdq(net, sums="rounded")
    (part,) = (m for m in form.modules() if isinstance(m, QdqLayer))
    scale = part.partials["sum"]
    y = net.last.x
    half = scale.scale / 2
    assert scale.high + R.low >= y.high - half
    assert scale.low + R.high <= half
    for factor in (10.0, -10.0):  # numbers far outside everything
        x, other = factor * image(2, C, 5, 5), -factor * image(2, C, 5, 5, seed=5)
        with torch.no_grad():
            off = (form(x, other) - net(x, other)).abs().max() / y.scale
        assert float(off) < part.steps + 1e-3


@pytest.fixture(scope="module")
def resnet() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    # Two stages of a block: six convolutions, four of them HetConv, two with a sum.
    net = ResNet(BasicBlock, (1, 1, 0, 0), num_classes=10).eval()
    net = hk.convert(net, hk.rules.het(4)).model
    x = image(1, 3, 32, 32)
    return hk.quantize(net, [x], measure=False).model, x


@pytest.fixture(scope="module")
def files(resnet: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """The network in every form."""
    net, x = resnet
    folder = tmp_path_factory.mktemp("resnet")
    paths = {each: folder / f"{'-'.join(each)}.onnx" for each in FORMS}
    for (form, sums), path in paths.items():
        to_onnx(net, x, path, form, sums)
    return paths


@pytest.mark.parametrize("form", ["dense", "composition"])
def test_onnx_runtime_convolves_a_resnet_in_integers_only(
    resnet: Any, files: Any, form: str
) -> None:
    net, x = resnet
    path = files[form, "rounded"]
    (found,), kinds = by_onnxruntime(path, (x,))
    count = [node.op_type for node in onnx.load(str(path)).graph.node].count("Conv")
    assert count == (6 if form == "dense" else 10)
    assert (kinds["QLinearConv"], floats(kinds)) == (count, 0)
    with torch.no_grad():
        expected = net(x)
    # Each layer is within its steps of the one before; they go through all of them.
    assert (found - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize(("form", "count"), [("dense", (4, 2)), ("composition", (2, 8))])
def test_onnx_runtime_leaves_fused_sums_in_float(
    form: str, count: tuple[int, int], resnet: Any, files: Any
) -> None:
    """The reason for the other way to sum: where this fails, ONNX Runtime has learnt it."""
    _, kinds = by_onnxruntime(files[form, "fused"], (resnet[1],))
    assert (kinds["QLinearConv"], floats(kinds)) == count


@pytest.mark.parametrize(("form", "sums"), FORMS)
def test_openvino_convolves_every_form_in_integers(
    resnet: Any, files: Any, form: str, sums: str
) -> None:
    net, x = resnet
    (found,), precisions = by_openvino(files[form, sums], (x,))
    assert precisions == ["u8"] * (6 if form == "dense" else 10)
    with torch.no_grad():
        expected = net(x)
    assert (found - expected).norm() < 0.05 * expected.norm()


def test_a_file_of_rounded_sums_comes_back_in(resnet: Any, files: Any) -> None:
    net, x = resnet
    again = from_onnx(files["dense", "rounded"])
    with torch.no_grad():
        expected = to_qdq(net, sums="rounded")(x)
        assert (again(x) - expected).norm() < 0.02 * expected.norm()


def test_batches_set_the_ranges_of_a_rounded_composition() -> None:
    net = Layer(SUPPORTS["het"], "relu", None).eval()
    x = image(2, C, 9, 7)

    def scales(*batches: torch.Tensor) -> dict[str, Scale]:
        form = to_qdq(net, "composition", "rounded", batches)
        return next(m for m in form.modules() if isinstance(m, QdqLayer)).partials

    one, both = scales(x), scales(x, 2 * x)
    assert set(one) == {"rings", "pointwise"}
    assert all(both[name].scale > one[name].scale for name in one)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"form": "sparse"}, r"form.*'sparse'.*dense, composition"),
        ({"sums": "exact"}, r"sums.*'exact'.*fused, rounded"),
        ({"form": "composition", "sums": "rounded"}, r"batches.*none"),
    ],
)
def test_what_no_form_is_and_missing_batches_are_refused(
    arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ArgumentError, match=message):
        to_qdq(Layer(SUPPORTS["het"], "relu", None), **arguments)
