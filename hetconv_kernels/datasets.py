# SPDX-License-Identifier: Apache-2.0
"""Data that networks are trained on: the digits that scikit-learn ships, CIFAR-10 from a folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .errors import ArgumentError, HetconvError, mismatch

__all__ = ["Batch", "Dataset", "Shuffled", "Split", "cifar10", "digits", "shifted_and_flipped"]

Batch = tuple[Tensor, Tensor]
_CIFAR_TRAIN = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
_CIFAR_TEST = "test_batch.bin"
_CIFAR_RECORD = 1 + 3 * 32 * 32
# Means and standard deviations of the training images' channels, as everybody uses them.
_CIFAR_MEAN, _CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


@dataclass(frozen=True)
class Split:
    """Images with labels.

    Attributes:
        images: float32.  # [N, C, H, W]
        labels: int64.  # [N]
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def tensors(self) -> Batch:
        """Both tensors, to cut them alike."""
        return self.images, self.labels

    def batches(self, size: int) -> list[Batch]:
        """Cuts the images into batches, in order."""
        return list(zip(self.images.split(size), self.labels.split(size), strict=True))

    def shuffled(self, size: int, augment: Callable[[Tensor], Tensor] | None = None) -> Shuffled:
        """Returns what `hk.compress` takes as ``data``: batches in a new order each epoch.

        Orders and augmentations are drawn from torch's global generator, which `hk.compress`
        seeds. A batch of one image at the end is left out: BatchNorm cannot train on it.
        """
        return Shuffled(self, size, augment)


@dataclass(frozen=True)
class Shuffled:
    """Batches in a new order each epoch; call it with the epoch's number.

    Attributes:
        split: the images.
        size: of a batch.
        augment: changes the images of a batch; None leaves them.
    """

    split: Split
    size: int
    augment: Callable[[Tensor], Tensor] | None = None

    def __call__(self, epoch: int) -> list[Batch]:
        """Draws the batches of an epoch from torch's global generator."""
        images, labels = self.split.tensors
        order = torch.randperm(len(self.split)).split(self.size)
        batches = [(images[i], labels[i]) for i in order if len(i) > 1]
        return [(x if self.augment is None else self.augment(x), y) for x, y in batches]


@dataclass(frozen=True)
class Dataset:
    """What is trained on, what decisions are made on, and what only the report sees.

    Attributes:
        train: for training.
        validation: for decisions, such as when to stop pruning.
        test: for the report.
    """

    train: Split
    validation: Split
    test: Split


def digits() -> Dataset:
    """Reads the 1,797 handwritten digits that scikit-learn ships: 1,000 / 297 / 500 of them.

    Source: E. Alpaydin, C. Kaynak, UCI, Optical Recognition of Handwritten Digits. Brightness is
    scaled to 0…1.  # [N, 1, 8, 8]

    Raises:
        HetconvError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise HetconvError(
            "The digits come with scikit-learn, which is not installed: "
            "pip install 'hetconv-kernels[demo]', or pip install scikit-learn."
        ) from error
    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    images = torch.from_numpy(found.images[order].astype(np.float32) / 16)[:, None]
    labels = torch.from_numpy(found.target[order].astype(np.int64))
    parts = [slice(0, 1000), slice(1000, 1297), slice(1297, None)]
    return Dataset(*(Split(images[part], labels[part]) for part in parts))


def cifar10(folder: str | os.PathLike[str], validation: int = 5000) -> Dataset:
    """Reads CIFAR-10 in its original binary format from a folder.

    The folder holds ``data_batch_1.bin`` … ``data_batch_5.bin`` and ``test_batch.bin``, each a run
    of records: one byte of label, then 32×32 bytes each of red, green and blue, row by row.
    Training files that are missing are left out as long as one is there. Images are normalised
    by the usual means and deviations.  # [N, 3, 32, 32]

    Source: A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.

    Args:
        folder: such as ``cifar-10-batches-bin``.
        validation: training images, the last ones, that are set aside for decisions.

    Raises:
        HetconvError: a file is missing, or is not in this format.
        ArgumentError: fewer training images than ``validation`` needs.
    """
    place = Path(folder)
    found = [place / name for name in _CIFAR_TRAIN if (place / name).is_file()]
    if not found or not (place / _CIFAR_TEST).is_file():
        raise HetconvError(
            mismatch(
                f"CIFAR-10 in {place}",
                "no such files" if place.is_dir() else "no such folder",
                f"{_CIFAR_TRAIN[0]} … and {_CIFAR_TEST}",
                "It is the folder of the binary version, cifar-10-batches-bin.",
            )
        )
    parts = [_records(path) for path in found]
    train = Split(torch.cat([p.images for p in parts]), torch.cat([p.labels for p in parts]))
    if not 0 < validation < len(train):
        raise ArgumentError(
            mismatch("validation", validation, f"from 1 to {len(train) - 1} images")
        )
    edge = len(train) - validation
    return Dataset(
        Split(train.images[:edge], train.labels[:edge]),
        Split(train.images[edge:], train.labels[edge:]),
        _records(place / _CIFAR_TEST),
    )


def _records(path: Path) -> Split:
    raw = np.fromfile(path, np.uint8)
    if raw.size == 0 or raw.size % _CIFAR_RECORD:
        raise HetconvError(
            mismatch(
                f"size of {path}", f"{raw.size} bytes", f"a multiple of {_CIFAR_RECORD} bytes",
                "It was cut off, or is not the binary version.",
            )
        )  # fmt: skip
    records = raw.reshape(-1, _CIFAR_RECORD)
    labels = records[:, 0].astype(np.int64)
    if labels.max() > 9:
        raise HetconvError(mismatch(f"a label in {path}", labels.max(), "0 to 9"))
    images = torch.from_numpy(records[:, 1:].reshape(-1, 3, 32, 32).astype(np.float32) / 255)
    mean, std = (torch.tensor(v)[None, :, None, None] for v in (_CIFAR_MEAN, _CIFAR_STD))
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
