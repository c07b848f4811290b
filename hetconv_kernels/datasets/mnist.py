# SPDX-License-Identifier: Apache-2.0
"""MNIST and its kin from a folder with their IDX files."""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from ..errors import HetconvError, mismatch
from .split import Dataset, Folder, Split, check_digests, set_aside

_BYTES = 0x08  # unsigned bytes, the only kind of IDX file that holds images or labels


def mnist(
    folder: Folder, validation: int = 5000, digests: Mapping[str, str] | None = None
) -> Dataset:
    """Reads MNIST, or what has its form, such as Fashion-MNIST and KMNIST, from a folder.

    The folder holds four IDX files, as they are or compressed (``.gz``):
    ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte`` and the same of ``t10k``; a name may
    have something before it, as EMNIST's have. Brightness is scaled to 0…1.  # [N, 1, H, W]

    Source: Y. LeCun, C. Cortes, C. Burges, The MNIST database of handwritten digits.

    Args:
        folder: with the four files.
        validation: training images, the last ones, that are set aside for decisions.
        digests: SHA-256, in hexadecimal, of files by name; each must be there and have it.

    Raises:
        HetconvError: a file is missing, is not in this format, or has another digest.
        ArgumentError: fewer training images than ``validation`` needs.
    """
    place = Path(folder)
    check_digests(place, digests)
    train, test = (_idx_split(place, part) for part in ("train", "t10k"))
    if train.images.shape[1:] != test.images.shape[1:]:
        raise HetconvError(
            mismatch(
                f"test images in {place}", tuple(test.images.shape[2:]),
                f"{tuple(train.images.shape[2:])} pixels, as the training images",
            )
        )  # fmt: skip
    return Dataset(*set_aside(train, validation), test)


def _idx_split(place: Path, part: str) -> Split:
    """Reads the images and labels of one part of MNIST or its kin."""
    images = _idx(_one_file(place, f"{part}-images", 3), 3)
    path = _one_file(place, f"{part}-labels", 1)
    labels = _idx(path, 1)
    if len(images) != len(labels) or not len(labels):
        raise HetconvError(
            mismatch(f"labels in {path}", len(labels), f"{max(len(images), 1)}, one for an image")
        )
    return Split(
        torch.from_numpy(images.astype(np.float32) / 255)[:, None],
        torch.from_numpy(labels.astype(np.int64)),
    )


def _one_file(place: Path, stem: str, dimensions: int) -> Path:
    # Some archives have a dot in the place of the second dash.
    names = [f"*{stem}{mark}idx{dimensions}-ubyte{end}" for mark in "-." for end in ("", ".gz")]
    found = sorted(path for name in names for path in place.glob(name))
    if len(found) == 2 and f"{found[0]}.gz" == str(found[1]):
        found.pop()  # the same, compressed
    if len(found) != 1:
        received = [path.name for path in found] or (
            "no such file" if place.is_dir() else "no such folder"
        )
        raise HetconvError(
            mismatch(
                f"{stem} in {place}", received, f"one file {stem}-idx{dimensions}-ubyte (or .gz)",
                "It is the folder of MNIST's IDX files.",
            )
        )  # fmt: skip
    return found[0]


def _idx(path: Path, dimensions: int) -> np.ndarray:
    """Reads an IDX file of unsigned bytes: 0, 0, the kind, the rank, the shape, the bytes."""
    try:
        raw = path.read_bytes()
        if path.suffix == ".gz":
            raw = gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise HetconvError(f"{path} cannot be read: {error}") from error
    begin = bytes((0, 0, _BYTES, dimensions))
    head = 4 + 4 * dimensions
    if raw[:4] != begin or len(raw) < head:
        raise HetconvError(
            mismatch(
                f"beginning of {path}", raw[:4].hex(" ") or "nothing",
                f"{begin.hex(' ')}: unsigned bytes in {dimensions} dimensions",
                "It is not an IDX file of this kind.",
            )
        )  # fmt: skip
    shape = [int(n) for n in np.frombuffer(raw, ">u4", dimensions, 4)]
    if len(raw) - head != math.prod(shape):
        raise HetconvError(
            mismatch(
                f"size of {path}", f"{len(raw) - head} bytes of data",
                f"{math.prod(shape)} for its shape {tuple(shape)}", "It was cut off or damaged.",
            )
        )  # fmt: skip
    return np.frombuffer(raw, np.uint8, offset=head).reshape(shape)
