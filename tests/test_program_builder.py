# SPDX-License-Identifier: Apache-2.0
"""What a program was made from: whatever changes after the recording shows in the next call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from planning import engine, needs_engine, optimized, poisoned, small, unplanned  # noqa: F401
from programs import program_of
from torch import nn

import hetconv_kernels as hk

pytestmark = [needs_engine, pytest.mark.usefixtures("poisoned")]
LAST, ROWS = torch.channels_last, torch.contiguous_format


def _layers(fast: nn.Module) -> list[Any]:
    return [m for m in fast.modules() if isinstance(m, hk.nn.FusedConv2d)]


def _swapped(fast: nn.Module) -> None:
    layer = _layers(fast)[0]
    layer.weight = layer.weight.flip(0)


def _data(fast: nn.Module) -> None:
    layer = _layers(fast)[0]
    layer.weight.data = layer.weight.data * 3


def _loaded(fast: nn.Module) -> None:
    state = {k: v * 2 if v.is_floating_point() else v for k, v in fast.state_dict().items()}
    fast.load_state_dict(state)


def _patched(fast: nn.Module) -> None:
    layer = _layers(fast)[1]
    layer.forward = lambda x: torch.zeros_like(x)


def _replaced(fast: Any) -> None:
    node = next(n for n in fast.graph.nodes if n.op == "call_module")
    parent, _, name = str(node.target).rpartition(".")
    owner = fast.get_submodule(parent)
    torch.manual_seed(9)
    owner._modules[name] = hk.nn.fuse(nn.Conv2d(4, 8, 3, padding=1)).eval()


CHANGES: dict[str, Callable[[Any], Any]] = {
    "written": lambda fast: _layers(fast)[0].weight.mul_(2),
    "shift written": lambda fast: _layers(fast)[1].shift.add_(1),
    "another tensor": _swapped,
    "data": _data,
    "loaded": _loaded,
    "activation": lambda fast: setattr(_layers(fast)[1], "act", "relu6"),
    "engine": lambda fast: setattr(_layers(fast)[1], "backend", "reference"),
    "forward": _patched,
    "module": _replaced,
    "dtype": lambda fast: fast.double(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_after_the_recording_shows_in_the_next_call(name: str) -> None:
    torch.manual_seed(0)
    fast = optimized(*small())
    plain = unplanned(fast)
    x = torch.randn(2, 4, 6, 6)
    with torch.no_grad():
        before = fast(x), fast(x)
        for one in (fast, plain):
            CHANGES[name](one)
        if name == "dtype":
            x = x.double()
        truth = plain(x)
        assert not torch.equal(before[1], truth.to(before[1].dtype)) or name == "engine"
        for _ in range(3):
            assert torch.equal(fast(x), truth)


def test_a_graph_that_was_changed_is_recorded_anew() -> None:
    fast = optimized(*small())
    x = torch.randn(2, 4, 6, 6)
    with torch.no_grad():
        first = fast(x), fast(x)
        (output,) = (n for n in fast.graph.nodes if n.op == "output")
        with fast.graph.inserting_before(output):
            negated = fast.graph.call_function(torch.neg, (output.args[0],))
        output.args = (negated,)
        fast.recompile()
        for _ in range(3):
            assert torch.equal(fast(x), -first[1])


def test_weights_written_before_every_call_end_the_recording_not_the_numbers() -> None:
    fast = optimized(*small())
    plain = unplanned(fast)
    x = torch.randn(2, 4, 6, 6)
    with torch.no_grad():
        for step in range(40):
            for one in (fast, plain):
                _layers(one)[0].weight.add_(0.01 * step)
            assert torch.equal(fast(x), plain(x))
    assert program_of(fast) is None
