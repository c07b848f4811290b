# SPDX-License-Identifier: Apache-2.0
"""Data that networks are trained on: digits of scikit-learn, MNIST and its kin, CIFAR-10, images.

Each is a `Dataset` of three parts: what is trained on, what decides, and what only a report sees.
Nothing is downloaded: `mnist`, `cifar10` and `image_folder` read a folder.
"""

from .cifar import cifar10, shifted_and_flipped
from .digits import digits
from .images import image_folder
from .known import read_folder
from .mnist import mnist
from .split import Batch, Dataset, Shuffled, Split

__all__ = [
    "Batch",
    "Dataset",
    "Shuffled",
    "Split",
    "cifar10",
    "digits",
    "image_folder",
    "mnist",
    "read_folder",
    "shifted_and_flipped",
]
