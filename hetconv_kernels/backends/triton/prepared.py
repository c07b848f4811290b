# SPDX-License-Identifier: Apache-2.0
"""Prepared launches: a compiled kernel whose parameters lie in memory as the driver reads them.

Triton's own launcher (3.6 to 3.9) takes Python objects: at every launch it asks the driver about
each pointer and encodes each descriptor anew. Here a launch writes the addresses that changed and
calls the driver; a descriptor is encoded once for each address.

What a compiled kernel takes are its arguments in order, without constants: an address has 8 bytes,
a descriptor is the hardware's 128 bytes, then its sizes (int32) and its strides (int64). Addresses
of two scratch memories come last, which our kernels have no use for.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

from torch import Tensor

# Encoded descriptors that one operand keeps; an allocator gives the same few addresses again.
MOST_KEPT = 64
_MAP_BYTES, _MAP_ALIGNMENT = 128, 64
# Up to this version drivers encode tensors of fewer bytes wrongly: a bit is to be cleared (CUTLASS,
# commit b7ecaa6; Triton does it too).
_FAULTY, _SMALL = 13010, 128 * 1024
# `CU_TENSOR_MAP_L2_PROMOTION_L2_128B`, as Triton asks for it.
_L2_PROMOTION = 2
_INTEGERS = ("i1", "i8", "i16", "i32", "i64", "u1", "u8", "u16", "u32", "u64")


class _Config(ctypes.Structure):
    """``CUlaunchConfig`` of the driver's interface."""

    _fields_ = (
        *((f"grid_{axis}", ctypes.c_uint) for axis in "xyz"),
        *((f"block_{axis}", ctypes.c_uint) for axis in "xyz"),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("attribute_count", ctypes.c_uint),
    )


@cache
def driver() -> Any:
    """Returns the driver's library; None where there is none."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    library.cuLaunchKernelEx.argtypes = [ctypes.c_void_p] * 4
    return library


def _driver_version(library: Any) -> int:
    found = ctypes.c_int()
    library.cuDriverGetVersion(ctypes.byref(found))
    return found.value


class _Frame(NamedTuple):
    """The memory of one launch: two threads that launch at once have one each."""

    values: Any
    params: Any
    config: _Config
    places: tuple[int, int]  # of config and params


class EncodedDescriptor:
    """Encodes the descriptor of one operand, once for each address.

    Args:
        library: the driver's.
        descriptor: Triton's, of an example.
        meta: what the compiled kernel says of it.
    """

    def __init__(self, library: Any, descriptor: Any, meta: Mapping[str, Any]) -> None:
        from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST

        rank, size = len(descriptor.shape), meta["elem_size"]
        long, short = ctypes.c_uint64 * rank, ctypes.c_uint32 * rank
        strides = [stride * size for stride in descriptor.strides[:-1]]
        self._encode = library.cuTensorMapEncodeTiled
        last = sum((n - 1) * s for n, s in zip(descriptor.shape, (*strides, size), strict=True))
        self._mended = last + 1 < _SMALL and _driver_version(library) <= _FAULTY
        self._kind = TMA_DTYPE_DEVICE_TO_HOST[meta["elem_type"]], rank
        self._rest = (
            long(*reversed(descriptor.shape)),
            long(*reversed(strides)),
            short(*reversed(meta["block_size"])),
            short(*[1] * rank),
            0,  # no interleaving
            meta["swizzle"],
            _L2_PROMOTION,
            0,  # what lies outside is zero
        )
        self._kept: dict[int, tuple[int, Any]] = {}

    def __call__(self, place: int) -> tuple[int, Any]:
        """Returns where the encoded descriptor lies, and its memory; 0 where the driver refuses."""
        found = self._kept.get(place)
        if found is None:
            memory = ctypes.create_string_buffer(_MAP_BYTES + _MAP_ALIGNMENT)
            at = -(-ctypes.addressof(memory) // _MAP_ALIGNMENT) * _MAP_ALIGNMENT
            base = ctypes.c_void_p(place)
            if self._encode(ctypes.c_void_p(at), *self._kind, base, *self._rest):
                return 0, None
            if self._mended:
                ctypes.c_uint64.from_address(at + 8).value &= ~(1 << 21)
            if len(self._kept) >= MOST_KEPT:
                self._kept.clear()
            found = self._kept[place] = at, memory
        return found


class PreparedKernel:
    """A compiled kernel with its parameters ready, but for the addresses that change.

    Args:
        library: the driver's.
        compiled: what Triton made.
        grid: programs along three axes.
        arguments: all that are no constants of the kernel, as they were in its first launch.
        changing: which of them change, all of them tensors, descriptors or None.
    """

    def __init__(
        self,
        library: Any,
        compiled: Any,
        grid: Sequence[int],
        arguments: Sequence[Any],
        changing: Sequence[int],
    ) -> None:
        metadata = compiled.metadata
        self._launch = library.cuLaunchKernelEx
        self._function, self._grid = compiled.function, tuple(grid)
        self._threads, self._shared = 32 * metadata.num_warps, metadata.shared
        metas = iter(metadata.tensordesc_meta or ())
        # Of each parameter its place in `values`, -1 for an encoded descriptor.
        self._values: list[int] = []
        self._slots: list[int] = []
        # Which place in `values` takes which of the changing addresses.
        self._written: list[tuple[int, int]] = []
        self._encoded: list[tuple[int, int, EncodedDescriptor]] = []
        order = {argument: nth for nth, argument in enumerate(changing)}
        kinds = list(compiled.src.signature.values())[: len(arguments)]
        for index, (kind, value) in enumerate(zip(kinds, arguments, strict=True)):
            if kind == "constexpr":
                continue
            if kind.startswith("tensordesc"):
                encoder = EncodedDescriptor(library, value, next(metas))
                self._encoded.append((len(self._slots), order[index], encoder))
                self._slots.append(-1)
                for number in (*value.shape, *value.strides):
                    self._add(number)
                continue
            if index in order:
                self._written.append((len(self._values), order[index]))
            self._add(value.data_ptr() if isinstance(value, Tensor) else value)
        self._add(0)  # global scratch
        self._add(0)  # profile scratch
        self._idle: list[_Frame] = []

    @classmethod
    def of(
        cls, compiled: Any, grid: Sequence[int], arguments: Sequence[Any], changing: Sequence[int]
    ) -> PreparedKernel | None:
        """Prepares a kernel; None where that is left to Triton: no driver, or more than is known.

        Args: as of the class.
        """
        library = driver()
        if library is None:
            return None
        metadata, wanted = compiled.metadata, {"num_ctas": 1}
        off = ("global_scratch_size", "profile_scratch_size", "launch_cooperative_grid")
        wanted |= dict.fromkeys((*off, "launch_pdl"), 0)
        if any(getattr(metadata, name, value) != value for name, value in wanted.items()):
            return None
        kinds = list(compiled.src.signature.values())[: len(arguments)]
        boxes = sum(kind.startswith("tensordesc") for kind in kinds)
        if boxes != len(getattr(metadata, "tensordesc_meta", None) or ()):
            return None
        known = ("*", "tensordesc")
        if any(k not in (*_INTEGERS, "constexpr") and not k.startswith(known) for k in kinds):
            return None
        return cls(library, compiled, grid, arguments, changing)

    def start(self, places: Sequence[int], stream: int) -> bool:
        """Launches the kernel; tells whether the driver took it.

        It does not where no context is current in this thread yet, as in a new one.

        Args:
            places: of the changing arguments, 0 for None.
            stream: the CUDA stream.
        """
        frame = self._idle.pop() if self._idle else self._frame()
        values, params, config, (at_config, at_params) = frame
        for slot, nth in self._written:
            values[slot] = places[nth]
        kept = []  # the memory of encoded descriptors, for as long as the driver reads it
        for param, nth, encoder in self._encoded:
            at, memory = encoder(places[nth])
            if not at:
                return False
            params[param] = at
            kept.append(memory)
        config.stream = stream
        status = self._launch(at_config, self._function, at_params, None)
        self._idle.append(frame)
        return not status

    def _add(self, value: int) -> None:
        self._slots.append(len(self._values))
        self._values.append(value)

    def _frame(self) -> _Frame:
        values = (ctypes.c_uint64 * len(self._values))(*(v & (2**64 - 1) for v in self._values))
        first = ctypes.addressof(values)
        places = [None if slot < 0 else first + 8 * slot for slot in self._slots]
        params = (ctypes.c_void_p * len(places))(*places)
        config = _Config(*self._grid, self._threads, 1, 1, self._shared, None, None, 0)
        return _Frame(values, params, config, (ctypes.addressof(config), ctypes.addressof(params)))
