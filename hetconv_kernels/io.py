# SPDX-License-Identifier: Apache-2.0
"""Saves networks whose layers were changed: compacted, pruned, optimised; no pickle.

One safetensors file: the weights, and as JSON beside them what every layer is (its class, sizes and
Support) and, where the network can be traced, the steps between them. It is read back into a
network of the original class, whose layers are exchanged for the saved ones, or without that
class, as an ``fx.GraphModule``. Needs the ``safetensors`` extra.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from ._version import __version__
from .errors import ArgumentError, FileError, HetconvError, mismatch
from .files import writing
from .graph.graph_json import graph_from_json, graph_to_json
from .graph.layer_json import layer_from_json, layer_to_json
from .graph.layout import set_module
from .graph.trace import FAILURES, check_plain, symbolic_graph

_FORMAT = "hetconv_kernels.Network/1"
_KEY = "hetconv_kernels"
Json = dict[str, Any]


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes a network to a file, which replaces an older one only when it is whole.

    Args:
        model: any network; one that torch.fx traces can be loaded without its class.
        path: of the file.

    Raises:
        InputTypeError: no nn.Module, or a scripted or wrapped one.
        ArgumentError: a weight has no values yet (meta device, lazy).
        HetconvError: safetensors is not installed.
    """
    check_plain(model)
    tensors = _tensors(model)
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
    text = json.dumps(
        {
            "format": _FORMAT,
            "version": __version__,
            "class": type(model).__qualname__,
            "layers": layers,
            "graph": _graph(model, layers),
            "fixed": [name for name, p in model.named_parameters() if not p.requires_grad],
            "training": model.training,
            "digest": _digest(tensors),
        }
    )
    path = Path(path)
    library = _safetensors()
    with writing(path, also=(library.SafetensorError,)) as part:
        library.torch.save_file(tensors, str(part), metadata={_KEY: text})


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
        ``into``, or an ``fx.GraphModule``; in the mode (train or eval) that it was saved in.

    Raises:
        FileNotFoundError: there is no such file.
        FileError: the file is foreign, truncated, damaged or of another format; or it has no
            steps and ``into`` is None.
        ArgumentError: ``into`` has not the modules that were saved.
        HetconvError: safetensors is not installed.
    """
    path = Path(path)
    description, tensors = _read(path, torch.device(device))
    try:
        layers = {name: layer_from_json(d) for name, d in description["layers"].items()}
        steps, fixed = description["graph"], set(description["fixed"])
        training = bool(description["training"])
    except (KeyError, TypeError, AttributeError) as error:
        raise FileError(_damaged(path, f"its description lacks something ({error!r})")) from error
    if into is None:
        if not isinstance(steps, list):
            raise FileError(
                f"{path.name} holds no steps: {steps}. Expected a network that torch.fx can trace; "
                "give load(..., into=network) a network of the saved one's class."
            )
        into = _assemble(steps, layers, tensors)
    else:
        check_plain(into)
        into = _exchange(into, layers, path)
    _fill(into, tensors, path)
    for name, described in description["layers"].items():
        if described.get("channels_last"):
            weight: Any = into.get_submodule(name).weight
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    for name, parameter in into.named_parameters():
        parameter.requires_grad_(name not in fixed)
    return into.train(training)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Lists parameters and buffers, each with memory of its own, as safetensors wants."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    named: list[tuple[str, Tensor]] = [*model.named_parameters(remove_duplicate=False)]
    named += model.named_buffers(remove_duplicate=False)
    for name, tensor in named:
        value = tensor.detach()
        if not value.is_meta:
            value = value.contiguous()
            if value.untyped_storage().data_ptr() in seen:
                value = value.clone()
            seen.add(value.untyped_storage().data_ptr())
        found[name] = value
    return found


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


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name].cpu()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read(path: Path, device: torch.device) -> tuple[Json, dict[str, Tensor]]:
    library = _safetensors()
    if not path.is_file():
        raise FileNotFoundError(f"{path.name}: there is no such file")
    try:
        with library.safe_open(str(path), "pt", device=str(device)) as file:
            text = (file.metadata() or {}).get(_KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except library.SafetensorError as error:
        raise FileError(_damaged(path, f"it is no whole safetensors file ({error})")) from error
    if text is None:
        raise FileError(_damaged(path, "another program wrote it"))
    try:
        description: Json = json.loads(text)
        form, digest = description["format"], description["digest"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise FileError(_damaged(path, f"its description cannot be read ({error!r})")) from error
    if form != _FORMAT:
        raise FileError(mismatch(f"format of {path.name}", form, _FORMAT, "Update this package."))
    if digest != _digest(tensors):
        raise FileError(_damaged(path, "its weights are not those that were saved"))
    return description, tensors


def _damaged(path: Path, how: str) -> str:
    return f"{path.name} cannot be loaded: {how}; expected a file of hetconv_kernels.io.save."


def _assemble(
    steps: list[Json], layers: Mapping[str, nn.Module], tensors: Mapping[str, Tensor]
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
        elif node.op == "get_attr":
            if name not in tensors:
                raise FileError(mismatch("tensor of a step", name, "one of the saved tensors"))
            value = tensors[name]
            parts[name] = nn.Parameter(value) if value.is_floating_point() else value
    return fx.GraphModule(parts, graph)


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


def _fill(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    names = {*dict(model.named_parameters(remove_duplicate=False))}
    names |= {*dict(model.named_buffers(remove_duplicate=False))}
    if names != tensors.keys():
        odd = sorted(names ^ tensors.keys())[:5]
        raise FileError(_damaged(path, f"weights and layers do not fit at {odd}"))
    owners = dict(model.named_modules())
    for name, tensor in tensors.items():
        owner, _, key = name.rpartition(".")
        module = owners[owner]
        slots: Any = module._parameters if key in module._parameters else module._buffers
        if slots[key].shape != tensor.shape or slots[key].dtype != tensor.dtype:
            raise FileError(_damaged(path, f"{name!r} has another size or dtype than its layer"))
        slots[key] = nn.Parameter(tensor, False) if slots is module._parameters else tensor


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise HetconvError(
            "saving and loading needs safetensors: pip install 'hetconv-kernels[safetensors]'"
        ) from error
    return safetensors
