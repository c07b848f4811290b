# SPDX-License-Identifier: Apache-2.0
"""Photographs, noise and quality for the demo."""

from __future__ import annotations

import importlib.util

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .errors import ArgumentError, HetconvError, mismatch

TRAINED_ON, HELD_OUT = "china.jpg", "flower.jpg"
SIGMA = 25 / 255

# ITU-R BT.601: how much red, green and blue add to the brightness that an eye sees.
_LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)
_EXTRA = {"sklearn": "scikit-learn", "PIL": "Pillow", "matplotlib": "matplotlib"}


def require_extra() -> None:
    """Checks that the packages of the demo are installed.

    Raises:
        HetconvError: one is missing; the sentence says how to install it.
    """
    missing = [name for module, name in _EXTRA.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise HetconvError(
            f"The demo needs {', '.join(missing)}: pip install 'hetconv-kernels[demo]'."
        )


def photograph(name: str) -> Tensor:
    """Reads one of the photographs that scikit-learn ships, as luminance.

    DnCNN's own experiments on Gaussian noise are on grey images too.

    Args:
        name: ``"china.jpg"`` or ``"flower.jpg"``.

    Returns:
        Brightness from 0 to 1.  # float32 [1, 427, 640]
    """
    from sklearn.datasets import load_sample_image

    return luminance(load_sample_image(name))


def luminance(rgb: NDArray[np.uint8]) -> Tensor:
    """Returns the brightness of an image, from 0 to 1.  # uint8 [H, W, 3] -> float32 [1, H, W]"""
    return torch.from_numpy(rgb.astype(np.float32) / 255 @ _LUMINANCE)[None]


def add_noise(image: Tensor, seed: int, sigma: float = SIGMA) -> Tensor:
    """Adds white Gaussian noise, not clipped, as is usual in denoising.  # [1, H, W] -> same"""
    generator = torch.Generator().manual_seed(seed)
    return image + sigma * torch.randn(image.shape, generator=generator)


def psnr(image: Tensor, truth: Tensor) -> float:
    """Returns the peak signal-to-noise ratio in dB of an image clipped to 0…1.  # [1, H, W] each"""
    error = (image.clamp(0, 1).double() - truth.double()).square().mean()
    return float(-10 * torch.log10(error))


class Patches:
    """An endless stream of noisy patches of one photograph, the only one it ever sees.

    A patch is cut anywhere, turned or mirrored in one of eight ways, and half of the time darkened
    by a random factor: one photograph has one exposure, and other photographs have others.

    Args:
        photo: what to cut from.  # [1, H, W]
        size: height and width of a patch.
        batch: patches in a batch.
        sigma: standard deviation of the noise.
        seed: seeds places, transformations and noise.
        device: where the batches go.

    Raises:
        ArgumentError: the patch is larger than the photograph.
    """

    def __init__(
        self,
        photo: Tensor,
        size: int,
        batch: int,
        sigma: float = SIGMA,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        if size > min(photo.shape[-2:]):
            raise ArgumentError(
                mismatch("size of a patch", size, f"at most {min(photo.shape[-2:])}")
            )
        self.photo, self.size, self.batch, self.sigma = photo, size, batch, sigma
        self.device = torch.device(device)
        self._random = torch.Generator().manual_seed(seed)

    def next(self) -> tuple[Tensor, Tensor]:
        """Draws a batch.

        Returns:
            The noisy patches and the noise in them.  # [N, 1, size, size] each, channels_last
        """
        clean = torch.stack([self._patch() for _ in range(self.batch)])
        noise = self.sigma * torch.randn(clean.shape, generator=self._random)
        noisy = (clean + noise).contiguous(memory_format=torch.channels_last)
        return noisy.to(self.device), noise.to(self.device)

    def _patch(self) -> Tensor:
        height, width = self.photo.shape[-2:]
        top, left = self._below(height - self.size + 1), self._below(width - self.size + 1)
        patch = self.photo[:, top : top + self.size, left : left + self.size]
        patch = torch.rot90(patch, self._below(4), (1, 2))
        if self._below(2):
            patch = patch.flip(2)
        if self._below(2):
            patch = patch * torch.rand(1, generator=self._random)
        return patch

    def _below(self, limit: int) -> int:
        return int(torch.randint(limit, (1,), generator=self._random))
