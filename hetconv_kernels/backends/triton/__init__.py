# SPDX-License-Identifier: Apache-2.0
"""`triton`: fprop, dgrad and wgrad on NVIDIA GPUs from sm_80 on, for bf16, fp16 and float32.

Built and checked by the interpreter and by ahead-of-time compilation; **no GPU has measured it**.
Triton itself is imported when a call is first prepared.
"""

from __future__ import annotations

import os
from functools import cache
from importlib import metadata
from math import prod
from typing import TYPE_CHECKING

import torch

from ...problem import Problem
from ..gpu import parts
from ..gpu.constants import constants_of
from ..gpu.devices import gpu_reasons
from ..protocol import Runner
from . import choice, table, wgrad_choice
from .picking import all_choices, pick_choice
from .words import MAX_TAPS

if TYPE_CHECKING:
    from .calls import GatherCall

_VERSIONS = ((3, 6), (3, 9))
_MAX_INT = 2**31 - 1
# Room for tiles, whose numbers are 32-bit integers, beyond the end of a list.
_ROOM = 2**16
# dgrad runs one row of the grid for each residue class of the stride; this is CUDA's limit.
_MOST_CLASSES = 2**16 - 1
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Triton:
    """The engine in Triton; its lowerings are kept with the Support that they were made from."""

    name = "triton"
    # Filters of a tile and channels of a step at the full rate of the matrix unit.
    grain = (64, 64)

    def unsupported_reasons(self, problem: Problem) -> list[str]:
        """Refuses other devices, old parts, float64, and sizes beyond the kernels' integers."""
        reasons = []
        if problem.device.type == "cuda":
            reasons += gpu_reasons(problem.device.index or 0)
        elif problem.device.type != "cpu" or not _interpreted():
            reasons.append(f"The tensors are on {problem.device}, not on an NVIDIA GPU.")
        if reasons:
            return reasons
        reasons += _version_reasons()
        if problem.dtype not in _DTYPES:
            reasons.append(f"{problem.dtype} has no matrix instructions that Triton uses.")
        support = problem.support
        if max(support.kernel) > MAX_TAPS:
            reasons.append(f"The kernel has more than {MAX_TAPS} taps along one axis.")
        if support.channels > 2**24 or support.filters > 2**24:
            reasons.append("There are more than 2**24 channels or filters.")
        oh, ow = problem.output_size
        pixels = max(problem.height * problem.width, oh * ow)
        if problem.batch * pixels > _MAX_INT - _ROOM:
            reasons.append("The batch has more than 2**31 - 65537 pixels.")
        geometry = problem.geometry
        reach = [p + (k - 1) * d + s for p, k, d, s in zip(
            (max(geometry.pads[:2]), max(geometry.pads[2:])),
            support.kernel, geometry.dilation, geometry.stride, strict=True,
        )]  # fmt: skip
        if max(reach) + max(problem.height, problem.width, oh, ow) > _MAX_INT:
            reasons.append("Padding, dilation and stride reach beyond 32-bit places.")
        if problem.verb == "dgrad" and prod(geometry.stride) > _MOST_CLASSES:
            reasons.append(f"The stride has more than {_MOST_CLASSES} residue classes.")
        f, c, kh, kw = support.shape
        if (f + 127) * (c + 127) * kh * kw > _MAX_INT:
            reasons.append("The packed weights may have more than 2**31 - 1 elements.")
        if reasons:
            return reasons
        span = max(abs(stride) for stride in problem.strides[1:])
        if span * max(problem.height, problem.width, oh, ow, c, f) > 2**62:
            reasons.append("The strides of the image are beyond 64-bit addresses.")
        elif parts.WITHOUT:
            gradient = problem.verb == "wgrad"
            pointers = parts.left_out("triton-wgrad" if gradient else "triton-gather")
            # Only boxes are left, where they can be used at all.
            reasons += [pointers] if pointers and not all_choices(problem) else []
        return reasons

    def estimate(self, problem: Problem) -> float:
        """Predicts the time by the cost model of `tiles`, in seconds; nominal, not measured."""
        return pick_choice(problem).seconds / constants_of(problem.device).ours[self.name]

    def measured(self, problem: Problem) -> bool:
        """Whether the GPU was calibrated, or the table of tiles has such a problem; none yet."""
        return constants_of(problem.device).measured or table.look_up(problem) is not None

    def efficiency(self, problem: Problem) -> float:
        """Useful over executed multiply-accumulates; filled tiles and merged groups count."""
        return pick_choice(problem).efficiency

    def notes(self, problem: Problem) -> list[str]:
        """Says, for `explain`, what is run, and what the problem's order or layout costs."""
        chosen = pick_choice(problem)
        found = [f"It runs tile {chosen.name}."]
        if chosen.reordered:
            found.append(
                "Its groups' channels are not adjacent: a gather, counted in "
                "backends.triton.launch.CONVERSIONS, copies them together at every call."
            )
        if chosen.lowering.coarse:
            found.append(
                "Its groups would fill the tiles badly: all filters are given all channels, dead "
                "weights as zeros."
            )
        if choice.has_tma(problem.device) and chosen.box is None and problem.verb != "wgrad":
            reasons = choice.tma_reasons(problem, chosen.reordered)
            found += [f"Without TMA: {reason}" for reason in reasons]
        return found

    def fprop(self, problem: Problem) -> Runner:
        """Prepares y = act(scale · conv(x, w) + shift + residual)."""
        return _call(problem).run

    def dgrad(self, problem: Problem) -> Runner:
        """Prepares dx."""
        return _call(problem).run

    def wgrad(self, problem: Problem) -> Runner:
        """Prepares dw."""
        from .wgrad_calls import WgradCall

        found = pick_choice(problem)
        assert isinstance(found, wgrad_choice.WgradChoice)
        return WgradCall(problem, found).run


def _call(problem: Problem) -> GatherCall:
    from .calls import GatherCall

    found = pick_choice(problem)
    assert isinstance(found, choice.GatherChoice)
    return GatherCall(problem, found)


def _interpreted() -> bool:
    """Whether Triton's interpreter runs kernels on CPU tensors; asked without importing Triton."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _version_reasons() -> list[str]:
    try:
        version = metadata.version("triton")
    except metadata.PackageNotFoundError:
        return []  # importable without metadata: a build of its own
    found = tuple(int(part) for part in version.split(".")[:2])
    if _VERSIONS[0] <= found <= _VERSIONS[1]:
        return []
    return [f"Triton {version} is installed; the engine was checked with 3.6 to 3.9."]
