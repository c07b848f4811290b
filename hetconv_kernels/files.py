# SPDX-License-Identifier: Apache-2.0
"""Writing files: whole or not at all, and a disk that is full is one sentence."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import HetconvError

# An object of a file.
Json = dict[str, Any]


@contextlib.contextmanager
def writing(
    path: str | os.PathLike[str],
    what: str = "",
    *,
    also: tuple[type[Exception], ...] = (),
    folders: bool = False,
) -> Iterator[Path]:
    """Gives the place beside a file to write to; what is there at the end becomes the file.

    A kill or an error at any moment leaves either the old file or the new one.

    Args:
        path: of the file.
        what: names it in the error; by default its path.
        also: what else the writing library raises when the disk is full.
        folders: whether to make the folders on the way to it.

    Raises:
        HetconvError: the file cannot be written.
    """
    path = Path(path)
    failures: tuple[type[Exception], ...] = (OSError, *also)
    beside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        if folders:
            path.parent.mkdir(parents=True, exist_ok=True)
        yield beside
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    except failures as error:
        raise unwritable(what or str(path), error) from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def unwritable(what: str, error: Exception) -> HetconvError:
    """Makes one sentence of the reason why something could not be written."""
    reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(". ")
    return HetconvError(f"{what} cannot be written: {reason}. Is the disk full, or the path wrong?")


def write_text(path: str | os.PathLike[str], text: str, what: str = "") -> None:
    """Writes a text file and the folders on the way to it.

    Raises:
        HetconvError: it cannot be written.
    """
    with writing(path, what, folders=True) as beside:
        beside.write_text(text, encoding="utf-8")
