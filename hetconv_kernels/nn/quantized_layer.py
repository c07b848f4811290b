# SPDX-License-Identifier: Apache-2.0
"""QuantizedLayer: the life of a layer in 8 bits: its integers, Scales, packed form, checkpoints."""

from __future__ import annotations

import json
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from .. import ranges
from ..backends import forced_code
from ..errors import ArgumentError, InputTypeError, SupportError, mismatch
from ..observers import sizes
from ..packing import Pack, Stamp, bits_on, dense_weight, live_weight, owned
from ..pooling import Pool
from ..problem import Geometry, Problem
from ..quantization import ops
from ..quantization.engine import engine, operations
from ..quantization.scheme import Scale, bounds, multiplier, output_of, quantize_weight, ratio
from ..support import Support
from .base import ForcedBackend

_FORMAT = "hetconv_kernels.QuantizedLayer/1"
_SCALES = ("x", "y", "residual")
_DERIVED_FROM = frozenset((*_SCALES, "act", "pool"))


class _Ready(NamedTuple):
    """An engine's form of the weight, and what it was made for and of."""

    fprop: Any
    handle: Any
    code: int
    device: torch.device
    weight: Stamp
    scale: Stamp


class QuantizedLayer(ForcedBackend):
    """What the quantised layers share: int8 weights, their Scales, the engine's form of both.

    Holds the live weights as a buffer, nothing dense, and does not train. The engine's packed form
    belongs to the layer and is made anew after loading, moving, copying and any write.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor

    def __init__(
        self,
        geometry: Geometry,
        *,
        x: Scale | None = None,
        y: Scale | None = None,
        residual: Scale | None = None,
        act: str = "none",
        pool: Pool | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        bounds(act)  # refuses an activation that is no clamp
        self._geometry, self.act, self.pool, self.backend = geometry, act, pool, backend
        self.x: Scale | None = x
        self.y: Scale | None = y
        self.residual: Scale | None = residual
        support = geometry.support
        weight = torch.zeros(support.live, dtype=torch.int8, device=device)
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", torch.ones(support.filters, device=device))
        bias = torch.zeros(support.filters, dtype=torch.int32, device=device)
        self.register_buffer("bias", bias)
        self._ready: _Ready | None = None
        self._numbers: dict[str, Any] = {}
        self.prepare_()

    @property
    def support(self) -> Support:
        """Which weights exist."""
        return self._geometry.support

    @property
    def out_dtype(self) -> torch.dtype:
        """The dtype of the output: that of its Scale, float32 where it has none."""
        return torch.float32 if self.y is None else self.y.dtype

    @torch.no_grad()
    def set_(self, weight: Tensor, weight_scale: Tensor, bias: Tensor) -> Self:
        """Gives the layer its integers.

        Args:
            weight: canonical; dead entries are ignored.  # int8 [live] or [F, C, KH, KW]
            weight_scale: of each filter.  # float32 [F]
            bias: in units of the input's scale times the filter's.  # int32 [F]

        Returns:
            The layer itself.

        Raises:
            ArgumentError: a shape or a scale that does not fit.
        """
        if weight.dim() != 1:
            weight = live_weight(self.support, weight)
        for name, value in (("weight", weight), ("weight_scale", weight_scale), ("bias", bias)):
            slot = self._buffers[name]
            assert slot is not None
            if value.shape != slot.shape or value.dtype != slot.dtype:
                raise ArgumentError(
                    mismatch(
                        name,
                        f"{value.dtype} {tuple(value.shape)}",
                        f"{slot.dtype} {tuple(slot.shape)}",
                    )
                )
            self._buffers[name] = value.detach().clone()
        return self.prepare_()

    @torch.no_grad()
    def set_float_(self, weight: Tensor, shift: Tensor) -> Self:
        """Gives the layer the integers of float weights and biases.

        Args:
            weight: canonical.  # float [live] or [F, C, KH, KW]
            shift: the biases.  # float [F]

        Returns:
            The layer itself.

        Raises:
            ArgumentError: the layer has no Scale of its input, a value is NaN or infinite, or a
                filter's accumulator could leave int32.
        """
        if self.x is None:
            raise ArgumentError(self._uncalibrated())
        if weight.dim() != 1:
            weight = live_weight(self.support, weight)
        return self.set_(*quantize_weight(self.support, weight, shift, self.x.scale))

    def dequantized(self) -> tuple[Tensor, Tensor]:
        """Returns the numbers that the weights and biases stand for.

        Returns:
            The dense weight [F, C, KH, KW] and the biases [F], in float32.

        Raises:
            ArgumentError: the layer was not calibrated.
        """
        if self.x is None:
            raise ArgumentError(self._uncalibrated())
        dense = dense_weight(self.support, self.weight, torch.float32)
        bias = self.bias.double() * self.weight_scale.double() * self.x.scale
        return dense * self.weight_scale[:, None, None, None], bias.to(torch.float32)

    def prepare_(self) -> Self:
        """Derives what calls need from buffers and Scales; called by whatever changes them.

        Returns:
            The layer itself.
        """
        self._ready = None
        for name, buffer in self._buffers.items():
            if buffer is not None and not torch.compiler.is_compiling():
                self._buffers[name] = owned(buffer)
        bits_on(self.support, self.weight.device)
        x, y = self.x, self.y
        self._multiplier = self.weight_scale
        if x is None or self.weight.is_meta:
            return self
        self._multiplier = multiplier(x, self.weight_scale, y)
        numbers: dict[str, Any] = {
            "x_zero_point": x.zero_point,
            "output": output_of(y, self.act),
            "residual_multiplier": 1.0,
            "residual_zero_point": 0,
            "pool": self.pool,
        }
        if self.residual is not None:
            numbers |= {
                "residual_multiplier": ratio(self.residual, y),
                "residual_zero_point": self.residual.zero_point,
            }
        self._numbers = numbers
        return self

    def problem(self, x: Tensor, residual: Tensor | None = None) -> Problem:
        """Describes the call of this layer: its work and its bytes.

        The choice of `backends` has no engine for it; those in 8 bits are another face.

        Args:
            x: the input.  # [N, C, H, W], of a linear layer [..., C]
            residual: added before the activation.  # [N, F, OH, OW]

        Raises:
            ArgumentError, InputTypeError: as the forward.
        """
        image = self._image(x)
        self._check(image, residual)
        batch, _, height, width = image.shape
        return Problem(
            "fprop", self._geometry, batch, height, width, image.dtype, tuple(self.weight.shape),
            self.weight.dtype, image.device, image.stride(), True,
            ("shift",) if residual is None else ("shift", "residual"), self.act, self.pool,
        )  # fmt: skip

    def _image(self, x: Tensor) -> Tensor:
        """Returns an input as the convolution sees it.  # [N, C, H, W]"""
        if x.dim() != 4 or x.shape[1] != self.support.channels:
            raise ArgumentError(
                mismatch("input shape", tuple(x.shape), f"[N, {self.support.channels}, H, W]")
            )
        return x

    def _run(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """Convolves with the epilogue.  # [N, C, H, W] -> [N, F, OH, OW]"""
        self._check(x, residual)
        code = self._backend_code()
        # Not by attributes: every one of a Module's buffers costs a search.
        weight: Any = self._buffers["weight"]
        scale: Any = self._buffers["weight_scale"]
        if ops.by_operator(x, weight):
            return self._traced_run(x, weight, residual, code)
        ready = self._ready
        if (
            ready is None
            or ready.code != (code or forced_code())
            or ready.device != x.device
            or not ready.weight.holds(weight)
            or not ready.scale.holds(scale)
        ):
            ready = self._make_ready(code, x.device)
        fprop = operations(x.device, code).fprop if ranges.active else ready.fprop
        y: Tensor = fprop(
            x,
            ready.handle,
            self._geometry.support,
            self._geometry,
            multiplier=self._multiplier,
            bias=self._buffers["bias"],
            residual=residual,
            **self._numbers,
        )
        return y

    def _traced_run(self, x: Tensor, weight: Tensor, residual: Tensor | None, code: int) -> Tensor:
        n = self._numbers
        y: Tensor = torch.ops.hetconv.qfprop(
            x, weight, bits_on(self.support, x.device), self._multiplier, self.bias, residual,
            self._geometry.ints(*sizes(x)[2:]), ops.pool_ints(self.pool),
            n["x_zero_point"], n["residual_multiplier"], n["residual_zero_point"],
            *n["output"], code,
        )  # fmt: skip
        return y

    def _make_ready(self, code: int, device: torch.device) -> _Ready:
        """Packs the weight for the engine of choice, and derives anew what follows from scales."""
        self.prepare_()
        weight: Any = self._buffers["weight"]
        scale: Any = self._buffers["weight_scale"]
        module = engine(device, code)
        self._ready = _Ready(
            module.fprop,
            Pack(lambda w: module.pack(w, self.support), module.__name__)(weight),
            code or forced_code(),
            device,
            Stamp.of(weight),
            Stamp.of(scale),
        )
        return self._ready

    def _check(self, x: Tensor, residual: Tensor | None) -> None:
        if self.x is None:
            raise ArgumentError(self._uncalibrated())
        _check_dtype("input", x, self.x)
        if (residual is None) != (self.residual is None):
            raise ArgumentError(
                mismatch(
                    f"residual of {type(self).__name__}",
                    "none" if residual is None else "a tensor",
                    f"what its Scale says: {self.residual}",
                )
            )
        if residual is not None and self.residual is not None:
            _check_dtype("residual", residual, self.residual)

    def _uncalibrated(self) -> str:
        return mismatch(
            f"Scale of the input of {type(self).__name__}",
            "none: the layer was not calibrated",
            "a Scale",
            "hetconv_kernels.quantize calibrates a network; load_state_dict brings Scales too.",
        )

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in _DERIVED_FROM and "_numbers" in self.__dict__:
            self.prepare_()

    # Moving, copying and saving ---------------------------------------------------------------

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        before = self.weight_scale
        super()._apply(fn, recurse)
        if self.weight_scale.dtype != torch.float32:
            # .half() and .double() are for float layers; these scales are float32 by definition.
            self.weight_scale = before.to(self.weight.device)
        return self.prepare_()

    def __getstate__(self) -> dict[str, Any]:
        # The packed form holds memory of the engine: every copy makes its own.
        return self.__dict__ | {"_ready": None}

    def get_extra_state(self) -> Tensor:
        """Saves Support and Scales beside the weights, as JSON.  # uint8 [bytes]"""
        text = json.dumps({"format": _FORMAT, "support": self.support.to_json(), **self.scales()})
        return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)

    def scales(self) -> dict[str, Any]:
        """Returns the Scales of input, output and residual as plain data."""
        named = {"x": self.x, "y": self.y, "residual": self.residual}
        return {name: None if s is None else s.to_dict() for name, s in named.items()}

    def set_extra_state(self, state: Any) -> None:
        """Takes over the Scales; weights of another Support are refused.

        Raises:
            SupportError: the checkpoint has another Support, or is not one of such a layer.
        """
        try:
            data = json.loads(bytes(state.cpu().numpy()).decode())
            if data["format"] != _FORMAT:
                raise ValueError(data["format"])
            support = Support.from_json(data["support"])
            found = [None if data[n] is None else Scale.from_dict(data[n]) for n in _SCALES]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SupportError(
                mismatch("extra state", f"{error!r:.100}", "what get_extra_state saved")
            ) from error
        if support != self.support:
            raise SupportError(mismatch("Support of the checkpoint", support, self.support))
        for name, scale in zip(_SCALES, found, strict=True):
            self.__dict__[name] = scale
        self.prepare_()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        # nn.Module calls set_extra_state before or after: whichever is last prepares for good.
        self.prepare_()

    def _tail(self) -> str:
        y = "float32" if self.y is None else str(self.y)
        return (
            f"x={self.x}, y={y}, act={self.act}, support={self.support.kind}, "
            f"density={self.support.density:.3g}"
            + ("" if self.residual is None else f", residual={self.residual}")
            + ("" if self.pool is None else f", pool={tuple(self.pool)}")
            + ("" if self.backend is None else f", backend={self.backend!r}")
        )


def _check_dtype(name: str, x: Tensor, scale: Scale) -> None:
    if x.dtype != scale.dtype:
        raise InputTypeError(
            mismatch(
                f"{name} dtype",
                x.dtype,
                f"{scale.dtype}, as calibrated",
                "hetconv_kernels.nn.Quantize makes it of float32.",
            )
        )
