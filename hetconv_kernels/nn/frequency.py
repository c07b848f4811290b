# SPDX-License-Identifier: Apache-2.0
"""FrequencyConv2d: a convolution whose kernels are sparse in the frequency domain."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from .. import masking, ops
from ..autograd import transforms_active
from ..errors import ArgumentError, InputTypeError, SupportError, mismatch
from ..functional import _autocasting, conv2d, fprop_problem
from ..masks import kernel_pair
from ..observers import observed, sizes
from ..packing import FrozenCache, dense_weight, owned
from ..problem import Geometry, Problem, make_geometry
from ..support import Support
from .base import STAND_IN, ForcedBackend, as_step
from .conv import SupportConv2d
from .dct import dct, dct_basis, to_spatial
from .extra_state import described_by, extra_state
from .frequency_cost import frequency_seconds, spatial_seconds
from .frequency_weights import image_sums, spatial_cache

PATHS = ("auto", "frequency", "spatial")
Band = tuple[int, int]

# Shapes of inputs whose way is remembered.
_MOST_PATHS = 128


class FrequencyConv2d(ForcedBackend):
    """A convolution with weights that exist for some frequencies only: drop-in for ``nn.Conv2d``.

    ⟨patch, w⟩ = ⟨B·patch, B·w⟩ for an orthonormal B, here the 2-D DCT. So the layer is a fixed
    depthwise transform of C channels to C·(live frequencies) maps, followed by a 1×1 convolution
    with the Support of the live coefficients. Frequencies that no coefficient of the layer has are
    not computed. Whether that is faster than the dense convolution with the kernels transformed
    back depends: the transform alone costs C·KH·KW multiply-accumulates for each pixel and
    frequency. ``path="auto"`` predicts, and takes the faster one.

    Source: Liu, Xu, Peng, Xiong, "Frequency-domain dynamic pruning for convolutional neural
    networks", NeurIPS 2018. Our reading; no code was published.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
        padding_mode, device, dtype, backend: as `SupportConv2d`; padding is with zeros.
        coefficients: which exist; None is all.  # bool [F, C, KH, KW]
        path: ``"auto"``, ``"frequency"`` or ``"spatial"``.

    Shape:
        input [N, C, H, W] or [C, H, W], output [N, F, OH, OW] or [F, OH, OW].

    Raises:
        ArgumentError: a value out of range.
        SupportError: ``coefficients`` has another shape, or keeps none at all.
    """

    mix: SupportConv2d
    basis: Tensor

    # The kept spatial weights, and of which Support.
    _held: tuple[Support, FrozenCache] | None = None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | str | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        coefficients: npt.ArrayLike | None = None,
        path: str = "auto",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        kernel = kernel_pair(kernel_size)
        if groups != 1 or padding_mode != "zeros":
            raise ArgumentError(
                mismatch(
                    "FrequencyConv2d",
                    f"groups={groups}, padding_mode={padding_mode!r}",
                    "groups=1 and padding_mode='zeros'",
                )
            )
        if path not in PATHS:
            raise ArgumentError(mismatch("path", repr(path), f"one of {PATHS}"))
        dense = Support.dense(in_channels, out_channels, kernel)
        shape = dense.shape
        chosen = np.ones(shape, bool) if coefficients is None else np.asarray(coefficients)
        if chosen.shape != shape or chosen.dtype != np.bool_ or not chosen.any():
            raise SupportError(
                mismatch(
                    "coefficients",
                    f"{chosen.dtype} {chosen.shape}, {int(chosen.sum())} of them",
                    f"bool {shape}, at least one True",
                )
            )
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, kernel
        self.groups, self.padding_mode, self.path = groups, padding_mode, path
        self._spatial = make_geometry(dense, stride, padding, dilation)
        given = self._spatial.symmetric_padding or self._spatial.pads
        self.padding: str | tuple[int, ...] = padding if isinstance(padding, str) else given
        self._spatial_frozen = replace(self._spatial, frozen=True)
        self.stride, self.dilation = self._spatial.stride, self._spatial.dilation
        self._paths: dict[Any, str] = {}
        self._build(chosen, bias, device, dtype)
        self.backend = backend
        self.reset_parameters()

    def _build(
        self, chosen: Any, bias: bool, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        """Makes the parts for the live frequencies."""
        f, c = chosen.shape[:2]
        flat = chosen.reshape(f, c, -1)
        live = np.flatnonzero(flat.any(axis=(0, 1)))
        self.live_frequencies: tuple[int, ...] = tuple(live.tolist())
        count = len(live)
        support = Support.from_mask(flat[:, :, live].reshape(f, c * count, 1, 1), "frequency")
        self.mix = SupportConv2d(
            c * count, f, 1, bias=bias, device=device, dtype=dtype, support=support
        )
        self._transform = Geometry(
            Support.grouped(c, c * count, self.kernel_size, c),
            self._spatial.stride,
            self._spatial.pads,
            self._spatial.dilation,
        )
        self._transform_frozen = replace(self._transform, frozen=True)
        basis = dct_basis(self.kernel_size)[live].repeat(c, 1, 1)[:, None]
        self.register_buffer("basis", owned(basis.to(self.mix.weight)), persistent=False)
        self._paths.clear()
        self._held = None

    @property
    def bands(self) -> tuple[Band, ...]:
        """The frequencies (u, v) that some coefficient of the layer has."""
        width = self.kernel_size[1]
        return tuple((i // width, i % width) for i in self.live_frequencies)

    @property
    def weight(self) -> nn.Parameter:
        """The coefficients, dead ones zero.  # [F, C·live frequencies, 1, 1]"""
        return self.mix.weight

    @property
    def bias(self) -> nn.Parameter | None:
        """Added per filter.  # [F]"""
        return self.mix.bias

    def live_parameters(self) -> int:
        """Counts the coefficients that exist, and the bias."""
        return self.mix.live_parameters()

    def reset_parameters(self) -> None:
        """Initialises like ``nn.Conv2d``, by each filter's live coefficients."""
        self.mix.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Convolves.  # [N, C, H, W] -> [N, F, OH, OW]"""
        if type(x) is STAND_IN:
            recorded: Tensor = as_step(self, x)
            return recorded
        if x.dim() == 3:
            return self.forward(x.unsqueeze(0)).squeeze(0)
        # Not by attributes: every one of a Module's parts costs a search.
        mix: Any = self._modules["mix"]
        code, path = self._backend_code(), self.path
        weight, bias = mix._operands()
        seen = observed(x, weight)
        # Derived weights are kept of a frozen layer, in an ordinary call.
        kept = mix._geometry.frozen and not seen
        if path == "auto":
            path = self._faster(x, x.shape if kept else sizes(x), code)
        if path == "frequency":
            # Not a Parameter: the transform is fixed, and its gradient is not computed.
            if kept and self.basis.dtype == x.dtype:
                maps = conv2d(x, self._kept_basis(), None, self._transform_frozen, code)
            else:
                maps = conv2d(x, self.basis.to(x.dtype), None, self._transform, code)
            return self.mix(maps)
        if not kept:
            back = None if seen else self._summed(weight, x)
            if back is None:
                back = self._transformed(self._masked(), not seen)
            return conv2d(x, back, bias, self._spatial, code)
        derived = self._kept_spatial_weight(weight)
        if torch.is_grad_enabled() or transforms_active() or _autocasting(x):
            return conv2d(x, derived, bias, self._spatial_frozen, code)
        return ops.run_fprop(x, derived, self._spatial_frozen, bias, code, False)

    def problem(self, x: Tensor, frozen: bool = False) -> Problem:
        """Describes the convolution that this layer is, with its kernels in space.

        It is what engines are asked about on the path ``"spatial"``; by way of the frequencies the
        layer asks for two other convolutions, which `predicted` counts.

        Args:
            x: the input.  # [N, C, H, W] or [C, H, W]
            frozen: whether to describe the call after ``mix.freeze``.

        Raises:
            ArgumentError, InputTypeError: as the forward.
        """
        x, kept = x.unsqueeze(0) if x.dim() == 3 else x, frozen or self.mix.frozen
        geometry = self._spatial_frozen if kept else self._spatial
        support = geometry.support
        weight = self.weight.new_empty((support.live,) if kept else support.shape)
        return fprop_problem(x, weight, geometry, self.bias)

    def _kept_basis(self) -> Tensor:
        """Returns the transform's weights as the live vector of its Support."""
        if self.basis.is_inference():
            self.basis = owned(self.basis)
        cache: FrozenCache = self._transform.support.derived.setdefault(
            "basis", FrozenCache(lambda basis: owned(basis.flatten().clone()), "frequency")
        )
        flat: Tensor = cache(self.basis)
        return flat

    def _kept_spatial_weight(self, weight: Tensor) -> Tensor:
        """Returns the frozen spatial weight as the live vector of a dense Support, kept."""
        mix: Any = self._modules["mix"]
        support: Support = mix._geometry.support
        held = self._held  # a search by all that decides it takes longer than the rest
        if held is None or held[0] is not support:
            held = self._held = (
                support,
                spatial_cache(support, self.in_channels, self.kernel_size, self.live_frequencies),
            )
        cache = held[1]
        flat: Tensor = cache(weight)
        return flat

    def spatial_weight(self) -> Tensor:
        """Transforms the coefficients back.  # [F, C, KH, KW]"""
        return self._transformed(self._masked())

    def _masked(self) -> Tensor:
        """Returns the coefficients with zeros where none exist; gradients go through."""
        mix = self.mix
        if mix.frozen:
            return mix.dense_weight()
        weight = mix.weight
        # Not a product: a dead coefficient may hold anything, NaN too.
        return weight if mix.support.is_dense else dense_weight(mix.support, weight, weight.dtype)

    def _transformed(self, masked: Tensor, multiplied: bool = False) -> Tensor:
        images = self.basis[: len(self.live_frequencies), 0]
        return to_spatial(masked, self.in_channels, images, multiplied)

    def _summed(self, weight: Tensor, x: Tensor) -> Tensor | None:
        """Transforms back by the compiled engine, for a call that nobody observes, if it can."""
        mix: Any = self._modules["mix"]
        support: Support = mix._geometry.support
        if (
            weight.dtype is not torch.float32
            or not weight.is_cpu
            or not weight.is_contiguous()
            or weight.shape[0] != support.filters
            or (weight.requires_grad and torch.is_grad_enabled())
            or transforms_active()
            or masking.native_engine() is None
        ):
            return None
        sums = image_sums(support, self.kernel_size, self.live_frequencies, not x.is_contiguous())
        # Where a gradient is wanted the convolution keeps its weight.
        return sums(weight, brief=not torch.is_grad_enabled())

    def path_for(self, x: Tensor) -> str:
        """Says which way an input goes: ``"frequency"`` or ``"spatial"``; predicted for auto."""
        return self.path if self.path != "auto" else self._faster(x, sizes(x), self._backend_code())

    def _faster(self, x: Tensor, shape: Sequence[int], code: int) -> str:
        frozen = self._modules["mix"]._geometry.frozen  # type: ignore[union-attr]
        key = (shape, x.dtype, x.device, x.is_contiguous(), code, frozen)
        path = self._paths.get(key)
        if path is None:
            there, back = self.predicted(x)
            if len(self._paths) >= _MOST_PATHS:
                self._paths.clear()
            path = self._paths[key] = "frequency" if there < back else "spatial"
        return path

    def predicted(self, x: Tensor, frozen: bool | None = None) -> tuple[float, float]:
        """Predicts both ways of a call, with what has to be derived from the weights for it.

        Args:
            x: an input; only its shape, layout, dtype and device count.
            frozen: as if the layer were frozen, or not; None for as it is.

        Returns:
            Seconds by way of the frequencies, and in space.
        """
        frozen = self.mix.frozen if frozen is None else frozen
        return frequency_seconds(self, x, frozen), spatial_seconds(self, x, frozen)

    @classmethod
    def from_conv2d(cls, conv: nn.Conv2d, coefficients: npt.ArrayLike, **kwargs: Any) -> Self:
        """Takes over a convolution's arguments and transforms its kernels.

        Args:
            conv: an ``nn.Conv2d`` with groups=1, padded with zeros.
            coefficients: which exist; the others are dropped.  # bool [F, C, KH, KW]
            **kwargs: keyword-only extras of the class.

        Raises:
            InputTypeError: ``conv`` is not an ``nn.Conv2d``.
            ArgumentError, SupportError: see the class.
        """
        if not isinstance(conv, nn.Conv2d):
            raise InputTypeError(mismatch("conv", type(conv).__name__, "an nn.Conv2d"))
        layer = cls(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding,
            conv.dilation, conv.groups, conv.bias is not None, conv.padding_mode,
            conv.weight.device, conv.weight.dtype, coefficients=coefficients, **kwargs,
        )  # fmt: skip
        live = list(layer.live_frequencies)
        with torch.no_grad():
            coefficient = dct(conv.weight.detach().double()).flatten(2)[:, :, live]
            layer.mix.weight.copy_(coefficient.reshape(layer.mix.weight.shape))
            layer.mix.project_()
            if conv.bias is not None and layer.mix.bias is not None:
                layer.mix.bias.copy_(conv.bias)
        layer.mix.weight.requires_grad_(conv.weight.requires_grad)
        return layer.train(conv.training)

    def to_conv2d(self) -> nn.Conv2d:
        """Returns the ``nn.Conv2d`` that computes the same, with copies of the parameters."""
        bias, weight = self.mix.bias, self.spatial_weight().detach()
        conv = nn.Conv2d(
            self.in_channels, self.out_channels, self.kernel_size, self.stride,
            self.padding, self.dilation, bias=bias is not None,  # type: ignore[arg-type]
            device=weight.device, dtype=weight.dtype,
        )  # fmt: skip
        with torch.no_grad():
            conv.weight.copy_(weight)
            if bias is not None and conv.bias is not None:
                conv.bias.copy_(bias)
        return conv.train(self.training)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.basis = owned(self.basis)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_held": None}  # what copies hold is made of their own weights

    def get_extra_state(self) -> Tensor:
        """Saves which frequencies are live, as a tensor.  # uint8"""
        return extra_state({"live_frequencies": list(self.live_frequencies)})

    def set_extra_state(self, state: Any) -> None:
        """Is done by `_load_from_state_dict`, before the parts are loaded."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        state = state_dict.get(prefix + "_extra_state")
        if state is not None:
            self._adopt([int(i) for i in described_by(state, "live_frequencies")])
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _adopt(self, live: list[int]) -> None:
        """Rebuilds the parts for the frequencies of a checkpoint."""
        taps = math.prod(self.kernel_size)
        if not live or not set(live) <= set(range(taps)):
            raise SupportError(mismatch("live frequencies", live, f"numbers from 0 to {taps - 1}"))
        if tuple(live) == self.live_frequencies:
            return
        chosen = np.zeros((self.out_channels, self.in_channels, taps), bool)
        chosen[:, :, live] = True
        weight, code = self.mix.weight, self._backend
        self._build(
            chosen.reshape(self._spatial.support.shape), self.bias is not None, weight.device,
            weight.dtype,
        )  # fmt: skip
        self.backend = code

    def extra_repr(self) -> str:
        """Says what ``nn.Conv2d`` says, the live frequencies and the path."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, frequencies={len(self.live_frequencies)} of "
            f"{math.prod(self.kernel_size)}, path={self.path!r}"
        )
