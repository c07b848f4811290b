# SPDX-License-Identifier: Apache-2.0
"""What the methods are judged on: the digits by accuracy, a photograph with noise by PSNR.

Both ship with scikit-learn. Each problem has three parts: what is trained on, what decisions are
made on, and what only the table sees.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.data import PHOTOGRAPHS, read_photographs
from hetconv_kernels import models
from hetconv_kernels.compression.command import top1_accuracy, train_dense, trainer
from hetconv_kernels.compression.training import Training
from hetconv_kernels.datasets import Split, digits
from hetconv_kernels.demo_data import (
    HELD_OUT,
    SIGMA,
    TRAINED_ON,
    Patches,
    add_noise,
    photograph,
    psnr,
)

# What the accuracy on 500 test images may fall by: five images.
ACCURACY_TOLERANCE = 0.01
# What the PSNR may fall by: DnCNN was published as 0.6 dB better than BM3D, the method before it.
PSNR_TOLERANCE = 0.5
_BATCH = 64


@dataclasses.dataclass(frozen=True)
class TaskSettings:
    """Sizes and lengths of one problem.

    Attributes:
        epochs: of training at the end of each method.
        short: of training on the way, after each of a method's steps.
        dense_epochs: of training of the dense network.
        scratch_epochs: of training where a method begins anew.
        tolerance: what the quality may fall by.
        rate: the first learning rate of fine-tuning.
        scratch_rate: that of training anew.
        steps: of the methods that repeat until the tolerance is spent, at most.
    """

    epochs: int
    short: int
    dense_epochs: int
    scratch_epochs: int
    tolerance: float
    rate: float
    scratch_rate: float
    steps: int = 50


class CompressionTask:
    """A network and data to compress it on.

    Attributes:
        name: of the problem, and of its part of the table.
        measure: what quality is called.
        settings: sizes and lengths.
        example: what multiply-accumulates and times are for.  # [N, C, H, W]

    Args:
        folder: where the state of the dense network is kept.
        quick: whether everything is as small as can be.
    """

    name: str
    measure: str
    settings: TaskSettings
    example: Tensor

    def __init__(self, folder: Path, quick: bool) -> None:
        self.folder, self.quick = folder, quick

    @cached_property
    def dense(self) -> nn.Module:
        """The trained dense network."""
        raise NotImplementedError

    @cached_property
    def standard(self) -> nn.Module:
        """The dense network that others are held to."""
        return self.dense

    @cached_property
    def reference(self) -> float:
        """Returns the quality of the standard network."""
        return self.quality(self.standard)

    @cached_property
    def reference_elsewhere(self) -> dict[str, float]:
        """Returns the quality of the standard network on more data, by name."""
        return self.elsewhere(self.standard)

    def elsewhere(self, model: nn.Module) -> dict[str, float]:
        """Measures a network on more data of the kind, as far as it was fetched, by name."""
        return {}

    def training(self, rate: float) -> Training:
        """Returns how a network is trained, beginning at a learning rate."""
        raise NotImplementedError

    def quality(self, model: nn.Module) -> float:
        """Measures a network on what no training and no decision has seen; larger is better."""
        raise NotImplementedError


class Digits(CompressionTask):
    """The digits, 8×8, in ten classes: 1,000 to train, 297 to decide by, 500 for the table."""

    name, measure = "digits", "accuracy"

    def __init__(self, folder: Path, quick: bool) -> None:
        super().__init__(folder, quick)
        epochs, dense = (1, 3) if quick else (15, 30)
        short, steps = max(epochs // 3, 1), 2 if quick else 50
        self.settings = TaskSettings(
            epochs, short, dense, 2 * epochs, ACCURACY_TOLERANCE, 0.01, 0.1, steps
        )
        data = digits()
        if quick:
            train, validation = (
                Split(*(t[:128] for t in split.tensors)) for split in (data.train, data.validation)
            )
            data = dataclasses.replace(data, train=train, validation=validation)
        self.data = data
        self.example = data.test.images[:_BATCH]

    @cached_property
    def dense(self) -> nn.Module:
        """The trained dense network."""
        torch.manual_seed(0)
        model = models.digits_net(8 if self.quick else 32)
        made = self.training(self.settings.rate)
        return train_dense(model, made, self.settings.dense_epochs, 0, self.folder / "dense.pt")

    def training(self, rate: float) -> Training:
        """SGD with momentum on cross-entropy."""
        return trainer(self.data, _BATCH, rate, False)

    def quality(self, model: nn.Module) -> float:
        """Top-1 accuracy on the test images."""
        return top1_accuracy(model, self.data)


class Denoising(CompressionTask):
    """White noise of σ = 25 taken out of a photograph by a DnCNN, without BatchNorm as in the demo.

    Trained on the left three quarters of one photograph, decided by the rest of it; the table's
    PSNR is that of the other photograph, and those of scikit-image stand beside it. An epoch is a
    number of batches of random patches, drawn by the epoch's number. Adam on the mean squared error
    in units of the noise's variance.
    """

    name, measure = "psnr", "PSNR, dB"
    photographs = PHOTOGRAPHS

    def __init__(self, folder: Path, quick: bool) -> None:
        super().__init__(folder, quick)
        epochs, dense = (1, 2) if quick else (16, 30)
        self.depth, self.channels = (3, 8) if quick else (6, 48)
        self.steps, self.dense_steps = (2, 2) if quick else (25, 40)
        # From scratch as many batches as the dense network and the training after it together.
        scratch = dense * self.dense_steps // self.steps + epochs
        short, steps = (1, 2) if quick else (2, 50)
        self.settings = TaskSettings(
            epochs, short, dense, scratch, PSNR_TOLERANCE, 1e-3, 2e-3, steps
        )
        photo, truth = photograph(TRAINED_ON), photograph(HELD_OUT)
        edge = photo.shape[2] * 3 // 4
        crop = slice(None, 48 if quick else None)
        self.photo, self.validation = photo[:, :, :edge], photo[:, crop, edge:]
        self.truth = truth[:, crop]
        self.example = add_noise(truth[:, :48, :64] if quick else truth[:, :240, :320], seed=3)[
            None
        ]

    @cached_property
    def dense(self) -> nn.Module:
        """The trained dense network."""
        torch.manual_seed(0)
        model = models.dncnn(self.depth, self.channels, 1, batch_norm=False)
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        # `train_dense` begins at ten times the rate.
        made = self._training(self.settings.scratch_rate / 10, self.dense_steps)
        return train_dense(model, made, self.settings.dense_epochs, 0, self.folder / "dense.pt")

    @cached_property
    def standard(self) -> nn.Module:
        """The dense network, trained on for longer than most methods do at the end, if it helps."""
        more, epochs = copy.deepcopy(self.dense), 3 * self.settings.epochs // 2
        made = self.training(self.settings.rate / 10)
        more = train_dense(more, made, epochs, 1, self.folder / "dense-more.pt")
        return max((more, self.dense), key=self.quality)

    def elsewhere(self, model: nn.Module) -> dict[str, float]:
        """PSNR on the photographs of scikit-image, where `benchmarks.data` has fetched them."""
        model = copy.deepcopy(model).eval()
        with torch.inference_mode():
            return {
                name: _psnr(truth[:, :48, :64] if self.quick else truth, 4 + place, model)
                for place, (name, truth) in enumerate(read_photographs(self.photographs).items())
            }

    def training(self, rate: float) -> Training:
        """Adam on the mean squared error of the predicted noise."""
        return self._training(rate, self.steps)

    def _training(self, rate: float, steps: int) -> Training:
        return Training(
            partial(self._batches, steps),
            train_step=_noise_loss,
            evaluate=partial(_psnr, self.validation, 1),
            optimizer=partial(_adam, rate),
        )

    def quality(self, model: nn.Module) -> float:
        """PSNR on the other photograph."""
        with torch.inference_mode():
            return _psnr(self.truth, 2, copy.deepcopy(model).eval())

    def _batches(self, steps: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        patches = Patches(self.photo, 24 if self.quick else 40, 8, seed=100 + epoch)
        return (patches.next() for _ in range(steps))


PROBLEMS: dict[str, Callable[[Path, bool], CompressionTask]] = {"digits": Digits, "psnr": Denoising}


def _noise_loss(model: nn.Module, batch: Any) -> Tensor:
    noisy, noise = batch
    return nn.functional.mse_loss(noisy - model(noisy), noise) / SIGMA**2


def _adam(rate: float, parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, rate)


def _psnr(truth: Tensor, seed: int, model: nn.Module) -> float:
    noisy = add_noise(truth, seed=seed)[None].contiguous(memory_format=torch.channels_last)
    return psnr(model(noisy)[0], truth)
