# SPDX-License-Identifier: Apache-2.0
"""optimize with a 16-bit dtype: what is narrow, what stays wide, and how far the outputs are."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from networks import interleaved, kinds, network
from torch import nn

import hetconv_kernels as hk
from hetconv_kernels.errors import ArgumentError, FileError, VerificationError
from hetconv_kernels.nn import FusedConv2d, SupportConv2d

NARROW = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("name", ["resnet20", "densenet", "branches"])
def test_outputs_err_by_no_more_than_the_rounding_of_the_dtype(
    name: str, dtype: torch.dtype
) -> None:
    model, x = network(name)
    model = interleaved(model)
    report = hk.optimize(model, x, dtype=dtype)
    with torch.no_grad():
        truth = copy.deepcopy(model).double()(x.double())
        own = (copy.deepcopy(model).to(dtype)(x.to(dtype)) - truth).abs().max()
        y = report.model(x)
    assert y.dtype == x.dtype
    assert (y - truth).abs().max() <= 2 * own + 4 * torch.finfo(dtype).eps * truth.abs().max()
    assert f"weights and activations in {str(dtype)[6:]}" in str(report)


def test_activations_stay_narrow_from_layer_to_layer() -> None:
    model, x = network("resnet20")
    fast, seen = hk.optimize(interleaved(model), x, dtype=torch.bfloat16).model, []
    for module in kinds(fast, FusedConv2d):
        module.register_forward_hook(
            lambda _module, inputs, output: seen.extend((inputs[0].dtype, output.dtype))
        )
    with torch.no_grad():
        fast(x)
    assert len(seen) >= 2 * 19
    assert set(seen) == {torch.bfloat16}


@pytest.mark.parametrize("dtype", NARROW)
def test_weights_are_narrow_and_what_is_added_to_sums_is_not(dtype: torch.dtype) -> None:
    model, x = network("densenet")
    fast = hk.optimize(model, x, dtype=dtype).model
    assert {m.weight.dtype for m in kinds(fast, FusedConv2d)} == {dtype}
    assert {m.shift.dtype for m in kinds(fast, FusedConv2d)} == {torch.float32}
    alone = kinds(fast, nn.BatchNorm2d)
    assert alone
    assert {t.dtype for m in alone for t in (m.weight, m.running_var)} == {torch.float32}


@pytest.mark.parametrize("given", [torch.bfloat16, torch.float32, torch.float64])
def test_outputs_have_the_dtype_and_memory_format_of_the_inputs(given: torch.dtype) -> None:
    model, x = network("resnet20")
    fast = hk.optimize(model, x, dtype=torch.bfloat16).model
    with torch.no_grad():
        assert fast(x.to(given)).dtype == given
    conv = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU()).eval()
    for layout in (torch.channels_last, torch.contiguous_format):
        image = torch.randn(2, 4, 6, 6).to(given).contiguous(memory_format=layout)
        fast = hk.optimize(conv, image.float(), dtype=torch.bfloat16).model
        with torch.no_grad():
            y = fast(image)
        assert y.dtype == given
        assert y.is_contiguous(memory_format=layout)


def test_what_cannot_be_traced_is_narrow_too() -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
            self.tail = hk.nn.HetConv2d(8, 8, 3, padding=1, p=2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.body(x)
            return self.tail(y) if y.sum() > 0 else y

    torch.manual_seed(0)
    report = hk.optimize(Asks().eval(), torch.randn(2, 8, 5, 5), dtype=torch.bfloat16)
    assert report.frozen == ("tail",)
    assert report.model.body.tail.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", NARROW)
def test_it_can_be_exported_and_reloaded(dtype: torch.dtype) -> None:
    model, x = network("branches")
    fast = hk.optimize(interleaved(model), x, dtype=dtype).model
    program = torch.export.export(fast, (x,))
    other = hk.optimize(interleaved(model), x, dtype=dtype).model
    for tensor in other.state_dict().values():
        if isinstance(tensor, torch.Tensor):
            tensor.zero_()
    other.load_state_dict(fast.state_dict())
    with torch.no_grad():
        assert torch.equal(program.module()(x), fast(x))
        assert torch.equal(other(x), fast(x))


# Of PyTorch's own operators inductor would make C++ for many seconds; "dncnn" has hardly any.
@pytest.mark.parametrize(
    ("dtype", "backend", "name"),
    [*((dtype, "aot_eager", "branches") for dtype in NARROW), (NARROW[0], "inductor", "dncnn")],
)
def test_it_compiles_into_one_graph(dtype: torch.dtype, backend: str, name: str) -> None:
    model, x = network(name)
    fast = hk.optimize(interleaved(model), x, dtype=dtype).model
    torch._dynamo.reset()
    compiled = torch.compile(fast, backend=backend, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), fast(x), rtol=2 * torch.finfo(dtype).eps, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int8, "bfloat16"])
def test_another_dtype_is_refused(dtype: object) -> None:
    model, x = network("branches")
    with pytest.raises(ArgumentError, match=r"dtype: received .*bfloat16 or torch\.float16"):
        hk.optimize(model, x, dtype=dtype)


def test_a_network_that_overflows_float16_is_refused() -> None:
    conv = nn.Conv2d(4, 4, 1)
    with torch.no_grad():
        conv.weight.fill_(1e4)
    model, x = nn.Sequential(conv, nn.Conv2d(4, 4, 1)).eval(), torch.full((1, 4, 2, 2), 10.0)
    with pytest.raises(VerificationError):
        hk.optimize(model, x, dtype=torch.float16)
    hk.optimize(model, x, dtype=torch.bfloat16)


def test_autocast_keeps_activations_narrow_from_layer_to_layer() -> None:
    model, x = network("resnet20")
    model, seen = interleaved(model), []
    layers = [module for module in model.modules() if isinstance(module, SupportConv2d)]
    for module in layers:
        module.register_forward_hook(
            lambda _module, inputs, output: seen.append((inputs[0].dtype, output.dtype))
        )
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        model(x)
    narrow = (torch.bfloat16, torch.bfloat16)
    assert len(layers) > 8
    assert set(seen) <= {narrow, (torch.float32, torch.bfloat16)}
    assert seen.count(narrow) >= len(layers) - 1  # the first may be given the image itself


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("name", ["resnet20", "branches"])
def test_a_saved_network_is_narrow_again(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, x = network(name)
    fast = hk.optimize(interleaved(model), x, dtype=dtype).model
    hk.save(fast, tmp_path / "n.safetensors")
    loaded = hk.load(tmp_path / "n.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), fast(x), rtol=0, atol=0)
        assert loaded(x.double()).dtype == torch.float64
    assert {n: t.dtype for n, t in loaded.state_dict().items()} == {
        n: t.dtype for n, t in fast.state_dict().items()
    }
    assert not any(module.training for module in loaded.modules())


def test_a_narrow_network_is_loaded_into_another(tmp_path: Path) -> None:
    model, x = network("resnet20")
    fast = hk.optimize(interleaved(model), x, dtype=torch.bfloat16).model
    other = copy.deepcopy(fast)
    for tensor in other.state_dict().values():
        if tensor.is_floating_point():
            tensor.zero_()
    hk.save(fast, tmp_path / "n.safetensors")
    assert hk.load(tmp_path / "n.safetensors", into=other) is other
    with torch.no_grad():
        torch.testing.assert_close(other(x), fast(x), rtol=0, atol=0)


def test_a_file_of_no_16_bit_type_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = network("resnet20")
    fast = hk.optimize(interleaved(model), x, dtype=torch.bfloat16).model
    monkeypatch.setattr(fast, "dtype", torch.int8)
    hk.save(fast, tmp_path / "n.safetensors")
    with pytest.raises(FileError, match="'int8' is no 16-bit type"):
        hk.load(tmp_path / "n.safetensors")
