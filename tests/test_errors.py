# SPDX-License-Identifier: Apache-2.0
"""Errors are of one family, are the built-in kinds that callers expect, and speak in one form."""

from __future__ import annotations

import inspect
import pickle

import pytest

from hetconv_kernels import errors
from hetconv_kernels.errors import HetconvError, mismatch

KINDS = [
    value
    for value in vars(errors).values()
    if inspect.isclass(value) and issubclass(value, Exception)
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_error_can_be_caught_as_the_packages(kind: type[Exception]) -> None:
    with pytest.raises(HetconvError, match="a sentence"):
        raise kind("a sentence")


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_errors_travel_between_processes(kind: type[Exception]) -> None:
    copied = pickle.loads(pickle.dumps(kind("a sentence")))
    assert type(copied) is kind
    assert copied.args == ("a sentence",)


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (errors.ArgumentError, ValueError),
        (errors.SupportError, ValueError),
        (errors.SupportError, errors.ArgumentError),
        (errors.InputTypeError, TypeError),
        (errors.BackendError, RuntimeError),
        (errors.MemoryShortageError, RuntimeError),
        (errors.MemoryShortageError, MemoryError),
    ],
    ids=lambda kind: kind.__name__,
)
def test_errors_are_what_pytorch_users_catch(kind: type, builtin: type) -> None:
    assert issubclass(kind, builtin)


def test_a_message_says_received_expected_and_the_way_out() -> None:
    assert mismatch("groups", 3, "a divisor of 8") == "groups: received 3, expected a divisor of 8."
    assert mismatch("a", 1, 2, "Use b.") == "a: received 1, expected 2. Use b."
