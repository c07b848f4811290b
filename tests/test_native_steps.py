# SPDX-License-Identifier: Apache-2.0
"""Native steps between layers: the same bits as PyTorch's, special values too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F_
from planning import engine, needs_engine, optimized, poisoned, small, unplanned  # noqa: F401
from programs import assert_equal_calls, kinds
from torch import Tensor, nn

pytestmark = [needs_engine, pytest.mark.usefixtures("poisoned")]
LAST, ROWS = torch.channels_last, torch.contiguous_format


class Steps(nn.Module):
    """Two convolutions and a step between."""

    def __init__(self, step: Callable[..., Any]) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.last = nn.Conv2d(8, 4, 1)
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        return self.last(self.step(y, self.two(y)))


def concatenated(a: Tensor, b: Tensor) -> Tensor:
    both = torch.cat([a, b, a], 1)
    return both[:, 4:12] + both[:, 16:]


def in_place(a: Tensor, b: Tensor) -> Tensor:
    seen = torch.cat([a, b], 1)
    F_.relu(seen, inplace=True)
    return seen[:, 8:] - seen[:, :8]


STEPS: dict[str, tuple[Callable[..., Any], str]] = {
    "add": (lambda a, b: a * b + a, "mul"),
    "sub": (lambda a, b: a - b, "sub"),
    "leaky": (lambda a, b: F_.leaky_relu(a - b, 0.1), "leaky relu"),
    "relu6": (lambda a, b: F_.relu6(3 * (a - b)), "sub"),
    "relu": (lambda a, b: F_.relu(a - b) * b, "relu"),
    "clamp": (lambda a, b: F_.hardtanh(a - b, 0.0, 6.0) * b, "clamp"),
    "pool": (lambda a, b: F_.max_pool2d(a - b, 3, 2, 1), "max pool"),
    "concat": (concatenated, "concat"),
    "in place": (in_place, "relu"),
    "upsample": (lambda a, b: F_.interpolate(a - b, scale_factor=2), "upsample"),
    "sizes": (lambda a, b: F_.interpolate(a - b, size=(7, 11)), "upsample"),
    "exact": (lambda a, b: F_.interpolate(a - b, (5, 4), mode="nearest-exact"), "upsample"),
    "flatten": (lambda a, b: (a - b).flatten(1).view(-1, 8, 9, 6), "copy"),
    "clone": (lambda a, b: (a - b).clone(memory_format=ROWS), "copy"),
    "reshape": (lambda a, b: (a - b)[:, :, 1:, ::2].reshape(2, 12, 8, 2)[:, 2:10], "copy"),
    "pad": (lambda a, b: F_.pad(a - b, (1, 2, 0, 3)), "pad"),
    "pad channels": (lambda a, b: F_.pad((a - b)[:, :6, ::2, 1::2], (0, 0, 0, 0, 1, 1)), "pad"),
    "pad by a number": (lambda a, b: F_.pad(a - b, (2, 1), value=-1.5), "pad"),
    "crop": (lambda a, b: F_.pad(a - b, (-1, 1)), "call"),
    "reflect": (lambda a, b: F_.pad(a - b, (1, 1, 1, 1), mode="reflect"), "call"),
    "bilinear": (lambda a, b: F_.interpolate(a - b, scale_factor=2, mode="bilinear"), "call"),
    "mean": (lambda a, b: a * b.mean((2, 3), keepdim=True), "call"),
    "silu": (lambda a, b: F_.silu(a - b), "call"),
}


@pytest.mark.parametrize("special", [None, torch.nan, torch.inf])
@pytest.mark.parametrize("name", STEPS)
def test_a_step_between_layers_computes_what_torch_does(name: str, special: float | None) -> None:
    torch.manual_seed(1)
    step, kind = STEPS[name]
    x = torch.randn(2, 4, 9, 6).to(memory_format=LAST)
    fast = optimized(Steps(step), x)
    plain = unplanned(fast)
    if special is not None:
        x[0, 1, 2, 3] = special
    assert_equal_calls(fast, plain, x)
    assert kind in kinds(fast)


def test_a_cast_to_bfloat16_and_back_is_native() -> None:
    x = torch.randn(2, 4, 9, 6).to(memory_format=LAST)
    fast = optimized(Steps(lambda a, b: a - b), x)
    node = next(n for n in fast.graph.nodes if n.name == "sub")
    with fast.graph.inserting_after(node):
        narrow = fast.graph.call_method("bfloat16", (node,))
    with fast.graph.inserting_after(narrow):
        wide = fast.graph.call_method("to", (narrow, torch.float32))
    node.replace_all_uses_with(wide, delete_user_cb=lambda user: user is not narrow)
    fast.recompile()
    plain = unplanned(fast)
    for special in (0.0, torch.nan, torch.inf, -torch.inf, 1e-40, 3.4e38):
        x[0, 1, 2, 3] = special
        assert_equal_calls(fast, plain, x)
    assert kinds(fast).count("cast") == 2


class Turns(nn.Module):
    """An image in another memory format, and back in the first."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layer = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        last = x.clone(memory_format=LAST)
        return self.layer(last), last.clone(memory_format=ROWS), last.clone(memory_format=LAST)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 16, 17, 130])
def test_images_are_copied_from_one_memory_format_to_another(
    channels: int, dtype: torch.dtype
) -> None:
    x = torch.randn(2, channels, 7, 9).to(dtype)
    fast = optimized(Turns(channels).to(dtype), x)
    for layout in (ROWS, LAST):
        given = x.to(memory_format=layout)
        assert_equal_calls(fast, unplanned(fast), given)
        _, back, again = fast(given)
        assert torch.equal(back, x)
        assert torch.equal(again, x)
        assert back.is_contiguous()
        assert again.is_contiguous(memory_format=LAST)
    assert "copy" in kinds(fast)
