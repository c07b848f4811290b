# SPDX-License-Identifier: Apache-2.0
"""The tensors of a network in a file: their ties, strides and digest, and how they come back."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import FileError
from .files import Json
from .nn.quantized_layer import QuantizedLayer

# A file may declare masks of this many entries, or this many for each weight that it has.
_DECLARED, _DECLARED_PER_WEIGHT = 1 << 26, 256


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Lists parameters and buffers by every name that they have."""
    found: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    return found | dict(model.named_buffers(remove_duplicate=False))


def tied_names(model: nn.Module) -> dict[str, str]:
    """Names for each tensor that is there under an earlier name that name."""
    first: dict[int, str] = {}
    found: dict[str, str] = {}
    for name, tensor in named_tensors(model).items():
        earlier = first.setdefault(id(tensor), name)
        if earlier != name:
            found[name] = earlier
    return found


def separate_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Lists parameters and buffers, each with memory of its own, as safetensors wants."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in named_tensors(model).items():
        value = tensor.detach()
        if not value.is_meta:
            value = value.contiguous()
            if value.untyped_storage().data_ptr() in seen:
                value = value.clone()
            seen.add(value.untyped_storage().data_ptr())
        found[name] = value
    return found


def special_strides(model: nn.Module) -> dict[str, list[int]]:
    """Lists the strides of what is not laid out row by row: PyTorch picks kernels by them.

    Those of an axis of length one count: they tell channels_last from contiguous 1×1 kernels.
    """
    return {
        name: list(tensor.stride())
        for name, tensor in named_tensors(model).items()
        if tensor.stride() != torch.empty(tensor.shape, device="meta").stride()
        and _is_dense(tensor.shape, tensor.stride())
    }


def _is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Tells whether strides order the axes of a tensor without holes or overlaps."""
    expected = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= max(size, 1)
    return True


def laid_out(tensor: Tensor, strides: Any, path: Path) -> Tensor:
    """Copies a tensor out of the file, to an aligned address and with the strides that it had.

    At the file's own addresses a matrix product may round in another way.
    """
    if strides is None:
        return tensor.clone()
    numbers = isinstance(strides, list) and all(type(n) is int for n in strides)
    fits = numbers and len(strides) == tensor.dim() and _is_dense(tensor.shape, strides)
    if not fits or not all(0 <= n < 2**62 for n in strides):
        raise FileError(damaged(path, f"{strides!r:.100} are no strides of {tensor.shape}"))
    return torch.empty_strided(
        tensor.shape, strides, dtype=tensor.dtype, device=tensor.device
    ).copy_(tensor)


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Names the names, types, shapes and values of tensors."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name].cpu()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def text_digest(text: str) -> str:
    """Names a description, which may hold what is no Unicode."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def damaged(path: Path, how: str) -> str:
    """Says that a file cannot be loaded, and how that is seen."""
    return f"{path.name} cannot be loaded: {how}; expected a file of hetconv_kernels.io.save."


def fill(
    model: nn.Module, tensors: Mapping[str, Tensor], tied: Mapping[str, str], path: Path
) -> None:
    """Puts tensors in their places, ties those that were tied, and lays out 8-bit weights.

    Raises:
        FileError: a place or a tensor is missing, or has another size or type.
    """
    names = {*named_tensors(model)}
    if names != tensors.keys():
        odd = sorted(names ^ tensors.keys())[:5]
        raise FileError(damaged(path, f"weights and layers do not fit at {odd}"))
    owners = dict(model.named_modules(remove_duplicate=False))
    for name, tensor in tensors.items():
        owner, _, key = name.rpartition(".")
        module = owners[owner]
        slots: Any = module._parameters if key in module._parameters else module._buffers
        if slots[key].shape != tensor.shape or slots[key].dtype != tensor.dtype:
            raise FileError(damaged(path, f"{name!r} has another size or dtype than its layer"))
        slots[key] = nn.Parameter(tensor, False) if slots is module._parameters else tensor
    for name, first in tied.items():
        if name in tensors and first in tensors:
            owner, _, key = name.rpartition(".")
            into, (origin, _, origin_key) = owners[owner], first.rpartition(".")
            for kind in ("_parameters", "_buffers"):
                if key in getattr(into, kind) and origin_key in getattr(owners[origin], kind):
                    getattr(into, kind)[key] = getattr(owners[origin], kind)[origin_key]
    for module in owners.values():
        if isinstance(module, QuantizedLayer):
            module.prepare_()


def check_sizes(layers: Mapping[str, Json], tensors: Mapping[str, Tensor], path: Path) -> None:
    """Refuses masks that are far larger than the weights they are for, before they are made."""
    declared = 0
    for described in layers.values():
        if "support" not in described:
            continue  # built without memory
        declared += math.prod(map(int, json.loads(described["support"])["shape"]))
        arguments = described["arguments"]
        if "kernel_size" in arguments:
            sizes = (arguments["in_channels"], arguments["out_channels"], *arguments["kernel_size"])
            declared += math.prod(map(int, sizes))
    allowed = max(_DECLARED, _DECLARED_PER_WEIGHT * sum(t.numel() for t in tensors.values()))
    if declared > allowed:
        why = f"it declares masks of {declared:,} entries, where its weights allow {allowed:,}"
        raise FileError(damaged(path, why))
