# SPDX-License-Identifier: Apache-2.0
"""The key of a state: equal for equal data, different for anything that decides a result."""

from __future__ import annotations

import functools
import json
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from hetconv_kernels.compression.identity import described
from hetconv_kernels.datasets import Shuffled, Split


def split(scale: float = 1.0) -> Split:
    return Split(torch.arange(8.0).view(8, 1, 1, 1) * scale, torch.arange(8))


def loader(size: int, scale: float = 1.0) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*split(scale).tensors), batch_size=size)


def flip(x: torch.Tensor) -> torch.Tensor:
    return x.flip(-1)


@pytest.mark.parametrize(
    ("make", "changed"),
    [
        (lambda: torch.ones(3), lambda: torch.ones(3, dtype=torch.float64)),
        (lambda: torch.ones(3), lambda: torch.ones(3, 1)),
        (lambda: torch.tensor([0.0]), lambda: torch.tensor([-0.0])),
        (lambda: np.ones(3), lambda: np.zeros(3)),
        (lambda: split().batches(4), lambda: split(2).batches(4)),
        (lambda: split().batches(4), lambda: split().batches(2)),
        (lambda: split().shuffled(4), lambda: split().shuffled(2)),
        (lambda: split().shuffled(4), lambda: split(3).shuffled(4)),
        (lambda: split().shuffled(4), lambda: split().shuffled(4, flip)),
        (lambda: loader(4), lambda: loader(2)),
        (lambda: loader(4), lambda: loader(4, 2.0)),
        (lambda: functools.partial(flip, 1), lambda: functools.partial(flip, 2)),
        (lambda: {"a": (1, [2.5])}, lambda: {"a": (1, [2.0])}),
        (lambda: range(3), lambda: range(4)),
        (lambda: "a", lambda: "b"),
        (lambda: None, lambda: 0),
    ],
)
def test_equal_values_have_equal_descriptions_and_others_not(make: Any, changed: Any) -> None:
    assert json.dumps(described(make())) == json.dumps(described(make()))
    assert json.dumps(described(make())) != json.dumps(described(changed()))


def test_code_is_no_part_of_a_description() -> None:
    assert described(flip) == described(lambda x: x)


def test_the_order_of_an_epoch_is_drawn_from_torch_s_generator() -> None:
    data = split().shuffled(3)
    assert isinstance(data, Shuffled)
    torch.manual_seed(1)
    one = data(0)
    torch.manual_seed(1)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(one, data(0), strict=True))
    assert sorted(torch.cat([y for _, y in one]).tolist()) == list(range(8))
