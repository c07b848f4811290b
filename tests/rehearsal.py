# SPDX-License-Identifier: Apache-2.0
"""A rehearsal of work on a GPU where there is none: everything happens but the kernels' own work.

Tensors that ask for CUDA live on the CPU. Triton's own launcher compiles for the capability that is
pretended, from the arguments of the real calls; the result is not started, but its descriptors are
held to TMA's rules. Streams and graphs are stand-ins: while one captures, the engine is told so.
Time is counted, not measured. What the values are is for the interpreter's tests to check.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pretending import build_for
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

GPU = torch.device("cuda", 0)
_SHARED = {(8, 0): 163 * 1024, (9, 0): 227 * 1024, (10, 0): 227 * 1024, (12, 0): 99 * 1024}


# What reads or writes whole images; only shape and strides of its result matter here.
_UNMADE = {"conv2d", "index_select", "clone", "cat", "contiguous", "add", "__add__"}


class OnCpu(TorchFunctionMode):
    """Turns CUDA devices in calls of PyTorch into the CPU, and leaves big products unmade."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.device:
            return func(*args, **(kwargs or {}))
        kwargs = {name: _cpu(value) for name, value in (kwargs or {}).items()}
        args = tuple(map(_cpu, args))
        name = getattr(func, "__name__", "")
        if name == "randn":
            return torch.zeros(*args, **kwargs)
        if name in _UNMADE and _is_image(args[0]):
            like = func(*tree_map_only(torch.Tensor, _meta, args), **kwargs)
            return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype)
        return func(*args, **kwargs)


def _is_image(value: Any) -> bool:
    first = value[0] if isinstance(value, list | tuple) else value
    return isinstance(first, torch.Tensor) and first.is_floating_point() and first.dim() == 4


def _meta(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to("meta")


def _cpu(value: Any) -> Any:
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("cpu")
    return "cpu" if isinstance(value, str) and value.startswith("cuda") else value


class Rehearsal:
    """What happened.

    Attributes:
        compiled: name of each kernel that was compiled, with its shared memory in bytes.
        started: how often a kernel was started.
        captures: how many graphs were captured.
    """

    def __init__(self, capability: tuple[int, int]) -> None:
        self.capability = capability
        self.compiled: list[tuple[str, int]] = []
        self.started = self.captures = 0
        self.capturing = False

    def driver(self) -> Any:
        """Makes what Triton takes for its connection to a GPU."""
        from triton.backends.compiler import GPUTarget

        major, minor = self.capability
        limit = _SHARED[self.capability]
        properties = {"max_shared_mem": limit, "multiprocessor_count": 132, "warpSize": 32}
        utils = SimpleNamespace(
            load_binary=lambda *_: (object(), 0, 0, 0, 1024),
            get_device_properties=lambda _: properties,
            unload_module=lambda *_: None,
        )
        return SimpleNamespace(
            utils=utils,
            launcher_cls=self._launcher,
            get_current_device=lambda: 0,
            get_current_stream=lambda _=0: 0,
            get_current_target=lambda: GPUTarget("cuda", 10 * major + minor, 32),
            get_active_torch_device=lambda: GPU,
        )

    def _launcher(self, source: Any, metadata: Any) -> Any:
        name = source.fn.__name__
        self.compiled.append((name, metadata.shared))
        blocks = getattr(metadata, "tensordesc_meta", None) or []

        def start(*arguments: Any) -> None:
            self.started += 1
            found = [a for a in arguments if type(a).__name__ == "TensorDescriptor"]
            assert len(found) == len(blocks), name
            for descriptor, block in zip(found, blocks, strict=True):
                check_descriptor(descriptor, block)

        return start

    def synchronize(self, *_: Any) -> None:
        """Stands for waiting for the device, which a capture forbids."""
        assert not self.capturing

    @contextlib.contextmanager
    def graph(self, *_: Any, **__: Any) -> Iterator[None]:
        """Stands for ``torch.cuda.graph``."""
        assert not self.capturing
        self.captures += 1
        self.capturing = True
        try:
            yield
        finally:
            self.capturing = False


def check_descriptor(descriptor: Any, block: dict[str, Any]) -> None:
    """Holds a descriptor to the rules of ``cuTensorMapEncodeTiled``.

    Raises:
        AssertionError: a driver would refuse it.
    """
    item = descriptor.base.dtype.itemsize
    assert descriptor.base.data_ptr() % 16 == 0
    assert all(1 <= size <= 2**32 for size in descriptor.shape), descriptor.shape
    assert descriptor.strides[-1] == 1
    for stride in descriptor.strides[:-1]:
        assert stride * item % 16 == 0, descriptor.strides
        assert 0 < stride * item < 2**40, descriptor.strides
    box = block["block_size"]
    assert len(descriptor.shape) == len(descriptor.strides) <= 5
    assert all(1 <= edge <= 256 for edge in box), box
    width = box[-1] * item
    assert width % 16 == 0, box
    # Swizzle modes 1, 2, 3 are of 32, 64 and 128 bytes; a row of a box must fit in one.
    assert not block["swizzle"] or width <= 16 << block["swizzle"], block


@contextlib.contextmanager
def rehearsal(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0)
) -> Iterator[Rehearsal]:
    """Pretends, for as long as it lasts, that there is a GPU of some capability."""
    from triton.runtime import driver

    from benchmarks import cases
    from hetconv_kernels import ops
    from hetconv_kernels.backends.gpu import capture, devices, packer
    from hetconv_kernels.backends.triton import calls, tma_calls, wgrad_calls
    from hetconv_kernels.measure import cache, timing

    made = Rehearsal(capability)
    stream = SimpleNamespace(
        synchronize=made.synchronize, wait_stream=lambda _: None, cuda_stream=0
    )
    properties = SimpleNamespace(multi_processor_count=132, L2_cache_size=2**20, name="rehearsed")
    stand_ins = {
        "is_available": lambda: True,
        "get_device_capability": lambda *_: capability,
        "get_device_properties": lambda *_: properties,
        "get_device_name": lambda *_: "rehearsed",
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "current_stream": lambda *_: stream,
        "synchronize": made.synchronize,
        "empty_cache": lambda: None,
        "is_current_stream_capturing": lambda: made.capturing,
        "Stream": lambda *_, **__: stream,
        "stream": lambda _: contextlib.nullcontext(),
        "graph": made.graph,
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
    }
    described, upload = ops.describe, capture.upload
    seconds = itertools.count()

    def on_gpu(*arguments: Any, **more: Any) -> Any:
        return dataclasses.replace(described(*arguments, **more), device=GPU)

    def checked_upload(array: Any, device: torch.device) -> torch.Tensor:
        capture.refuse_capture(device, "A Plan's table")
        return upload(array, torch.device("cpu"))

    def clock(device: Any = "cpu") -> timing.Clock:
        # Twice the least length of a sample and a power of two: with a tick of just that length
        # rounding decided whether the calls of a sample were doubled, again and again.
        ticks = lambda: next(seconds) / 512  # noqa: E731
        return timing.Clock(device, now=ticks, synchronize=lambda: None, resolution=1e-6)

    kernels = _kernels()
    caches = [devices.gpu_reasons, devices._spec_of]
    with monkeypatch.context() as patch:
        for name, stand_in in stand_ins.items():
            patch.setattr(torch.cuda, name, stand_in)
        patch.setattr(torch.Tensor, "record_stream", lambda *_: None)
        patch.setattr(ops, "describe", on_gpu)
        build_for(patch, "80")  # Triton's boxes are for where the CUDA engine has no wide kernel
        patch.setattr("benchmarks.bench.ENGINES", ())  # machine code has no stand-in
        for module in (calls, tma_calls, wgrad_calls, packer):
            patch.setattr(module, "upload", checked_upload)
        patch.setattr(timing, "clock", clock)
        patch.setattr(timing, "rotations", lambda *_: 2)
        patch.setattr(cache, "last_level_cache", lambda *_: 2**20)
        patch.setattr("hetconv_kernels.measure.tuning.pick", lambda *_: None)
        before = driver._active
        driver.set_active(made.driver())
        try:
            for kept in caches:
                kept.cache_clear()
            with OnCpu():
                yield made
        finally:
            for kernel in kernels:
                kernel.device_caches.clear()
            cases._build.cache_clear()  # their Supports keep handles of kernels
            gc.collect()
            driver._active = before
            for kept in caches:
                kept.cache_clear()


def _kernels() -> list[Any]:
    from hetconv_kernels.backends.triton import fprop, fprop_tma, wgrad, wgrad_tma

    modules = (fprop, fprop_tma, wgrad, wgrad_tma)
    found = [v for m in modules for name, v in vars(m).items() if "_kernel_" in name]
    assert len(found) == 6
    return found
