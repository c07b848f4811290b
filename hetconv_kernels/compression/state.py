# SPDX-License-Identifier: Apache-2.0
"""StateFile: the resumable state of a compression, one file that holds tensors and no code."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch

from ..errors import ArgumentError, HetconvError, mismatch
from ..files import writing

_FORMAT = "hetconv_kernels.compress/2"

# What torch.load raises on a file that is damaged or something else.
UNREADABLE = (
    OSError,
    RuntimeError,
    ValueError,
    AttributeError,
    AssertionError,
    LookupError,
    OverflowError,
    TypeError,
    EOFError,
    MemoryError,
    struct.error,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
)


class StateFile:
    """Saves the state of a run after each round, and gives it back after a kill.

    The file is what ``torch.save`` writes, read with ``weights_only=True``: tensors, numbers and
    text. It is written beside its place and then moved there, so that a kill at any moment leaves
    either the old state or the new one.

    Args:
        path: of the file; None keeps nothing.
        identity: plain data that a saved state must have been made with: all that decides the
            result.
    """

    def __init__(self, path: str | os.PathLike[str] | None, identity: dict[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        self.identity = json.loads(json.dumps(identity, sort_keys=True))

    def save(self, content: dict[str, Any]) -> None:
        """Replaces what the file holds.

        Raises:
            HetconvError: the file cannot be written.
        """
        if self.path is None:
            return
        whole = {"format": _FORMAT, "identity": json.dumps(self.identity), **content}
        what = f"The state {self.path}"
        # torch's writer says RuntimeError where the disk is full.
        with writing(self.path, what, also=(RuntimeError,), folders=True) as beside:
            torch.save(whole, beside)

    def load(self) -> dict[str, Any] | None:
        """Reads the file; None when there is none yet.

        Raises:
            HetconvError: the file is damaged or something else.
            ArgumentError: it belongs to another run: method, seed, network, data or optimiser.
        """
        if self.path is None or not self.path.exists():
            return None
        try:
            whole = torch.load(self.path, map_location="cpu", weights_only=True)
            found, identity = whole["format"], json.loads(whole["identity"])
        except UNREADABLE as error:
            reason = (str(error).splitlines() or [repr(error)])[0]
            raise HetconvError(
                f"The state {self.path} cannot be read ({reason}); expected what hk.compress wrote."
                " Delete it to start anew."
            ) from error
        if found != _FORMAT:
            raise HetconvError(
                mismatch(f"format of the state {self.path}", found, _FORMAT, "Delete it.")
            )
        self._check(identity)
        content: dict[str, Any] = whole
        return content

    def _check(self, identity: dict[str, Any]) -> None:
        keys = sorted({*identity, *self.identity})
        wrong = [key for key in keys if identity.get(key) != self.identity.get(key)]
        if wrong:
            found, wanted = identity.get(wrong[0]), self.identity.get(wrong[0])
            path, found, wanted = _apart(wrong[0], found, wanted)
            raise ArgumentError(
                mismatch(
                    f"{path} of the state {self.path}",
                    _short(found),
                    _short(wanted),
                    "Call with what the state was made with, or name another file.",
                )
            )


def _apart(path: str, found: Any, wanted: Any) -> tuple[str, Any, Any]:
    """Goes down to the first place where two descriptions differ; its path, and what is there."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in sorted({*found, *wanted}):
            if found.get(key) != wanted.get(key):
                return _apart(f"{path}.{key}", found.get(key), wanted.get(key))
    if isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted):
        for number, (one, two) in enumerate(zip(found, wanted, strict=True)):
            if one != two:
                return _apart(f"{path}.{number}", one, two)
    return path, found, wanted


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"
