# SPDX-License-Identifier: Apache-2.0
"""A folder of MNIST or CIFAR-10, told apart by its files."""

from __future__ import annotations

from pathlib import Path

from ..errors import HetconvError, mismatch
from .cifar import cifar10
from .mnist import mnist
from .split import Dataset, Folder


def read_folder(folder: Folder, validation: int = 5000) -> Dataset:
    """Reads MNIST (or its kin) or CIFAR-10, whichever a folder holds.

    Args:
        folder: of `mnist` or of `cifar10`.
        validation: training images, the last ones, that are set aside for decisions.

    Raises:
        HetconvError: it holds neither, or both, or what these two say.
        ArgumentError: fewer training images than ``validation`` needs.
    """
    place = Path(folder)
    is_mnist, is_cifar = any(place.glob("*idx?-ubyte*")), any(place.glob("*_batch*.bin"))
    if is_mnist == is_cifar:
        received = "both" if is_mnist else ("neither" if place.is_dir() else "no such folder")
        raise HetconvError(
            mismatch(
                f"data in {place}", received,
                "MNIST's IDX files (train-images-idx3-ubyte …), or CIFAR-10's binary files "
                "(data_batch_1.bin …)",
            )
        )  # fmt: skip
    return mnist(place, validation) if is_mnist else cifar10(place, validation)
