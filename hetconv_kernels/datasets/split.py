# SPDX-License-Identifier: Apache-2.0
"""What a data set is: images with labels in three parts, and batches of them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import ArgumentError, HetconvError, mismatch

Batch = tuple[Tensor, Tensor]
Folder = str | os.PathLike[str]


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

    def chosen(self, which: Tensor | slice) -> Split:
        """Returns some of the images: a slice, or their numbers."""
        return Split(self.images[which], self.labels[which])

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


def set_aside(train: Split, validation: int) -> tuple[Split, Split]:
    """Cuts the last training images off, for decisions."""
    edge = len(train) - validation
    if not 0 < validation < len(train):
        raise ArgumentError(
            mismatch("validation", validation, f"from 1 to {len(train) - 1} images")
        )
    return train.chosen(slice(None, edge)), train.chosen(slice(edge, None))


def check_digests(place: Path, digests: Mapping[str, str] | None) -> None:
    """Compares files of a folder with their SHA-256.

    Raises:
        HetconvError: one is missing or is another.
    """
    for name, expected in (digests or {}).items():
        path = place / name
        if not path.is_file():
            raise HetconvError(mismatch(f"{name} in {place}", "no such file", "the file"))
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != expected.lower():
            raise HetconvError(
                mismatch(
                    f"SHA-256 of {path}", found, expected,
                    "It is damaged, or another version: fetch it again.",
                )
            )  # fmt: skip
