# SPDX-License-Identifier: Apache-2.0
"""AveragePool: average pooling by the engine, for programs that run without PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from ..arena import allocate
from ..errors import ArgumentError, mismatch
from ..nn.base import STAND_IN, as_step
from ..pooling import Pool
from .names import module_of, name_of

try:
    from .. import _cpu
except ImportError:  # nothing is compiled here
    _cpu = None  # type: ignore[assignment]

_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_LAST = torch.channels_last


class AveragePool(nn.Module):
    """The mean of each window of an image, summed in float32 row by row.

    Args:
        pool: the windows.
        inside: whether to divide by the taps inside the image, not by all of the window.
        keepdim: whether an output of one pixel is still an image.

    Shape:
        x [N, C, H, W] -> [N, C, PH, PW], or [N, C] where not keepdim.
    """

    def __init__(self, pool: Pool, inside: bool = False, keepdim: bool = True) -> None:
        super().__init__()
        self.pool, self.inside, self.keepdim = pool, inside, keepdim

    def forward(self, x: Tensor) -> Tensor:
        """Pools. An image in another memory format is copied into channels_last first.

        Raises:
            ArgumentError: the image is of another dtype, or not on the CPU.
        """
        if type(x) is STAND_IN:
            recorded: Tensor = as_step(self, x)
            return recorded
        if x.dtype not in _NAMES or not x.is_cpu:
            expected = "float32 or bfloat16 on the CPU"
            raise ArgumentError(
                mismatch("input of AveragePool", f"{x.dtype} on {x.device}", expected)
            )
        x = x.contiguous(memory_format=_LAST)
        n, c, h, w = x.shape
        size = self.pool.output_size(h, w)
        y = allocate(self, (n, c, *size), x.dtype, x.device, _LAST)
        window = _cpu.Pool(*self.pool, size)
        threads = torch.get_num_threads()
        _cpu.average_pool(
            _NAMES[x.dtype], x.data_ptr(), (n, h, w, c), y.data_ptr(), window, self.inside, threads
        )
        return y if self.keepdim else y.flatten(1)

    def extra_repr(self) -> str:
        """Says the windows."""
        return f"pool={tuple(self.pool)}, inside={self.inside}, keepdim={self.keepdim}"


def average_of(node: fx.Node, shape: tuple[int, ...]) -> AveragePool | None:
    """Returns the average pooling that a step of a graph is; None for another step.

    Args:
        node: the step.
        shape: of its input.  # [N, C, H, W]
    """
    if len(shape) != 4:
        return None
    name, height, width = name_of(node), shape[2], shape[3]
    module = module_of(node)
    if name == "adaptive_avg_pool2d":
        size = _argument(node, module, 1, "output_size", None)
        oh, ow = (size, size) if isinstance(size, int) else size or (None, None)
        oh, ow = oh or height, ow or width
        if height % oh or width % ow:
            return None  # windows of several sizes
        kernel = (height // oh, width // ow)
        return AveragePool(Pool(kernel, kernel, (0, 0)))
    if name == "mean" and module is None:
        axes = _argument(node, None, 1, "dim", None)
        keepdim = _argument(node, None, 2, "keepdim", False)
        axes = sorted(a % 4 for a in axes) if isinstance(axes, list | tuple) else None
        if axes != [2, 3] or node.kwargs.get("dtype") is not None:
            return None
        return AveragePool(Pool((height, width), (1, 1), (0, 0)), keepdim=bool(keepdim))
    if name == "avg_pool2d":
        window = _pair(_argument(node, module, 1, "kernel_size", None))
        stride = _pair(_argument(node, module, 2, "stride", None)) or window
        padding = _pair(_argument(node, module, 3, "padding", 0))
        ceil = _argument(node, module, 4, "ceil_mode", False)
        everywhere = _argument(node, module, 5, "count_include_pad", True)
        divisor = _argument(node, module, 6, "divisor_override", None)
        if ceil or divisor is not None or window is None or stride is None or padding is None:
            return None
        return AveragePool(Pool(window, stride, padding), inside=not everywhere)
    return None


def _argument(node: fx.Node, module: nn.Module | None, place: int, name: str, usual: object) -> Any:
    if module is not None:
        return getattr(module, name, usual)
    if len(node.args) > place:
        return node.args[place]
    return node.kwargs.get(name, usual)


def _pair(value: Any) -> tuple[int, int] | None:
    if isinstance(value, int):
        return value, value
    if isinstance(value, list | tuple) and len(value) in (1, 2):
        return (value[0], value[-1])
    return None
