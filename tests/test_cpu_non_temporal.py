# SPDX-License-Identifier: Apache-2.0
"""Outputs that the last-level cache cannot hold are written past it: the same, wherever they lie.

The size from which on that is done is set to nothing here, so that small ones are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from winograd_calls import call

import hetconv_kernels as hk

if "cpu" in hk.available_backends():
    from hetconv_kernels import _cpu

    ISAS = _cpu.isas()
else:
    ISAS = []

pytestmark = pytest.mark.skipif(not ISAS, reason="the native engine is not built here")

NEVER = 1 << 60
FORMS = ("filters", "pixels", "winograd 2x2", "winograd 4x4")
SUPPORTS = {
    "het of 64": hk.Support.het(64, 64, 3, p=4),
    "het of 32, 48 filters": hk.Support.het(32, 48, 3, p=2),
    "dense, 40 filters": hk.Support.dense(16, 40, 3),  # half a vector at the end
    "interleaved": hk.Support.het(32, 64, 3, p=4, order="interleaved"),
}


@pytest.fixture(autouse=True)
def _set_back() -> Iterator[None]:
    before = _cpu.non_temporal_bytes()
    yield
    _cpu.set_non_temporal_bytes(before)


def channels_last(*shape: int) -> Tensor:
    return torch.randn(*shape).contiguous(memory_format=torch.channels_last)


def placed(shape: tuple[int, ...], first: int, pixel: int) -> tuple[Tensor, Tensor]:
    """Returns memory full of NaN, and an output in it.

    Args:
        shape: of the output.  # [N, F, H, W]
        first: the element of memory that it begins at.
        pixel: from pixel to pixel.
    """
    n, _, height, width = shape
    memory = torch.full((64 + n * height * width * pixel + 64,), float("nan"))
    start = (-memory.data_ptr() // 4) % 16 + first
    strides = (height * width * pixel, 1, width * pixel, pixel)
    return memory, memory[start:].as_strided(shape, strides)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", SUPPORTS)
def test_a_large_output_is_that_of_a_small_one(name: str, form: str, isa: str) -> None:
    support = SUPPORTS[name]
    f = support.filters
    x, w = channels_last(2, support.channels, 9, 13), torch.randn(support.shape)
    given: dict[str, Any] = {"shift": torch.randn(f), "act": "relu", "form": form, "isa": isa}
    for residual in (None, channels_last(2, f, 9, 13)):
        _cpu.set_non_temporal_bytes(NEVER)
        expected = call(support, x, w, residual=residual, **given)
        assert expected is not None
        _cpu.set_non_temporal_bytes(0)
        # As a tensor lies; beside others' channels; at no cache line's beginning; and pixels that
        # do not all begin at one.
        for first, pixel in ((0, f), (16, f + 32), (1, f), (0, f + 3)):
            memory, out = placed((2, f, 9, 13), first, pixel)
            call(support, x, w, residual=residual, out=out, **given)
            assert torch.equal(out, expected)
            out.fill_(float("nan"))
            assert memory.isnan().all()  # nothing was written beside it


def test_large_is_what_the_last_cache_does_not_hold() -> None:
    assert 1 << 20 <= _cpu.non_temporal_bytes() < 1 << 32


def test_a_network_reads_what_its_layers_wrote_past_the_caches() -> None:
    """In several threads: each must see the others' stores before it reads them."""
    model = hk.convert(hk.models.dncnn(depth=6, channels=64), hk.rules.het(p=4)).model.eval()
    x = torch.rand(2, 1, 40, 56)
    with torch.no_grad():
        fast = hk.optimize(model, x).model
        _cpu.set_non_temporal_bytes(NEVER)
        expected = [fast(x) for _ in range(3)][-1]
        _cpu.set_non_temporal_bytes(0)
        for _ in range(50):
            assert torch.equal(fast(x), expected)
