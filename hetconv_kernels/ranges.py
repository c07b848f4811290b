# SPDX-License-Identifier: Apache-2.0
"""Ranges: each primitive under its name in the timelines of torch.profiler and of Nsight.

    from hetconv_kernels import ranges

    with ranges.enabled(nvtx=True):
        model(x)

A range is called, for instance, ``hetconv.fprop cpu 8x64x56x56 -> 64 k3x3 het(p=4, blocked)``; what
runs in 8 bits has its own verbs, such as ``hetconv.qfprop`` and ``hetconv.qadd``.
Off, which is the default, a call pays for one test of a module's attribute and nothing else.
HETCONV_RANGES=profiler or HETCONV_RANGES=nvtx turns them on for a whole process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd.profiler import record_function

from .backends.protocol import Choice
from .errors import ArgumentError, HetconvError, mismatch

__all__ = ["enabled"]

# Read at every call of a primitive (see `ops`); `enabled` sets it.
active = False
_nvtx = False


@contextmanager
def enabled(nvtx: bool = False) -> Iterator[None]:
    """Turns the ranges on, for all threads; afterwards they are as they were before.

    Args:
        nvtx: whether to push NVTX ranges too, for Nsight Systems and Nsight Compute.

    Raises:
        HetconvError: NVTX is asked for and there is no CUDA device.
    """
    global active, _nvtx
    if nvtx and not torch.cuda.is_available():
        raise HetconvError(
            f"NVTX ranges need a CUDA device, and torch {torch.__version__} finds none. "
            "Use ranges.enabled() for torch.profiler alone."
        )
    before = active, _nvtx
    active, _nvtx = True, nvtx
    try:
        yield
    finally:
        active, _nvtx = before


def range_name(choice: Choice) -> str:
    """Names the range of a primitive: verb, backend, shape and Support."""
    problem = choice.problem
    f, _, kh, kw = problem.support.shape
    shape = "x".join(map(str, problem.x_shape))
    return (
        f"hetconv.{problem.verb} {choice.backend.name} {shape} -> {f} k{kh}x{kw} "
        f"{problem.support.kind}"
    )


def run_in_range(choice: Choice, *operands: Any) -> Any:
    """Runs a primitive inside its range."""
    return around(range_name(choice), choice.run, *operands)


def around(name: str, call: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Calls a function inside a range of a name."""
    with record_function(name):
        if not _nvtx:
            return call(*arguments, **named)
        torch.cuda.nvtx.range_push(name)
        try:
            return call(*arguments, **named)
        finally:
            torch.cuda.nvtx.range_pop()


def _from_environment() -> tuple[bool, bool]:
    asked = os.environ.get("HETCONV_RANGES", "")
    if asked not in ("", "profiler", "nvtx"):
        raise ArgumentError(mismatch("HETCONV_RANGES", repr(asked), "profiler, nvtx or nothing"))
    # Where nvtx cannot be had the same variable must not stop the program.
    return asked != "", asked == "nvtx" and torch.cuda.is_available()


active, _nvtx = _from_environment()
