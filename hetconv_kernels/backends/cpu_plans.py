# SPDX-License-Identifier: Apache-2.0
"""cpu_plans: the native engine's lowerings of a Support, and what a call by each should take.

A lowering, `Plan` in csrc/cpu/plan.h, is made once and kept with the Support that it is of.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from .. import _cpu
from ..problem import Problem
from . import winograd
from .common import is_linear, is_pointwise
from .cost_model import (
    COLD_WEIGHT,
    DOUBT,
    ENGINE,
    EXPAND,
    FAR_COMPUTE,
    FAR_WEIGHT,
    GRADIENT,
    OVERHEAD,
    PACK,
    PACK_ALONE,
    PIXELS_OF_ROWS,
    VERB,
    WGRAD,
)
from .protocol import UNMEASURED_MARGIN

# The instruction set; "" takes the best one here, or what HETCONV_ISA says.
_ISA = ""
MOST_RESIDUES = 4096  # dgrad has a plan for each residue of the stride
# Bytes: of packed weights that stay in a processor's cache from one band of pixels to the next, and
# of a band, at most.
_NEAR, _BAND = 2**24, 2**21


def direct_plan(problem: Problem, form: str = "auto") -> Any:
    """Returns the lowering for fprop: by direct sums, unless a form is named."""
    return _kept(_cpu.Plan, problem, form)


def wgrad_plan(problem: Problem) -> Any:
    """Returns the lowering for wgrad."""
    return _kept(_cpu.Wgrad, problem, "auto")


def dgrad_plan(problem: Problem) -> Any:
    """Returns the lowerings for dgrad, one for each residue of the stride."""
    geometry, stride = problem.geometry, dgrad_stride(problem)
    key = ("cpu dgrad", _ISA, problem.dtype, problem.channels_last, stride)
    plan = geometry.derived.get(key)
    if plan is None:
        plan = geometry.derived[key] = _cpu.Dgrad(
            _mask(problem),
            stride,
            (geometry.pads[0], geometry.pads[2]),
            geometry.dilation,
            name_of_dtype(problem.dtype),
            _ISA,
            channels_last=problem.channels_last,
        )
    return plan


def chosen_plan(problem: Problem) -> Any:
    """Returns the plan that a call is run by: Winograd's where that is predicted to win.

    That has more weights, up to four times as many, which a layer of a network does not find near.
    """
    direct = direct_plan(problem)
    forms = winograd.forms(problem)
    if not forms:
        return direct
    try:
        transformed = [direct_plan(problem, form) for form in forms]
    except ValueError:  # fewer channels or filters than a vector has
        return direct
    fastest = min(transformed, key=lambda plan: _cold_seconds(problem, plan))
    margin = winograd.WINOGRAD_MARGIN * (1.0 if is_measured(problem) else UNMEASURED_MARGIN)
    seconds = _cold_seconds(problem, fastest) * margin
    return fastest if seconds <= _cold_seconds(problem, direct) else direct


def _cold_seconds(problem: Problem, plan: Any) -> float:
    """Predicts the time of one call whose packed weights come from main memory."""
    cold = plan.packed_elements * COLD_WEIGHT
    # Arithmetic takes twice as long there as where the rates were fitted, memory does not.
    return plan_seconds(problem, plan) + (cold / 2 if plan.half_vectors else cold)


def plan_seconds(problem: Problem, plan: Any, around: bool = True) -> float:
    """Predicts the time of one call of fprop or dgrad by a plan.

    Args:
        problem: the call.
        plan: of it.
        around: whether the layer's Python counts, see `cost_model.OVERHEAD`.
    """
    threads = torch.get_num_threads()
    transformed = winograd.tile_of(plan.form) > 0
    name = "pixels" if plan.form in ("pixels", "columns") else "filters"
    cost = winograd.executed(plan, problem) if transformed else plan.cost
    form, rows = ENGINE[name], is_linear(problem)
    python = OVERHEAD[f"{name} rows" if rows else name] if around else 0.0
    image = form.image * (PIXELS_OF_ROWS if rows and name == "pixels" else 1.0)
    pixels = problem.batch * math.prod(problem.output_size)
    one_row = rows or (is_pointwise(problem) and problem.channels_last)
    images = 1 if one_row else problem.batch
    pairs = _multiplies_pairs(problem)
    compute = (
        pixels * cost * form.operation
        + pixels * columns_of_tiles(problem) / (32 if pairs else 16) * form.load
        + images * cost * image
    )
    packing = 0.0
    if not problem.frozen_weight:
        expanded = math.prod(problem.support.shape) if problem.live_weight else 0
        hands = threads if plan.packed_elements > PACK_ALONE else 1
        packing = plan.packed_elements * PACK / hands + expanded * EXPAND
    weights = plan.packed_elements * form.packed
    if plan.packed_elements * 4 > _NEAR:
        band = pixels * problem.support.channels * (2 if pairs else 4)
        bands = math.ceil(band / _BAND)
        weights = plan.packed_elements * bands * FAR_WEIGHT
        compute *= FAR_COMPUTE
    seconds = compute * VERB[problem.verb] / threads + weights + packing + form.call + python
    whole = direct_plan(problem).packed_elements >= math.prod(problem.support.shape)
    return seconds * (DOUBT if whole else 1.0)


def wgrad_plan_seconds(problem: Problem, plan: Any) -> float:
    """Predicts the time of one call of wgrad by a plan."""
    pixels = problem.batch * math.prod(problem.output_size)
    fixed = math.prod(problem.support.shape) * GRADIENT + ENGINE["pixels"].call
    return pixels * plan.cost * WGRAD[plan.form] / torch.get_num_threads() + fixed


def is_measured(problem: Problem) -> bool:
    """Tells whether the seconds were fitted to such a call: in float32 with AVX-512.

    A vector instruction of bfloat16 pairs was seen to take as long as one of float32.
    """
    if problem.dtype == torch.float32:
        return bool(direct_plan(problem).isa.startswith("avx512"))
    return problem.verb != "wgrad" and _multiplies_pairs(problem)


def _multiplies_pairs(problem: Problem) -> bool:
    """Tells whether two channels of bfloat16 are multiplied by one instruction."""
    plan = direct_plan(problem)
    bf16 = problem.dtype == torch.bfloat16
    return bf16 and plan.form in ("filters", "pixel pairs") and bool(plan.isa == "avx512bf16")


def columns_of_tiles(problem: Problem) -> int:
    """Counts the columns that the tiles of at most eight filters read, one after the other."""
    return sum(-(-len(g.filters) // 8) * int(g.mask.sum()) for g in problem.support.groups)


def dgrad_stride(problem: Problem) -> tuple[int, int]:
    """Returns the stride whose residues dgrad has plans for.

    Where there is one output a stride has no meaning: one that has too many residues is left out.
    """
    stride = problem.geometry.stride
    if math.prod(stride) <= MOST_RESIDUES:
        return stride
    vertical, horizontal = (
        1 if count == 1 else step for count, step in zip(problem.output_size, stride, strict=True)
    )
    return vertical, horizontal


def name_of_dtype(dtype: torch.dtype) -> str:
    """Names a dtype as the engine does."""
    return str(dtype).removeprefix("torch.")


def _kept(make: Any, problem: Problem, form: str) -> Any:
    """Returns the engine's lowering of a Support, made by its class once and kept with it."""
    key = (make, _ISA, problem.dtype, form, problem.channels_last)
    plan = problem.support.derived.get(key)
    if plan is None:
        plan = problem.support.derived[key] = make(
            _mask(problem),
            name_of_dtype(problem.dtype),
            _ISA,
            form,
            channels_last=problem.channels_last,
        )
    return plan


def _mask(problem: Problem) -> Any:
    return np.ascontiguousarray(problem.support.mask).view(np.uint8)
