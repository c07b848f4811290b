# SPDX-License-Identifier: Apache-2.0
"""verify: a rewritten network computes what the original computes, up to rounding."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import VerificationError
from ..measure.stats import live_weights
from ..testing import error_bound
from .copying import copied


class Match(NamedTuple):
    """How far two networks are apart.

    Attributes:
        error: the largest error of the new network's outputs.
        own: the original's largest rounding error.
        allowed: what the error may be.
    """

    error: float
    own: float
    allowed: float

    @property
    def ok(self) -> bool:
        """Whether the error is explained by rounding."""
        return self.error <= self.allowed

    def __str__(self) -> str:
        return (
            f"largest error {self.error:.2g}, allowed {self.allowed:.2g} "
            f"(the original's own rounding: {self.own:.2g})"
        )


@torch.no_grad()
def match(
    before: nn.Module,
    after: nn.Module,
    inputs: tuple[Any, ...],
    dtype: torch.dtype | None = None,
    depth: int = 1,
) -> Match:
    """Compares two networks on the inputs and on noise of their size.

    The truth is the original in float64. The new network may err by twice what the original errs
    at its own dtype, and by the rounding of one accumulation of the network's greatest depth
    (`error_bound`). For a float64 network its own rounding is that of its float32 copy, scaled by
    the ratio of the two precisions, with a factor of 32 for being another sample.

    Args:
        before: the original, in evaluation mode.
        after: the new network.
        inputs: arguments of the forward.
        dtype: what the new network computes in, if not in the original's: then the original's
            error there is its own rounding.
        depth: of accumulations that no layer's weights tell, such as the pixels of an average.
    """
    exact = copied(before).double()
    narrow = dtype is not None
    if dtype is None:
        dtype = next((t.dtype for t in _floats(tuple(before.parameters()))), torch.float32)
    coarse = copied(before).float() if dtype == torch.float64 else before
    if narrow:
        coarse = copied(before).to(dtype)
    depth = max(depth, *(_depth(module) for module in before.modules()))
    worst = Match(0.0, 0.0, 0.0)
    for given in (inputs, _noise(inputs)):
        truth = _floats(exact(*_cast(given, torch.float64)))
        result = _floats(after(*copy.deepcopy(given)))
        if dtype == torch.float64:
            ratio = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
            own = 16 * ratio * _largest(_floats(coarse(*_cast(given, torch.float32))), truth)
        else:
            cast = _cast(given, dtype) if narrow else copy.deepcopy(given)
            own = _largest(_floats(coarse(*cast)), truth)
            if narrow and own == float("inf"):
                own = 0.0  # an original that overflows there is no measure
        size = max((t.abs().max() for t in truth if t.numel()), default=torch.zeros(()))
        allowed = 2 * own + float(error_bound(size, depth, dtype))
        found = Match(_largest(result, truth), own, allowed)
        if not found.ok or found.error >= worst.error:
            worst = found
        if not found.ok:
            break
    return worst


def verify(
    before: nn.Module,
    after: nn.Module,
    inputs: tuple[Any, ...],
    what: str,
    dtype: torch.dtype | None = None,
    depth: int = 1,
) -> Match:
    """Compares two networks, see `match`.

    Raises:
        VerificationError: they differ by more than rounding.
    """
    found = match(before, after, inputs, dtype, depth)
    if not found.ok:
        raise VerificationError(
            f"{what} changes the outputs of the network: {found}. The network was left as it was. "
            "Its code may compute something that its trace does not show (branches, randomness, "
            "state); hetconv_kernels.convert works without a trace."
        )
    return found


def _depth(module: nn.Module) -> int:
    live = live_weights(module)
    filters = getattr(module, "out_channels", getattr(module, "out_features", 1))
    return 1 if live is None else max(1, live // max(1, filters))


def _cast(inputs: Any, dtype: torch.dtype) -> Any:
    def cast(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.to(dtype, copy=True) if leaf.is_floating_point() else leaf.clone()

    return pytree.tree_map(cast, inputs)


def _noise(inputs: Any) -> Any:
    generator = torch.Generator().manual_seed(0)

    def noise(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            return leaf
        drawn = torch.randn(leaf.shape, generator=generator).to(leaf)
        # Of the example's size, which the network was made for.
        return drawn * (leaf.double().square().mean().sqrt().to(leaf) if leaf.numel() else 1)

    return pytree.tree_map(noise, inputs)


def _floats(outputs: Any) -> list[Tensor]:
    leaves = pytree.tree_leaves(outputs)
    return [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]


def _largest(results: list[Tensor], truth: list[Tensor]) -> float:
    """Returns the largest difference; infinite where shapes or non-finite values differ."""
    if [t.shape for t in results] != [t.shape for t in truth]:
        return float("inf")
    worst = 0.0
    for result, true in zip(results, truth, strict=True):
        if not result.numel():
            continue
        same = (result.double() == true) | (result.isnan() & true.isnan())
        error = torch.where(same, 0.0, (result.double() - true).abs()).max()
        worst = max(worst, float("inf") if error.isnan() else float(error))
    return worst
