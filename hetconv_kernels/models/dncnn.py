# SPDX-License-Identifier: Apache-2.0
"""DnCNN: a plain stack of 3×3 convolutions that predicts the noise of an image."""

from __future__ import annotations

from torch import Tensor, nn

from ..errors import ArgumentError, mismatch


class DnCNN(nn.Module):
    """The residual denoiser: it predicts the noise and returns the image without it.

    The first convolution has a bias and a ReLU, the middle ones BatchNorm and a ReLU, the last
    neither, as in the authors' code (github.com/cszn/DnCNN), including its epsilon.

    Source: Zhang, Zuo, Chen, Meng, Zhang, IEEE TIP 26(7), 2017, arXiv 1608.03981.

    Args:
        depth: convolutions, at least 2; the paper uses 17 for a known noise level, 20 for blind.
        channels: filters of every convolution but the last.
        image_channels: 1 for grey images, 3 for colour.
        batch_norm: False trains without normalisation, for very small batches.

    Raises:
        ArgumentError: ``depth`` is under 2.
    """

    def __init__(
        self,
        depth: int = 17,
        channels: int = 64,
        image_channels: int = 1,
        batch_norm: bool = True,
    ) -> None:
        super().__init__()
        if depth < 2:
            raise ArgumentError(mismatch("depth of a DnCNN", depth, "at least 2"))
        layers: list[nn.Module] = [
            nn.Conv2d(image_channels, channels, 3, padding=1),
            nn.ReLU(inplace=True),
        ]
        for _ in range(depth - 2):
            layers.append(nn.Conv2d(channels, channels, 3, padding=1, bias=not batch_norm))
            if batch_norm:
                layers.append(nn.BatchNorm2d(channels, eps=1e-4))
            layers.append(nn.ReLU(inplace=True))
        layers.append(nn.Conv2d(channels, image_channels, 3, padding=1, bias=False))
        self.dncnn = nn.Sequential(*layers)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.orthogonal_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def noise(self, x: Tensor) -> Tensor:
        """Predicts the noise, the residual of the paper: [N, image_channels, H, W] -> same."""
        return self.dncnn(x)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the denoised image, x − noise(x): [N, image_channels, H, W] -> same."""
        return x - self.noise(x)


def dncnn(
    depth: int = 17, channels: int = 64, image_channels: int = 1, batch_norm: bool = True
) -> DnCNN:
    """Builds `DnCNN`; the default has 556,096 parameters."""
    return DnCNN(depth, channels, image_channels, batch_norm)
