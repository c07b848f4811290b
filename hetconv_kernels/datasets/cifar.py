# SPDX-License-Identifier: Apache-2.0
"""CIFAR-10 from a folder with its binary files, and its usual augmentation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import HetconvError, mismatch
from .split import Dataset, Folder, Split, check_digests, set_aside

_TRAIN = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
_TEST = "test_batch.bin"
_RECORD = 1 + 3 * 32 * 32
# Means and standard deviations of the training images' channels, as everybody uses them.
_MEAN, _STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def cifar10(
    folder: Folder, validation: int = 5000, digests: Mapping[str, str] | None = None
) -> Dataset:
    """Reads CIFAR-10 in its original binary format from a folder.

    The folder holds ``data_batch_1.bin`` … ``data_batch_5.bin`` and ``test_batch.bin``, each a run
    of records: one byte of label, then 32×32 bytes each of red, green and blue, row by row.
    Training files that are missing are left out as long as one is there. Images are normalised
    by the usual means and deviations.  # [N, 3, 32, 32]

    Source: A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.

    Args:
        folder: such as ``cifar-10-batches-bin``.
        validation: training images, the last ones, that are set aside for decisions.
        digests: SHA-256, in hexadecimal, of files by name; each must be there and have it.

    Raises:
        HetconvError: a file is missing, is not in this format, or has another digest.
        ArgumentError: fewer training images than ``validation`` needs.
    """
    place = Path(folder)
    check_digests(place, digests)
    found = [place / name for name in _TRAIN if (place / name).is_file()]
    if not found or not (place / _TEST).is_file():
        raise HetconvError(
            mismatch(
                f"CIFAR-10 in {place}",
                "no such files" if place.is_dir() else "no such folder",
                f"{_TRAIN[0]} … and {_TEST}",
                "It is the folder of the binary version, cifar-10-batches-bin.",
            )
        )
    parts = [_records(path) for path in found]
    train = Split(torch.cat([p.images for p in parts]), torch.cat([p.labels for p in parts]))
    return Dataset(*set_aside(train, validation), _records(place / _TEST))


def _records(path: Path) -> Split:
    raw = np.fromfile(path, np.uint8)
    if raw.size == 0 or raw.size % _RECORD:
        raise HetconvError(
            mismatch(
                f"size of {path}", f"{raw.size} bytes", f"a multiple of {_RECORD} bytes",
                "It was cut off, or is not the binary version.",
            )
        )  # fmt: skip
    records = raw.reshape(-1, _RECORD)
    labels = records[:, 0].astype(np.int64)
    if labels.max() > 9:
        raise HetconvError(mismatch(f"a label in {path}", labels.max(), "0 to 9"))
    images = torch.from_numpy(records[:, 1:].reshape(-1, 3, 32, 32).astype(np.float32) / 255)
    mean, std = (torch.tensor(v)[None, :, None, None] for v in (_MEAN, _STD))
    return Split((images - mean) / std, torch.from_numpy(labels))


def shifted_and_flipped(images: Tensor) -> Tensor:
    """Augments as is usual for CIFAR: a shift by up to four pixels, and a mirror image or not.

    # [N, C, H, W] -> same
    """
    n, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4))
    top, left = torch.randint(0, 9, (2, n)).tolist()
    mirrored = torch.rand(n) < 0.5
    crops = [
        padded[i, :, y : y + height, x : x + width]
        for i, (y, x) in enumerate(zip(top, left, strict=True))
    ]
    result = torch.stack(crops)
    result[mirrored] = result[mirrored].flip(-1)
    return result
