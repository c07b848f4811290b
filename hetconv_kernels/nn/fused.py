# SPDX-License-Identifier: Apache-2.0
"""FusedConv2d: convolution, batch normalisation, residual and activation as one, for inference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, InputTypeError, SupportError, mismatch
from ..functional import fprop_problem, fused_conv2d
from ..packing import bits_on, dense_weight, forget, live_weight, owned
from ..pooling import Pool
from ..problem import ACTIVATIONS, Geometry, Problem, make_geometry
from ..support import Support
from .base import STAND_IN, ForcedBackend, as_step
from .conv import SupportConv2d, expanded_weight
from .extra_state import described_by, extra_state


class FusedConv2d(ForcedBackend):
    """act(conv(x) + shift + residual), with the scale of batch normalisation in the weight.

    Where it has a `Pool`, that is max-pooled, on a CPU while it is in the cache. Made by `fuse`.
    Holds the live weights as a buffer, nothing dense, and does not train. It is frozen: engines
    keep their packed form of the weight, and what ``SupportConv2d.freeze`` says of writes that are
    not seen holds here too; `freeze` after such a write.

    Shape:
        x [N, C, H, W], residual [N, F, OH, OW] and output the same, or what pooling makes of it.
    """

    weight: Tensor
    shift: Tensor

    def __init__(
        self,
        geometry: Geometry,
        weight: Tensor,
        shift: Tensor,
        act: str,
        backend: str | None,
        pool: Pool | None = None,
    ) -> None:
        super().__init__()
        if pool is not None:
            pool.check_values()
        self._geometry = replace(geometry, frozen=True)
        self.act, self.backend, self.pool = act, backend, pool
        self.register_buffer("weight", owned(weight))
        self.register_buffer("shift", owned(shift))

    @property
    def support(self) -> Support:
        """Which weights exist."""
        return self._geometry.support

    @property
    def frozen(self) -> bool:
        """Whether only the live weights are left: always."""
        return self._geometry.frozen

    def _apply(self, fn: Any, recurse: bool = True) -> FusedConv2d:
        super()._apply(fn, recurse)
        bits_on(self.support, self.weight.device)
        self._frozen_weight()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # copies and pickles
        if not self._geometry.frozen:  # older pickles
            self._geometry = replace(self._geometry, frozen=True)
        self._frozen_weight()

    def freeze(self) -> FusedConv2d:
        """Lets engines pack the weight anew, after a write to it that leaves no trace."""
        forget(self.support, self.weight)
        return self

    def _frozen_weight(self) -> Tensor:
        """Returns the weight, made anew first where it is an inference tensor."""
        weight = self.weight
        if not torch.compiler.is_compiling() and weight.is_inference() and not weight.is_meta:
            weight = self.weight = owned(weight)
        return weight

    def get_extra_state(self) -> Tensor:
        """Saves the Support beside the weight, as a tensor.  # uint8"""
        return extra_state({"support": self.support.to_json()})

    def set_extra_state(self, state: Any) -> None:
        """Refuses weights of another Support: live vectors of one length are not interchangeable.

        Raises:
            SupportError: the checkpoint has another Support.
        """
        saved = Support.from_json(described_by(state, "support"))
        if saved != self.support:
            raise SupportError(mismatch("Support of the checkpoint", saved, self.support))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Convolves and applies the epilogue in one pass.  # [N, C, H, W] -> [N, F, OH, OW]"""
        if type(x) is STAND_IN:
            recorded: Tensor = as_step(self, x, residual)
            return recorded
        return fused_conv2d(
            x,
            self._frozen_weight(),
            self._geometry,
            self._backend_code(),
            shift=self.shift,
            residual=residual,
            act=self.act,
            pool=self.pool,
        )

    def problem(self, x: Tensor, residual: Tensor | None = None) -> Problem:
        """Describes the call of this layer: what engines are asked about.

        Args:
            x: the input.  # [N, C, H, W]
            residual: added before the activation.  # [N, F, OH, OW]

        Raises:
            ArgumentError, InputTypeError: as the forward.
        """
        return fprop_problem(
            x, self.weight, self._geometry, self.shift, residual, self.act, self.pool
        )

    def extra_repr(self) -> str:
        """Says the Support and the activation."""
        f, c, kh, kw = self.support.shape
        pool = "" if self.pool is None else f"pool={tuple(self.pool)}, "
        return (
            f"{c}, {f}, kernel_size={(kh, kw)}, stride={self._geometry.stride}, act={self.act}, "
            f"{pool}support={self.support.kind}, density={self.support.density:.3g}"
        )


@torch.no_grad()
def fuse(
    conv: nn.Conv2d | SupportConv2d,
    bn: nn.BatchNorm2d | None = None,
    act: str = "none",
    pool: Pool | None = None,
) -> FusedConv2d:
    """Fuses a convolution with what follows it, for inference; the originals are left alone.

    Args:
        conv: an ``nn.Conv2d`` or a layer of this package, with zero padding.
        bn: the batch normalisation after it, with running statistics.
        act: ``"none"``, ``"relu"``, ``"relu6"``, ``"silu"`` or ``"gelu"``.
        pool: max-pooling after that, or None.

    Returns:
        A FusedConv2d that equals ``pool(act(bn(conv(x)) + residual))`` in evaluation mode.

    Raises:
        InputTypeError: ``conv`` is neither, or ``bn`` is no batch normalisation.
        ArgumentError: an unknown activation, another padding mode, a normalisation of another
            width or without running statistics.
    """
    if act not in ACTIVATIONS:
        raise ArgumentError(mismatch("act", repr(act), f"one of {', '.join(ACTIVATIONS)}"))
    if isinstance(conv, SupportConv2d):
        geometry, backend = conv._geometry, conv.backend
        weight = conv.weight.detach()
        dense = dense_weight(geometry.support, weight, weight.dtype)
    elif isinstance(conv, nn.Conv2d):
        dense, support = expanded_weight(conv)
        geometry, backend = make_geometry(support, conv.stride, conv.padding, conv.dilation), None
    else:
        raise InputTypeError(
            mismatch("conv", type(conv).__name__, "an nn.Conv2d or a layer of this package")
        )
    if conv.padding_mode != "zeros":
        raise ArgumentError(
            mismatch("padding_mode", conv.padding_mode, "'zeros'", "Leave this layer unfused.")
        )
    wide = torch.promote_types(dense.dtype, torch.float32)
    zeros = torch.zeros(conv.out_channels, dtype=wide, device=dense.device)
    shift = zeros if conv.bias is None else conv.bias.detach().to(wide)
    scale = zeros + 1
    if bn is not None:
        if not isinstance(bn, nn.modules.batchnorm._BatchNorm):
            raise InputTypeError(mismatch("bn", type(bn).__name__, "an nn.BatchNorm2d"))
        if bn.running_mean is None or bn.running_var is None:
            raise ArgumentError("bn has no running statistics; expected track_running_stats=True.")
        if bn.num_features != conv.out_channels:
            raise ArgumentError(mismatch("features of bn", bn.num_features, conv.out_channels))
        scale = torch.rsqrt(bn.running_var.to(wide) + bn.eps)
        scale = scale if bn.weight is None else scale * bn.weight.to(wide)
        shift = (shift - bn.running_mean.to(wide)) * scale
        shift = shift if bn.bias is None else shift + bn.bias.to(wide)
    scaled = (dense.to(wide) * scale[:, None, None, None]).to(dense.dtype)
    live = live_weight(geometry.support, scaled)
    return FusedConv2d(geometry, live, shift.to(dense.dtype), act, backend, pool)
