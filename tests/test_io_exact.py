# SPDX-License-Identifier: Apache-2.0
"""A loaded network computes bit by bit what the saved one did: layouts and addresses come back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hetconv_kernels as hk
from hetconv_kernels import io
from hetconv_kernels.errors import FileError
from hetconv_kernels.file_tensors import laid_out

pytest.importorskip("safetensors", reason="the file's format")


class Small(nn.Module):
    """Depthwise, pointwise and linear layers, whose layouts is_contiguous does not tell."""

    def __init__(self) -> None:
        super().__init__()
        self.point = nn.Conv2d(3, 16, 1)
        self.depth = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.conv = nn.Conv2d(16, 33, 3, stride=2, padding=1)
        self.again = nn.Conv2d(33, 33, 3, padding=1)
        self.first, self.last = nn.Linear(33, 515), nn.Linear(515, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.depth(self.point(x))).relu()
        x = self.conv(x)
        x = (x + self.again(x)).relu()
        return self.last(self.first(x.mean((2, 3))).relu())


def channels_last(model: nn.Module) -> nn.Module:
    return model.to(memory_format=torch.channels_last)


def transposed(model: Small) -> nn.Module:
    for linear in (model.first, model.last):
        linear.weight = nn.Parameter(linear.weight.detach().T.contiguous().T)
    return model


def het(model: nn.Module) -> nn.Module:
    return hk.convert(model, hk.rules.het(p=4, skip_stem=False), inplace=False).model


def frozen(model: nn.Module) -> nn.Module:
    model = het(model)
    for layer in model.modules():
        if isinstance(layer, hk.nn.base.SupportLayer):
            layer.freeze()
    return model


def grouped(model: nn.Module) -> nn.Module:
    return hk.convert(model, hk.rules.grouped(), inplace=False).model


LAYOUTS: dict[str, Callable[[Any], nn.Module]] = {
    "contiguous": lambda model: model,
    "channels_last": channels_last,
    "transposed": transposed,
}
CHANGES: dict[str, Callable[[nn.Module, Tensor], nn.Module]] = {
    "as it is": lambda model, x: model,
    "het": lambda model, x: het(model),
    "frozen": lambda model, x: frozen(model),
    "grouped": lambda model, x: grouped(model),
    "optimized": lambda model, x: hk.optimize(het(model), x).model,
    "optimized dense": lambda model, x: hk.optimize(model, x).model,
}


def through_file(model: nn.Module, folder: Path, into: nn.Module | None = None) -> nn.Module:
    hk.save(model, folder / "network.safetensors")
    return hk.load(folder / "network.safetensors", into)


@pytest.mark.parametrize("given", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("change", CHANGES)
def test_loaded_equals_saved(change: str, layout: str, given: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 3, 17, 17).contiguous(memory_format=given)
    model = CHANGES[change](LAYOUTS[layout](Small().eval()), x)
    loaded = through_file(model, tmp_path)
    tensors = {**dict(loaded.named_parameters()), **dict(loaded.named_buffers())}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert tensors[name].stride() == tensor.stride(), name
        assert torch.equal(tensors[name], tensor)
    with torch.no_grad():
        expected, found = model(x), loaded(x)
    assert torch.equal(found, expected)
    assert found.stride() == expected.stride()


def test_loaded_into_a_network_of_another_layout_equals_saved(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 17, 17)
    model = channels_last(Small().eval())
    loaded = through_file(model, tmp_path, into=Small())
    assert torch.equal(loaded(x), model(x))
    assert loaded.point.weight.stride() == model.point.weight.stride()


def test_loaded_tensors_have_memory_of_their_own_at_aligned_addresses(tmp_path: Path) -> None:
    model = nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(8))).eval()
    loaded = through_file(model, tmp_path)
    own = [p.untyped_storage().data_ptr() for p in loaded.parameters()]
    assert len(set(own)) == len(own)
    assert all(p.data_ptr() % 64 == 0 for p in loaded.parameters())


@pytest.mark.parametrize(
    "strides",
    [
        [1, 1, 1, 1],
        [9, 9, 3, 10**12],
        [27, 9, 3],
        "all",
        [27, 9, 3, 1.0],
        [27, 9, 3, -1],
        [2**70, 9, 3, 1],
        None,
        7,
    ],
    ids=str,
)
def test_strides_that_are_none_are_a_damaged_file(strides: Any, tmp_path: Path) -> None:
    model, path = nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), tmp_path / "network.safetensors"
    hk.save(model, path)
    _, tensors = io._read(path, torch.device("cpu"))
    weight = tensors["0.weight"]
    if strides is None:  # an older file has none
        assert laid_out(weight, None, path).stride() == (27, 9, 3, 1)
        return
    with pytest.raises(FileError, match="are no strides of"):
        laid_out(weight, strides, path)
