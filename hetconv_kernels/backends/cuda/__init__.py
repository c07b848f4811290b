# SPDX-License-Identifier: Apache-2.0
"""`cuda`: narrow and scattered groups from sm_80 on, wide ones on Hopper; bf16, fp16, float32.

A tile of pixels with its halo is brought to shared memory once, and all taps and groups are
computed from it (``csrc/cuda``): by mma.sync where groups are narrow, by wgmma, which only compute
capability 9.0 has, where they are wide. float32 has fprop and dgrad of narrow groups, by TF32 as
PyTorch's switch for convolutions says. Built and checked on the CPU; **no GPU has measured it**.
"""

from __future__ import annotations

import re
from functools import cache

import torch

from ...problem import Problem
from ..gpu.constants import constants_of
from ..gpu.devices import gpu_reasons
from ..protocol import Runner
from . import choice
from .calls import MAX_SPAN, NarrowCall, element_span, vector
from .scattered_calls import ScatteredCall
from .wgrad_calls import NarrowWgradCall, WideWgradCall
from .wide_calls import WideCall

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Tiles of the whole batch are counted in 32 bits, with room for a step beyond the last one.
_MAX_PIXELS = 2**30


class Cuda:
    """The engine of csrc/cuda; its tables are kept with the Support that they were made from."""

    name = "cuda"
    # Filters of a wgmma segment, channels of a 16-byte access, filters of one that is stored, and
    # channels of a step.
    grain = (64, 8, 8, 64)

    def unsupported_reasons(self, problem: Problem) -> list[str]:
        """Refuses other devices, dtypes and layouts, odd channels, and sizes beyond 32 bits."""
        if problem.device.type != "cuda":
            return [f"The tensors are on {problem.device}, not on an NVIDIA GPU."]
        index = problem.device.index or 0
        reasons = list(gpu_reasons(index) or _build_reasons(index))  # these are kept: a copy
        if reasons:
            return reasons
        if problem.dtype not in _DTYPES:
            reasons.append(f"{problem.dtype} is not bfloat16, float16 or float32.")
        if problem.weight_dtype == torch.float64:
            reasons.append("The weight is float64, which nothing packs.")
        reasons += _layout_reasons(problem)
        oh, ow = problem.output_size
        support = problem.support
        pixels = max(problem.height * problem.width, oh * ow)
        if pixels * max(support.channels, support.filters) > MAX_SPAN:
            reasons.append("One image has more than 2**30 elements.")
        if problem.batch * pixels > _MAX_PIXELS:
            reasons.append("The batch has more than 2**30 pixels.")
        if max(support.kernel) > 32:
            reasons.append("The kernel has more than 32 taps along one axis.")
        if not reasons:
            found = choice.best(problem)
            reasons += [found] if isinstance(found, str) else []
        return reasons

    def estimate(self, problem: Problem) -> float:
        """Predicts the time by the cost models of the tiles, in seconds; nominal, not measured."""
        found = choice.best(problem)
        share = constants_of(problem.device).ours[self.name]
        return float("inf") if isinstance(found, str) else found.seconds / share

    def measured(self, problem: Problem) -> bool:
        """Whether `benchmarks.calibrate` has measured it on this GPU; it has on none yet."""
        return constants_of(problem.device).measured

    def efficiency(self, problem: Problem) -> float:
        """Useful over executed multiply-accumulates; filled tiles and half steps count."""
        found = choice.best(problem)
        return 0.0 if isinstance(found, str) else found.efficiency

    def notes(self, problem: Problem) -> list[str]:
        """Says, for `explain`, which kernel is run, and with what tile."""
        found = choice.best(problem)
        if isinstance(found, choice.WideChoice):
            shape = found.how.shape
            flat = " of flattened rows" if shape.flat_pitch else ""
            return [
                f"It runs the kernel for wide groups: tiles of {shape.pixels} pixels{flat} by "
                f"2 x 64 filters, {shape.stages} halos and 2 x {shape.slots} slabs in shared "
                f"memory, clusters of {shape.cluster}."
            ]
        if isinstance(found, choice.WideWgradChoice):
            plan = found.how.plan
            return [
                f"It runs the kernel for wide groups: tiles of {plan.rows} x 8 pixels, "
                f"{plan.stages} of them in shared memory, {len(plan.jobs)} jobs of up to "
                f"2 x {plan.products} products, {plan.splits} splits."
            ]
        if isinstance(found, choice.ScatteredChoice):
            halo, tables = found.how.shape, found.how.tables
            return [
                f"It runs the kernel for scattered groups: {halo.slots} channels and "
                f"{halo.columns} filters in shared memory, {len(tables.parts)} parts of the "
                f"filters, {halo.warps} warps."
            ]
        if isinstance(found, choice.NarrowChoice):
            tile, why = found.how.tables.shape, found.how.no_tma
            size = f"{tile.height} x {tile.width} pixels by {tile.filters} filters"
        elif isinstance(found, choice.NarrowWgradChoice):
            size, why = f"{found.tables.height} x {found.tables.width} pixels", found.no_tma
        else:
            return []
        way = f"cp.async, not by TMA: {why}" if why else "TMA"
        return [f"It runs the kernel for narrow groups: tiles of {size}, brought by {way}."]

    def fprop(self, problem: Problem) -> Runner:
        """Prepares y = act(scale · conv(x, w) + shift + residual)."""
        return _call(problem).run

    def dgrad(self, problem: Problem) -> Runner:
        """Prepares dx."""
        return _call(problem).run

    def wgrad(self, problem: Problem) -> Runner:
        """Prepares dw."""
        found = choice.best_cuda_wgrad(problem)
        if isinstance(found, choice.WideWgradChoice):
            return WideWgradCall(problem, found).run
        return NarrowWgradCall(problem, found).run


def _call(problem: Problem) -> NarrowCall | WideCall | ScatteredCall:
    found = choice.best_cuda_gather(problem)
    if isinstance(found, choice.ScatteredChoice):
        return ScatteredCall(problem, found)
    if isinstance(found, choice.WideChoice):
        return WideCall(problem, found)
    return NarrowCall(problem, found)


def _layout_reasons(problem: Problem) -> list[str]:
    """Says what 16-byte accesses to channels need and the operands do not have."""
    support, wide, reasons = problem.support, vector(problem.dtype), []
    read = {
        "fprop": (("channels", support.channels),),
        "dgrad": (("filters", support.filters),),
        "wgrad": (("channels", support.channels), ("filters", support.filters)),
    }[problem.verb]
    for name, count in read:
        if count % wide:
            reasons.append(f"There are {count} {name}, which is no multiple of {wide}.")
    shape = problem.x_shape if problem.verb == "fprop" else problem.y_shape
    pairs = list(zip(problem.strides, shape, strict=True))
    apart = [stride for stride, size in (pairs[0], *pairs[2:]) if size > 1]
    if not problem.channels_last or (shape[1] > 1 and problem.strides[1] != 1):
        reasons.append("The operands are not channels_last.")
    elif any(stride % wide for stride in apart):
        reasons.append(f"Pixels lie {apart} elements apart, not multiples of {wide}.")
    elif element_span(shape, problem.strides) > MAX_SPAN:
        reasons.append("The elements of one image span more than 2**30 places.")
    return reasons


@cache
def _build_reasons(index: int) -> list[str]:
    """Says what this build lacks for a GPU, or for its driver."""
    from ... import _cuda

    major, minor = torch.cuda.get_device_capability(index)
    names = _cuda.architectures().split("_")
    built = [divmod(int(re.sub(r"\D", "", name)), 10) for name in names]
    # Machine code runs within its generation; PTX is there for the newest one only.
    runs = any(a == major and b <= minor for a, b in built) or ((12, 0) in built and major > 12)
    if not runs:
        return [
            f"It was built for compute capabilities {', '.join(names)}, not for {major}.{minor}; "
            "build it again with HETCONV_CUDA_ARCHS=native."
        ]
    runtime, driver = _cuda.versions()
    if driver // 1000 < runtime // 1000:
        return [
            f"The driver is for CUDA {driver // 1000}.{driver % 1000 // 10}, older than the "
            f"{runtime // 1000}.{runtime % 1000 // 10} that it was built with."
        ]
    return []
