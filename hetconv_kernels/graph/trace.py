# SPDX-License-Identifier: Apache-2.0
"""trace: the graph of a network, from torch.fx or, where that fails, from torch.export."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ..errors import ArgumentError, InputTypeError, TraceError, mismatch
from ..nn.base import ForcedBackend
from .alias import say
from .exported import lift
from .frozen_norm import is_frozen_norm
from .group_norm import lift_group_norms

# What a network's own code raises when it meets a tracer's stand-ins for tensors.
FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    RuntimeError,
    TypeError,
    ValueError,
)


# Modules of torch.nn that compute something else in training mode, by themselves or in their parts.
_MODAL = (
    nn.modules.batchnorm._NormBase,
    nn.modules.dropout._DropoutNd,
    nn.RReLU,
    nn.RNNBase,
    nn.MultiheadAttention,
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
    nn.FractionalMaxPool2d,
    nn.FractionalMaxPool3d,
)


def as_inputs(example: Any) -> tuple[Any, ...]:
    """Returns the arguments of a forward: the example itself, or the tuple that it is.

    Raises:
        InputTypeError: there is no tensor in it.
    """
    inputs = tuple(example) if isinstance(example, tuple | list) else (example,)
    if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(inputs)):
        raise InputTypeError(
            mismatch("example", type(example).__name__, "an input tensor, or a tuple of inputs")
        )
    return inputs


def check_plain(model: nn.Module) -> None:
    """Refuses what is no plain network.

    Raises:
        InputTypeError: it is no nn.Module, or a scripted or wrapped one.
    """
    wrapped = (nn.DataParallel, nn.parallel.DistributedDataParallel, torch.jit.ScriptModule)
    if not isinstance(model, nn.Module) or isinstance(model, wrapped):
        raise InputTypeError(mismatch("model", type(model).__name__, "a plain nn.Module"))


def check_network(model: nn.Module) -> None:
    """Refuses what is no plain network in evaluation mode.

    Raises:
        InputTypeError: it is no nn.Module, or a scripted or wrapped one.
        ArgumentError: a part of it is in training mode.
    """
    check_plain(model)
    for name, module in model.named_modules():
        if module.training and not (name and _indifferent(module)):
            raise ArgumentError(
                mismatch(
                    "mode of the network",
                    f"training mode at {name!r} ({type(module).__name__})",
                    "evaluation mode, in which batch normalisation is a fixed scale and shift",
                    "Call model.eval() first, and once more after putting new modules in it.",
                )
            )


def _indifferent(module: nn.Module) -> bool:
    """Tells whether a part computes the same in both modes: torch builds some in training mode."""
    own = type(module).__module__.startswith(("torch.nn.modules.", "torch.ao.nn.quantized."))
    return own and not isinstance(module, _MODAL)


def check_float(model: nn.Module) -> None:
    """Refuses a network that is in 8 bits already.

    Raises:
        InputTypeError: it has a quantised layer, or weights of torchao's.
    """
    check_tensors(model)
    for name, module in model.named_modules() if isinstance(model, nn.Module) else ():
        if isinstance(module, ForcedBackend) and hasattr(module, "weight_scale"):
            raise InputTypeError(
                mismatch(
                    "model",
                    f"a network in 8 bits ({name or 'the whole'} is a {type(module).__name__})",
                    "one in float",
                    "hetconv_kernels.quantize has optimised it already.",
                )
            )


def check_tensors(model: nn.Module) -> None:
    """Refuses weights that torchao's ``quantize_`` made: they are no tensors that can be rewritten.

    Raises:
        InputTypeError: it has one; the message names it.
    """
    for name, parameter in model.named_parameters() if isinstance(model, nn.Module) else ():
        if type(parameter).__module__.startswith("torchao."):
            raise InputTypeError(
                mismatch(
                    f"weight {name!r}",
                    f"torchao's {type(parameter).__name__}",
                    "a plain tensor",
                    "Call torchao's quantize_ last, on what this package gave; or "
                    "hetconv_kernels.quantize in its place, or torchao's PT2E with "
                    "quantization.from_pt2e.",
                )
            )


def trace(model: nn.Module, example: Any) -> fx.GraphModule:
    """Finds the graph of a network: its layers as ``call_module`` nodes with their own names.

    torch.fx is tried first: it keeps sizes free. Where the network's code asks for values or sizes
    that torch.fx does not have, or where its graph computes something else (it takes ``z += 1`` on
    a view for ``z = z + 1``), torch.export is tried, whose graph is that of the example's sizes
    (but for the batch, where the code allows it); its convolutions, normalisations and linear
    layers are made modules again, with the names that their parameters had.

    The graph shares modules with the network. Each node's ``meta`` has ``shape`` (of a tensor, or
    of each of a tuple) or ``value`` (anything else), as they were with the example.

    Args:
        model: the network.
        example: an input, or a tuple of inputs.

    Raises:
        InputTypeError: the example has no tensor.
        TraceError: neither way works; the message has both reasons.
    """
    inputs = as_inputs(example)
    reasons, doubtful = [], None
    for name, find in (("torch.fx", _symbolic), ("torch.export", lift)):
        try:
            traced = find(model, inputs)
            record(traced, inputs)
            if say(traced):
                record(traced, inputs)
            _keep_mappings(model, traced, inputs)
        except FAILURES as error:
            reasons.append(f"{name}: {_first_line(error)}")
        else:
            traced.meta["traced by"] = name
            if _computes_the_same(model, traced, inputs):
                return traced
            doubtful = doubtful or traced
    if doubtful is not None:
        return doubtful  # those who rewrite it compare outputs, and say what may be the matter
    raise TraceError(
        f"{type(model).__name__} cannot be traced ({'; '.join(reasons)}); expected a forward "
        "without branches on values of tensors. hetconv_kernels.convert needs no trace; compact, "
        "compress and optimize take the parts that can be traced."
    )


class _Tracer(fx.Tracer):
    """Stops at the layers of this package as at those of torch.nn."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, ForcedBackend) or super().is_leaf_module(m, module_qualified_name)


class _NormTracer(_Tracer):
    """Stops at frozen batch normalisations too."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_frozen_norm(m) or super().is_leaf_module(m, module_qualified_name)


def symbolic_graph(model: nn.Module, norms: bool = False) -> fx.Graph:
    """Traces a network with torch.fx, the layers of this package being single steps.

    Args:
        model: the network.
        norms: whether frozen batch normalisations are single steps too.

    Raises:
        Whatever torch.fx and the network's own code raise.
    """
    graph = (_NormTracer if norms else _Tracer)().trace(model)
    for node in list(graph.nodes):
        if node.op == "call_function" and _passes_on(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    return graph


def _passes_on(node: fx.Node) -> bool:
    """Tells torchvision's stochastic depth in evaluation mode: it gives back what it is given."""
    named = getattr(node.target, "__name__", "") == "stochastic_depth"
    training = node.args[3] if len(node.args) > 3 else node.kwargs.get("training", True)
    return named and training is False and isinstance(node.args[0], fx.Node)


def _symbolic(model: nn.Module, inputs: tuple[Any, ...]) -> fx.GraphModule:
    if isinstance(model, ForcedBackend):
        model = nn.Sequential(model)
    graph = symbolic_graph(model, norms=True)
    # Arguments that are left out keep their defaults: the traced code has to see them constant.
    names = [node for node in graph.nodes if node.op == "placeholder"]
    for node in names[len(inputs) :]:
        if node.users:
            raise TypeError(f"its argument {node.target!r} is not in the example")
    for node in graph.nodes:
        node.type = None  # annotations, which fx cannot pickle where they are strings
    traced = fx.GraphModule(model, graph)
    lift_group_norms(traced, model)
    return traced


@torch.inference_mode(False)
@torch.no_grad()
def record(traced: fx.GraphModule, inputs: tuple[Any, ...]) -> None:
    """Runs a graph and notes in each node's ``meta`` what it gave.

    Args:
        traced: the graph.
        inputs: arguments of its forward; they stay as they are.
    """
    _Recorder(traced).run(*copy.deepcopy(inputs))


@torch.inference_mode(False)
@torch.no_grad()
def _computes_the_same(model: nn.Module, traced: fx.GraphModule, inputs: tuple[Any, ...]) -> bool:
    """Tells whether a graph gives what the network gives for the example, up to rounding."""
    own, other = (
        [t for t in pytree.tree_leaves(m(*copy.deepcopy(inputs))) if isinstance(t, Tensor)]
        for m in (model, traced)
    )
    if [t.shape for t in own] != [t.shape for t in other]:
        return False
    for mine, found in zip(own, other, strict=True):
        if not mine.is_floating_point() or mine.is_meta or not mine.numel():
            continue
        size = mine.abs().nan_to_num(0, 0).max().double()
        error = (mine.double() - found.double()).abs().nan_to_num(0).max()
        if error > size * 2 ** (-10 if mine.dtype.itemsize > 2 else -5):
            return False
    return True


@torch.no_grad()
def _keep_mappings(model: nn.Module, traced: fx.GraphModule, inputs: tuple[Any, ...]) -> None:
    """Makes an OrderedDict of the outputs again where the network gives one: a graph gives a dict.

    Raises:
        TypeError: it gives a mapping of another class, which a graph cannot.
    """
    (output,) = (node for node in traced.graph.nodes if node.op == "output")
    if not _has_mapping(output.args[0]):
        return

    def again(here: Any, there: Any) -> Any:
        if isinstance(here, Mapping) and isinstance(there, Mapping):
            parts = {key: again(here[key], there[key]) for key in here}
            if type(there) is dict:
                return parts
            if type(there) is not OrderedDict:
                raise TypeError(
                    f"its output is a {type(there).__name__}, which a graph cannot give"
                )
            with traced.graph.inserting_before(output):
                return traced.graph.call_function(OrderedDict, (parts,))
        if isinstance(here, list | tuple) and isinstance(there, list | tuple):
            parts_of = [again(h, t) for h, t in zip(here, there, strict=True)]
            return type(here)(parts_of) if type(here) in (list, tuple) else here
        return here

    output.args = (again(output.args[0], model(*copy.deepcopy(inputs))),)
    traced.recompile()
    record(traced, inputs)


def _has_mapping(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(map(_has_mapping, value))
    return isinstance(value, Mapping)


class _Recorder(fx.Interpreter):
    """Runs the graph and notes what each node gives, whose memory it shares and what it changes."""

    def run_node(self, n: fx.Node) -> Any:
        operands = [(node, self.env[node]) for node in n.all_input_nodes]
        before = [_version(value) for _, value in operands]
        result = super().run_node(n)
        for key in ("shape", "value", "alias", "mutates"):
            n.meta.pop(key, None)
        if isinstance(result, Tensor):
            n.meta["shape"] = tuple(result.shape)
        elif isinstance(result, tuple | list) and all(isinstance(r, Tensor) for r in result):
            n.meta["shape"] = tuple(tuple(r.shape) for r in result)
        else:
            n.meta["value"] = result
        memory = _memory(result)
        for (node, value), version in zip(operands, before, strict=True):
            if memory & _memory(value):
                n.meta.setdefault("alias", node)
            if _version(value) != version:
                n.meta.setdefault("mutates", node)
        return result


def _memory(value: Any) -> set[int]:
    """Returns the addresses of the storages that a value's tensors are in."""
    tensors = value if isinstance(value, tuple | list) else (value,)
    found = {
        t.untyped_storage().data_ptr()
        for t in tensors
        if isinstance(t, Tensor) and t.layout == torch.strided and not t.is_meta
    }
    return found - {0}


def _version(value: Any) -> int:
    return value._version if isinstance(value, Tensor) else 0


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    line = lines[0] if lines else ""
    return f"{type(error).__name__}: {line if len(line) < 160 else line[:157] + '...'}"
