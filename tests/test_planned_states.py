# SPDX-License-Identifier: Apache-2.0
"""Planned memory that is given back, switched off, copied, saved, compiled and exported."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from planning import arenas, engine, large, needs_engine, optimized, small  # noqa: F401

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
