# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs of a whole network: captured once for each signature of inputs, then replayed.

A layer takes the host some microseconds, and small images the GPU no more: a replay gives all
launches to the driver at once.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils import _pytree as pytree

from .. import ranges
from ..accuracy import is_strict
from ..autograd import transforms_active
from ..backends import forced_code
from ..errors import ArgumentError, BackendError, mismatch
from .seen import describe_arguments

# Signatures of inputs whose graphs are kept; the one that was not used for longest goes first.
MOST_GRAPHS = 8
# Calls before a capture, in which engines are chosen, kernels compiled and weights packed.
_BEFORE = 2


def check_gpu(inputs: Sequence[Any]) -> None:
    """Refuses to capture what is not on one GPU.

    Raises:
        BackendError: PyTorch can use no GPU.
        ArgumentError: a tensor of the inputs is elsewhere, or on another one.
    """
    way_out = "Leave cuda_graph out: on a CPU the network runs as a native program."
    if not torch.cuda.is_available():
        received = "no GPU that PyTorch can use"
        raise BackendError(mismatch("device for cuda_graph", received, "an NVIDIA GPU", way_out))
    devices = {t.device for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor)}
    if len(devices) != 1 or not all(on_gpu(device) for device in devices):
        received = ", ".join(sorted(map(str, devices)))
        expected = "tensors on one NVIDIA GPU, as the network"
        raise ArgumentError(mismatch("example for cuda_graph", received, expected, way_out))


def on_gpu(device: torch.device) -> bool:
    """Tells whether what is on a device can be captured."""
    return device.type == "cuda"


def replay_on_gpu(network: nn.Module) -> None:
    """Has a `PlannedNetwork` capture its calls on a GPU, and replay them."""
    network.__dict__["_graphs"] = CudaGraphs()


class _Captured(NamedTuple):
    """A graph with the tensors that it reads and writes.

    Attributes:
        graph: is replayed.
        inputs: copies of what the network was given.
        result: what the network returned.
        used: which later replays wait for: that the result of the latest one was copied.
    """

    graph: Any
    inputs: tuple[Any, ...]
    result: Any
    used: Any

    def replay(self, args: Sequence[Any]) -> Any:
        """Runs the graph on other inputs; returns copies of its results."""
        stream = torch.cuda.current_stream()
        stream.wait_event(self.used)
        for kept, given in zip(self.inputs, args, strict=True):
            if isinstance(kept, Tensor):
                kept.copy_(given)
        self.graph.replay()
        result = pytree.tree_map(_copied, self.result)
        self.used.record(stream)
        return result

    @property
    def bytes(self) -> int:
        """The size of inputs and results; the driver says nothing of the rest."""
        leaves = pytree.tree_leaves((self.inputs, self.result))
        return sum(t.nbytes for t in leaves if isinstance(t, Tensor))


class CudaGraphs:
    """The captured graphs of a network, one for each signature of its inputs.

    What a graph returns is copied, so it is the caller's. A layer, a weight or an option that was
    changed is noticed, and captured anew: a graph reads addresses. Calls that want gradients, that
    are traced, compiled or captured themselves, or whose modules have hooks, are run as the network
    says. An unpickled network starts without any graph, and a copied one has none.
    """

    def __init__(self) -> None:
        self._captured: OrderedDict[Any, _Captured] = OrderedDict()
        self._guard: _Guard | None = None
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: dict[int, Any]) -> CudaGraphs:
        return CudaGraphs()

    def __reduce__(self) -> tuple[Any, ...]:
        return CudaGraphs, ()

    def signature(self, network: nn.Module, args: Sequence[Any]) -> Any:
        """Returns what a graph depends on; None where this call must run as the network says."""
        if torch.compiler.is_compiling():
            return None
        described = describe_arguments(args, on_gpu)
        if described is None:
            return None
        parts, wants_gradient = described
        devices = {value.device for value in args if isinstance(value, Tensor)}
        if len(devices) != 1 or ranges.active or transforms_active():
            return None
        if torch.cuda.is_current_stream_capturing() or torch_module._has_any_global_hook():
            return None
        with self._lock:
            if self._guard is None or not self._guard.holds():
                self._captured.clear()
                self._guard = _Guard(network)
            guard = self._guard
        if not guard.steady(wants_gradient):
            return None
        cast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
        return (devices.pop(), *parts, forced_code(), is_strict(), cast)

    def run(self, signature: Any, args: Sequence[Any], call: Callable[..., Any]) -> Any:
        """Replays the graph of a signature; captures it first where there is none.

        Args:
            signature: as `signature` said.
            args: the inputs.
            call: runs the network.

        Raises:
            BackendError: a step of the network cannot be captured.
        """
        with self._lock, torch.cuda.device(signature[0]):
            found = self._captured.get(signature)
            if found is None:
                found = self._captured[signature] = _capture(args, call)
                while len(self._captured) > MOST_GRAPHS:
                    self._captured.popitem(last=False)
            self._captured.move_to_end(signature)
            return found.replay(args)

    def release(self) -> int:
        """Drops all graphs; returns the bytes of their inputs and results."""
        with self._lock:
            freed = sum(one.bytes for one in self._captured.values())
            self._captured.clear()
        return freed


def _capture(args: Sequence[Any], call: Callable[..., Any]) -> _Captured:
    """Captures a call on copies of its inputs.

    Raises:
        BackendError: PyTorch refused.
    """
    with torch.no_grad():
        inputs = tuple(pytree.tree_map(_copied, value) for value in args)
        here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            for _ in range(_BEFORE):
                call(*inputs)
        here.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                result = call(*inputs)
        except RuntimeError as error:
            raise BackendError(
                "A step of the network cannot be captured in a CUDA graph "
                f"({error}). Use optimize without cuda_graph."
            ) from error
    used = torch.cuda.Event()
    used.record(here)
    return _Captured(graph, inputs, result, used)


def _copied(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach().clone(memory_format=torch.preserve_format)


class _Guard:
    """What a network was made of when it was captured."""

    def __init__(self, network: nn.Module) -> None:
        self._modules = list(network.modules())
        self._children = [(m._modules, dict(m._modules)) for m in self._modules]
        self._tensors = [(s, name, t, _state(t)) for s, name, t in _tensors_of(self._modules)]

    def holds(self) -> bool:
        """Tells whether modules and tensors are the same, and these unchanged."""
        return all(now == then for now, then in self._children) and all(
            store.get(name) is tensor and _state(tensor) == state
            for store, name, tensor, state in self._tensors
        )

    def steady(self, wants_gradient: bool) -> bool:
        """Tells whether a call is one for inference, that nobody looks into."""
        if any(m.training or m._forward_hooks or m._forward_pre_hooks for m in self._modules):
            return False
        wanted = wants_gradient or any(t.requires_grad for _, _, t, _ in self._tensors)
        return not (wanted and torch.is_grad_enabled())


def _tensors_of(modules: Sequence[nn.Module]) -> Iterator[tuple[Any, str, Tensor]]:
    for module in modules:
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is not None:
                    yield store, name, tensor


def _state(tensor: Tensor) -> tuple[int, int]:
    # An inference tensor has no version.
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version
