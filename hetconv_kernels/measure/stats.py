# SPDX-License-Identifier: Apache-2.0
"""Counts the work of a network in multiply-accumulates (MACs), layer by layer.

One MAC is one multiplication with its addition; the papers of this project call that a FLOP.
"""

from __future__ import annotations

import contextlib
import math
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import ArgumentError, HetconvError, InputTypeError, mismatch
from ..integers import is_integer
from ..pooling import Pool
from ..problem import Geometry
from ..support import Support

__all__ = ["LayerMacs", "layer_macs", "live_parameters", "live_weights", "macs", "weight_bytes"]

# Operators of these do the work of layers, and torch has no formulas for them.
_UNKNOWN_WORK = frozenset(("quantized", "_quantized", "mkldnn", "onednn"))
# What a traced run cannot do with values it does not have; the real run can.
_NEEDS_VALUES = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
    NotImplementedError,  # of packed weights, which cannot be compared
)


@dataclass(frozen=True)
class LayerMacs:
    """The work of one layer in one forward pass.

    Attributes:
        name: of the module in the network; for work outside of known layers, the name of the
            module that did it.
        kind: class of the module, or name of the operator for work outside of known layers.
        macs: multiply-accumulates of all its calls, for the whole batch.
        live: weights that exist, without biases; 0 where the kind is an operator.
        dense: weights of the same layer with every column, without biases.
        positions: how often each weight is used: output pixels (rows, for a fully connected
            layer) of all calls, for the whole batch.
        output_shape: of its last call, without the batch dimension.
    """

    name: str
    kind: str
    macs: int
    live: int
    dense: int
    positions: int
    output_shape: tuple[int, ...]


def macs(
    model: nn.Module,
    input_size: Sequence[int] | Tensor,
    fc: bool = True,
    bias: bool = False,
    bn: bool = False,
) -> int:
    """Counts the multiply-accumulates of one forward pass in evaluation mode.

    With the defaults these are the numbers that the papers print: convolutions and fully connected
    layers, no biases, no normalisation. Weights that a Support leaves out are not counted; pixels
    of padding are, as everywhere.

    Args:
        model: the network, on any device, ``meta`` included; nothing of it changes.
        input_size: shape of the input: [C, H, W] or [features] for one sample, or with a batch
            dimension, [N, C, H, W] or [N, features], which multiplies the result by N. Or an
            example input, of which only shape and dtype count.
        fc: whether fully connected layers count.
        bias: whether the addition of a bias counts, one MAC for each output value.
        bn: whether batch normalisation counts, one MAC (scale and shift) for each output value.

    Raises:
        ArgumentError: a size is not positive, the network cannot run on such an input, or a lazy
            layer has no weights yet.
        InputTypeError: ``model`` is not a plain nn.Module; scripted ones cannot be observed.
    """
    return sum(row.macs for row in layer_macs(model, input_size, fc=fc, bias=bias, bn=bn))


def layer_macs(
    model: nn.Module,
    input_size: Sequence[int] | Tensor,
    fc: bool = True,
    bias: bool = False,
    bn: bool = False,
) -> list[LayerMacs]:
    """Counts like `macs`, layer by layer, in the order of the first calls.

    A layer that is called several times has one row with the sum. Convolutions and matrix products
    that a network computes outside of known layers have a row for each module and operator. The
    forward hooks of the network run, as in any call. Quantised layers of torch.ao count like those
    that they came from; other quantised work is warned of.

    Raises:
        ArgumentError, InputTypeError: see `macs`.
    """
    if not isinstance(model, nn.Module):
        raise InputTypeError(mismatch("model", type(model).__name__, "an nn.Module"))
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        model = model.module
    for name, module in model.named_modules():
        what = f"module {name!r}"
        if isinstance(module, torch.jit.ScriptModule):
            raise InputTypeError(
                mismatch(what, "a ScriptModule", "an nn.Module", "Count before scripting.")
            )
        if any(map(is_lazy, module._parameters.values())):
            raise ArgumentError(
                mismatch(what, "a lazy layer", "known sizes", "Call the model once first.")
            )
    shape, dtype, device = _input(model, input_size)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            return _observe(model, torch.empty(shape, dtype=dtype, device=device), fc, bias, bn)
    except _NEEDS_VALUES:
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            return _observe(model, torch.zeros(shape, dtype=dtype, device=device), fc, bias, bn)


def live_weights(module: nn.Module) -> int | None:
    """Counts the weights of one layer that exist, without biases; None if it is no layer."""
    weights = _weights(module)
    return None if weights is None else weights.live


def live_parameters(model: nn.Module) -> int:
    """Counts a network's parameters as the papers do: weights that a Support leaves out are not.

    Shared parameters count once. Running statistics are not parameters.
    """
    seen: dict[int, int] = {}
    inside: set[int] = set()
    for module in model.modules():
        if id(module) in inside:
            continue
        support = getattr(module, "support", None)
        if isinstance(support, Support):
            inside.update(map(id, module.modules()))
            seen[id(module)] = support.live
            owned = [p for p in (_bias(module),) if p is not None]
        elif _is_quantised(module) and (weights := _weights(module)) is not None:
            seen[id(module)] = weights.live
            owned = [p for p in (_bias(module),) if p is not None]
        else:
            owned = [p for p in module._parameters.values() if p is not None]
        seen.update((id(p), p.numel()) for p in owned)
    return sum(seen.values())


def weight_bytes(model: nn.Module) -> int:
    """Counts the bytes of a network's parameters and buffers, as they are held now.

    What is shared counts once. Frozen and quantised layers hold live weights only.
    """
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def macs_with(rows: Sequence[LayerMacs], live: dict[str, int]) -> int:
    """Counts multiply-accumulates when some layers have this many live weights."""
    return sum(
        row.positions * live[row.name] if row.dense and row.name in live else row.macs
        for row in rows
    )


def _input(
    model: nn.Module, input_size: Sequence[int] | Tensor
) -> tuple[list[int], torch.dtype, torch.device]:
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    dtype = tensors[0].dtype if tensors else torch.get_default_dtype()
    device = tensors[0].device if tensors else torch.get_default_device()
    if isinstance(input_size, Tensor):
        return list(input_size.shape), input_size.dtype, device
    sizes = list(input_size) if isinstance(input_size, Sequence | np.ndarray) else []
    if not sizes or not all(is_integer(s) and s > 0 for s in sizes):
        raise ArgumentError(
            mismatch("input_size", input_size, "positive integers such as (3, 224, 224)")
        )
    shape = [int(size) for size in sizes]
    return ([1, *shape] if len(shape) in (1, 3) else shape), dtype, device


class _Weights(NamedTuple):
    live: int
    dense: int
    filters: int


@contextlib.contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Sets the flags themselves: ``eval()`` may be overridden to do more than that."""
    flags = [(module, module.training) for module in model.modules()]
    for module, _ in flags:
        module.training = False
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


@contextlib.contextmanager
def fitting(x: Tensor) -> Iterator[None]:
    """Makes one sentence of what a network says when it cannot run on an input.

    Raises:
        ArgumentError: it cannot.
    """
    try:
        yield
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, (HetconvError, NotImplementedError, *_NEEDS_VALUES)):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ArgumentError(
            mismatch("input", f"{x.dtype} {list(x.shape)}", "one that the network takes")
            + f" It says: {reason}"
        ) from error


def _observe(model: nn.Module, x: Tensor, fc: bool, bias: bool, bn: bool) -> list[LayerMacs]:
    recorder = _Recorder(model, fc, bias, bn)
    with contextlib.ExitStack() as stack:
        if "torch._dynamo" in sys.modules:
            # Compiled parts would run from a cache that knows nothing of our hooks.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(_evaluation_mode(model))
        stack.enter_context(torch.no_grad())
        for module in model.modules():
            handles = (
                module.register_forward_pre_hook(recorder.enter, prepend=True),
                module.register_forward_hook(recorder.leave, prepend=True),
            )
            for handle in handles:
                stack.callback(handle.remove)
        stack.enter_context(recorder)
        with fitting(x):
            model(x)
    return list(recorder.rows.values())


class _Recorder(TorchDispatchMode):
    """Collects the rows: layers through hooks, everything else through the operators it sees."""

    def __init__(self, model: nn.Module, fc: bool, bias: bool, bn: bool) -> None:
        super().__init__()
        from torch.utils.flop_counter import flop_registry

        self.formulas = flop_registry
        self.names = {id(module): name for name, module in model.named_modules()}
        self.fc, self.bias, self.bn = fc, bias, bn
        self.path: list[tuple[str, bool]] = [("", False)]
        self.rows: dict[tuple[str, str], LayerMacs] = {}

    def enter(self, module: nn.Module, args: Any) -> None:
        """Notes which module runs and whether it, or one around it, counts for itself."""
        inside = self.path[-1][1] or _weights(module) is not None
        self.path.append((self.names[id(module)], inside))

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Adds the row of a layer, unless a layer around it has counted the work."""
        name, _ = self.path.pop()
        if self.path[-1][1]:
            return
        weights = _weights(module)
        if weights is not None and (self.fc or not hasattr(module, "in_features")):
            live, dense, filters = weights.live, weights.dense, weights.filters
            values = output.numel()
            pool, geometry = getattr(module, "pool", None), getattr(module, "_geometry", None)
            if isinstance(pool, Pool) and isinstance(geometry, Geometry):
                height, width = args[0].shape[2:]  # its own output was larger
                values = len(output) * filters * math.prod(geometry.output_size(height, width))
            positions = values // filters
            if isinstance(module, _ConvTransposeNd):
                positions = args[0].numel() // module.in_channels
            work = positions * live
            if self.bias and _bias(module) is not None:
                work += values
            self._add(module, name, work, live, dense, positions, output)
        elif self.bn and isinstance(module, _BatchNorm):
            self._add(module, name, output.numel(), 0, 0, 0, output)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Adds the work of convolutions and products that no layer stands for."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func._overloadpacket
        name, inside = self.path[-1]
        if not inside and packet in self.formulas and (self.fc or "conv" in str(packet)):
            work = self.formulas[packet](*args, **kwargs, out_val=out) // 2
            self._add(str(packet), name, work, 0, 0, 0, out)
        elif not inside and func.namespace in _UNKNOWN_WORK and self.fc:
            warnings.warn(
                f"the work of {packet} in {name or 'the network'} is not counted: no formula is "
                "known for it. Count the network before it is quantised.",
                stacklevel=2,
            )
        return out

    def _add(
        self,
        what: nn.Module | str,
        name: str,
        work: int,
        live: int,
        dense: int,
        positions: int,
        output: Any,
    ) -> None:
        kind = what if isinstance(what, str) else type(what).__name__
        shape = tuple(output.shape[1:]) if isinstance(output, Tensor) else ()
        old = self.rows.get((name, kind))
        if old is not None:
            work, positions = work + old.macs, positions + old.positions
        self.rows[name, kind] = LayerMacs(name, kind, work, live, dense, positions, shape)


def _is_quantised(module: nn.Module) -> bool:
    """Tells whether it is one of torch.ao's layers whose weights are packed out of sight."""
    own = type(module).__module__.startswith("torch.ao.nn.")
    return own and (hasattr(module, "_packed_params") or hasattr(module, "_weight_bias"))


def _bias(module: nn.Module) -> Tensor | None:
    # A fused layer has a shift, which is its bias and that of the normalisation in one.
    bias: Any = getattr(module, "bias", getattr(module, "shift", None))
    if _is_quantised(module):
        bias = bias()  # a method there
    return bias if isinstance(bias, Tensor) else None


def _weights(module: Any) -> _Weights | None:
    # From the sizes and not from module.weight, which may be computed (weight normalisation),
    # frozen away, or change state when it is read (spectral normalisation).
    support = getattr(module, "support", None)
    if isinstance(support, Support):
        return _Weights(support.live, math.prod(support.shape), support.filters)
    quantised = _is_quantised(module)
    if isinstance(module, nn.Linear) or (quantised and hasattr(module, "in_features")):
        weights = module.in_features * module.out_features
        return _Weights(weights, weights, module.out_features)
    if isinstance(module, _ConvNd) or (quantised and hasattr(module, "in_channels")):
        dense = module.in_channels * module.out_channels * math.prod(module.kernel_size)
        return _Weights(dense // module.groups, dense, module.out_channels)
    return None
