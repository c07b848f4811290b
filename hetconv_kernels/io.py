# SPDX-License-Identifier: Apache-2.0
"""Saves networks whose layers were changed: compacted, pruned, optimised; no pickle.

One safetensors file: the weights, and as JSON beside them what every layer is (its class, sizes and
Support) and, where the network can be traced, the steps between them. It is read back into a
network of the original class, whose layers are exchanged for the saved ones, or without that
class, as an ``fx.GraphModule``. Needs the ``safetensors`` extra.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from ._version import __version__
from .errors import ArgumentError, FileError, HetconvError, mismatch
from .file_tensors import (
    check_sizes,
    damaged,
    fill,
    laid_out,
    named_tensors,
    separate_tensors,
    special_strides,
    tensors_digest,
    text_digest,
    tied_names,
)
from .files import Json, writing
from .graph.carried import check_described
from .graph.graph_json import graph_from_json, graph_to_json
from .graph.layer_json import layer_from_json, layer_to_json
from .graph.layout import set_module
from .graph.narrow import NARROW, Narrow
from .graph.planned import PlannedNetwork, planned
from .graph.trace import (
    FAILURES,
    check_network,
    check_plain,
    check_tensors,
    symbolic_graph,
    trace,
)

__all__ = ["load", "save"]

_FORMAT = "hetconv_kernels.Network/2"
# Without a digest of the description, modes and ties; still read.
_OLD_FORMAT = "hetconv_kernels.Network/1"
_KEY = "hetconv_kernels"
_COUNT = "num_batches_tracked"
_DIGEST_KEY = "hetconv_kernels.digest"
_MALFORMED = (*FAILURES, MemoryError, RecursionError)


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    into: nn.Module | None = None,
    example: Any = None,
) -> None:
    """Writes a network to a file, which replaces an older one only when it is whole.

    What `load` could not give back is refused: hooks, pruning and weight norms that are not
    permanent, tensors that a layer's class does not make.

    Args:
        model: any network; one that torch.fx traces can be loaded without its class.
        path: of the file.
        into: a network like the one that the file will be loaded into; what it carries too (the
            same pruning, the same hooks) is not refused. It is looked at and not changed.
        example: an input, or a tuple of inputs, for a network in evaluation mode whose code asks
            for sizes and which torch.fx therefore cannot trace: torch.export's graph is written,
            for images of that size, and the file is loaded without the class.

    Raises:
        InputTypeError: no nn.Module, or a scripted or wrapped one; the example has no tensor.
        TraceError: torch.export cannot trace it either.
        ArgumentError: a weight has no values yet (meta device, lazy); or the network carries what
            a file cannot describe, which the message names.
        HetconvError: safetensors is not installed.
    """
    check_plain(model)
    check_tensors(model)
    if into is not None:
        check_plain(into)
    dtype = model.dtype if isinstance(model, Narrow) else None
    model, into = _inside(model), None if into is None else _inside(into)
    if example is not None:
        model = _as_graph(model, example)
    tensors = separate_tensors(model)
    for name, tensor in tensors.items():
        if tensor.is_meta or not isinstance(tensor, Tensor):
            raise ArgumentError(mismatch(f"values of {name!r}", "none", "a tensor with values"))
    layers: dict[str, Json] = {}
    for name, module in model.named_modules():
        if any(name.startswith(f"{whole}.") for whole in layers):
            continue  # a part of a layer that is described with its parts
        described = layer_to_json(module)
        if described is not None:
            layers[name] = described
    check_described(model, layers, into)
    description = {
        "format": _FORMAT,
        "version": __version__,
        "class": type(model).__qualname__,
        "layers": layers,
        "graph": _graph(model, layers),
        "fixed": [name for name, p in model.named_parameters() if not p.requires_grad],
        "buffers": [name for name, _ in model.named_buffers(remove_duplicate=False)],
        "tied": tied_names(model),
        "training": model.training,
        "strides": special_strides(model),
        "other_mode": [n for n, m in model.named_modules() if m.training != model.training],
        "digest": tensors_digest(tensors),
        "planned": isinstance(model, PlannedNetwork),
    }
    if dtype is not None:
        description["narrow"] = str(dtype).removeprefix("torch.")
    description["graph"] = _rebuildable(description, tensors)
    text = json.dumps(description)
    path = Path(path)
    library = _safetensors()
    metadata = {_KEY: text, _DIGEST_KEY: text_digest(text)}
    with writing(path, also=(library.SafetensorError,)) as part:
        library.torch.save_file(tensors, str(part), metadata=metadata)


def load(
    path: str | os.PathLike[str],
    into: nn.Module | None = None,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """Reads a network back.

    Args:
        path: of a file that `save` wrote.
        into: a network of the saved one's class, of any widths: its layers are exchanged for the
            saved ones, in place. None builds the network from the steps in the file.
        device: where the weights go.

    Returns:
        ``into``, or an ``fx.GraphModule`` that plans its memory if the saved network did (inside
        of a `graph.narrow.Narrow` where ``optimize(..., dtype=…)`` made it); every module in the
        mode (train or eval) that it was saved in, tied weights tied.

    Raises:
        FileNotFoundError: there is no such file.
        FileError: the file is foreign, truncated, damaged, of another format, or declares sizes
            far beyond its weights; or it has no steps and ``into`` is None.
        ArgumentError: ``into`` has not the modules that were saved, or there is no such device.
        HetconvError: safetensors is not installed.
    """
    path = Path(path)
    device = _device(device)
    if into is not None:
        check_plain(into)
    description, tensors = _read(path, device)
    try:
        dtype = _narrow_dtype(description, path)
        built = _built(description, tensors, None if into is None else _inside(into), path)
        if dtype is None:
            return built
        if not isinstance(into, Narrow):
            return Narrow(built, dtype).train(built.training)
        into.body, into.dtype = built, dtype
        return into
    except HetconvError:
        raise
    except _MALFORMED as error:
        why = f"its description makes no sense ({error!r:.200})"
        raise FileError(damaged(path, why)) from error


def _inside(model: nn.Module) -> nn.Module:
    """Returns the network that a `Narrow` one wraps, or the network itself."""
    return model.body if isinstance(model, Narrow) else model


def _narrow_dtype(description: Json, path: Path) -> torch.dtype | None:
    """Returns the 16-bit type that the network runs in behind its inputs, if it does."""
    name = description.get("narrow")
    if name is None:
        return None
    dtypes = {str(dtype).removeprefix("torch."): dtype for dtype in NARROW}
    if not isinstance(name, str) or name not in dtypes:
        raise FileError(damaged(path, f"{name!r:.40} is no 16-bit type"))
    return dtypes[name]


def _built(
    description: Json, tensors: Mapping[str, Tensor], into: nn.Module | None, path: Path
) -> nn.Module:
    """Makes the network of a file's contents."""
    check_sizes(description["layers"], tensors, path)
    layers = {name: layer_from_json(d) for name, d in description["layers"].items()}
    steps, fixed = description["graph"], set(description["fixed"])
    training = bool(description["training"])
    tied, buffers = dict(description.get("tied", {})), set(description.get("buffers", ()))
    plans = into is None and description.get("planned") is True
    if into is None:
        if not isinstance(steps, list):
            raise FileError(
                f"{path.name} holds no steps: {steps}. Expected a network that torch.fx can trace; "
                "give load(..., into=network) a network of the saved one's class, or save(..., "
                "example=...) an input."
            )
        into = _assemble(steps, layers, tensors, buffers)
        there = {*named_tensors(into)}
        # A module that stood at two names has one in the steps.
        tensors = {n: t for n, t in tensors.items() if n in there or tied.get(n) not in there}
    else:
        into = _exchange(into, layers, path)
    strides = description.get("strides", {})
    tensors = {name: laid_out(t, strides.get(name), path) for name, t in tensors.items()}
    fill(into, tensors, tied, path)
    for name, described in description["layers"].items():
        if described.get("channels_last"):
            weight: Any = into.get_submodule(name).weight
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    for name, parameter in into.named_parameters():
        parameter.requires_grad_(name not in fixed)
    into.train(training)
    others = set(description.get("other_mode", ()))
    for name, module in into.named_modules():
        if name in others:
            module.training = not training
    return planned(into) if plans and isinstance(into, fx.GraphModule) else into


def _device(device: torch.device | str) -> torch.device:
    """Returns a device that there is."""
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        raise ArgumentError(
            mismatch("device", repr(device), "one of this machine", f"PyTorch says: {error}")
        ) from error
    return found


def _rebuildable(description: Json, tensors: Mapping[str, Tensor]) -> list[Json] | str:
    """Returns the steps, or says why a network of them would lack something."""
    steps = description["graph"]
    if not isinstance(steps, list):
        return str(steps)
    layers = {name: layer_from_json(d) for name, d in description["layers"].items()}
    there = {*named_tensors(_assemble(steps, layers, tensors, set(description["buffers"])))}
    tied = description["tied"]
    unread = sorted(n for n in tensors if n not in there and tied.get(n) not in there)
    return f"no step reads {', '.join(unread[:5])}" if unread else steps


def _as_graph(model: nn.Module, example: Any) -> nn.Module:
    """Returns a network whose steps can be written: itself, or the graph of its example."""
    try:
        if not isinstance(model, fx.GraphModule):
            graph_to_json(symbolic_graph(model))
    except (HetconvError, *FAILURES):
        check_network(model)
        return trace(model, example).eval()
    return model


def _graph(model: nn.Module, layers: Mapping[str, Json]) -> list[Json] | str:
    """Describes the steps of a network, or says why there are none."""
    try:
        graph = model.graph if isinstance(model, fx.GraphModule) else symbolic_graph(model)
        steps = graph_to_json(graph)
    except (HetconvError, *FAILURES) as error:
        return f"{error}"
    for node in graph.nodes:
        if node.op == "call_module" and node.target not in layers:
            kind = type(model.get_submodule(str(node.target))).__name__
            return f"the module {node.target} is a {kind}, which a file cannot describe"
    return steps


def _read(path: Path, device: torch.device) -> tuple[Json, dict[str, Tensor]]:
    library = _safetensors()
    if not path.is_file():
        raise FileNotFoundError(f"{path.name}: there is no such file")
    try:
        with library.safe_open(str(path), "pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            text = metadata.get(_KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (library.SafetensorError, *_MALFORMED) as error:
        raise FileError(damaged(path, f"it is no whole safetensors file ({error})")) from error
    if text is None:
        raise FileError(damaged(path, "another program wrote it"))
    try:
        description: Json = json.loads(text)
        form, digest = description["format"], description["digest"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise FileError(damaged(path, f"its description cannot be read ({error!r})")) from error
    if form not in (_FORMAT, _OLD_FORMAT):
        raise FileError(mismatch(f"format of {path.name}", form, _FORMAT, "Update this package."))
    if form == _FORMAT and metadata.get(_DIGEST_KEY) != text_digest(text):
        raise FileError(damaged(path, "its description is not the one that was saved"))
    if digest != tensors_digest(tensors):
        raise FileError(damaged(path, "its weights are not those that were saved"))
    return description, tensors


def _assemble(
    steps: list[Json],
    layers: Mapping[str, nn.Module],
    tensors: Mapping[str, Tensor],
    buffers: set[str],
) -> nn.Module:
    """Builds the network of the steps."""
    graph = graph_from_json(steps)
    parts: dict[str, Any] = {}
    for node in graph.nodes:
        name = str(node.target)
        if node.op == "call_module":
            if name not in layers:
                raise FileError(mismatch("module of a step", name, "one of the saved layers"))
            parts[name] = layers[name]
            _check_step(node, layers[name])
        elif node.op == "get_attr":
            if name not in tensors:
                raise FileError(mismatch("tensor of a step", name, "one of the saved tensors"))
            value = tensors[name]
            trained = value.is_floating_point() and name not in buffers
            parts[name] = nn.Parameter(value) if trained else value
    made = fx.GraphModule(parts, graph)
    for name in sorted(buffers - parts.keys()):
        # The count of a batch norm whose own forward was traced: only training reads it.
        place, _, last = name.rpartition(".")
        if last == _COUNT and f"{place}.running_mean" in parts and name in tensors:
            made.get_submodule(place).register_buffer(last, tensors[name])
    return made


def _check_step(node: fx.Node, layer: nn.Module) -> None:
    """Refuses a layer that is called with arguments that its forward has not, or without a value.

    Raises:
        FileError: it is.
    """
    try:
        inspect.signature(type(layer).forward).bind(layer, *node.args, **node.kwargs)
        if not node.args or not isinstance(node.args[0], fx.Node):
            raise TypeError(f"its input is {node.args[:1]}")
    except TypeError as error:
        raise FileError(
            mismatch("arguments of a step", f"{node.format_node()} ({error})", "the layer's own")
        ) from error


def _exchange(into: nn.Module, layers: Mapping[str, nn.Module], path: Path) -> nn.Module:
    """Puts the saved layers in the places of those that differ."""
    present = dict(into.named_modules())
    missing = sorted(layers.keys() - present.keys())
    if missing:
        raise ArgumentError(
            mismatch(
                f"network to load {path.name} into",
                f"one without the modules {missing[:5]}",
                "a network of the saved one's class",
                "load(path) builds the network without its class.",
            )
        )
    for name, layer in layers.items():
        if layer_to_json(layer) == layer_to_json(present[name]):
            continue
        if not name:
            return layer
        set_module(into, name, layer)
    return into


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise HetconvError(
            "saving and loading needs safetensors: pip install 'hetconv-kernels[safetensors]'"
        ) from error
    return safetensors
