# SPDX-License-Identifier: Apache-2.0
"""computed_weights: convolutions that compute their weight at each call become plain ones."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .copying import copied
from .plain import Answer, Keep, Rule
from .trace import FAILURES

_ARGUMENTS = inspect.Signature(
    [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default)
        for name, default in (
            ("input", None), ("weight", None), ("bias", None), ("stride", 1), ("padding", 0),
            ("dilation", 1), ("groups", 1),
        )
    ]
)  # fmt: skip


def computed_weights() -> Rule:
    """Makes subclasses of ``nn.Conv2d`` whose weight is computed at each call plain ones.

    Such are the standardised weights of timm's ``StdConv2d`` and ``ScaledStdConv2d``, which BiT and
    NFNet have. The plain convolution holds the weight as it is computed now, and gives the same;
    trained on, its weight is standardised no more. Other rules and compressors can take it then.
    Kept: subclasses whose forward is something else than one convolution of its input, as where
    padding depends on the size of the image.
    """

    def rule(name: str, module: nn.Module) -> Answer:
        if not isinstance(module, nn.Conv2d) or type(module) is nn.Conv2d:
            return None
        try:
            return _plain_twin(module)
        except FAILURES as error:
            return Keep(f"its forward cannot be watched ({error})")

    return rule


class _Watch(TorchFunctionMode):
    """Notes every call of a convolution, and what it gave."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[dict[str, Any], Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.conv2d:
            bound = _ARGUMENTS.bind(*args, **(kwargs or {}))
            bound.apply_defaults()
            self.calls.append((bound.arguments, result))
        return result


@torch.no_grad()
def _plain_twin(module: nn.Conv2d) -> Answer:
    own = copied(module).eval()
    images = [_noise(module, more) for more in (1, 4)]
    with _Watch() as watch:
        output = own(images[0])
    if len(watch.calls) != 1 or watch.calls[0][1] is not output:
        return Keep(f"a {type(module).__name__} is more than one convolution")
    call = watch.calls[0][0]
    if call["input"] is not images[0]:
        return Keep(f"a {type(module).__name__} changes its input before the convolution")
    weight, bias = call["weight"], call["bias"]
    twin = nn.Conv2d(
        module.in_channels, module.out_channels, module.kernel_size, call["stride"],  # type: ignore[arg-type]
        call["padding"], call["dilation"], call["groups"], bias is not None,
        device=weight.device, dtype=weight.dtype,
    )  # fmt: skip
    twin.weight.copy_(weight)
    if twin.bias is not None:
        twin.bias.copy_(bias)
    if not torch.allclose(twin(images[1]), own(images[1]), rtol=1e-3, atol=1e-5):
        return Keep(f"a {type(module).__name__} computes another weight for another input")
    return twin


def _noise(conv: nn.Conv2d, more: int) -> Tensor:
    """Draws an image that the kernel has room in.  # [2, C, H, W]"""
    axes = zip(conv.dilation, conv.kernel_size, conv.stride, strict=True)
    sizes = [dilation * (kernel - 1) + stride + more for dilation, kernel, stride in axes]
    generator = torch.Generator().manual_seed(more)
    return torch.randn(2, conv.in_channels, *sizes, generator=generator).to(conv.weight)
