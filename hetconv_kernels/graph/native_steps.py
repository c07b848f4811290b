# SPDX-License-Identifier: Apache-2.0
"""Which steps of a recorded network a program runs natively, and how."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from .fold import _activation, _pool
from .names import module_of, name_of
from .native_copies import Made, cast, is_padding, native_copy, padded
from .seen import Operand, Seen, Spec

try:
    from .. import _cpu
except ImportError:  # nothing is compiled here
    _cpu = None  # type: ignore[assignment]

_LAST, _ROWS = torch.channels_last, torch.contiguous_format
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


Found = tuple[Any, tuple[Operand, ...]]


def native_step(seen: Seen, sources: Sequence[Seen]) -> Found | None:
    """Returns the native step that does what a recorded step did, and its operands.

    Args:
        seen: the step; its value is one tensor with elements.
        sources: the steps that it reads.

    Returns:
        None where there is no native step that gives the same bits.
    """
    module = module_of(seen.node)
    if seen.node.op == "call_module" and _is_layer(module) and not is_padding(module):
        return _engine_call(seen)
    if module is not None and (module._forward_hooks or "forward" in module.__dict__):
        return None
    foreign = module is not None and not type(module).__module__.startswith("torch.nn.")
    if foreign and not (is_padding(module) and _is_layer(module)):
        return None
    specs = {s.node: s.spec for s in sources if s.spec is not None and s.spec.numel}
    if seen.spec is None or len(specs) != len(sources) or not specs:
        return None
    makers = (
        _binary, _activated, _max_pooled, _concatenated, _upsampled, native_copy, padded, cast,
    )  # fmt: skip
    for make in makers:
        found = make(seen.node, seen.spec, module, specs)
        if found is not None:
            step, nodes = found
            operands = [Operand(n, specs[n] if n is not None else None) for n in nodes]
            return step, (*operands, Operand(seen.node, seen.spec))
    return None


def _is_layer(module: nn.Module | None) -> bool:
    """Tells whether a module is a layer of this package that the engine may compute all of."""
    from ..nn import (
        AveragePool,
        FusedConv2d,
        QuantizedConv2d,
        QuantizedLinear,
        SupportConv2d,
        SupportLinear,
    )
    from ..nn.quantized_steps import STEP_CLASSES

    if module is None or not type(module).__module__.startswith("hetconv_kernels."):
        return False
    if "forward" in module.__dict__:
        return False
    if isinstance(module, SupportConv2d | SupportLinear):
        return module.frozen and module._owns_weight and _without_inference(module)
    exact = (FusedConv2d, QuantizedConv2d, QuantizedLinear, AveragePool, *STEP_CLASSES)
    return type(module) in exact and _without_inference(module)


def _without_inference(module: nn.Module) -> bool:
    """Tells whether changes of a layer's tensors show in their versions."""
    tensors = (*module._parameters.values(), *module._buffers.values())
    return not any(t is not None and t.is_inference() for t in tensors)


def _engine_call(seen: Seen) -> Found | None:
    """Returns the one call of the engine that a layer was, if it was one."""
    if len(seen.calls) != 1:
        return None
    ((step, operands),) = seen.calls
    known = [o for o in operands if o is not None]
    if len(known) != len(operands) or known[-1].step is not seen.node:
        return None
    return step, tuple(known)


def _common_format(*specs: Spec) -> bool:
    """Tells whether tensors of one shape and dtype have their elements in one dense order."""
    first = specs[0]
    if any(s.shape != first.shape or s.dtype != first.dtype for s in specs):
        return False
    return any(all(s.is_dense(layout) for s in specs) for layout in (_ROWS, _LAST))


def _each(what: str, y: Spec, low: float = 0.0, high: float = 0.0) -> Any:
    return _cpu.each_step(what, _NAMES[y.dtype], y.numel, low, high, torch.get_num_threads())


def _binary(
    node: fx.Node, y: Spec, module: nn.Module | None, specs: dict[fx.Node, Spec]
) -> Made | None:
    what = name_of(node)
    operands = node.args
    if what not in ("add", "sub", "mul") or module is not None or len(operands) != 2:
        return None
    if node.kwargs or not all(isinstance(a, fx.Node) for a in operands) or y.dtype not in _NAMES:
        return None
    if not _common_format(y, *(specs[a] for a in operands)):  # type: ignore[index]
        return None
    return _each(what, y), operands  # type: ignore[return-value]


def _activated(
    node: fx.Node, y: Spec, module: nn.Module | None, specs: dict[fx.Node, Spec]
) -> Made | None:
    if len(specs) != 1 or y.dtype not in _NAMES or not _common_format(y, *specs.values()):
        return None
    (x,) = specs
    if node.args[:1] != (x,):
        return None
    act = _activation(node)
    if act == "relu":
        return _each("relu", y), (x, None)
    if act == "relu6":
        return _each("clamp", y, 0.0, 6.0), (x, None)
    if name_of(node) == "leaky_relu" and y.dtype == torch.float32:
        given = node.args[1] if len(node.args) > 1 else node.kwargs.get("negative_slope", 0.01)
        slope = getattr(module, "negative_slope", given)
        if isinstance(slope, float | int):
            return _each("leaky_relu", y, float(slope)), (x, None)
    return None


def _max_pooled(
    node: fx.Node, y: Spec, module: nn.Module | None, specs: dict[fx.Node, Spec]
) -> Made | None:
    pool = _pool(node)
    if pool is None or len(specs) != 1 or y.dtype not in _NAMES:
        return None
    ((x, spec),) = specs.items()
    if not (spec.is_dense(_LAST) and y.is_dense(_LAST)) or node.args[:1] != (x,):
        return None
    n, c, h, w = spec.shape
    window = _cpu.Pool(*pool, y.shape[2:])
    threads = torch.get_num_threads()
    return _cpu.max_pool_step(_NAMES[y.dtype], (n, h, w, c), window, threads), (x,)


def _concatenated(
    node: fx.Node, y: Spec, module: nn.Module | None, specs: dict[fx.Node, Spec]
) -> Made | None:
    if name_of(node) not in ("cat", "concat") or module is not None:
        return None
    parts: Any = node.args[0] if node.args else None
    axis = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    if not isinstance(parts, list | tuple) or len(y.shape) < 2 or axis not in (1, 1 - len(y.shape)):
        return None
    if not all(isinstance(p, fx.Node) for p in parts) or set(node.kwargs) - {"dim"}:
        return None
    found = [specs[p] for p in parts]
    if any(s.dtype != y.dtype or len(s.shape) != len(y.shape) for s in found):
        return None
    for layout in (_LAST, _ROWS):
        if all(s.is_dense(layout) for s in (y, *found)):
            pixels = math.prod(y.shape[2:])
            outer = y.shape[0] * (pixels if layout == _LAST else 1)
            each = 1 if layout == _LAST else pixels
            sizes = [s.shape[1] * each * y.dtype.itemsize for s in found]
            return _cpu.concat_step(outer, sizes, torch.get_num_threads()), parts
    return None


def _upsampled(
    node: fx.Node, y: Spec, module: nn.Module | None, specs: dict[fx.Node, Spec]
) -> Made | None:
    """Upsampling to the nearest pixel, which PyTorch itself says for a row and a column."""
    if name_of(node) not in ("upsample", "interpolate", "upsample_nearest2d") or len(specs) != 1:
        return None
    ((x, spec),) = specs.items()
    plain = (int, float, str, bool, type(None), list, tuple)
    others = [*node.args[1:], *node.kwargs.values()]
    if node.args[:1] != (x,) or any(isinstance(a, fx.Node) for a in others):
        return None
    if not (spec.is_dense(_LAST) and y.is_dense(_LAST)):
        return None
    if module is not None:
        mode = getattr(module, "mode", "")
    else:
        mode = node.kwargs.get("mode", node.args[3] if len(node.args) > 3 else "nearest")
    if mode not in ("nearest", "nearest-exact") or not all(isinstance(a, plain) for a in others):
        return None
    n, c, h, w = spec.shape
    grid = torch.arange(h * w, dtype=torch.float64).view(1, 1, h, w)
    if module is None and node.op != "call_function":
        return None
    call: Any = node.target if module is None else module
    picked = call(grid, *node.args[1:], **node.kwargs)
    if tuple(picked.shape[2:]) != y.shape[2:]:
        return None
    rows = (picked[0, 0, :, 0] // w).long().tolist()
    columns = (picked[0, 0, 0] % w).long().tolist()
    pixel = c * y.dtype.itemsize
    return _cpu.pick_step(n, h, w, pixel, rows, columns, torch.get_num_threads()), (x,)
