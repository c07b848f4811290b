# SPDX-License-Identifier: Apache-2.0
"""What decides the result of a training, as plain data: the key by which a state is known.

A state that continues a run has to be of the same run. Tensors stand in the key by their digests,
data by its contents or its batches, an optimiser by its settings. Code is no part of it: two
functions cannot be compared, and to mend a training loop between two starts is what resuming is
for.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Mapping, Sequence, Sized
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from . import ranks
from .training import Training


def identity_of(training: Training, model: nn.Module, example: Tensor | None) -> dict[str, Any]:
    """Describes data, optimiser and example of a training; on all ranks what rank 0 found.

    Args:
        training: the user's callables and data.
        model: the network that will be trained.
        example: the input that shapes and work are counted for; only its shape counts.
    """

    def found() -> dict[str, Any]:
        return {
            "data": _data(training),
            "eval_data": described(training.eval_data),
            "optimizer": _optimizer(training, model),
            "example": None if example is None else _form(example),
        }

    return ranks.from_first(found)


def described(value: object) -> Any:
    """Describes a value as plain data for JSON; equal values have equal descriptions.

    Tensors and arrays become a form and a digest, containers and dataclasses what is in them. Of
    anything else the type stays, and how long it is.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        return {**_form(value), "digest": digest([value])}
    if isinstance(value, np.ndarray):
        return {"shape": list(value.shape), "dtype": str(value.dtype), "digest": _hash([value])}
    if isinstance(value, range):
        return repr(value)
    if isinstance(value, Mapping):
        return {str(key): described(item) for key, item in value.items()}
    if isinstance(value, Sequence | set | frozenset) and not isinstance(value, bytes):
        tensors = list(_tensors(value))
        if tensors and len(tensors) == _leaves(value):  # such as a list of batches
            return {"tensors": len(tensors), "first": _form(tensors[0]), "digest": digest(tensors)}
        return [described(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: described(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": type(value).__qualname__, **fields}
    if isinstance(value, functools.partial):
        return {"arguments": described(value.args), "keywords": described(value.keywords)}
    if isinstance(value, DataLoader):
        names = ("batch_size", "drop_last")
        rest = {name: getattr(value, name) for name in names}
        return {"type": "DataLoader", **rest, "dataset": described(value.dataset)}
    if isinstance(value, TensorDataset):
        return described(value.tensors)
    name = getattr(value, "__qualname__", None)  # of a function: its code is no part of the key
    kind = "function" if name is not None else type(value).__qualname__
    return {"type": kind, "length": len(value)} if isinstance(value, Sized) else {"type": kind}


def weights_of(model: nn.Module) -> list[Tensor]:
    """Lists all weights and buffers: a state continues the network that it began with."""
    return [value for value in model.state_dict().values() if isinstance(value, Tensor)]


def digest(tensors: Iterable[Tensor]) -> str:
    """Hashes the contents of tensors, in order, on any device."""
    return _hash(
        t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        for t in tensors
        if t.device.type != "meta"
    )


def _hash(arrays: Iterable[np.ndarray]) -> str:
    found = hashlib.blake2b(digest_size=16)
    for array in arrays:
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def _form(value: Tensor) -> dict[str, Any]:
    return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}


def _tensors(value: object) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for item in value:
            yield from _tensors(item)


def _leaves(value: object) -> int:
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return sum(map(_leaves, value))
    return 1


def _data(training: Training) -> Any:
    """Describes the data; of a function its arguments, and the form of its first batch."""
    data = training.data
    plain = described(data)
    opaque = callable(data) and not dataclasses.is_dataclass(data)
    if not opaque or isinstance(data, DataLoader) or ranks.world_size() > 1:
        return plain
    first = next(iter(training.batches(0)), None)
    return {"callable": plain, "first batch": [_form(t) for t in _tensors(first)]}


def _optimizer(training: Training, model: nn.Module) -> Any:
    """Describes the optimiser that the stages of training will begin with."""
    if training.data is None or not any(p.requires_grad for p in model.parameters()):
        return None
    optimizer = training.make_optimizer(model)
    groups = [
        {key: described(item) for key, item in group.items() if key != "params"}
        | {"parameters": len(group["params"])}
        for group in optimizer.param_groups
    ]
    return {"type": type(optimizer).__qualname__, "groups": groups}
