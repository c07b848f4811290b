# SPDX-License-Identifier: Apache-2.0
"""Layers as plain data: what a constructor was given, without the weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import FileError, mismatch
from ..files import Json
from ..integers import INT32_MAX, is_integer
from ..masks import BoolArray
from ..nn import (
    AveragePool,
    FrequencyConv2d,
    FusedConv2d,
    GroupedConv2d,
    HetConv2d,
    QuantizedConv2d,
    QuantizedLinear,
    SelfGroupConv2d,
    SupportConv2d,
    SupportLinear,
)
from ..nn.quantized_layer import QuantizedLayer
from ..nn.quantized_steps import STEP_CLASSES, QuantizedStep
from ..pooling import Pool
from ..problem import ACTIVATIONS, Geometry, make_geometry
from ..quantization.scheme import Scale
from ..support import Support

# The arguments of each class are its attributes of the same names.
_CONV = (
    "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups",
    "padding_mode",
)  # fmt: skip
_NORM = ("num_features", "eps", "momentum", "affine", "track_running_stats")
_PLAIN: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Conv2d: _CONV,
    nn.Conv1d: _CONV,
    nn.ConvTranspose2d: (*_CONV, "output_padding"),
    nn.Linear: ("in_features", "out_features"),
    nn.BatchNorm1d: _NORM,
    nn.BatchNorm2d: _NORM,
    nn.GroupNorm: ("num_groups", "num_channels", "eps", "affine"),
    nn.LayerNorm: ("normalized_shape", "eps", "elementwise_affine"),
    nn.PReLU: ("num_parameters",),
    nn.ReLU: ("inplace",),
    nn.ReLU6: ("inplace",),
    nn.SiLU: ("inplace",),
    nn.Mish: ("inplace",),
    nn.Hardswish: ("inplace",),
    nn.Hardsigmoid: ("inplace",),
    nn.Hardtanh: ("min_val", "max_val", "inplace"),
    nn.GELU: ("approximate",),
    nn.LeakyReLU: ("negative_slope", "inplace"),
    nn.ELU: ("alpha", "inplace"),
    nn.Softplus: ("beta", "threshold"),
    nn.Sigmoid: (),
    nn.Tanh: (),
    nn.Softmax: ("dim",),
    nn.LogSoftmax: ("dim",),
    nn.Identity: (),
    nn.Dropout: ("p", "inplace"),
    nn.Dropout2d: ("p", "inplace"),
    nn.Flatten: ("start_dim", "end_dim"),
    nn.MaxPool2d: ("kernel_size", "stride", "padding", "dilation", "return_indices", "ceil_mode"),
    nn.AvgPool2d: (
        "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override",
    ),
    nn.AdaptiveAvgPool2d: ("output_size",),
    nn.AdaptiveMaxPool2d: ("output_size",),
    nn.Upsample: ("size", "scale_factor", "mode", "align_corners"),
    nn.ZeroPad2d: ("padding",),
    nn.ChannelShuffle: ("groups",),
    nn.PixelShuffle: ("upscale_factor",),
}  # fmt: skip
_BIASED = (nn.Conv2d, nn.Conv1d, nn.ConvTranspose2d, nn.Linear)
_SUPPORTED: tuple[type[SupportConv2d], ...] = (
    SupportConv2d,
    SelfGroupConv2d,
    HetConv2d,
    GroupedConv2d,
)
_BY_NAME: dict[str, type[nn.Module]] = {
    kind.__name__: kind
    for kind in (
        *_PLAIN,
        *_SUPPORTED,
        SupportLinear,
        FusedConv2d,
        FrequencyConv2d,
        QuantizedConv2d,
        QuantizedLinear,
        AveragePool,
        *STEP_CLASSES,
    )
}


def layer_to_json(module: nn.Module) -> Json | None:
    """Describes a layer; None for a class that is not known here."""
    kind = type(module)
    described: Json = {"kind": kind.__name__}
    weight = next((t for t in (*module.parameters(), *module.buffers())), None)
    if weight is not None:
        described["dtype"] = str(weight.dtype).removeprefix("torch.")
    if kind in _PLAIN:
        described["arguments"] = {name: getattr(module, name) for name in _PLAIN[kind]}
        if kind in _BIASED:
            described["arguments"]["bias"] = module.bias is not None
        if kind is nn.Conv2d and _is_channels_last(module):
            described["channels_last"] = True
        return described
    if isinstance(module, FusedConv2d) and kind is FusedConv2d:
        geometry = module._geometry
        if module.shift.dtype != module.weight.dtype:  # float32 beside 16 bits, see graph.narrow
            described["shift_dtype"] = str(module.shift.dtype).removeprefix("torch.")
        return described | {
            "support": geometry.support.to_json(),
            "arguments": {
                "stride": geometry.stride,
                "pads": geometry.pads,
                "dilation": geometry.dilation,
                "act": module.act,
                "backend": module.backend,
                "pool": module.pool,
            },
        }
    if isinstance(module, QuantizedLayer) and kind in (QuantizedConv2d, QuantizedLinear):
        return _quantized_to_json(module)
    if isinstance(module, QuantizedStep) and kind in STEP_CLASSES:
        return {"kind": kind.__name__, "arguments": module.describe()}
    if isinstance(module, AveragePool) and kind is AveragePool:
        return {"kind": kind.__name__, "arguments": module.describe()}
    if isinstance(module, FrequencyConv2d) and kind is FrequencyConv2d:
        return _frequency_to_json(module, described)
    if not isinstance(module, SupportConv2d | SupportLinear) or kind not in _BY_NAME.values():
        return None
    if not module._owns_weight:
        return None
    names = ("in_features", "out_features") if kind is SupportLinear else _CONV
    arguments = {name: getattr(module, name) for name in (*names, "backend")}
    arguments["bias"] = module.bias is not None
    if isinstance(module, HetConv2d):
        arguments |= {"p": module.p, "order": module.order}
    return described | {
        "support": module.support.to_json(),
        "arguments": arguments,
        "frozen": module.frozen,
        "channels_last": not module.frozen and _is_channels_last(module),
    }


def _quantized_to_json(module: QuantizedLayer) -> Json:
    geometry = module._geometry
    return {
        "kind": type(module).__name__,
        "support": geometry.support.to_json(),
        "scales": module.scales(),
        "arguments": {
            "stride": geometry.stride,
            "pads": geometry.pads,
            "dilation": geometry.dilation,
            "act": module.act,
            "backend": module.backend,
            "pool": module.pool,
        },
    }


def _frequency_to_json(module: FrequencyConv2d, described: Json) -> Json | None:
    """Describes the layer with its parts, which have no description of their own."""
    mix = module.mix
    if type(mix) is not SupportConv2d or not mix._owns_weight:
        return None
    arguments = {name: getattr(module, name) for name in (*_CONV, "path", "backend")}
    arguments["bias"] = module.bias is not None
    return described | {
        "support": mix.support.to_json(),
        "live_frequencies": list(module.live_frequencies),
        "mix_backend": mix.backend,
        "arguments": arguments,
        "frozen": mix.frozen,
    }


def layer_from_json(described: Json) -> nn.Module:
    """Builds a layer, without weights (on the meta device), from its description.

    Raises:
        FileError: the class is unknown or its arguments make no sense.
    """
    try:
        kind = _BY_NAME[described["kind"]]
        if issubclass(kind, QuantizedStep):
            return kind.from_description(described["arguments"])
        arguments = {name: _tuples(value) for name, value in described["arguments"].items()}
        dtype = getattr(torch, described.get("dtype", "float32"))
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"{dtype} is no dtype")
        with torch.device("meta"):
            return _build(kind, arguments, described, dtype)
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise FileError(
            mismatch(
                "description of a layer", f"{described!r:.200} ({error!r:.200})", "a known layer"
            )
        ) from error


def _build(
    kind: type[nn.Module], arguments: Json, described: Json, dtype: torch.dtype
) -> nn.Module:
    if kind in _PLAIN:
        known = {*_PLAIN[kind], *(("bias",) if kind in _BIASED else ())}
        if set(arguments) != known:
            raise ValueError(f"arguments {sorted(arguments)} where {sorted(known)} are expected")
        for name, value in arguments.items():
            _check_argument(name, value)
        module = kind(**arguments)
        return module.to(dtype) if "dtype" in described else module
    if kind is AveragePool:
        return AveragePool(**arguments | {"pool": _pool(arguments)})
    support = Support.from_json(described["support"])
    if kind is FusedConv2d:
        geometry = _geometry(arguments, support)
        wide = getattr(torch, described["shift_dtype"]) if "shift_dtype" in described else dtype
        weight = torch.empty(support.live, dtype=dtype)
        shift = torch.empty(support.filters, dtype=wide)
        act, backend, pool = arguments["act"], arguments["backend"], _pool(arguments)
        if act not in ACTIVATIONS:
            raise ValueError(f"the activation {act!r}")
        return FusedConv2d(geometry, weight, shift, act, backend, pool)
    if issubclass(kind, QuantizedLayer):
        return _quantized(kind, arguments, described, support)
    if kind is FrequencyConv2d:
        return _frequency(arguments, described, support, dtype)
    own = kind in (HetConv2d, GroupedConv2d)  # their Support follows from their arguments
    layer: Any = kind(dtype=dtype, **arguments, **({} if own else {"support": support}))
    if own:
        layer._adopt({"support": described["support"]})
    if described["frozen"]:
        layer.freeze()
    return layer


def _quantized(
    kind: type[QuantizedLayer], arguments: Json, described: Json, support: Support
) -> QuantizedLayer:
    geometry = _geometry(arguments, support)
    scales: Json = {
        name: None if data is None else Scale.from_dict(data)
        for name, data in described["scales"].items()
    }
    pool = _pool(arguments)
    extras: Json = {} if pool is None else {"pool": pool}
    act, backend = arguments["act"], arguments["backend"]
    return kind(geometry, act=act, backend=backend, device="meta", **scales, **extras)


def _geometry(arguments: Json, support: Support) -> Geometry:
    """Builds the Geometry of a layer that keeps pads; refuses what no layer has."""
    stride, pads, dilation = (arguments[name] for name in ("stride", "pads", "dilation"))
    sizes = [len(v) if isinstance(v, tuple) else 0 for v in (stride, pads, dilation)]
    if sizes != [2, 4, 2]:
        raise ValueError(f"stride {stride}, pads {pads}, dilation {dilation}")
    return make_geometry(support, stride, pads, dilation)


def _pool(arguments: Json) -> Pool | None:
    if arguments["pool"] is None:
        return None
    pool = Pool(*arguments["pool"])
    pool.check_values()
    return pool


# Arguments of PyTorch's layers, which look at them when they are called; the others are integers.
_NUMBERS = frozenset(("eps", "momentum", "p", "min_val", "max_val", "negative_slope", "alpha",
                      "beta", "threshold", "scale_factor"))  # fmt: skip
_FLAGS = frozenset(("affine", "track_running_stats", "elementwise_affine", "inplace", "bias",
                    "return_indices", "ceil_mode", "count_include_pad",
                    "align_corners"))  # fmt: skip
_TEXTS = frozenset(("padding_mode", "mode", "approximate"))
_SINGLE = frozenset(("start_dim", "end_dim", "in_features", "out_features", "num_features",
                     "num_groups", "num_channels", "num_parameters", "groups",
                     "upscale_factor"))  # fmt: skip


def _check_argument(name: str, value: Any) -> None:
    """Refuses a value of a kind that an argument of PyTorch's layers never has."""
    if isinstance(value, tuple):
        if (
            name in _FLAGS | _TEXTS | _SINGLE
            or not value
            or any(isinstance(v, tuple) for v in value)
        ):
            raise TypeError(f"{name}={value!r}")
        for part in value:
            _check_argument(name, part)
        return
    if name in _FLAGS:
        fits = isinstance(value, bool | None)
    elif name in _TEXTS:
        fits = isinstance(value, str)
    elif name in _NUMBERS:
        fits = value is None or (isinstance(value, float | int) and not isinstance(value, bool))
    else:
        whole = is_integer(value) and abs(value) <= INT32_MAX
        none = value is None and name not in _SINGLE
        fits = whole or none or (name == "padding" and value in ("same", "valid"))
    if not fits:
        raise TypeError(f"{name}={value!r}")


def _frequency(
    arguments: Json, described: Json, support: Support, dtype: torch.dtype
) -> FrequencyConv2d:
    live: list[int] = list(described["live_frequencies"])
    kernel = arguments["kernel_size"]
    filters, channels = arguments["out_channels"], arguments["in_channels"]
    coefficients: BoolArray = np.zeros((filters, channels, *kernel), bool)
    coefficients.reshape(filters, channels, -1)[:, :, live] = True
    layer = FrequencyConv2d(dtype=dtype, **arguments, coefficients=coefficients)
    layer.mix._adopt({"support": described["support"]})
    if layer.mix.support != support or live != list(layer.live_frequencies):
        raise ValueError(f"live frequencies {live} and a Support of {support.shape}")
    layer.mix.backend = described["mix_backend"]
    if described["frozen"]:
        layer.mix.freeze()
    return layer


def _is_channels_last(module: nn.Module) -> bool:
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    last = weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last)
    return last and not weight.is_contiguous()


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
