# SPDX-License-Identifier: Apache-2.0
"""Observers: everything in PyTorch that wants to see an operator, and so forbids the short cut.

A plain eager call reaches an engine without the dispatcher. Whatever works by watching the
dispatcher then sees the engine's allocations and no convolution: a JIT trace of it would be a graph
of uninitialised memory. `observed` knows all of them, so that such calls go through
``torch.ops.hetconv``.

It asks not for names but for dispatch keys. PyTorch routes a call by the keys of its thread and of
its tensors, and any key beyond those of an ordinary thread and an ordinary tensor is somebody who
wants to see the call (the JIT tracer, dispatch modes, functionalisation) or a tensor whose memory
is not its value (fake, meta, a negated view, zeros without memory). A key that a later PyTorch adds
is an observer until it is listed here as harmless. What works without a key is asked for by name:
torch.compile, function modes, the profiler. A ``torch.profiler.ExecutionTraceObserver`` that runs
without a profiler leaves nothing that could be asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad as _forward_ad
from torch.autograd import profiler as _profiler
from torch.nn import Parameter
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

# The keys of ordinary tensors and threads, of which a call may go to an engine directly.
ORDINARY = (
    "CPU", "CUDA", "AutogradCPU", "AutogradCUDA", "AutocastCPU", "AutocastCUDA",
    "BackendSelect", "ADInplaceOrView",
)  # fmt: skip
# Those of functorch's levels, which the twins in `transforms` know.
LEVELS = (
    "FuncTorchDynamicLayerFrontMode", "FuncTorchDynamicLayerBackMode", "FuncTorchVmapMode",
    "FuncTorchBatched", "FuncTorchGradWrapper",
)  # fmt: skip

_PLAIN = (Tensor, Parameter)
_is_negated = torch._C.TensorBase.is_neg
_keys_of = torch._C._dispatch_keys
_thread_keys = torch._C._dispatch_tls_local_include_set


def _bits(names: tuple[str, ...]) -> int:
    keys = torch._C._dispatch_keys(torch.empty(0, device="cpu"))
    for name in names:
        keys = keys.add(getattr(torch._C.DispatchKey, name))
    return int(keys.raw_repr())


_EXTRAORDINARY = ~_bits(ORDINARY)
_STRANGE = ~_bits(ORDINARY + LEVELS)


def observed(x: Tensor, *others: Tensor | None) -> bool:
    """Tells whether a call has to go through its operator.

    Args:
        x: the first tensor of the call, on whose device it runs.
        others: the others; one on another device is refused by the engines' checks.
    """
    if (
        torch.compiler.is_compiling()  # first: a compiler cannot look into the others
        or (_thread_keys().raw_repr() & _EXTRAORDINARY and _strange((x, *others)))
        or _profiler._is_profiler_enabled
        or (torch._C._len_torch_function_stack() and _function_mode())
        or type(x) not in _PLAIN
        or x.is_meta
        or _is_negated(x)
    ):
        return True
    # All keys of a tensor cost as much to ask for as all the rest; outside of functorch's levels
    # these two questions tell the same, for other layouts are refused by the engines' checks.
    for other in others:
        if other is not None and (type(other) not in _PLAIN or _is_negated(other)):
            return True
    return False


def has_values(*operands: Tensor | None) -> bool:
    """Tells whether what the engines would read in memory is what the tensors hold."""
    return not any(o is not None and _keys_of(o).raw_repr() & _EXTRAORDINARY for o in operands)


def transforms_active() -> bool:
    """Tells whether a functorch transform or forward-mode differentiation is running."""
    return torch._C._are_functorch_transforms_active() or _forward_ad._current_level >= 0


def functionalised(*operands: Tensor | None) -> bool:
    """Tells whether a tensor is one of ``torch.func.functionalize``, whose level has no twins."""
    key = torch._C.DispatchKey.Functionalize
    return any(o is not None and _keys_of(o).has(key) for o in operands)


@contextmanager
def untraced() -> Iterator[None]:
    """Hides from the JIT tracer what is computed inside: constants, sizes as plain integers."""
    engine: Any = torch._C
    state = engine._get_tracing_state()
    if state is None:
        yield
        return
    engine._set_tracing_state(None)
    try:
        yield
    finally:
        engine._set_tracing_state(state)


def sizes(x: Tensor) -> torch.Size:
    """Returns the shape of a tensor in the form that an operator's integers can have.

    Symbolic where a tracer has symbols. The JIT tracer makes tensors of sizes, which lists of
    integers cannot hold; for it they are the example's, and the operators ask the tensors anew.
    """
    if torch.compiler.is_compiling():
        return x.shape
    with untraced():
        return x.shape


def _strange(operands: tuple[Tensor | None, ...]) -> bool:
    """Tells whether a thread's keys are more than functorch's levels, or a tensor's are."""
    keys = _thread_keys().raw_repr()
    for operand in operands:
        keys |= 0 if operand is None else _keys_of(operand).raw_repr()
    return bool(keys & _STRANGE)


def _function_mode() -> bool:
    """Tells whether there is a function mode other than that of the default device."""
    return any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack())
