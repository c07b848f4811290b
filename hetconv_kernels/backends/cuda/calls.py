# SPDX-License-Identifier: Apache-2.0
"""Calls of fprop and dgrad: what both kernels share, and a Problem on ``narrow_fprop``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from ...problem import Problem
from ...support import Support
from ..common import empty, unit
from ..gpu.capture import CONVERSIONS, DeviceTables, capturing, pin, refuse_capture, upload
from ..gpu.packer import Packer
from ..gpu.precision import precision
from .choice import NarrowChoice
from .narrow_tma import MOST_MAPS, tma_readable

# The kernels count bytes within an image in 32 bits, so its elements must span fewer than these.
MAX_SPAN = 2**30


def compiled_part() -> Any:
    """Returns the compiled part, which only a call needs."""
    from ... import _cuda

    return _cuda


def vector(dtype: torch.dtype) -> int:
    """Returns the elements of a 16-byte access."""
    return 16 // dtype.itemsize


def dtype_name(dtype: torch.dtype) -> str:
    """Returns a dtype's name as the compiled part knows it."""
    return str(dtype).removeprefix("torch.")


@contextmanager
def current(device: torch.device) -> Iterator[int]:
    """Makes a device the current one, and gives its current stream as an integer."""
    if device.type != "cuda":  # the kernels on the CPU, in tests
        yield 0
    elif device.index == torch.cuda.current_device():
        yield torch.cuda.current_stream(device).cuda_stream
    else:
        with torch.cuda.device(device):
            yield torch.cuda.current_stream(device).cuda_stream


def readable(tensor: Tensor) -> Tensor:
    """Returns an operand that 16-byte accesses read: channels_last, and rightly aligned.

    A Problem knows neither addresses nor the layout of the second operand of wgrad, so what does
    not fit is copied, and counted in `CONVERSIONS`.
    """
    tensor = tensor.resolve_neg()
    wide = vector(tensor.dtype)
    strided = tensor.stride(1) == 1 and unit(wide, tensor) == wide
    if not strided or element_span(tensor.shape, tensor.stride()) > MAX_SPAN:
        CONVERSIONS["operand brought to channels_last"] += 1
        tensor = torch.empty_like(tensor, memory_format=torch.channels_last).copy_(tensor)
    if tensor.data_ptr() % 16:
        CONVERSIONS["operand brought to an aligned address"] += 1
        tensor = tensor.clone(memory_format=torch.preserve_format)
    return tensor


def element_span(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Returns how many elements lie between the first and the last one of an image, both in."""
    pairs = zip(shape[1:], strides[1:], strict=True)
    return 1 + sum((size - 1) * stride for size, stride in pairs if size > 1)


class Source(Protocol):
    """Tables that say where each packed weight comes from."""

    def source(self, support: Support, form: str) -> Any:
        """Lists where each packed weight lies in the memory of a canonical weight."""
        ...


def cuda_packer(problem: Problem, tables: Source) -> Packer:
    """Makes what packs canonical weights into the slabs of some tables; kept with the Support."""
    support, device, dtype = problem.support, problem.device, problem.dtype
    key = ("cuda packer", device, dtype, id(tables))
    packer: Packer | None = support.derived.get(key)
    if packer is None:
        module, name = compiled_part(), dtype_name(dtype)

        def start(w: Tensor, source: Tensor, slabs: Tensor) -> None:
            with current(device) as stream:
                module.pack(
                    w.data_ptr(),
                    dtype_name(w.dtype),
                    source.data_ptr(),
                    slabs.data_ptr(),
                    name,
                    source.numel(),
                    stream,
                )

        def source(form: str) -> Any:
            return tables.source(support, form)

        packer = support.derived[key] = Packer(support, source, start, device, dtype, "cuda")
    return packer


def uploaded(problem: Problem, tables: Any, names: Sequence[str]) -> dict[str, Tensor]:
    """Returns tables on the device; kept with the Support."""
    key = ("cuda tables", problem.device, id(tables))
    # The tables stay with their copies, so that no others get their identity.
    kept: tuple[Any, dict[str, Tensor]] | None = problem.support.derived.get(key)
    if kept is None:
        found = {name: upload(getattr(tables, name), problem.device) for name in names}
        kept = problem.support.derived[key] = tables, found
    return kept[1]


class CudaCall:
    """fprop or dgrad of a Problem: what the kernels for narrow and for wide groups share.

    Args:
        problem: what to run.
        tables: the lowering.
    """

    def __init__(self, problem: Problem, tables: Source) -> None:
        self.problem, self._device = problem, problem.device
        back = problem.verb == "dgrad"
        self._shape = problem.x_shape if back else problem.y_shape
        self._image = problem.output_size if back else (problem.height, problem.width)
        self._packer = cuda_packer(problem, tables)
        self._name = dtype_name(problem.dtype)
        self._bound: dict[Any, Callable[..., None]] = {}
        self._kept = DeviceTables()

    def run(
        self,
        x: Tensor,
        w: Tensor,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Runs the kernel.  # [N, F, OH, OW]"""
        y = empty(self._shape, x, self.problem)
        if not y.numel():
            return y
        x = self.seen(readable(x))
        if residual is not None:
            residual = self.like(residual, y)
        # The per-filter vectors are computed with in float32.
        scale, shift = (None if v is None else _single(v) for v in (scale, shift))
        aligned = residual is None or residual.data_ptr() % 16 == 0
        key = (x.stride(), y.stride(), aligned, precision(x.dtype))
        with current(self._device) as stream:
            launch = self._bound.get(key)
            if launch is None:
                refuse_capture(self._device, "A layout of operands")  # asks the device for blocks
                launch = self._bound[key] = self.bind(x, y, aligned)
            frozen = self.problem.frozen_weight
            slabs = self._packer(w, frozen)
            self._kept.lend(self._device)
            if capturing(self._device):
                pin(self._device, self, slabs if frozen else None)
            launch(
                self._name,
                x.data_ptr(),
                slabs.data_ptr(),
                y.data_ptr(),
                *(0 if v is None else v.data_ptr() for v in (scale, shift, residual)),
                stream,
            )
        return y

    def seen(self, x: Tensor) -> Tensor:
        """Returns the pixels of an operand that the kernel reads."""
        return x

    def like(self, residual: Tensor, y: Tensor) -> Tensor:
        """Returns the residual with the strides of y, which the kernel reads it by."""
        same = residual.resolve_neg()
        if same.stride() != y.stride():
            CONVERSIONS["residual brought to the format of y"] += 1
            same = torch.empty_like(y).copy_(same)
        return same

    def bind(self, x: Tensor, y: Tensor, aligned: bool) -> Callable[..., None]:
        """Fills the kernel's arguments, all but the operands' addresses.

        Returns:
            What launches it; takes the dtype, the addresses of x, slabs, y, scale, shift and
            residual, and the stream.
        """
        raise NotImplementedError


class NarrowCall(CudaCall):
    """fprop or dgrad of a Problem by the kernel for narrow groups.

    Args:
        problem: what to run.
        choice: how.
    """

    def __init__(self, problem: Problem, choice: NarrowChoice) -> None:
        super().__init__(problem, choice.how.tables)
        self.choice = choice
        names = ("classes", "heads", "rounds", "lists", "words", "chunks", "slots", "rows")
        self._tables = uploaded(problem, choice.how.tables, names)
        self._kept = DeviceTables(*self._tables.values())

    def bind(self, x: Tensor, y: Tensor, aligned: bool) -> Callable[..., None]:
        """Fills the kernel's arguments, all but the operands' addresses."""
        problem, choice, tables = self.problem, self.choice, self.choice.how.tables
        call = compiled_part().Narrow()
        for name, table in self._tables.items():
            setattr(call, name, table.data_ptr())
        call.x_n, _, call.x_h, call.x_w = strides_of(x)
        call.y_n, _, call.y_h, call.y_w = strides_of(y)
        call.batch, (call.image_h, call.image_w) = problem.batch, self._image
        call.channels = x.shape[1]
        call.class_count, call.parts, call.round_count = tables.rounds.shape[:3]
        shape = tables.shape
        call.tile_h, call.tile_w = shape.height, shape.width
        call.warps_m, call.warps_n = shape.warps_m, shape.warps_n
        call.raw_pitch, call.slot_pitch = tables.raw_pitch, tables.slot_pitch
        call.halo_pixels = tables.halo_pixels
        call.max_words, call.max_fragments = tables.max_words, tables.max_fragments
        wide = vector(y.dtype)
        call.vector_stores = int(aligned and unit(wide, y) == wide)
        call.item, call.split = tables.item, int(precision(x.dtype) == "tf32x3")
        call.buffers, call.resident = choice.how.buffers, int(choice.how.resident)
        if not choice.how.no_tma and tma_readable(x):
            call.tma = 1
            spare = [0] * (MOST_MAPS - len(tables.halos))
            call.box_h, call.box_w = ([*sides, *spare] for sides in tables.halos.T.tolist())
        call.act = problem.act
        call.blocks = call.max_resident_blocks(self._name)
        launch: Callable[..., None] = call.launch
        return launch


def strides_of(tensor: Tensor) -> tuple[int, ...]:
    """Returns the strides, zero along axes of one place, whose strides may be anything."""
    pairs = zip(tensor.stride(), tensor.shape, strict=True)
    return tuple(stride if size > 1 else 0 for stride, size in pairs)


def _single(vector: Tensor) -> Tensor:
    return vector.resolve_neg().float().contiguous()
