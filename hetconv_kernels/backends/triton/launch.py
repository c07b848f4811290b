# SPDX-License-Identifier: Apache-2.0
"""Launches: kernels with their constants bound, started through cached handles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..gpu.capture import refuse_capture


def interpreted() -> bool:
    """Tells whether Triton's interpreter stands in for a GPU in this process."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


class Launch:
    """A kernel with its constants bound.

    The first launch with pointers of some alignment compiles; its handle is kept and started
    directly from then on, which takes a fraction of the time of Triton's own launch.

    Args:
        kernel: a ``triton.jit`` function.
        grid: programs along up to three axes.
        constants: the kernel's constexpr arguments, in the order of its signature.
        warps: of one program.
        stages: of its pipeline.
        device: where its arguments are.
    """

    def __init__(
        self,
        kernel: Any,
        grid: Sequence[int],
        constants: Sequence[Any],
        warps: int,
        stages: int,
        device: torch.device,
    ) -> None:
        self.device = device
        self.kernel, self.constants = kernel, tuple(constants)
        self.grid = (*grid, 1, 1)[:3]
        # Fusion is said outright: Triton 3.10 changes its default.
        self.options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
        self._handles: dict[tuple[Any, ...], Any] = {}

    def __call__(self, *arguments: Any) -> None:
        """Launches on the device's current stream."""
        device = self.device
        if device.type != "cuda":  # the interpreter
            self.kernel[self.grid](*arguments, *self.constants, **self.options)
            return
        # Triton reads 16-byte vectors only where it was told of the alignment.
        key = tuple(map(_kind, arguments))
        handle = self._handles.get(key)
        if device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                self._start(handle, key, arguments)
        else:
            self._start(handle, key, arguments)

    def _start(self, handle: Any, key: tuple[Any, ...], arguments: tuple[Any, ...]) -> None:
        if handle is not None:
            handle(*arguments, *self.constants)
            return
        refuse_capture(self.device, "A kernel")
        compiled = self.kernel[self.grid](*arguments, *self.constants, **self.options)
        self._handles[key] = compiled[self.grid]


def _kind(argument: Any) -> Any:
    """What Triton specialises a kernel on: dtype and alignment of a tensor, classes of integers."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, int):
        return argument == 1, argument % 16 == 0, argument > 2**31 - 1
    return type(argument)
