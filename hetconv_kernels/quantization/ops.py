# SPDX-License-Identifier: Apache-2.0
"""The operators in 8 bits: schemas, fakes, and bodies that pick the engine.

Plain eager calls of the layers go to an engine without the dispatcher; tracing, dispatch modes and
exported programs go through ``torch.ops.hetconv``. None has a gradient: integers do not, and
training goes through `fake`. What each computes is said in `reference`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..autograd import transforms_active
from ..errors import ArgumentError, InputTypeError, mismatch
from ..flops import register_flop_formulas
from ..geometries import geometry_of
from ..observers import observed
from ..ops import _LIBRARY
from ..packing import FrozenCache
from ..pooling import Pool
from ..problem import output_size
from ..support import Support
from .checks import Output
from .engine import operations

_TAIL = "int y_zero_point, float low, float high, ScalarType dtype, int backend"
_SCHEMAS = (
    "qfprop(Tensor x, Tensor w, Tensor support, Tensor multiplier, Tensor bias, Tensor? residual, "
    "SymInt[] geometry, int[] pool, int x_zero_point, float residual_multiplier, "
    f"int residual_zero_point, {_TAIL}) -> Tensor",
    "qadd(Tensor a, Tensor b, float a_multiplier, float b_multiplier, int a_zero_point, "
    f"int b_zero_point, {_TAIL}) -> Tensor",
    f"requantize(Tensor x, float multiplier, int x_zero_point, {_TAIL}) -> Tensor",
    f"qmean(Tensor x, float multiplier, int x_zero_point, {_TAIL}) -> Tensor",
    "qmax_pool(Tensor x, int[] pool, int backend) -> Tensor",
    "quantize(Tensor x, float scale, int zero_point, ScalarType dtype, int backend) -> Tensor",
    "dequantize(Tensor x, float scale, int zero_point, int backend) -> Tensor",
)


def by_operator(x: Tensor, *others: Tensor | None) -> bool:
    """Tells whether a call has to go through its operator: somebody watches, or transforms it.

    The operators have no rules of their own for functorch: PyTorch maps them one by one.
    """
    return observed(x, *others) or transforms_active()


def refuse_derivatives(x: Tensor) -> None:
    """Refuses what would be a derivative of rounding: zero, or lost without a word.

    Raises:
        InputTypeError: forward-mode differentiation, or a functorch transform that differentiates,
            follows x.
    """
    if torch.compiler.is_compiling() or not transforms_active():
        return
    level = x
    while torch._C._functorch.is_functorch_wrapped_tensor(level):
        if torch._C._functorch.is_gradtrackingtensor(level):
            break
        level = torch._C._functorch.get_unwrapped(level)
    else:
        if forward_ad._current_level < 0 or forward_ad.unpack_dual(level).tangent is None:
            return
    raise InputTypeError(
        mismatch(
            "input of a network in 8 bits",
            "a tensor that is being differentiated (torch.func or forward mode)",
            "a plain tensor: rounding to integers has no useful derivative",
            "Differentiate the network in float, or the one of "
            "hetconv_kernels.quantization.prepare, whose gradients pass through the rounding.",
        )
    )


def pool_ints(pool: Pool | None) -> list[int]:
    """Returns a Pool as the operators take it: kernel, stride, padding, or nothing."""
    return [] if pool is None else [*pool.kernel, *pool.stride, *pool.padding]


def _pool_of(ints: Sequence[int]) -> Pool | None:
    if not ints:
        return None
    if len(ints) != 6:
        raise ArgumentError(mismatch("pool", list(ints), "six integers, or none"))
    kh, kw, sh, sw, ph, pw = ints
    return Pool((kh, kw), (sh, sw), (ph, pw))


def _packed(w: Tensor, support: Support, module: Any) -> Any:
    """Returns a weight made ready for an engine, kept while it is unchanged."""
    key = ("8-bit packed", module.__name__)
    cache: FrozenCache | None = support.derived.get(key)
    if cache is None:
        build = FrozenCache(lambda live: module.pack(live, support), module.__name__)
        cache = support.derived.setdefault(key, build)
    return cache(w)


# Bodies -----------------------------------------------------------------------------------------


def _qfprop(
    x: Tensor,
    w: Tensor,
    support: Tensor,
    multiplier: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    geometry: Sequence[int],
    pool: Sequence[int],
    x_zero_point: int,
    residual_multiplier: float,
    residual_zero_point: int,
    y_zero_point: int,
    low: float,
    high: float,
    dtype: torch.dtype,
    backend: int,
) -> Tensor:
    module = operations(x.device, backend)
    layer = geometry_of(support, geometry)
    y: Tensor = module.fprop(
        x,
        _packed(w, layer.support, module),
        layer.support,
        layer,
        multiplier=multiplier,
        bias=bias,
        x_zero_point=x_zero_point,
        output=Output(y_zero_point, low, high, dtype),
        residual=residual,
        residual_multiplier=residual_multiplier,
        residual_zero_point=residual_zero_point,
        pool=_pool_of(pool),
    )
    return y


def _qadd(
    a: Tensor,
    b: Tensor,
    a_multiplier: float,
    b_multiplier: float,
    a_zero_point: int,
    b_zero_point: int,
    y_zero_point: int,
    low: float,
    high: float,
    dtype: torch.dtype,
    backend: int,
) -> Tensor:
    y: Tensor = operations(a.device, backend).add(
        a,
        b,
        a_multiplier=a_multiplier,
        b_multiplier=b_multiplier,
        a_zero_point=a_zero_point,
        b_zero_point=b_zero_point,
        output=Output(y_zero_point, low, high, dtype),
    )
    return y


def _requantize(
    x: Tensor,
    multiplier: float,
    x_zero_point: int,
    y_zero_point: int,
    low: float,
    high: float,
    dtype: torch.dtype,
    backend: int,
) -> Tensor:
    y: Tensor = operations(x.device, backend).requantize(
        x,
        multiplier=multiplier,
        x_zero_point=x_zero_point,
        output=Output(y_zero_point, low, high, dtype),
    )
    return y


def _qmean(
    x: Tensor,
    multiplier: float,
    x_zero_point: int,
    y_zero_point: int,
    low: float,
    high: float,
    dtype: torch.dtype,
    backend: int,
) -> Tensor:
    y: Tensor = operations(x.device, backend).mean(
        x,
        multiplier=multiplier,
        x_zero_point=x_zero_point,
        output=Output(y_zero_point, low, high, dtype),
    )
    return y


def _qmax_pool(x: Tensor, pool: Sequence[int], backend: int) -> Tensor:
    window = _pool_of(pool)
    if window is None:
        raise ArgumentError(mismatch("pool", [], "six integers"))
    y: Tensor = operations(x.device, backend).max_pool(x, window)
    return y


def _quantize(x: Tensor, scale: float, zero_point: int, dtype: torch.dtype, backend: int) -> Tensor:
    y: Tensor = operations(x.device, backend).quantize_tensor(x, scale, zero_point, dtype)
    return y


def _dequantize(x: Tensor, scale: float, zero_point: int, backend: int) -> Tensor:
    y: Tensor = operations(x.device, backend).dequantize(x, scale, zero_point)
    return y


# Fakes ------------------------------------------------------------------------------------------


def _empty(x: Tensor, shape: Sequence[Any], dtype: torch.dtype) -> Tensor:
    return torch.empty(
        tuple(shape), dtype=dtype, device=x.device, memory_format=torch.channels_last
    )


def _check_rank(x: Tensor) -> None:
    if x.dim() != 4:
        raise ArgumentError(mismatch("input shape", tuple(x.shape), "[N, C, H, W]"))


def _fake_qfprop(
    x: Tensor,
    w: Tensor,
    support: Tensor,
    multiplier: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    geometry: Sequence[int],
    pool: Sequence[int],
    *rest: Any,
) -> Tensor:
    _check_rank(x)
    if x.shape[1] != geometry[2]:
        raise ArgumentError(mismatch("input channels", x.shape[1], geometry[2]))
    size = output_size(geometry)
    window = _pool_of(pool)
    if window is not None:
        size = window.output_size(*size)
    return _empty(x, (x.shape[0], support.shape[0], *size), rest[-2])


def _fake_like(x: Tensor, *rest: Any) -> Tensor:
    _check_rank(x)
    return _empty(x, x.shape, rest[-2])


def _fake_qmean(x: Tensor, *rest: Any) -> Tensor:
    _check_rank(x)
    return _empty(x, (*x.shape[:2], 1, 1), rest[-2])


def _fake_qmax_pool(x: Tensor, pool: Sequence[int], backend: int) -> Tensor:
    _check_rank(x)
    window = _pool_of(pool)
    assert window is not None
    return _empty(x, (*x.shape[:2], *window.output_size(*x.shape[2:])), x.dtype)


def _fake_dequantize(x: Tensor, scale: float, zero_point: int, backend: int) -> Tensor:
    _check_rank(x)
    return _empty(x, x.shape, torch.float32)


for _schema in _SCHEMAS:
    _LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
for _name, _body, _fake in (
    ("qfprop", _qfprop, _fake_qfprop),
    ("qadd", _qadd, _fake_like),
    ("requantize", _requantize, _fake_like),
    ("qmean", _qmean, _fake_qmean),
    ("qmax_pool", _qmax_pool, _fake_qmax_pool),
    ("quantize", _quantize, _fake_like),
    ("dequantize", _dequantize, _fake_dequantize),
):
    _LIBRARY.impl(_name, _body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"hetconv::{_name}", _fake, lib=_LIBRARY)

register_flop_formulas()
