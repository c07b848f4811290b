# SPDX-License-Identifier: Apache-2.0
"""The rig in 8 bits: a case's integers, our quantised layer and oneDNN's, checked before timing.

All read the same unsigned activations and multiply the same signed weights with the same scales, so
that each result is known but for its rounding. The rivals' weights are prepacked, as ours
are. A *composition* is what inductor would make of it: grouped K×K, then a 1×1 that adds into it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import hetconv_kernels as hk
from benchmarks import baselines, gate
from benchmarks.cases import Case
from benchmarks.rig import COMPOSITION, DENSE, OURS, OURS_FLOAT32, Call
from hetconv_kernels.nn import QuantizedConv2d
from hetconv_kernels.packing import dense_weight
from hetconv_kernels.quantization import Scale, reference
from hetconv_kernels.quantization.engine import engine_name

_LAST = torch.channels_last
# A result may be one step off; one more where a partial result was rounded on its own.
_STEPS, _PARTIAL_STEPS = 1.0, 2.0


class Int8Rig:
    """One case in 8 bits, ready to be checked and timed; has what `Rig` has.

    Attributes:
        case: what is measured.
        backend: that was asked for.
        support: its Support.
        layer: our layer as a user holds it.
        variants: name -> one call; names begin with the role, as in `Rig`.
    """

    def __init__(self, case: Case, backend: str) -> None:
        self.case, self.backend, self.support = case, backend, case.build_support()
        generator = torch.Generator().manual_seed(1)
        mask = torch.as_tensor(self.support.mask.copy())
        weight = torch.randn(case.f, case.c, case.k, case.k, generator=generator) * mask
        image = torch.randn(case.n, case.c, case.h, case.w, generator=generator)
        self.image = image.contiguous(memory_format=_LAST)
        self.float_layer = self._float_layer(weight)
        self.x = _scale(self.image)
        y = self.float_layer(self.image)
        self.layer = QuantizedConv2d.from_float(self.float_layer, self.x, _scale(y))
        self.layer.backend = None if backend == "auto" else backend
        assert self.layer.y is not None
        self.y = self.layer.y
        self.input = reference.quantize_tensor(
            self.image, self.x.scale, self.x.zero_point, self.x.dtype
        )
        self.weight = dense_weight(self.support, self.layer.weight, torch.int8)
        self.variants = self._variants()

    def check(self) -> gate.Agreement:
        """Compares ours with the reference bit for bit, everybody with the exact result.

        Returns:
            The worst match of all variants: the largest error over the steps that are allowed.
        """
        exact = self._exact()
        ours = self.variants[OURS][0]()
        with hk.use_backend("reference"):
            again = QuantizedConv2d.from_float(self.float_layer, self.x, self.y)(self.input)
        if not torch.equal(ours, again):  # type: ignore[arg-type]
            error = (ours.double() - again.double()).abs().max()  # type: ignore[attr-defined]
            return gate.Agreement(False, float("inf"), float(error))
        matches = [self._float_match()]
        for name, calls in self.variants.items():
            if name == OURS_FLOAT32:
                continue
            result: Any = calls[0]()
            result = result.int_repr() if result.is_quantized else result
            allowed = _PARTIAL_STEPS if name.startswith(COMPOSITION) else _STEPS
            error = float((result.double() - exact).abs().max())
            matches.append(gate.Agreement(error <= allowed, error / allowed, error))
        return max(matches, key=lambda match: match.worst)

    def ran(self) -> str:
        """Names the engine that runs our layer."""
        return engine_name(self.input.device, self.layer._backend_code())

    def _exact(self) -> Tensor:
        """The result before it is rounded, clamped to the range.  # float64"""
        padding = self.case.k // 2
        centred = self.input.double() - self.x.zero_point
        y = functional.conv2d(centred, self.weight.double(), None, self.case.stride, padding)
        y = y * (self.layer.weight_scale.double() * self.x.scale)[:, None, None]
        return (y / self.y.scale + self.y.zero_point).clamp(0, 255)

    def _float_match(self) -> gate.Agreement:
        case, images = self.case, [0, -1]
        assert isinstance(self.float_layer, hk.nn.SupportConv2d)
        weight = dense_weight(self.support, self.float_layer.weight.detach(), torch.float32)
        truth = gate.truth(
            self.image[images], weight, None, stride=case.stride, padding=case.k // 2,
            dtype=torch.float32,
        )  # fmt: skip
        return truth.match([self.variants[OURS_FLOAT32][0]()[images]])  # type: ignore[index]

    def _float_layer(self, weight: Tensor) -> hk.nn.SupportConv2d:
        case = self.case
        layer = hk.nn.SupportConv2d(
            case.c, case.f, case.k, case.stride, case.k // 2, support=self.support, bias=False
        ).eval()
        with torch.no_grad():
            layer.weight.copy_(weight)
        layer.freeze()
        return layer

    def _variants(self) -> dict[str, list[Call]]:
        case, x, scale = self.case, self.input, self.layer.weight_scale
        found: dict[str, list[Call]] = {
            OURS: [lambda: self.layer(x)],
            OURS_FLOAT32: [lambda: self.float_layer(self.image)],
        }
        whole = _Conv(case, self.weight, scale, self.x, self.y, tuple(x.shape))
        found[f"{DENSE}:inductor"] = [lambda: whole(x)]
        found[f"{DENSE}:quantized"] = [self._quantized(scale)]
        modules = baselines.compositions(case, self.support, self.weight.float())
        for name, module in modules.items():
            call = self._composed(module)
            if call is not None:
                found[f"{COMPOSITION}:{name}"] = [call]
        return found

    def _quantized(self, scale: Tensor) -> Call:
        """PyTorch's quantised tensors and operator, by oneDNN."""
        stride, padding = [self.case.stride] * 2, [self.case.k // 2] * 2
        zeros = torch.zeros(len(scale), dtype=torch.int64)
        torch.backends.quantized.engine = "onednn"
        weight = torch._make_per_channel_quantized_tensor(self.weight, scale.double(), zeros, 0)
        packed = torch.ops.quantized.conv2d_prepack(weight, None, stride, padding, [1, 1], 1)
        image = torch._make_per_tensor_quantized_tensor(self.input, self.x.scale, self.x.zero_point)
        y = self.y

        return lambda: torch.ops.quantized.conv2d(image, packed, y.scale, y.zero_point)

    def _composed(self, module: nn.Module) -> Call | None:
        """Brings a composition to 8 bits; None for what has no form of its own there."""
        x, scale, case = self.input, self.layer.weight_scale, self.case
        if isinstance(module, baselines.GroupedPlusPointwise):
            image = (self.input.float() - self.x.zero_point) * self.x.scale
            part = _scale(module.grouped(image) * scale[:, None, None])
            grouped = _Conv(case, module.grouped.weight, scale, self.x, part, tuple(x.shape))
            point = _Conv(case, module.pointwise.weight, scale, self.x, self.y, tuple(x.shape))
            return lambda: point.into(grouped(x), part, x)
        if isinstance(module, baselines.GatherPerGroup):
            filters = torch.argsort(module.order).split([len(c.weight) for c in module.convs])  # type: ignore[arg-type]
            convs = [
                _Conv(
                    case, conv.weight, scale[own], self.x, self.y,
                    (case.n, len(channels), case.h, case.w),
                )
                for conv, channels, own in zip(module.convs, module.channels, filters, strict=True)
            ]  # fmt: skip

            def run() -> Tensor:
                parts = [
                    conv(x.index_select(1, channels))
                    for conv, channels in zip(convs, module.channels, strict=True)
                ]
                return torch.cat(parts, 1).index_select(1, module.order)

            return run
        return None


class _Conv:
    """The convolution that inductor calls for int8: oneDNN's, with the weights packed once."""

    def __init__(
        self, case: Case, weight: Any, scale: Tensor, x: Scale, y: Scale, shape: tuple[int, ...]
    ) -> None:
        ints = weight.detach().to(torch.int8)
        groups = shape[1] // ints.shape[1]
        stride, padding = [case.stride] * 2, [ints.shape[2] // 2] * 2
        self.zeros, self.scale, self.y = torch.zeros(len(scale), dtype=torch.int64), scale, y
        self.x = (x.scale, x.zero_point)
        self.sizes = (stride, padding, [1, 1], groups)
        self.packed = torch.ops.onednn.qconv_prepack(ints, scale, *self.x, *self.sizes, list(shape))

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.onednn.qconv2d_pointwise(
            x, *self.x, self.packed, self.scale, self.zeros, None, *self.sizes,
            self.y.scale, self.y.zero_point, torch.uint8, "none", [], "",
        )  # fmt: skip
        return y

    def into(self, accumulated: Tensor, part: Scale, x: Tensor) -> Tensor:
        """Convolves and adds what was computed before, in one pass."""
        y: Tensor = torch.ops.onednn.qconv2d_pointwise.binary(
            x, *self.x, self.packed, self.scale, self.zeros, accumulated, None, *self.sizes,
            self.y.scale, self.y.zero_point, torch.uint8, part.scale, part.zero_point,
            "sum", 1.0, "none", [], "",
        )  # fmt: skip
        return y


def _scale(values: Tensor) -> Scale:
    return Scale.of_range(float(values.min()), float(values.max()))
