# SPDX-License-Identifier: Apache-2.0
"""hooks: what layers are called with is seen as it was, and nothing stays on them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hetconv_kernels.graph.hooks import LayerCall, calls_of, hooked, without_values


class Twice(nn.Module):
    """Calls one part twice, in place in between, and another with a keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.scale, self.unused = nn.Conv2d(3, 3, 1), Scale(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        x.zero_()
        return self.scale(self.conv(y), by=2.0)


class Scale(nn.Module):
    def forward(self, x: Tensor, by: float) -> Tensor:
        return x * by


def image() -> Tensor:
    return torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)


def no_hooks(model: nn.Module) -> bool:
    return not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_calls_are_listed_in_their_order_as_they_were() -> None:
    model, x = Twice(), image()
    before = x.clone()
    with torch.no_grad():
        calls = calls_of(dict(model.named_children()), lambda: model(x))
    assert [len(calls[name]) for name in ("conv", "scale", "unused")] == [2, 1, 0]
    first, second = (call.arguments[0] for call in calls["conv"])
    assert torch.equal(first, before), "the network has written into its input since"
    assert first.stride() == before.stride()
    assert torch.equal(second, model.conv(before))
    assert calls["scale"][0].keywords == {"by": 2.0}
    assert no_hooks(model)


def test_what_is_kept_of_tensors_can_be_their_kind_alone() -> None:
    model, x = Twice(), image().double()
    model.double()
    calls = calls_of({0: model.conv}, lambda: model(x), without_values)
    kept = calls[0][0].arguments[0]
    assert (kept.shape, kept.stride(), kept.dtype) == (x.shape, x.stride(), x.dtype)
    assert kept.data_ptr() != x.data_ptr()


def test_before_and_after_are_the_innermost_hooks_of_a_module() -> None:
    model, log = Twice(), []
    model.conv.register_forward_pre_hook(lambda *_: log.append("theirs before"))
    model.conv.register_forward_hook(lambda *_: log.append("theirs after"))
    seen: list[Any] = []

    def before(key: str, call: LayerCall) -> None:
        log.append(f"{key} before")

    def after(key: str, call: LayerCall, output: Any) -> None:
        log.append(f"{key} after")
        seen.append((call.arguments[0].shape, output.shape))

    with hooked({"conv": model.conv}, before, after):
        model(image())
    assert log == 2 * ["theirs before", "conv before", "conv after", "theirs after"]
    assert seen == 2 * [((2, 3, 4, 5), (2, 3, 4, 5))]


@pytest.mark.parametrize("always", [False, True])
def test_nothing_is_left_on_a_module_that_raises(always: bool) -> None:
    model, outputs = Twice(), []
    with (
        pytest.raises(RuntimeError),
        hooked({0: model.conv}, lambda *_: None, lambda *a: outputs.append(a[2]), always=always),
    ):
        model(torch.randn(2, 4, 4, 5))
    assert outputs == ([None] if always else [])
    assert no_hooks(model)
