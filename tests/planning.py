# SPDX-License-Identifier: Apache-2.0
"""What the tests of planned memory share: networks on the engine, and a poisoned arena."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hetconv_kernels as hk
from hetconv_kernels import arena
from hetconv_kernels.backends import available_backends
from hetconv_kernels.graph.planned import PlannedNetwork, plan_memory

needs_engine = pytest.mark.skipif(
    "cpu" not in available_backends(), reason="the engine that plans is not built here"
)


@pytest.fixture(autouse=True)
def engine() -> Any:
    """All layers on the engine whose results are planned."""
    with hk.use_backend("cpu"):
        yield


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills the arena with NaN at the beginning of every call."""
    start = arena.Arena.start

    def start_with_nan(self: arena.Arena) -> None:
        start(self)
        for place in self._tensors:
            if place is not None and place.dtype.is_floating_point:
                place.fill_(torch.nan)

    monkeypatch.setattr(arena.Arena, "start", start_with_nan)


def optimized(model: nn.Module, x: Tensor) -> PlannedNetwork:
    fast = hk.optimize(model.eval(), x).model
    assert isinstance(fast, PlannedNetwork)
    return fast


def unplanned(fast: nn.Module) -> nn.Module:
    plain = copy.deepcopy(fast)
    assert plan_memory(plain, False)
    return plain


def arenas(fast: nn.Module) -> list[arena.Arena]:
    plans = fast.__dict__["_memory"]._plans.values()
    return [one for plan in plans for one in plan._idle]


def small(*layers: nn.Module) -> tuple[nn.Module, Tensor]:
    found = [nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), *layers]
    return nn.Sequential(*found), torch.randn(2, 4, 6, 6)


def large() -> tuple[PlannedNetwork, Tensor]:
    layers = [hk.nn.HetConv2d(32, 32, 3, padding=1, p=4) for _ in range(6)]
    x = torch.randn(1, 32, 160, 160).to(memory_format=torch.channels_last)
    return optimized(nn.Sequential(*layers), x), x
