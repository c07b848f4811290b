# SPDX-License-Identifier: Apache-2.0
"""export: the same outputs without this package's operators, in PyTorch and in ONNX Runtime."""

from __future__ import annotations

import io
import warnings

import numpy as np
import pytest
import torch
from layers import BUILDERS, C, F, build, image
from networks import interleaved, network
from torch import Tensor, nn

import hetconv_kernels as hk
from hetconv_kernels import export
from hetconv_kernels.errors import ArgumentError, InputTypeError
from hetconv_kernels.nn import FusedConv2d, GroupedConv2d, SupportLinear, fuse
from hetconv_kernels.pooling import Pool


def operators(program: torch.export.ExportedProgram) -> set[str]:
    return {str(n.target) for n in program.graph.nodes if n.op == "call_function"}


def frequency_layer(path: str) -> nn.Module:
    coefficients = np.random.default_rng(0).random((F, C, 3, 3)) < 0.3
    return hk.nn.FrequencyConv2d(C, F, 3, padding=1, stride=2, coefficients=coefficients, path=path)


LAYERS = {
    **{kind: lambda kind=kind: build(kind, 3, padding=1, stride=2) for kind in BUILDERS},
    "frozen": lambda: build("support", 3).freeze(),
    "same": lambda: build("het", 4 - 1, padding="same", dilation=2),
    "uneven": lambda: hk.nn.SupportConv2d(
        C, F, 2, padding="same", support=hk.Support.dense(C, F, 2)
    ),
    "reflect": lambda: build("het", 3, padding=1, padding_mode="reflect"),
    **{path: lambda path=path: frequency_layer(path) for path in ("frequency", "spatial")},
    "fused": lambda: fuse(build("het", 3, padding=1), nn.BatchNorm2d(F).eval(), "silu"),
    "fused-pooled": lambda: fuse(nn.Conv2d(C, F, 3), None, "relu", Pool((3, 2), (2, 1), (1, 0))),
    "fused-groups": lambda: fuse(nn.Conv2d(C, F, 3, groups=4), act="relu6"),
    "fused-uneven": lambda: fuse(nn.Conv2d(C, F, 2, padding="same"), act="gelu"),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_layers(kind: str) -> None:
    model = nn.Sequential(LAYERS[kind]()).eval()
    x = image()
    plain = export.plain(model)
    program = export.decompose(torch.export.export(model, (x,)))
    assert export.support_layers(model) == ["0"]
    assert export.support_layers(plain) == []
    assert not any(module.training for module in plain.modules())
    found = operators(program)
    assert any("aten.conv2d" in name for name in found)
    assert not any("hetconv" in name for name in found)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(plain(x), expected)
        torch.testing.assert_close(program.module()(x), expected)


def test_dead_entries_do_not_leave() -> None:
    layer = build("support", 3)
    with torch.no_grad():
        layer.weight.masked_fill_(torch.tensor(~layer.support.mask), float("nan"))
    program = export.decompose(torch.export.export(layer.eval(), (image(),)))
    for result in (export.plain(layer)(image()), program.module()(image())):
        assert result.isfinite().all()


def test_equal_groups_stay_groups() -> None:
    model = nn.Sequential(GroupedConv2d(C, F, 3, groups=4), fuse(nn.Conv2d(F, F, 3, groups=2)))
    plain = export.plain(model)
    assert (plain[0].groups, plain[1].conv.groups) == (4, 2)
    assert plain[0].weight.shape == (F, C // 4, 3, 3)


def test_residuals_and_linear_layers() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = fuse(nn.Conv2d(4, 4, 3, padding=1), act="relu")
            mask = np.random.default_rng(0).random((5, 4, 1, 1)) < 0.5
            support = hk.Support.from_mask(mask)
            self.head = SupportLinear.from_linear(nn.Linear(4, 5), support)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.conv(x, x).mean((2, 3)))

    model, x = Net().eval(), torch.randn(2, 4, 5, 5)
    program = export.decompose(torch.export.export(model, (x,)))
    with torch.no_grad():
        torch.testing.assert_close(export.plain(model)(x), model(x))
        torch.testing.assert_close(program.module()(x), model(x))


def test_the_original_stays() -> None:
    model = nn.Sequential(build("het", 3), fuse(nn.Conv2d(F, F, 1)))
    export.plain(model)
    assert isinstance(model[0], hk.nn.HetConv2d)
    assert isinstance(model[1], FusedConv2d)


def test_a_program_from_a_file_decomposes() -> None:
    """What the decomposition needs is in the program: the bits, not this process's Supports."""
    model, x = nn.Sequential(build("support", 3)).eval(), image()
    file = io.BytesIO()
    torch.export.save(torch.export.export(model, (x,)), file)
    file.seek(0)
    program = export.decompose(torch.export.load(file))
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize(("name", "form"), [("resnet20", "optimized"), ("branches", "layers")])
def test_onnx_runtime_gives_the_same(name: str, form: str, tmp_path) -> None:
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    model, x = network(name)
    model = interleaved(model)
    if form == "optimized":
        model = hk.optimize(model, x).model
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "ONNX Runtime")
        export.to_onnx(model, x, tmp_path / "net.onnx")
    session = runtime.InferenceSession(
        str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"]
    )
    (source,) = session.get_inputs()
    for batch in (2, 5):
        images = torch.randn(batch, *x.shape[1:])
        (result,) = session.run(None, {source.name: images.numpy()})
        with torch.no_grad():
            expected = model(images)
        torch.testing.assert_close(torch.tensor(result), expected, rtol=1e-4, atol=1e-5)


def test_refusals(tmp_path) -> None:
    with pytest.raises(InputTypeError, match="model: received int"):
        export.plain(3)
    with pytest.raises(ArgumentError, match="training mode"):
        export.to_onnx(nn.Sequential(nn.ReLU()), torch.randn(2), tmp_path / "net.onnx")
