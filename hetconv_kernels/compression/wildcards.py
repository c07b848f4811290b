# SPDX-License-Identifier: Apache-2.0
"""Settings by layer: a name, or a pattern such as ``"features.*"``, and what it stands for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import TypeVar

from ..errors import ArgumentError, mismatch

_Value = TypeVar("_Value")


def first_that_fits(name: str, chosen: Mapping[str, _Value] | None) -> _Value | None:
    """Returns what the first pattern that fits a name stands for; None where none does."""
    return next((v for pattern, v in (chosen or {}).items() if fnmatchcase(name, pattern)), None)


def check_patterns(what: str, chosen: Mapping[str, object] | None, names: Iterable[str]) -> None:
    """Refuses a pattern that fits no layer.

    Raises:
        ArgumentError: there is one.
    """
    known = list(names)
    for pattern in chosen or {}:
        if not any(fnmatchcase(name, pattern) for name in known):
            raise ArgumentError(
                mismatch(
                    what, repr(pattern),
                    f"the name of a layer, or a pattern that fits one of {known[:8]}",
                )
            )  # fmt: skip
