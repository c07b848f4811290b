# SPDX-License-Identifier: Apache-2.0
"""What the tests of layers share: one layer of each kind, its dense twin, and the comparison."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import hetconv_kernels as hk
from hetconv_kernels.nn import GroupedConv2d, HetConv2d, SelfGroupConv2d, SupportConv2d

C, F = 12, 8
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def random_mask(kernel: int | tuple[int, int] = 3, density: float = 0.4) -> np.ndarray:
    """Draws an irregular mask in which one filter has no weight and one channel is never read."""
    kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
    mask = np.random.default_rng(1).random((F, C, *kernel)) < density
    mask[3], mask[:, 5] = False, False
    return mask


def self_grouped(kernel: int | tuple[int, int] = 3) -> hk.Support:
    """Groups of 5, 2 and 1 filters that overlap in channels; the last one reads none."""
    labels = np.array([0, 1, 0, 0, 1, 2, 0, 0])
    keep = np.zeros((3, C), bool)
    keep[0, 2:9], keep[1, [0, 4, 7, 11]] = True, True
    return hk.Support.self_grouped(labels, keep, kernel)


def _support(kernel: Any, **kw: Any) -> SupportConv2d:
    return SupportConv2d(C, F, kernel, support=hk.Support.from_mask(random_mask(kernel)), **kw)


def _selfgroup(kernel: Any, **kw: Any) -> SupportConv2d:
    return SelfGroupConv2d(C, F, kernel, support=self_grouped(kernel), **kw)


IRREGULAR = hk.Support.from_mask(random_mask())
NARROWER = IRREGULAR & hk.Support.het(C, F, 3, p=3)

# Each builds a layer of C channels and F filters from a kernel size and nn.Conv2d's keywords.
BUILDERS: dict[str, Callable[..., SupportConv2d]] = {
    "support": _support,
    "het": lambda kernel, **kw: HetConv2d(C, F, kernel, **kw),
    "het-uneven-interleaved": lambda kernel, **kw: HetConv2d(
        C, F, kernel, p=5, order="interleaved", **kw
    ),
    "selfgroup": _selfgroup,
    "grouped": lambda kernel, **kw: GroupedConv2d(C, F, kernel, groups=2, **kw),
}


def build(kind: str, kernel: int | tuple[int, int] = 3, **keywords: Any) -> SupportConv2d:
    """Builds the layer of a kind with ``nn.Conv2d``'s keywords."""
    return BUILDERS[kind](kernel, **keywords)


def dead(layer: SupportConv2d) -> Tensor:
    """Tells which entries of the layer's weight do not exist.  # bool, the weight's shape"""
    if isinstance(layer, GroupedConv2d):
        return torch.zeros_like(layer.weight, dtype=torch.bool)
    missing = torch.tensor(~layer.support.mask, device=layer.weight.device)
    return missing.view(layer.weight.shape)


def assert_projected(layer: SupportConv2d) -> None:
    """Finds a zero wherever no weight exists."""
    assert (layer.weight[dead(layer)] == 0).all()


def through_file(state: Any) -> Any:
    """Saves and loads as a checkpoint is."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def fill_dead(layer: SupportConv2d, value: float) -> None:
    """Writes a value into every entry that does not exist."""
    with torch.no_grad():
        layer.weight.masked_fill_(dead(layer), value)


def twin(layer: SupportConv2d, dtype: torch.dtype | None = None) -> nn.Conv2d:
    """Builds the ``nn.Conv2d`` that the layer has to equal, without asking the layer to."""
    conv = nn.Conv2d(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        layer.stride,
        layer.padding,
        layer.dilation,
        layer.groups,
        layer.bias is not None,
        layer.padding_mode,
    )
    weight = layer.weight.detach().clone().masked_fill_(dead(layer), 0)
    conv.weight = nn.Parameter(weight.to(dtype or weight.dtype))
    if layer.bias is not None:
        conv.bias = nn.Parameter(layer.bias.detach().clone().to(dtype or weight.dtype))
    return conv


def assert_as_good(name: str, ours: Tensor, theirs: Tensor, truth: Tensor) -> None:
    """Allows twice the error that PyTorch makes at the same dtype, and a few roundings."""
    assert ours.shape == theirs.shape, name
    assert ours.dtype == theirs.dtype, name
    assert torch.isfinite(ours).all(), name
    if not truth.numel():
        return
    floor = 4 * torch.finfo(ours.dtype).eps * truth.abs().max().item()
    error = (ours.double() - truth).abs().max().item()
    allowed = 2 * (theirs.double() - truth).abs().max().item() + floor
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def assert_equals_conv2d(layer: SupportConv2d, x: Tensor) -> None:
    """Compares output, layout and every gradient with those of ``nn.Conv2d``."""
    plain, exact = twin(layer), twin(layer, torch.float64)
    results = []
    for module, image in ((layer, x), (plain, x), (exact, x.double())):
        image = image.detach().requires_grad_()
        y = module(image)
        wanted = [image, module.weight, *([] if module.bias is None else [module.bias])]
        # The cotangent is the same for all three, whatever their dtype.
        g = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y)
        results.append((y, torch.autograd.grad(y, wanted, g)))
    (y, grads), (expected, plain_grads), (truth, true_grads) = results
    assert y.stride() == expected.stride()
    assert_as_good("y", y, expected, truth)
    names = ["x", "weight", "bias"][: len(grads)]
    for name, ours, theirs, true in zip(names, grads, plain_grads, true_grads, strict=True):
        if name == "weight":
            assert (ours[dead(layer)] == 0).all()
            theirs, true = (g.masked_fill(dead(layer), 0) for g in (theirs, true))
        assert_as_good(f"gradient of {name}", ours, theirs, true)


def image(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Draws an input, by default two images of C channels."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape or (2, C, 9, 7), generator=generator).to(dtype)
