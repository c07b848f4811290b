# SPDX-License-Identifier: Apache-2.0
"""Planned memory that is given back, switched off, copied, saved, compiled and exported."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from planning import arenas, engine, large, needs_engine, optimized, small  # noqa: F401
from torch import Tensor, nn

import hetconv_kernels as hk
from hetconv_kernels import io
from hetconv_kernels.graph.planned import plan_memory, release_memory

pytestmark = needs_engine


def test_memory_is_given_back_on_request_and_taken_again() -> None:
    fast, x = large()
    with torch.no_grad():
        first = fast(x), fast(x)
        assert release_memory(fast) == 2 * x.numel() * 4
        assert release_memory(fast) == 0
        assert torch.equal(fast(x), first[1])
    assert len(arenas(fast)) == 1


class Residual(nn.Module):
    """Two layers and a sum, a layer of stride 2, an average and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.last = nn.Conv2d(4, 16, 3, padding=1), nn.Conv2d(16, 32, 3, 2, 1)
        self.a, self.b = (nn.Conv2d(16, 16, 3, padding=1) for _ in "ab")
        self.linear = nn.Linear(32, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.b(torch.relu(self.a(x))) + x)
        return self.linear(torch.relu(self.last(x)).mean((2, 3)))


def test_the_arena_in_8_bits_is_a_quarter_and_in_bfloat16_a_half() -> None:
    torch.manual_seed(0)
    network = hk.convert(Residual().eval(), hk.rules.het(4)).model
    x = torch.randn(2, 4, 32, 32).to(memory_format=torch.channels_last)
    with torch.no_grad(), hk.use_backend("cpu"):
        made = [
            hk.optimize(network, x).model,
            hk.optimize(network, x, dtype=torch.bfloat16).model,
            hk.quantize(network, [x], measure=False).model,
        ]
        sizes = []
        for each in made:
            each(x), each(x)
            sizes.append(release_memory(each))
    # Three activations of 16 channels are alive at the second layer of the block.
    assert sizes == [4 * sizes[2], 2 * sizes[2], 3 * 2 * 16 * 32 * 32]


def test_planning_can_be_switched_off_and_on() -> None:
    fast, x = large()
    assert plan_memory(fast, False) == 1
    with torch.no_grad():
        fast(x), fast(x)
        assert release_memory(fast) == 0
        assert plan_memory(fast) == 1
        fast(x), fast(x)
    assert len(arenas(fast)) == 1


def test_a_copy_or_an_unpickled_network_has_no_part_in_the_arena() -> None:
    fast, x = large()
    with torch.no_grad():
        truth = fast(x)
        fast(x)
        for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
            assert other is not fast
            assert torch.equal(other(x), truth)
            assert torch.equal(other(x), truth)


def test_a_saved_network_computes_the_same(tmp_path: Any) -> None:
    pytest.importorskip("safetensors")
    fast, x = large()
    io.save(fast, tmp_path / "network.safetensors")
    loaded = io.load(tmp_path / "network.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), fast(x))


def test_compiled_and_exported_networks_take_no_place_in_the_arena() -> None:
    model, x = small()
    fast = optimized(model, x)
    with torch.no_grad():
        truth = fast(x)
        fast(x)
        compiled = torch.compile(fast, backend="eager", fullgraph=True)
        exported = torch.export.export(fast, (x,)).module()
        for form in (compiled, exported):
            first, second = form(x), form(2 * x)
            torch.testing.assert_close(first, truth)
            assert not torch.equal(first, second)
    assert len(arenas(fast)) == 1
