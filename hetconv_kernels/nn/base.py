# SPDX-License-Identifier: Apache-2.0
"""SupportConv2d: the drop-in layer that all the others are, and its life with a changing Support."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import backends
from ..errors import ArgumentError, InputTypeError, SupportError, mismatch
from ..functional import conv2d
from ..packing import bits_on, dense_weight, live_weight, mask_on
from ..problem import Geometry, make_geometry
from ..support import Support, kernel_pair

_PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


class SupportLayer(nn.Module):
    """What a layer with a Support does besides its forward: freezing, projection, checkpoints.

    The `weight` is an ordinary dense Parameter while training, so ``nn`` checkpoints, initialisers,
    weight decay, averaging and DDP work as they are. Dead entries are ignored by every engine and
    kept at zero by `project_`. `freeze` leaves only the live vector, `thaw` goes back.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    frozen: bool = False

    _geometry: Geometry
    # Layers whose Support follows from their arguments refuse a checkpoint that contradicts it.
    _fixed_support: Support | None = None

    @property
    def support(self) -> Support:
        """Which weights exist; assigning another one projects the weight onto it."""
        return self._geometry.support

    @support.setter
    def support(self, support: Support) -> None:
        self.set_support(support)

    @property
    def _dense_shape(self) -> tuple[int, ...]:
        """The shape of the weight while it is not frozen."""
        return self.support.shape

    def set_support(
        self, support: Support, optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        """Changes the Support and projects weight, gradient and optimiser slots onto it.

        Args:
            support: of the same shape as the present one.
            optimizer: the one that trains this layer, if its slots are to be projected too.

        Raises:
            SupportError: the shape differs, or the layer is frozen.
        """
        if support.shape != self.support.shape:
            raise SupportError(mismatch("Support of a layer", support.shape, self.support.shape))
        if self.frozen:
            raise SupportError("a frozen layer cannot change its Support. Call thaw() first.")
        self._place(support)
        self.project_(optimizer)

    def _place(self, support: Support) -> None:
        old = self._geometry
        self._geometry = Geometry(support, old.stride, old.pads, old.dilation)

    def live_parameters(self) -> int:
        """Counts the weights that exist, and the bias: the number that papers quote."""
        return self.support.live + (0 if self.bias is None else self.bias.numel())

    @torch.no_grad()
    def project_(self, optimizer: torch.optim.Optimizer | None = None) -> Self:
        """Zeroes dead entries in the weight, its gradient, and the optimiser's slots, in place.

        Args:
            optimizer: the one that trains this layer, if its slots are to be projected too.

        Returns:
            The layer itself.
        """
        if self._all_live:
            return self
        targets = [self.weight]
        if self.weight.grad is not None:
            targets.append(self.weight.grad)
        if optimizer is not None:
            slots = optimizer.state.get(self.weight, {}).values()
            targets += [s for s in slots if isinstance(s, Tensor) and s.shape == self.weight.shape]
        for target in targets:
            if not target.is_meta:
                target.masked_fill_(~self._mask(target.device), 0)
        return self

    @property
    def _all_live(self) -> bool:
        return self.frozen or self.support.is_dense

    def _mask(self, device: torch.device) -> Tensor:
        return mask_on(self.support, device).view(self._dense_shape)

    def freeze(self) -> Self:
        """Keeps only the live vector, for inference; engines then keep their packed form of it.

        Returns:
            The layer itself.
        """
        if not self.frozen:
            self._weight_trained = self.weight.requires_grad
            self.weight = nn.Parameter(self._to_live(self.weight.detach()), requires_grad=False)
            self.frozen = True
        return self

    def thaw(self) -> Self:
        """Goes back to a dense, trainable weight.

        Returns:
            The layer itself.
        """
        if self.frozen:
            dense = self._to_dense(self.weight.detach())
            self.frozen = False
            self.weight = nn.Parameter(dense, requires_grad=self._weight_trained)
        return self

    def _to_live(self, dense: Tensor) -> Tensor:
        return live_weight(self.support, dense.view(self.support.shape))

    def _to_dense(self, live: Tensor) -> Tensor:
        return dense_weight(self.support, live, live.dtype).view(self._dense_shape)

    @torch.no_grad()
    def _initialise(self) -> None:
        """Initialises like ``nn.Conv2d``, each filter by its *live* fan-in."""
        if self.weight.is_meta:
            return
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        fan_in = self._live_fan_in()
        full = math.prod(self.weight.shape[1:])
        gain = (full / fan_in.to(self.weight)).sqrt()
        self.weight *= gain.view(-1, *[1] * (self.weight.dim() - 1))
        if self.bias is not None:
            nn.init.uniform_(self.bias, -1, 1)
            self.bias /= fan_in.to(self.bias).sqrt()
        self.project_()

    def _live_fan_in(self) -> Tensor:
        """Counts the live weights of each filter, at least one.  # [F]"""
        mask = self.support.mask
        return torch.tensor(mask.sum((1, 2, 3)).clip(1), device=self.weight.device)

    # Moving and saving ------------------------------------------------------------------------

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        # The mask bits follow the weight here, so that no call has to move them.
        bits_on(self.support, self.weight.device)
        return self

    def get_extra_state(self) -> dict[str, str]:
        """Saves the Support beside the weight."""
        return {"support": self.support.to_json()}

    def set_extra_state(self, state: Any) -> None:
        """Is done by `_load_from_state_dict`, which needs the Support before the weight."""

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        extra = state_dict.get(prefix + "_extra_state")
        support = self.support if extra is None else self._adopted(extra)
        self._place(support)
        weight = state_dict.get(prefix + "weight")
        if weight is not None:
            state_dict[prefix + "weight"] = self._loaded(weight)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        # An nn.Conv2d checkpoint has no Support, and needs none.
        missing_keys[:] = [key for key in missing_keys if key != prefix + "_extra_state"]

    def _adopted(self, extra: Any) -> Support:
        """Reads a saved Support and refuses one that contradicts the layer."""
        if not isinstance(extra, dict) or "support" not in extra:
            raise SupportError(
                mismatch("extra state", type(extra).__name__, "what get_extra_state saved")
            )
        saved = Support.from_json(extra["support"])
        if saved.shape != self.support.shape:
            raise SupportError(
                mismatch("shape of the checkpoint's Support", saved.shape, self.support.shape)
            )
        fixed = self._fixed_support
        if fixed is not None and saved & fixed != saved:
            raise SupportError(
                mismatch(
                    "Support of the checkpoint",
                    saved,
                    f"weights within {fixed}",
                    "Build the layer with the order and p that the checkpoint was trained with.",
                )
            )
        return saved

    def _loaded(self, weight: Tensor) -> Tensor:
        """Brings a checkpoint's weight, dense or live, to the form that the layer has now."""
        support = self.support
        if weight.shape == (support.live,) and weight.shape != self._dense_shape:
            return weight if self.frozen else self._to_dense(weight)
        if weight.shape != self._dense_shape:
            return weight  # nn.Module reports the mismatch
        if self.frozen:
            return self._to_live(weight)
        if support.is_dense or weight.is_meta:
            return weight
        return weight.masked_fill(~self._mask(weight.device), 0)


class SupportConv2d(SupportLayer):
    """A convolution whose weights exist where a Support says: drop-in for ``nn.Conv2d``.

    Args:
        in_channels: C.
        out_channels: F.
        kernel_size: one number or (KH, KW).
        stride: one number or a pair, in pixels.
        padding: one number, a pair, ``"same"`` or ``"valid"``.
        dilation: one number or a pair, in pixels.
        groups: 1; groups are said by the Support.
        bias: whether there is a bias.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        device: of the parameters.
        dtype: of the parameters.
        support: which weights exist.
        backend: forces an engine for this layer; None follows `use_backend`.

    Shape:
        input [N, C, H, W] or [C, H, W], output [N, F, OH, OW] or [F, OH, OW], as ``nn.Conv2d``.

    Raises:
        ArgumentError: a value out of range.
        SupportError: the Support has another shape.
        BackendError: the backend is unknown or not built here.
    """

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
        support: Support,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        kernel = kernel_pair(kernel_size)
        if not isinstance(support, Support):
            raise InputTypeError(mismatch("support", type(support).__name__, "a Support"))
        if support.shape != (out_channels, in_channels, *kernel):
            raise SupportError(
                mismatch(
                    f"Support of {type(self).__name__}",
                    support.shape,
                    f"{(out_channels, in_channels, *kernel)} (F, C, KH, KW)",
                )
            )
        if padding_mode not in _PADDING_MODES:
            raise ArgumentError(
                mismatch("padding_mode", repr(padding_mode), f"one of {', '.join(_PADDING_MODES)}")
            )
        self._check_groups(groups)
        geometry = make_geometry(support, stride, padding, dilation)
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride = kernel, geometry.stride
        self.dilation = _as_pair(dilation)
        self.padding: str | tuple[int, int] = (
            padding if isinstance(padding, str) else _as_pair(padding)
        )
        self.padding_mode = padding_mode
        self.backend = backend
        # Other padding modes pad before the convolution, which then pads nothing.
        top, bottom, left, right = geometry.pads
        self._outer_pads = (left, right, top, bottom) if padding_mode != "zeros" else None
        self._geometry = (
            geometry
            if self._outer_pads is None
            else Geometry(support, geometry.stride, (0, 0, 0, 0), geometry.dilation)
        )
        self.weight = nn.Parameter(torch.empty(self._dense_shape, device=device, dtype=dtype))
        self.register_parameter(
            "bias",
            nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype)) if bias else None,
        )
        bits_on(support, self.weight.device)
        self.reset_parameters()

    def _check_groups(self, groups: int) -> None:
        if groups != 1:
            raise ArgumentError(
                mismatch(
                    f"groups of {type(self).__name__}",
                    groups,
                    "1, since the Support says which channels a filter reads",
                    "For nn.Conv2d(groups=g) use GroupedConv2d.",
                )
            )

    @property
    def backend(self) -> str | None:
        """The engine that this layer is forced to, None to follow `use_backend`."""
        return self._backend

    @backend.setter
    def backend(self, name: str | None) -> None:
        self._code = None if name is None else backends.backend_code(name)
        self._backend = name

    def reset_parameters(self) -> None:
        """Initialises like ``nn.Conv2d``, with each filter's *live* fan-in in place of the dense."""
        self._initialise()

    def forward(self, x: Tensor) -> Tensor:
        """Convolves.  # [N, C, H, W] -> [N, F, OH, OW]"""
        if self._outer_pads is not None:
            x = F.pad(x, self._outer_pads, mode=self.padding_mode)
        code = self._code
        return conv2d(
            x,
            self.weight,
            self.bias,
            self._geometry,
            backends.forced_code() if code is None else code,
        )

    @classmethod
    def from_conv2d(cls, conv: nn.Conv2d, support: Support, **kwargs: Any) -> Self:
        """Takes over a convolution's arguments and copies its weights, dead ones left out.

        Args:
            conv: an ``nn.Conv2d``; a grouped one is expanded, and the Support intersected with it.
            support: which weights exist.
            **kwargs: keyword-only extras of the class.

        Raises:
            InputTypeError: ``conv`` is not an ``nn.Conv2d``.
            SupportError: the Support has another shape.
        """
        weight, within = expanded_weight(conv)
        support = support if conv.groups == 1 else support & within
        return cls._from(conv, weight, support=support, **kwargs)

    @classmethod
    def _from(cls, conv: nn.Conv2d, weight: Tensor, groups: int = 1, **kwargs: Any) -> Self:
        layer = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            groups,
            conv.bias is not None,
            conv.padding_mode,
            "meta",
            conv.weight.dtype,
            **kwargs,
        )
        take_parameters(layer, conv, weight)
        return layer

    def to_conv2d(self) -> nn.Conv2d:
        """Returns the dense ``nn.Conv2d`` that computes the same, with copies of the weights."""
        dense = self.weight.detach()
        if self.frozen:
            dense = dense_weight(self.support, dense, dense.dtype)
        return self._plain_conv2d(dense, groups=1)

    def _plain_conv2d(self, weight: Tensor, groups: int) -> nn.Conv2d:
        conv = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,  # type: ignore[arg-type]
            self.padding,
            self.dilation,
            groups,
            self.bias is not None,
            self.padding_mode,  # type: ignore[arg-type]
            "meta",
            weight.dtype,
        )
        take_parameters(conv, self, weight)
        return conv

    def extra_repr(self) -> str:
        """Says what ``nn.Conv2d`` says, and the Support."""
        text = (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}"
        )
        for name, default in (
            ("padding", (0, 0)),
            ("dilation", (1, 1)),
            ("groups", 1),
            ("padding_mode", "zeros"),
            ("backend", None),
        ):
            if getattr(self, name) != default:
                text += f", {name}={getattr(self, name)!r}"
        text += ", bias=False" if self.bias is None else ""
        text += f", support={self.support.kind}, groups_of_filters={len(self.support.groups)}"
        text += f", density={self.support.density:.3g}"
        return text + (", frozen" if self.frozen else "")


def take_parameters(target: nn.Module, source: nn.Module, weight: Tensor) -> None:
    """Gives target copies of a weight and of source's bias, and source's flags."""
    old = source.weight
    copy = weight.detach().clone(memory_format=torch.preserve_format)
    target.weight = nn.Parameter(copy, requires_grad=old.requires_grad)  # type: ignore[union-attr]
    if source.bias is not None:
        target.bias = nn.Parameter(
            source.bias.detach().clone(),  # type: ignore[operator]
            requires_grad=source.bias.requires_grad,  # type: ignore[arg-type]
        )
    target.train(source.training)
    if isinstance(target, SupportLayer):
        bits_on(target.support, copy.device)
        target.project_()


def expanded_weight(conv: nn.Conv2d) -> tuple[Tensor, Support]:
    """Returns a convolution's dense weight and the Support of its groups.

    # [F, C, KH, KW]

    Raises:
        InputTypeError: ``conv`` is not an ``nn.Conv2d``.
    """
    if not isinstance(conv, nn.Conv2d):
        raise InputTypeError(mismatch("conv", type(conv).__name__, "an nn.Conv2d"))
    support = Support.grouped(conv.in_channels, conv.out_channels, conv.kernel_size, conv.groups)
    weight = conv.weight.detach()
    if conv.groups > 1:
        weight = dense_weight(support, weight, weight.dtype)
    return weight, support


def _as_pair(value: int | Sequence[int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])
