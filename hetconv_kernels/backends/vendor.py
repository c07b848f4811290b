# SPDX-License-Identifier: Apache-2.0
"""`vendor`: PyTorch's own convolution (oneDNN, cuDNN) on the masked dense weight.

It is the promise that `auto` is never slower than what the user had: a frozen weight is laid out
once, and that of an equal grouping or of a dense Support is passed on as it is, so a call is one
``torch.conv2d``. Any other weight is masked at each call, since its dead entries may hold anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import masking
from ..packing import FrozenCache, Pack, bits_on, dense_weight, masked, own_blocks
from ..problem import Problem, is_dense_shape
from . import prepacked
from .common import (
    crop_image,
    empty,
    epilogue,
    finish_in_place,
    has_idle_taps,
    is_linear,
    pad_image,
    to_format,
    weight_gradient,
)
from .cost_model import (
    EXPAND,
    MASK,
    MASK_CALL,
    TRANSPOSE,
)
from .dense_cost import dense_seconds
from .protocol import Runner


class Vendor:
    """``torch.conv2d`` and its two gradients, grouped where the Support is an equal grouping."""

    name = "vendor"

    def unsupported_reasons(self, problem: Problem) -> list[str]:
        """Refuses what PyTorch itself computes wrongly on a CPU (`benchmarks.pytorch_faults`).

        Its 16-bit convolutions by oneDNN (3.12) leave the weight gradient of taps that meet only
        padding unwritten, and the output of such layers may be wrong or end the process.
        """
        if (
            problem.device.type != "cpu"
            or problem.dtype.itemsize != 2
            or problem.geometry.symmetric_padding in ((0, 0), None)  # none, or padded beforehand
            or not has_idle_taps(problem)
        ):
            return []
        return [
            f"PyTorch's {problem.dtype} convolution on CPUs may be wrong, leave gradients "
            "unwritten or crash where a tap of the kernel meets nothing but padding, as here."
        ]

    def estimate(self, problem: Problem) -> float:
        """Predicts the time of the dense (or equally grouped) convolution, in seconds."""
        seconds = dense_seconds(problem, work=1 / (problem.support.uniform_groups or 1))
        masks = problem.verb != "wgrad" and problem.support.uniform_groups is None
        if masks and not problem.frozen_weight and problem.device.type == "cpu":
            transposed = problem.channels_last and problem.support.kernel != (1, 1)
            each = EXPAND if problem.live_weight else TRANSPOSE if transposed else MASK
            each = 0.0 if _multiplies_masked(problem) else each
            seconds += MASK_CALL + math.prod(problem.support.shape) * each
        return seconds

    def measured(self, problem: Problem) -> bool:
        """The rates were fitted on CPUs, in float32; elsewhere they are nominal."""
        return problem.device.type == "cpu" and problem.dtype == torch.float32

    def efficiency(self, problem: Problem) -> float:
        """Every weight of the dense (or equally grouped) convolution is multiplied."""
        return problem.support.density * (problem.support.uniform_groups or 1)

    def fprop(self, problem: Problem) -> Runner:
        """Prepares y = act(scale · conv(x, w) + shift + residual)."""
        each_time = self._fprop(problem)
        if not prepacked.takes(problem):
            return each_time
        prepare = prepacked.prepare_linear if _is_product(problem) else prepacked.convolution
        once, dtype = prepare(problem, self._dense(problem)), problem.dtype

        def run(
            x: Tensor,
            w: Tensor,
            scale: None,
            shift: Tensor | None,
            residual: Tensor | None,
        ) -> Tensor:
            if w.requires_grad or w.is_inference():  # nothing can be kept for such a weight
                return each_time(x, w, scale, shift, residual)
            if shift is not None and shift.dtype is not dtype:
                shift = shift.to(dtype)
            return once(x, w, shift, residual)

        return run

    def product(self, problem: Problem) -> Callable[[Tensor, Tensor, Tensor | None], Tensor] | None:
        """Prepares a fully-connected layer on rows of features, as ``nn.Linear`` has them.

        Returns:
            A callable (x, w, bias) -> y, None where it is none of ours.  # [..., C] -> [..., F]
        """
        if not _is_product(problem) or problem.device.type != "cpu":
            return None
        if _multiplies_masked(problem):
            bits = bits_on(problem.support, problem.device)
            return lambda x, w, bias: masking.multiply_masked(x, w, bits, bias)
        if prepacked.takes(problem):
            return prepacked.prepare_product(problem, self._dense(problem))
        support, dtype, multiply = problem.support, problem.dtype, F.linear
        shape = support.shape[:2]
        weight: Callable[[Tensor], Tensor]
        if support.is_dense and problem.weight_dtype == dtype:

            def weight(w: Tensor) -> Tensor:
                return w.view(shape)
        elif not problem.frozen_weight:
            make = self._weight(problem)

            def weight(w: Tensor) -> Tensor:
                masked_now: Tensor = make(w)
                return masked_now.view(shape)
        else:
            dense, key = self._dense(problem), ("vendor product", dtype)
            kept = FrozenCache(lambda w: dense(w).view(shape), "vendor")
            weight = support.derived.setdefault(key, kept)

        def run(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
            if bias is not None and bias.dtype is not dtype:
                bias = bias.to(dtype)
            return multiply(x, weight(w), bias)

        return run

    def _fprop(self, problem: Problem) -> Runner:
        """Prepares the same on a weight that may have changed since the last call."""
        geometry, dtype, conv2d = problem.geometry, problem.dtype, torch.conv2d
        padding, uneven = geometry.symmetric_padding or (0, 0), geometry.symmetric_padding is None
        groups = geometry.support.uniform_groups or 1
        stride, dilation = geometry.stride, geometry.dilation
        weight = self._weight(problem)

        def run_plain(
            x: Tensor, w: Tensor, _scale: None, shift: Tensor | None, _residual: None
        ) -> Tensor:
            if shift is not None and shift.dtype is not dtype:
                shift = shift.to(dtype)
            return conv2d(x, weight(w), shift, stride, padding, dilation, groups)

        def run(
            x: Tensor,
            w: Tensor,
            scale: Tensor | None,
            shift: Tensor | None,
            residual: Tensor | None,
        ) -> Tensor:
            if not problem.batch:
                return empty(problem.y_shape, x, problem)
            if uneven:
                x = pad_image(x, geometry.pads)
            if scale is None and dtype.itemsize > 2 and (shift is None or shift.dtype is dtype):
                # The convolution adds the bias as it writes; what is left works in place.
                y = conv2d(x, weight(w), shift, stride, padding, dilation, groups)
                if residual is not None:
                    y += residual
                y = finish_in_place(y, problem.act)
            else:
                y = conv2d(x, weight(w), None, stride, padding, dilation, groups)
                y = epilogue(y, scale, shift, residual, problem.act)
            return y.contiguous(memory_format=problem.format)

        def run_linear(
            x: Tensor, w: Tensor, _scale: None, shift: Tensor | None, _residual: None
        ) -> Tensor:
            if shift is not None and shift.dtype is not dtype:
                shift = shift.to(dtype)
            return F.linear(x.flatten(1), weight(w).flatten(1), shift)[:, :, None, None]

        fused = problem.act != "none" or {"scale", "residual"} & set(problem.epilogue)
        if fused or uneven or not problem.batch:
            return run
        return run_linear if _is_product(problem) else run_plain

    def dgrad(self, problem: Problem) -> Runner:
        """Prepares dx."""
        geometry = problem.geometry
        padding, uneven = geometry.symmetric_padding or (0, 0), geometry.symmetric_padding is None
        n, c, height, width = problem.x_shape
        if uneven:
            top, bottom, left, right = geometry.pads
            height, width = height + top + bottom, width + left + right
        weight = self._weight(problem)
        if _is_product(problem):
            return lambda dy, w: (dy.flatten(1) @ weight(w).flatten(1))[:, :, None, None]

        def run(dy: Tensor, w: Tensor) -> Tensor:
            if not n:
                return empty(problem.x_shape, dy, problem)
            dx, _, _ = torch.ops.aten.convolution_backward(
                dy,
                dy.new_empty(1).expand(n, c, height, width),
                weight(w),
                None,
                geometry.stride,
                padding,
                geometry.dilation,
                False,
                (0, 0),
                geometry.support.uniform_groups or 1,
                (True, False, False),
            )
            if uneven:
                dx = crop_image(dx, geometry.pads)
            return dx.contiguous(memory_format=problem.format)

        return run

    def wgrad(self, problem: Problem) -> Runner:
        """Prepares dw."""
        geometry, support = problem.geometry, problem.support
        padding, uneven = geometry.symmetric_padding or (0, 0), geometry.symmetric_padding is None
        groups, shape = support.uniform_groups or 1, _weight_shape(problem)
        stride, (step_h, step_w) = geometry.stride, geometry.stride
        # oneDNN 3.12's own choice of these pixels, for gradients of strided 1×1 kernels in float32
        # and bfloat16, goes beyond the end of its memory at some sizes: it crashes, or is wrong.
        sliced = problem.device.type == "cpu" and support.kernel == (1, 1) and stride != (1, 1)
        if sliced:
            uneven, stride, padding = any(geometry.pads), (1, 1), (0, 0)

        def gradient(dy: Tensor, x: Tensor) -> Tensor:
            if not problem.batch:
                return x.new_zeros(shape)
            if _is_product(problem):
                return (dy.flatten(1).T @ x.flatten(1))[:, :, None, None]
            if uneven:
                x = pad_image(x, geometry.pads)
            if sliced:
                x = x[:, :, ::step_h, ::step_w]
            _, dw, _ = torch.ops.aten.convolution_backward(
                dy,
                x,
                x.new_empty(1).expand(shape),
                None,
                stride,
                padding,
                geometry.dilation,
                False,
                (0, 0),
                groups,
                (False, True, False),
            )
            return dw

        def run(dy: Tensor, x: Tensor) -> Tensor:
            return weight_gradient(problem, gradient(dy, x))

        def run_grouped(dy: Tensor, x: Tensor) -> Tensor:
            # The live vector of an equal grouping is exactly nn.Conv2d's grouped weight.
            live = gradient(dy, x).to(problem.weight_dtype)
            if problem.live_weight:
                return live.reshape(problem.weight_shape)
            return to_format(problem, dense_weight(support, live, problem.weight_dtype))

        return run if groups == 1 else run_grouped

    @staticmethod
    def _dense(problem: Problem) -> Callable[[Tensor], Tensor]:
        """Returns what makes the weight that ``torch.conv2d`` takes from the canonical one."""
        support, dtype, layout = problem.support, problem.dtype, problem.format
        shape, groups = _weight_shape(problem), support.uniform_groups

        def build(w: Tensor) -> Tensor:
            if groups is None:
                dense = dense_weight(support, w, dtype)
            elif problem.live_weight or support.is_dense:
                dense = w.to(dtype).reshape(shape)
            else:
                dense = own_blocks(w.view(support.shape), groups).to(dtype)
            # PyTorch lays out a weight that it gets for one call by itself.
            return dense.contiguous(memory_format=layout) if problem.frozen_weight else dense

        return build

    def _weight(self, problem: Problem) -> Callable[[Tensor], Tensor]:
        """Returns what makes a dense weight, without work where it is dense already or frozen."""
        support, dtype, shape = problem.support, problem.dtype, _weight_shape(problem)
        groups, same = support.uniform_groups, problem.weight_dtype == dtype
        # An equal grouping's live entries, and a dense weight, are nn.Conv2d's own weight already.
        whole, layout = (
            groups is not None and (problem.live_weight or support.is_dense),
            problem.format,
        )
        if whole and same and problem.weight_shape == shape:
            return lambda w: w
        if whole and same and (problem.format == torch.contiguous_format or shape[2:] == (1, 1)):
            return lambda w: w.reshape(shape)
        build = self._dense(problem)
        if not problem.frozen_weight:
            # Masked for this call alone.
            if groups is None and same and is_dense_shape(support, problem.weight_shape):
                full, layout = support.shape, problem.format

                def mask(w: Tensor) -> Tensor:
                    # In the layout that the convolution would otherwise copy it to.
                    w = w if w.dim() == 4 else w.view(full)
                    return masked(support, w, brief=True, layout=layout)

                return Pack(mask, "vendor")
            return Pack(build, "vendor")
        key = ("vendor", dtype, problem.format)
        cache: FrozenCache = support.derived.setdefault(key, FrozenCache(build, "vendor"))
        return cache


def _multiplies_masked(problem: Problem) -> bool:
    """Tells whether a product masks a weight as it reads it, instead of a copy beforehand."""
    return (
        _is_product(problem)
        and not (problem.frozen_weight or problem.live_weight or problem.support.is_dense)
        and problem.device.type == "cpu"
        and problem.dtype == problem.weight_dtype == torch.float32
        and 0 < problem.batch <= masking.MOST_ROWS
        and masking.native_engine() is not None
    )


def _is_product(problem: Problem) -> bool:
    """Tells whether one product of matrices computes it."""
    return is_linear(problem) and problem.support.uniform_groups in (None, 1)


def _weight_shape(problem: Problem) -> tuple[int, int, int, int]:
    f, c, kh, kw = problem.support.shape
    return f, c // (problem.support.uniform_groups or 1), kh, kw
