# SPDX-License-Identifier: Apache-2.0
"""Predicts what a dense convolution costs, PyTorch's or ours, by the rates of `cost_model`."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from ..problem import Problem
from ..support import Support
from . import prepacked
from .common import is_linear
from .cost_model import (
    BETWEEN_PROGRAMS,
    DENSE_RATES,
    DTYPE_SPEED,
    FILTERS_BLOCK,
    FRESH,
    LINEAR,
    LINEAR_FAR,
    NARROW_GROUPS,
    OVERHEAD,
    POINTWISE,
    PREPACKED_RATES,
    SMALL_CALL,
    SMALL_IMAGE,
    SMALL_MAC,
    SMALL_NCHW,
)
from .gpu.constants import GpuConstants, constants_of, dense_gpu_seconds
from .gpu.devices import GpuSpec, spec_of

# Bytes of weights that stay in a processor's cache from call to call.
_NEAR = 2**24
# Memory beyond this comes from the system at each call and goes back to it: the largest that glibc
# lets its threshold grow to.
_KEPT = 2**25


def dense_gpu_prediction(
    problem: Problem, spec: GpuSpec, constants: GpuConstants, work: float = 1.0, launches: int = 1
) -> float:
    """Predicts the time of cuDNN on a GPU, in seconds; arguments beyond it as `dense_seconds`."""
    (f, c, kh, kw), (oh, ow) = problem.support.shape, problem.output_size
    pixels = {
        "fprop": problem.batch * oh * ow,
        "dgrad": problem.batch * problem.height * problem.width,
        "wgrad": c * kh * kw,
    }[problem.verb]
    seconds = dense_gpu_seconds(
        problem.dense_macs * work,
        (pixels, c if problem.verb == "dgrad" else f),
        problem.bytes_moved,
        problem.dtype,
        spec,
        constants,
    )
    return seconds + launches * constants.launch


def outside_program(problem: Problem, seconds: float) -> float:
    """Adds to what a call of PyTorch's engine takes what it costs the network around it.

    A frozen layer of ours may be a step of a network's program, see `hk.optimize`. PyTorch's own
    convolution there is a call between two programs, and cannot write to the network's arena: the
    pages of a large output come fresh from the system. A call with an activation is always one of
    such a network, which alone fuses them.

    Args:
        problem: the call.
        seconds: what `vendor` is predicted to take for it.
    """
    if problem.verb != "fprop" or not problem.frozen_weight or problem.device.type != "cpu":
        return seconds
    size = math.prod(problem.y_shape) * problem.dtype.itemsize
    pages = size if problem.act != "none" and size > _KEPT else 0
    return seconds * BETWEEN_PROGRAMS + pages * FRESH / torch.get_num_threads()


def dense_seconds(
    problem: Problem, work: float = 1.0, launches: int = 1, around: bool = True
) -> float:
    """Predicts the time of a dense engine.

    Args:
        problem: what runs.
        work: the fraction of the dense multiply-accumulates that is executed.
        launches: kernels started.
        around: whether our layer's Python counts, see `cost_model.OVERHEAD`.

    Returns:
        Seconds.
    """
    macs = problem.dense_macs * work
    if problem.device.type != "cpu":
        device = problem.device
        return dense_gpu_prediction(problem, spec_of(device), constants_of(device), work, launches)
    pixels = problem.height * problem.width
    weights = math.prod(problem.support.shape) * work
    rates, ours = DENSE_RATES, OVERHEAD["vendor"]
    if is_linear(problem):
        rates = LINEAR if weights * problem.dtype.itemsize <= _NEAR else LINEAR_FAR
        ours = OVERHEAD["vendor rows"]
    if prepacked.takes(problem):
        rates = PREPACKED_RATES
    if not around:
        ours = 0.0
    if (
        rates is DENSE_RATES
        and problem.batch == 1
        and problem.support.channels * pixels <= SMALL_IMAGE
        and max(problem.support.kernel) <= 3
        and work == 1.0
    ):
        ours = OVERHEAD["vendor small"] if around else 0.0
        layout = 1.0 if problem.channels_last or problem.support.kernel == (1, 1) else SMALL_NCHW
        return macs * SMALL_MAC * layout + launches * SMALL_CALL + ours
    groups = problem.support.uniform_groups or 1
    if work == 1.0 and problem.verb == "fprop" and not is_linear(problem):
        # Filters go in blocks: one takes as long as a block.
        filters = problem.support.filters
        macs *= -(-filters // FILTERS_BLOCK) * FILTERS_BLOCK / max(1, filters)
        macs *= POINTWISE if problem.support.kernel == (1, 1) and rates is PREPACKED_RATES else 1.0
    width = problem.support.channels // groups
    if work < 1.0 and width <= max(NARROW_GROUPS):
        mac = next(mac for most, mac in NARROW_GROUPS.items() if width <= most)
        return macs * mac[problem.channels_last] + launches * rates.call + ours
    speed = torch.get_num_threads() * DTYPE_SPEED.get(problem.dtype, 1.0)
    return (
        macs * rates.mac / speed
        + weights * rates.weight
        + problem.bytes_moved * rates.byte
        + launches * rates.call
        + ours
    )


def plain_seconds(problem: Problem) -> float:
    """Predicts the plain layer that a layer with a Support replaced, zeros in its weight.

    Args:
        problem: of the layer with a Support, on a CPU.

    Returns:
        Seconds of ``nn.Conv2d`` or ``nn.Linear``, which lays nothing out in advance.
    """
    geometry = problem.geometry
    support = geometry.support
    if support.uniform_groups is None:
        f, c, kh, kw = support.shape
        support = Support.dense(c, f, (kh, kw))
    trained = replace(geometry, support=support, frozen=False)
    plain = replace(problem, geometry=trained)
    return dense_seconds(plain, work=1 / (support.uniform_groups or 1), around=False)
