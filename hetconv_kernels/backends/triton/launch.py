# SPDX-License-Identifier: Apache-2.0
"""Launches: kernels with their constants bound, started through prepared parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..gpu.capture import current_stream, refuse_capture
from .prepared import PreparedKernel


@cache
def _options() -> Any:
    from triton import knobs

    return knobs.runtime


def interpreted() -> bool:
    """Tells whether Triton's interpreter stands in for a GPU in this process."""
    return bool(_options().interpret)


class _Met(NamedTuple):
    """A kernel as it was compiled for arguments of some kinds: Triton's handle, and our own."""

    handle: Callable[..., None]
    prepared: PreparedKernel | None


class Launch:
    """A kernel with its constants bound.

    The first launch with pointers of some alignment compiles. From then on the driver is called
    with parameters that lie ready (see `prepared`); where that cannot be, as in a thread that has
    no context yet or while a profiler's hooks are set, the handle that Triton gave is started.

    Args:
        kernel: a ``triton.jit`` function.
        grid: programs along up to three axes.
        constants: the kernel's constexpr arguments, in the order of its signature.
        warps: of one program.
        stages: of its pipeline.
        device: where its arguments are.
        fixed: arguments that are the same at every launch, by their place in the signature.
        described: what makes the descriptor of a tensor, for arguments that are descriptors.
    """

    def __init__(
        self,
        kernel: Any,
        grid: Sequence[int],
        constants: Sequence[Any],
        warps: int,
        stages: int,
        device: torch.device,
        fixed: Mapping[int, Any] | None = None,
        described: Mapping[int, Callable[[Tensor], Any]] | None = None,
    ) -> None:
        self.device = device
        self.kernel, self.constants = kernel, tuple(constants)
        self.grid = (*grid, 1, 1)[:3]
        # Fusion is said outright: Triton 3.10 changes its default.
        self.options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
        self._fixed, self._described = dict(fixed or {}), dict(described or {})
        self._met: dict[Any, _Met] = {}

    def __call__(self, *changing: Tensor | None) -> None:
        """Launches on the device's current stream.

        Args:
            changing: the arguments that are not fixed, in order; for a descriptor its tensor.
        """
        device = self.device
        if device.type != "cuda":  # the interpreter
            arguments, _ = self._arguments(changing)
            self.kernel[self.grid](*arguments, *self.constants, **self.options)
            return
        places = [0 if a is None else a.data_ptr() for a in changing]
        # Triton specialises on dtypes and, since 16-byte vectors are read only then, on alignment.
        joined = 0
        for place in places:
            joined |= place
        odd = tuple([place % 16 != 0 for place in places]) if joined % 16 else None
        key = (odd, *[None if a is None else a.dtype for a in changing])
        met = self._met.get(key)
        if device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                self._start(met, key, changing, places)
        else:
            self._start(met, key, changing, places)

    def _start(
        self, met: _Met | None, key: Any, changing: Sequence[Tensor | None], places: list[int]
    ) -> None:
        prepared = None if met is None else met.prepared
        if (
            prepared is not None
            and not _hooked()
            and prepared.start(places, current_stream(self.device))
        ):
            return
        arguments, order = self._arguments(changing)
        if met is not None:
            met.handle(*arguments, *self.constants)
            return
        refuse_capture(self.device, "A kernel")
        compiled = self.kernel[self.grid](*arguments, *self.constants, **self.options)
        ready = PreparedKernel.of(compiled, self.grid, arguments, order)
        self._met[key] = _Met(compiled[self.grid], ready)

    def _arguments(self, changing: Sequence[Tensor | None]) -> tuple[list[Any], list[int]]:
        """Lists all arguments, descriptors made; and the places of those that change."""
        left, found, order = iter(changing), [], []
        for index in range(len(changing) + len(self._fixed)):
            if index in self._fixed:
                found.append(self._fixed[index])
                continue
            value, describe = next(left), self._described.get(index)
            found.append(value if value is None or describe is None else describe(value))
            order.append(index)
        return found, order


def _hooked() -> bool:
    """Tells whether somebody, a profiler, wants to be told of launches."""
    runtime = _options()
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))
