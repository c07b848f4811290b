# SPDX-License-Identifier: Apache-2.0
"""Arena: results of the engines at planned places of one buffer, instead of fresh memory.

An engine asks `allocate` for the memory of its result. Outside a planned call that is
``torch.empty``. Inside one, the thread's `Placement` answers: while a call is recorded it notes
who asked and for how much; afterwards it gives each result, in the order in which they were asked
for, the place that the plan has for it. Recycling memory is what saves the page faults of fresh
outputs, which on large images take as long as the convolutions do.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import threading
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .errors import MemoryShortageError, mismatch

if TYPE_CHECKING:
    from collections.abc import Iterator

# Places begin at multiples of this many bytes: a cache line, and the widest vector.
ALIGNMENT = 64
_HUGE_PAGE = 2 << 20


class Placement(Protocol):
    """What decides where a result lies, in the thread that it is current in."""

    def place(
        self, owner: object, shape: Sequence[int], dtype: torch.dtype, layout: torch.memory_format
    ) -> Tensor:
        """Returns uninitialised memory for a result of that shape."""
        ...


class _Thread(threading.local):
    placement: Placement | None = None


_thread = _Thread()


def allocate(
    owner: object,
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    layout: torch.memory_format,
) -> Tensor:
    """Returns uninitialised memory for a result.

    Args:
        owner: who asks: the same object in every call with operands of the same kind.
        shape: of the result.
        dtype: of the result.
        device: where it has to be; only results on the CPU are planned.
        layout: its memory format.
    """
    placement = _thread.placement
    if placement is None or device.type != "cpu":
        return fresh(shape, dtype, layout, device)
    return placement.place(owner, shape, dtype, layout)


_CPU = torch.device("cpu")
_SMALLER = "Give the network fewer or smaller images, or this process more memory (ulimit -v says)."
_ARENAS = "hk.release_memory(network) frees the arenas of inputs of other shapes."


def fresh(
    shape: Sequence[int],
    dtype: torch.dtype,
    layout: torch.memory_format,
    device: torch.device = _CPU,
    way_out: str = _SMALLER,
) -> Tensor:
    """Returns uninitialised memory that nobody else has.

    Raises:
        MemoryShortageError: on the CPU, there is not as much; PyTorch says it with a bare
            RuntimeError, and without a way out.
    """
    try:
        return torch.empty(shape, dtype=dtype, device=device, memory_format=layout)
    except RuntimeError as error:
        if device.type != "cpu" or "you tried to allocate" not in str(error):
            raise
        wanted = dtype.itemsize * math.prod(shape)
        raise MemoryShortageError(
            mismatch("memory", "none", f"{wanted:,} bytes for one buffer", way_out)
        ) from error


@contextmanager
def placing(placement: Placement | None) -> Iterator[None]:
    """Makes a placement (None: plain allocation) that of this thread, inside a ``with``."""
    before = _thread.placement
    _thread.placement = placement
    try:
        yield
    finally:
        _thread.placement = before


@dataclass(frozen=True)
class Lifetime:
    """One result of an engine in the course of a network.

    Attributes:
        owner: who asked for it.
        shape: of the result.
        dtype: of the result.
        layout: its memory format.
        born: the step in which it is computed.
        dies: the last step that reads it, or a view of it.
        escapes: whether the network returns it, or a view of it: its memory is the caller's then.
    """

    owner: object
    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: torch.memory_format
    born: int
    dies: int
    escapes: bool

    @property
    def bytes(self) -> int:
        """Returns the bytes of the tensor."""
        elements = 1
        for size in self.shape:
            elements *= size
        return elements * self.dtype.itemsize


def assign_offsets(lifetimes: Sequence[Lifetime]) -> tuple[tuple[int, ...], int]:
    """Finds places so that results which live at the same time do not overlap.

    The largest first, each at the lowest place that is free for as long as it lives.

    Example: a chain of three layers of 64 bytes each, the second reading the first, the third the
    second. Two places are enough, by turns:

        >>> chain = [
        ...     Lifetime(None, (16,), torch.float32, torch.contiguous_format, i, i + 1, False)
        ...     for i in range(3)
        ... ]
        >>> assign_offsets(chain)
        ((0, 64, 0), 128)

    Returns:
        The first byte of each, -1 for those that escape; and the size of the arena in bytes.
    """
    places = [-1] * len(lifetimes)
    kept = [i for i, life in enumerate(lifetimes) if not life.escapes]
    size = 0
    for i in sorted(kept, key=lambda i: -lifetimes[i].bytes):
        mine = lifetimes[i]
        near = sorted(
            (places[j], _aligned(lifetimes[j].bytes))
            for j in kept
            if places[j] >= 0 and lifetimes[j].born <= mine.dies and mine.born <= lifetimes[j].dies
        )
        at = 0
        for start, length in near:
            if start - at >= mine.bytes:
                break
            at = max(at, start + length)
        places[i] = at
        size = max(size, at + _aligned(mine.bytes))
    return tuple(places), size


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


class Arena:
    """The buffer of one running call, and a tensor at each of its places.

    Args:
        lifetimes: of the results, in the order in which they are asked for.
        copies: how many times all places are there; the tensors are at the first.

    Attributes:
        memory: the buffer.
        first: the byte of it that places are counted from.
        places: the first byte of each result, -1 for those that escape.
    """

    def __init__(self, lifetimes: Sequence[Lifetime], copies: int = 1) -> None:
        self.lifetimes = tuple(lifetimes)
        self.places, size = assign_offsets(self.lifetimes)
        self.bytes = size * copies
        # Outside inference mode, so that any later call may use it.
        with torch.inference_mode(False):
            self.memory, self.first = _buffer(self.bytes)
            self._tensors = [
                None if at < 0 else _tensor(self.memory, self.first + at, life)
                for at, life in zip(self.places, self.lifetimes, strict=True)
            ]
        self._next = 0
        self.fits = True

    def start(self) -> None:
        """Begins a call."""
        self._next = 0
        self.fits = True

    def fill(self) -> None:
        """Ends a call that put all results at their places without asking for them."""
        self._next = len(self.lifetimes)

    @property
    def whole(self) -> bool:
        """Whether the call asked for just the results that were planned."""
        return self.fits and self._next == len(self.lifetimes)

    def place(
        self, owner: object, shape: Sequence[int], dtype: torch.dtype, layout: torch.memory_format
    ) -> Tensor:
        """Returns the next result's place; fresh memory from the first surprise on."""
        index = self._next
        if self.fits and index < len(self.lifetimes):
            self._next = index + 1
            life = self.lifetimes[index]
            if life.owner is owner and life.shape == tuple(shape) and life.dtype == dtype:
                planned = self._tensors[index]
                if planned is not None:
                    return planned.detach()
                return fresh(shape, dtype, layout)
        self.fits = False
        return fresh(shape, dtype, layout)


def _buffer(size: int) -> tuple[Tensor, int]:
    """Returns memory, and the byte of it that ``size`` usable ones begin at.

    Where they fill huge pages they begin at one and Linux is asked for those, which it gives by
    default to nobody else: with pages of 4 KiB a core looks up translations all the time.
    """
    alignment = _HUGE_PAGE if size >= _HUGE_PAGE else ALIGNMENT
    plain, way_out = torch.contiguous_format, f"{_SMALLER} {_ARENAS}"
    memory = fresh((size + alignment,), torch.uint8, plain, way_out=way_out)
    first = -memory.data_ptr() % alignment
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if alignment == _HUGE_PAGE and advice is not None:  # advice only: a refusal is none
        whole = size // _HUGE_PAGE * _HUGE_PAGE
        libc = ctypes.CDLL(None)
        libc.madvise(ctypes.c_void_p(memory.data_ptr() + first), ctypes.c_size_t(whole), advice)
    return memory, first


def _tensor(whole: Tensor, first: int, life: Lifetime) -> Tensor:
    flat = whole[first : first + life.bytes].view(life.dtype)
    like = torch.empty(life.shape, device="meta", memory_format=life.layout)
    return flat.as_strided(life.shape, like.stride())


class Asked(NamedTuple):
    """A result that was asked for."""

    owner: object
    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: torch.memory_format
    storage: StorageWeakRef


class Recorder:
    """Notes the results that are asked for in one call, all of them in fresh memory.

    Attributes:
        asked: of each result its owner, shape, dtype, layout and storage, in order.
    """

    def __init__(self) -> None:
        self.asked: list[Asked] = []

    def place(
        self, owner: object, shape: Sequence[int], dtype: torch.dtype, layout: torch.memory_format
    ) -> Tensor:
        """Returns fresh memory, and notes it."""
        result = fresh(shape, dtype, layout)
        # Weak, so that recording takes no more memory than the call; and while it is held, no other
        # storage has its identity.
        storage = StorageWeakRef(result.untyped_storage())
        self.asked.append(Asked(owner, tuple(shape), dtype, layout, storage))
        return result
