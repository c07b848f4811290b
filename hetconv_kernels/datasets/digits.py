# SPDX-License-Identifier: Apache-2.0
"""The handwritten digits that scikit-learn ships."""

from __future__ import annotations

import numpy as np
import torch

from ..errors import HetconvError
from .split import Dataset, Split


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
