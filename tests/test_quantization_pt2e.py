# SPDX-License-Identifier: Apache-2.0
"""Programs that PyTorch's PT2E flow quantised come in as networks of quantised layers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hetconv_kernels as hk
from hetconv_kernels.errors import FileError, InputTypeError
from hetconv_kernels.nn.quantized import QuantizedConv2d, QuantizedLayer
from hetconv_kernels.nn.quantized_steps import Dequantize
from hetconv_kernels.quantization import from_pt2e, to_qdq
from hetconv_kernels.quantization.qdq import operators

C = 16
Q = operators()


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, C, 3, padding=1), nn.BatchNorm2d(C), nn.ReLU())
        self.a = nn.Sequential(nn.Conv2d(C, C, 3, 2, padding=1, groups=4), nn.ReLU())
        self.b, self.down = nn.Conv2d(C, C, 3, padding=1), nn.Conv2d(C, C, 1, 2)
        self.relu, self.pool, self.fc = nn.ReLU(), nn.MaxPool2d(2), nn.Linear(C, 5)
        self.average = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = self.pool(self.relu(self.b(self.a(x)) + self.down(x)))
        return self.fc(torch.flatten(self.average(x), 1))


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def small() -> nn.Module:
    torch.manual_seed(0)
    net = Small().eval()
    with torch.no_grad():  # HetConv p=4, known by its zeros alone
        mask = torch.as_tensor(hk.Support.het(C, C, 3, p=4).mask.copy())
        net.b.weight.mul_(mask)
    return net


def by_torch(net: nn.Module, x: torch.Tensor) -> torch.export.ExportedProgram:
    """Quantises by PyTorch's own FX mode, which writes the same operators as PT2E."""
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.backend_config import get_onednn_backend_config
    from torch.ao.quantization.quantize_fx import (
        _convert_to_reference_decomposed_fx,
        prepare_fx,
    )

    patterns = get_onednn_backend_config()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepared = prepare_fx(
            net, get_default_qconfig_mapping("onednn"), (x,), backend_config=patterns
        )
        prepared(x)
        return torch.export.export(
            _convert_to_reference_decomposed_fx(prepared, backend_config=patterns), (x,)
        )


def by_torchao(net: nn.Module, x: torch.Tensor) -> torch.export.ExportedProgram:
    """Quantises by torchao's PT2E flow."""
    pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(torch.export.export(net, (x,)).module(), quantizer)
    prepared(x)
    return torch.export.export(convert_pt2e(prepared), (x,))


@pytest.mark.parametrize("quantise", [by_torch, by_torchao])
@pytest.mark.parametrize("form", ["program", "saved", "module"])
def test_a_quantised_program_is_computed_as_it_says(
    quantise: Callable[..., Any], form: str, x: torch.Tensor, tmp_path: Path
) -> None:
    net = small()
    program = quantise(net, x)
    module = program.module()
    given: Any = program if form == "program" else module
    if form == "saved":
        torch.export.save(program, str(tmp_path / "net.pt2"))
        given = torch.export.load(str(tmp_path / "net.pt2"))
    found = from_pt2e(given)
    with torch.no_grad():
        expected = module(x)
        error = (found(x) - expected).abs().max()
        spoiled = (found(x.flip(3)) - expected).abs().max()
    steps = [m.x.scale for m in found.modules() if isinstance(m, Dequantize)]
    step = steps[0] if steps else 0.01 * float(expected.abs().max())
    assert error <= 1.001 * step
    assert spoiled > 2 * step, "any input would do"
    layers = [m for m in found.modules() if isinstance(m, QuantizedLayer)]
    assert len(layers) == 5, "a layer stayed in float"
    het = hk.Support.het(C, C, 3, p=4)
    assert any(np.array_equal(layer.support.mask, het.mask) for layer in layers)
    assert any(layer.support.uniform_groups == 4 for layer in layers)
    assert any(layer.residual is not None for layer in layers), "the sum stayed apart"


def test_what_we_write_comes_back_bit_for_bit(x: torch.Tensor) -> None:
    quantized = hk.quantize(small(), [x], measure=False).model
    again = from_pt2e(torch.export.export(to_qdq(quantized), (x,)))
    with torch.no_grad():
        assert torch.equal(again(x), quantized(x))
    scales = [
        sorted((m.x.scale, m.act) for m in net.modules() if isinstance(m, QuantizedConv2d))
        for net in (quantized, again)
    ]
    assert scales[0] == scales[1]


# Refusals


class Written(nn.Module):
    """A program of quantised operators, written by hand."""

    def __init__(self, step: Callable[[torch.Tensor], torch.Tensor], **scale: Any) -> None:
        super().__init__()
        self.step = step
        self.scale = {"zero": 10, "low": 0, "high": 255, "dtype": torch.uint8, "size": 0.1} | scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        s = self.scale
        numbers = (s["size"], s["zero"], s["low"], s["high"], s["dtype"])
        return self.step(Q.dequantize_per_tensor(Q.quantize_per_tensor(x, *numbers), *numbers))


@pytest.mark.parametrize(
    ("net", "said"),
    [
        (Written(torch.sigmoid), r"sigmoid.*not known.*conv2d"),
        (Written(lambda x: F.max_pool2d(x, 3, 2, ceil_mode=True)), r"max_pool2d.*ceil_mode"),
        (Written(lambda x: torch.clamp(x, -1, 1)), r"clamp.*\(-1, 1\).*0 and 6"),
        (Written(lambda x: x + 1), r"add.*other=1.*two tensors"),
        (Written(lambda x: x.mean(1)), r"mean.*\[1\].*2 and 3"),
        (Written(torch.relu, high=127), r"quantize_per_tensor.*0 to 127.*all of torch\.uint8"),
        (Written(torch.relu, dtype=torch.int16, low=-99, high=99), r"torch\.int16"),
        (Written(torch.relu, size=0.0), r"quantize_per_tensor.*scale.*0"),
        (Written(torch.relu, zero=300), r"quantize_per_tensor.*zero_point.*300"),
        (Written(lambda x: F.conv2d(x, x[:1])), r"conv2d.*weight.*constant"),
    ],
    ids=["operator", "ceil", "clamp", "number", "mean", "range", "int16", "scale", "zero",
         "weight"],
)  # fmt: skip
def test_what_cannot_be_imported_is_named(net: nn.Module, said: str) -> None:
    program = torch.export.export(net.eval(), (torch.randn(1, 4, 8, 8),))
    with pytest.raises(FileError, match=said):
        from_pt2e(program)


def test_something_else_is_refused() -> None:
    with pytest.raises(InputTypeError, match=r"Linear.*ExportedProgram"):
        from_pt2e(nn.Linear(2, 2))  # type: ignore[arg-type]
