# SPDX-License-Identifier: Apache-2.0
"""Saving programs: what goes into a file, what is refused, and what the refusal says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F_
from deployed import NETWORKS, sealed, small_chain
from networks import network
from planning import needs_engine
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import hetconv_kernels as hk
from hetconv_kernels.errors import (
    ArgumentError,
    BackendError,
    FileError,
    HetconvError,
    InputTypeError,
    TraceError,
)

pytestmark = needs_engine
LAST = torch.channels_last


class Ends(nn.Module):
    """A convolution and what is returned of it."""

    def __init__(self, end: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.end = nn.Conv2d(3, 8, 3, padding=1), end

    def forward(self, x: Tensor) -> Any:
        return self.end(self.conv(x), x)


def image(channels: int = 3) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(2, channels, 8, 6)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_file_computes_what_the_network_of_the_result_does(name: str, tmp_path: Path) -> None:
    from hetconv_kernels import _cpu

    model, x = NETWORKS[name]()
    inputs = x if isinstance(x, tuple) else (x,)
    saved = hk.export.program(model, x, tmp_path / "network.hc")
    program = _cpu.SavedProgram(saved.path.read_bytes())
    for factor in (1.0, -0.5, 3.0):
        given = [x * factor for x in inputs]
        with torch.no_grad():
            expected = pytree.tree_leaves(saved.network(*given))
            before = pytree.tree_leaves(model(*given))
        found = [torch.full_like(y, torch.nan) for y in expected]
        program.run([x.data_ptr() for x in given], [y.data_ptr() for y in found], 1)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        for a, b in zip(expected, before, strict=True):
            assert a.shape == b.shape
            assert a.dtype == b.dtype
            # A step of 8 bits, or a rounding to bfloat16, of numbers of that size.
            narrow = "int8" in name or "bf16" in name
            torch.testing.assert_close(
                a, b, rtol=0, atol=(0.06 if narrow else 1e-5) * b.abs().max()
            )
    assert saved.bytes == saved.path.stat().st_size
    assert (saved.match is None) == ("int8" in name)


def test_the_report_says_what_was_saved(tmp_path: Path) -> None:
    model, x = NETWORKS["resnet18"]()
    said = str(hk.export.program(model, x, tmp_path / "network.hc"))
    assert "21 conv" in said
    assert "1 average pool" in said
    assert "outputs compared" in said
    assert "avgpool is an average pooling of the engine" in said
    assert "x is brought into channels_last" in said


def test_a_file_holds_the_live_weights_and_little_else(tmp_path: Path) -> None:
    layer = hk.nn.HetConv2d(128, 128, 3, padding=1, p=8).eval()
    saved = hk.export.program(layer, image(128), tmp_path / "network.hc")
    live, bits = layer.support.live * 4, 128 * 128 * 9 // 8
    assert live + bits < saved.bytes < live + bits + 4096
    again = hk.export.program(layer, image(128), tmp_path / "again.hc")
    assert again.path.read_bytes() == saved.path.read_bytes()


def test_an_engine_that_the_user_forced_on_a_layer_gives_way(tmp_path: Path) -> None:
    layers = [hk.nn.HetConv2d(8, 8, 3, padding=1, p=2, backend="vendor"), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(384, 4)).eval()
    saved = hk.export.program(model, image(8).to(memory_format=LAST), tmp_path / "network.hc")
    assert saved.steps.count("conv") == 2
    assert layers[0].backend == "vendor"


FOREIGN: dict[str, tuple[Callable[[Tensor, Tensor], Any], str]] = {
    "softmax": (lambda y, x: torch.softmax(y, 1), "softmax"),
    "sigmoid": (lambda y, x: torch.sigmoid(y) * y, "sigmoid"),
    "bilinear": (lambda y, x: F_.interpolate(y, scale_factor=2.0, mode="bilinear"), "interpolate"),
    "broadcast": (lambda y, x: y * y.mean((2, 3), keepdim=True), "mul"),
    "number": (lambda y, x: y * 2, "mul"),
    "double": (lambda y, x: y.double(), "double"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_step_that_only_pytorch_has_is_named(name: str, tmp_path: Path) -> None:
    end, step = FOREIGN[name]
    with pytest.raises(BackendError) as error:
        hk.export.program(Ends(end).eval(), image(), tmp_path / "network.hc")
    assert step in str(error.value)
    assert "only PyTorch computes" in str(error.value)
    assert "to_onnx" in str(error.value)
    assert not [*tmp_path.iterdir()]


def test_a_normalisation_that_stays_one_is_named(tmp_path: Path) -> None:
    model, x = network("densenet", share=0.0)
    with pytest.raises(BackendError, match=r"\(BatchNorm2d\).* and \d+ more, which only PyTorch"):
        hk.export.program(model, x, tmp_path / "network.hc")


OUTPUTS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "the input": lambda y, x: (y, x),
    "twice": lambda y, x: (y, y),
    "a part": lambda y, x: y[:, :, 1:],
    "a number": lambda y, x: (y, 3),
    "two views": lambda y, x: (y, y.flatten(2)),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_an_output_that_is_no_tensor_of_its_own_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "network.hc"
    with pytest.raises(BackendError, match=r"output \d of a program: .*Return whole tensors"):
        hk.export.program(Ends(OUTPUTS[name]).eval(), image().to(memory_format=LAST), path)
    assert not [*tmp_path.iterdir()]


def test_a_view_of_a_whole_result_is_an_output(tmp_path: Path) -> None:
    model = Ends(lambda y, x: {"flat": F_.relu(y).mean((2, 3)).flatten(1), "whole": y + y})
    saved = hk.export.program(model.eval(), image(), tmp_path / "network.hc")
    assert saved.path.exists()
    assert "average pool" in saved.steps


def test_what_is_no_network_to_be_saved_is_said(tmp_path: Path) -> None:
    path, model = tmp_path / "network.hc", small_chain()[0]
    with pytest.raises(ArgumentError, match="evaluation mode"):
        hk.export.program(small_chain()[0].train(), image(), path)
    with pytest.raises(InputTypeError, match=r"example\[1\]: received int"):
        hk.export.program(model, (image(), 3), path)
    with pytest.raises(InputTypeError):
        hk.export.program(nn.Identity, image(), path)  # type: ignore[arg-type]
    with pytest.raises(HetconvError, match="cannot be written"):
        hk.export.program(model, image(), tmp_path / "nowhere" / "network.hc")
    with pytest.raises(BackendError, match="none"):
        hk.export.program(nn.Identity().eval(), image().to(memory_format=LAST), path)
    assert not path.exists()


def test_a_network_that_cannot_be_traced_is_said(tmp_path: Path) -> None:
    def branch(y: Tensor, x: Tensor) -> Tensor:
        return y if float(x.sum()) > 0 else -y

    with pytest.raises(TraceError, match="traced as a whole"):
        hk.export.program(Ends(branch).eval(), image(), tmp_path / "network.hc")


def test_a_damaged_file_is_no_program(tmp_path: Path) -> None:
    from hetconv_kernels import _cpu

    saved = hk.export.program(*small_chain(), tmp_path / "network.hc")
    file = bytearray(saved.path.read_bytes())
    _cpu.SavedProgram(sealed(bytes(file)))
    file[100] ^= 1
    with pytest.raises(FileError, match="not those that were saved"):
        _cpu.SavedProgram(bytes(file))
