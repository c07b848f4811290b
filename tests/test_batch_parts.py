# SPDX-License-Identifier: Apache-2.0
"""Batches that are taken through a network in parts: the same bits, in less memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F_
from torch import Tensor, nn

import hetconv_kernels as hk
from hetconv_kernels.graph.batch_parts import images_of_part

pytestmark = pytest.mark.skipif(
    "cpu" not in hk.available_backends(), reason="the native engine is not built here"
)
if "cpu" in hk.available_backends():
    from hetconv_kernels import _cpu

LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


class Branches(nn.Module):
    """What a program has native steps for, all of it on each image by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = hk.nn.HetConv2d(8, 16, 3, p=4, padding=1)
        self.narrow = hk.nn.HetConv2d(16, 16, 1, p=4)
        self.strided = hk.nn.HetConv2d(16, 16, 3, p=4, padding=1, stride=2)
        self.last = hk.nn.HetConv2d(32, 24, 3, p=4, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F_.max_pool2d(torch.relu(self.stem(x)), 2)
        x = torch.relu(x + self.narrow(x))
        y = F_.interpolate(self.strided(x), scale_factor=2)
        x = torch.cat([x, y * x], 1)
        return self.last(F_.relu6(x))


class Mirrored(nn.Module):
    """The same, with a step that brings images together."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Branches()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.inner(x.flip(0))


class Pooled(nn.Module):
    """A network that ends in one pixel of each image."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Branches()
        self.head = hk.nn.HetConv2d(24, 40, 1, p=4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(F_.adaptive_avg_pool2d(self.inner(x), 1))
        return y


@contextmanager
def cache_of(size: int) -> Iterator[None]:
    """Has programs believe in a last-level cache of so many bytes."""
    before = _cpu.non_temporal_bytes()
    _cpu.set_non_temporal_bytes(size)
    try:
        yield
    finally:
        _cpu.set_non_temporal_bytes(before)


def optimized(model: nn.Module, x: Tensor, dtype: torch.dtype | None = None) -> nn.Module:
    network: nn.Module = hk.optimize(model.eval(), x, dtype=dtype).model
    return network


def by_layer(network: nn.Module, x: Tensor) -> Tensor:
    hk.plan_memory(network, False)
    with torch.no_grad():
        y: Tensor = network(x)
    hk.plan_memory(network, True)
    return y


def steadily(network: nn.Module, x: Tensor) -> tuple[Tensor, int]:
    """Returns what a steady call gives, and the bytes of its arena."""
    with torch.no_grad():
        for _ in range(2):
            network(x)
        y = network(x)
    return y, hk.release_memory(network)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_parts_give_the_bits_of_the_layers_one_by_one(
    dtype: torch.dtype | None, layout: str, threads: int
) -> None:
    torch.set_num_threads(threads)
    x = torch.randn(8, 8, 20, 24).contiguous(memory_format=LAYOUTS[layout])
    network = optimized(Branches(), x, dtype)
    expected = by_layer(network, x)
    whole, bytes_of_all = steadily(network, x)
    hk.plan_memory(network)  # forgets the program
    with cache_of(bytes_of_all // 2):
        y, bytes_of_parts = steadily(network, x)
    assert torch.equal(whole, expected)
    assert torch.equal(y, expected)
    assert y.stride() == expected.stride()
    assert bytes_of_parts <= bytes_of_all // 2


def test_a_batch_may_be_a_part_of_something_larger() -> None:
    torch.set_num_threads(2)
    images = torch.randn(17, 8, 20, 24).contiguous(memory_format=torch.channels_last)
    network = optimized(Branches(), images[:8])
    _, bytes_of_all = steadily(network, images[:8])
    for x in (images[8:16], images[::2][:8], images[1:].flip(0)[:8]):
        hk.plan_memory(network)
        expected = by_layer(network, x)
        with cache_of(bytes_of_all // 2):
            y, bytes_of_parts = steadily(network, x)
        assert torch.equal(y, expected)
        assert bytes_of_parts <= bytes_of_all // 2


def test_a_network_that_ends_in_one_pixel() -> None:
    torch.set_num_threads(2)
    x = torch.randn(8, 8, 20, 24).contiguous(memory_format=torch.channels_last)
    network = optimized(Pooled(), x)
    with hk.use_backend("cpu"):  # so small a layer would be PyTorch's
        expected = by_layer(network, x)
        _, bytes_of_all = steadily(network, x)
        hk.plan_memory(network)
        with cache_of(bytes_of_all // 2):
            y, bytes_of_parts = steadily(network, x)
    assert torch.equal(y, expected)
    assert bytes_of_parts <= bytes_of_all // 2


@pytest.mark.parametrize("batch", [7, 8])
def test_steps_that_bring_images_together_have_the_whole_batch(batch: int) -> None:
    torch.set_num_threads(2)
    x = torch.randn(batch, 8, 20, 24).contiguous(memory_format=torch.channels_last)
    network = optimized(Mirrored(), x)
    expected = by_layer(network, x)
    with cache_of(1 << 10):
        y, _ = steadily(network, x)
    assert torch.equal(y, expected)


def test_parts_are_as_many_images_as_fit_the_cache() -> None:
    assert images_of_part(8, 2, 8 * 7, 32) == 2
    assert images_of_part(8, 2, 8 * 7, 28) == 2
    assert images_of_part(8, 2, 8 * 7, 27) == 1
    assert images_of_part(12, 2, 12 * 4, 24) == 3
    assert images_of_part(8, 1, 8 * 7, 32) == 4
    assert images_of_part(8, 2, 8 * 4, 32) is None  # fits as it is
    assert images_of_part(8, 2, 8 * 20, 32) is None  # not even one image for each thread does
    assert images_of_part(7, 2, 7 * 7, 32) is None  # one thread would have one more
