# SPDX-License-Identifier: Apache-2.0
"""The exceptions of the package: each says what was received, what is expected, the way out."""

from __future__ import annotations

from typing import Any

__all__ = [
    "ArgumentError",
    "BackendError",
    "FileError",
    "HetconvError",
    "InputTypeError",
    "MemoryShortageError",
    "SpeedupError",
    "SupportError",
    "TraceError",
    "VerificationError",
    "mismatch",
]


class HetconvError(Exception):
    """The base of every error that this package raises on purpose."""


class ArgumentError(HetconvError, ValueError):
    """An argument has a value that the call cannot work with."""


class InputTypeError(HetconvError, TypeError):
    """An argument has the wrong type or dtype."""


class SupportError(ArgumentError):
    """A Support cannot be built, read back, or matched with the tensors it came with."""


class BackendError(HetconvError, RuntimeError):
    """The backend that was asked for does not exist or cannot run this problem."""


class TraceError(HetconvError, RuntimeError):
    """The graph of a network cannot be found by tracing."""


class VerificationError(HetconvError, RuntimeError):
    """A rewritten network does not compute what the original computes."""


class MemoryShortageError(HetconvError, RuntimeError, MemoryError):
    """The machine, or a limit of the process, has not the memory that a call needs."""


class FileError(HetconvError, ValueError):
    """A file is not one that this package wrote, or it is damaged."""


def mismatch(what: str, received: object, expected: object, way_out: str = "") -> str:
    """Returns one sentence in the house form: what, received, expected, way out."""
    text = f"{what}: received {received}, expected {expected}."
    return f"{text} {way_out}" if way_out else text


class SpeedupError(HetconvError):
    """A compressed network is not as much faster as was required; ``report`` has it all.

    Args:
        message: what was measured and required.
        report: the `CompressionReport`, with the network.
    """

    def __init__(self, message: str, report: Any = None) -> None:
        super().__init__(message)
        self.report = report
