# SPDX-License-Identifier: Apache-2.0
"""The gate: nothing is timed before it was shown to be right."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

# Rounding errors of a sum of d terms grow like sqrt(d)·u: with this factor the bound fails with a
# probability that is negligible even over millions of outputs (Higham and Mary 2019).
_CERTAINTY = 8.0
_ACCUMULATOR_ROUNDOFF = 2.0**-24  # fp32 accumulation, which every dtype here has
_PARTIAL_SUMS = 6.0  # parts of a sum that are rounded on their own stay within 6 sigma of it
_NETWORK_MARGIN = 16.0
_PRECISION_MARGIN = 3.0


@dataclass(frozen=True)
class Agreement:
    """Whether a result agrees with the truth.

    Attributes:
        ok: every element is within its bound.
        worst: the largest error over its own bound; at most 1 when ok.
        max_error: the largest absolute error.
    """

    ok: bool
    worst: float
    max_error: float

    def to_dict(self) -> dict[str, bool | float | None]:
        """Returns the fields as plain data; None stands for an infinite error, which JSON lacks."""
        worst, error = (v if math.isfinite(v) else None for v in (self.worst, self.max_error))
        return {"ok": self.ok, "worst": worst, "max_error": error}


@dataclass(frozen=True)
class Truth:
    """``F.conv2d(x, w·mask)`` in float64, and its gradients, each with an elementwise bound."""

    values: tuple[Tensor, ...]
    bounds: tuple[Tensor, ...]

    def match(self, results: Sequence[Tensor]) -> Agreement:
        """Compares output (and gradients) with the truth; NaN never matches."""
        worst = largest = 0.0
        for result, value, bound in zip(results, self.values, self.bounds, strict=True):
            error = (result.double() - value).abs()
            largest = max(largest, _finite_max(error))
            worst = max(worst, _finite_max(error / bound))
        return Agreement(worst <= 1.0, worst, largest)


def truth(
    x: Tensor, weight: Tensor, dy: Tensor | None, *, stride: int, padding: int, dtype: torch.dtype
) -> Truth:
    """Computes the truth and its bounds.

    The bound of an element is λ·sqrt(d)·2⁻²⁴·Σ|x||w| for the accumulation over d terms, plus the
    rounding of the result (and of partial sums, when a composition adds them) to ``dtype``.

    Args:
        x: the input, as the layer computes with it.  # [N, C, H, W]
        weight: the masked weight, likewise.  # [F, C, KH, KW]
        dy: the gradient of the output; None when only the output is wanted.  # [N, F, OH, OW]
        stride: in pixels.
        padding: in pixels, on every side.
        dtype: of the results.
    """

    def passes(x: Tensor, w: Tensor, dy: Tensor | None = None) -> tuple[Tensor, ...]:
        if dy is None:
            return (functional.conv2d(x, w, None, stride, padding),)
        with torch.enable_grad():
            leaves = (x.detach().requires_grad_(), w.detach().requires_grad_())
            y = functional.conv2d(*leaves, None, stride, padding)
            return (y.detach(), *torch.autograd.grad(y, leaves, dy))

    tensors = [t.detach().double() for t in (x, weight, dy) if t is not None]
    values = passes(*tensors)
    sizes = passes(*(t.abs() for t in tensors))
    sigmas = passes(*(t.square() for t in tensors))
    live = int(weight.ne(0).sum(dim=(1, 2, 3)).max())
    fan_out = int(weight.ne(0).sum(dim=(0, 2, 3)).max())
    depths = (live, fan_out, x.shape[0] * values[0].shape[2] * values[0].shape[3])
    rounding = torch.finfo(dtype).eps / 2
    tiny = torch.finfo(dtype).tiny
    bounds = []
    for value, size, sigma, depth in zip(values, sizes, sigmas, depths, strict=False):
        accumulated = _CERTAINTY * max(depth, 1) ** 0.5 * _ACCUMULATOR_ROUNDOFF * size
        rounded = 2 * rounding * (value.abs() + _PARTIAL_SUMS * sigma.sqrt())
        bounds.append(accumulated + rounded + tiny)
    return Truth(values, tuple(bounds))


class NetworkTruth:
    """What a network makes of the first and the last image, in float64; computed once.

    Args:
        network: in float32.  # in PyTorch's own layers
        x: the images.
    """

    def __init__(self, network: nn.Module, x: Tensor) -> None:
        self.network, self.images = network, ends(x)
        self.exact: Tensor = copy.deepcopy(network).double()(self.images.double())
        self._errors: dict[str, Tensor] = {}

    def match(self, result: Tensor, dtype: str = "float32") -> Agreement:
        """Compares a result of all images.

        No bound through tens of layers is tight, so rounding is measured. In float32 the largest
        error may be `_NETWORK_MARGIN` times the largest one that the network itself makes (other
        engines use transforms that round more, Winograd's among them), plus some roundings of the
        result. In bfloat16 and int8 the root mean square may be `_PRECISION_MARGIN` times that of
        the network itself, in bfloat16, or with the weights and the inputs of its convolutions and
        linear layers rounded to 8 bits (`rounded_to_8_bits`). Engines choose other scales and round
        other tensors too; a wrong sum is off by far more.

        Args:
            result: of whoever is judged.
            dtype: ``float32``, ``bfloat16`` or ``int8``.
        """
        error, own = ends(result).double() - self.exact, self._own_error(dtype)
        largest = _finite_max(error.abs())
        if dtype == "float32":
            roundings = 64 * torch.finfo(torch.float32).eps * self.exact.abs().max()
            worst = float(error.abs().max() / (_NETWORK_MARGIN * own.abs().max() + roundings))
        else:
            worst = float(_rms(error) / (_PRECISION_MARGIN * _rms(own)))
        worst = worst if worst == worst else math.inf
        return Agreement(worst <= 1.0, worst, largest)

    def _own_error(self, dtype: str) -> Tensor:
        """Returns how the network itself errs in a precision."""
        if dtype not in self._errors:
            network, images = self.network, self.images
            if dtype == "int8":
                network = rounded_to_8_bits(network)
            elif dtype == "bfloat16":
                network, images = copy.deepcopy(network).bfloat16(), images.bfloat16()
            self._errors[dtype] = network(images).double() - self.exact
        return self._errors[dtype]


def ends(images: Tensor) -> Tensor:
    """Returns the first and the last image; of a single one no second copy."""
    return images[[0, -1]] if len(images) > 1 else images


def rounded_to_8_bits(network: nn.Module) -> nn.Module:
    """Copies a network; the copy rounds what its convolutions and linear layers multiply.

    Weights are rounded to 127 steps a side per filter, inputs to 255 steps from the least to the
    greatest value, the zero among them.
    """
    rounded = copy.deepcopy(network)
    for module in rounded.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            weight = module.weight.detach()
            step = weight.abs().amax(tuple(range(1, weight.dim())), keepdim=True) / 127
            step = torch.where(step == 0, 1.0, step)
            module.weight = nn.Parameter((weight / step).round() * step, requires_grad=False)
            module.register_forward_pre_hook(lambda _module, args: (_rounded(args[0]),))
    return rounded


def _rounded(x: Tensor) -> Tensor:
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    step = (high - low) / 255 or 1.0
    zero = round(-low / step)
    return (((x / step).round() + zero).clamp(0, 255) - zero) * step


def _rms(values: Tensor) -> Tensor:
    return values.square().mean().sqrt()


def results_of(call: Callable[[], object]) -> tuple[Tensor, ...]:
    """Runs a call once and returns its output, and gradients if it gives them."""
    result = call()
    tensors = result if isinstance(result, tuple) else (result,)
    return tuple(t.detach() for t in tensors if isinstance(t, Tensor))


def _finite_max(values: Tensor) -> float:
    if values.numel() == 0:
        return 0.0
    largest = float(values.max())
    return largest if largest == largest else float("inf")
