# SPDX-License-Identifier: Apache-2.0
"""Distillation: a network learns what another one says of each image, beside the label."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ArgumentError, mismatch
from ..measure import stats
from .schedule import check_positive
from .training import cross_entropy, pair_of


@dataclass(frozen=True)
class Distillation:
    """A ``train_step`` for `compress`: what a teacher says counts beside the label.

    The loss is (1 − ``weight``)·CE(z, label) + ``weight``·T²·KL(softmax(z'/T) ‖ softmax(z/T)), of
    the outputs z of the network and z' of the teacher; T² keeps the gradients as large at any T.
    Any method trains so, and with the dense network as its teacher loses less where few weights are
    left and few images are there to learn from.

    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015,
    arXiv 1503.02531.

    Attributes:
        teacher: gives [N, classes], as the network does. A copy in evaluation mode is kept.
        weight: of what the teacher says, from 0 (labels only) to 1 (no labels).
        temperature: T; higher ones bring out what the teacher finds unlikely.

    Raises:
        ArgumentError: a value out of range.
    """

    teacher: nn.Module
    weight: float = 0.7
    temperature: float = 4.0

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise ArgumentError(mismatch("weight of Distillation", self.weight, "from 0 to 1"))
        check_positive("temperature", self.temperature)
        teacher = copy.deepcopy(self.teacher).eval().requires_grad_(False)
        object.__setattr__(self, "teacher", teacher)

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """Computes the loss of a batch (x, label).

        Raises:
            InputTypeError: the batch is no pair.
            ArgumentError: the outputs are none for cross-entropy, or not of the teacher's shape.
        """
        x, label = pair_of(batch, model)
        with stats.fitting(x):
            found = model(x)
            with torch.no_grad():
                told = self.teacher(x)
        loss = cross_entropy(found, label)
        if not isinstance(told, Tensor) or told.shape != found.shape:
            form = list(told.shape) if isinstance(told, Tensor) else type(told).__name__
            raise ArgumentError(mismatch("output of the teacher", form, list(found.shape)))
        apart = F.kl_div(
            F.log_softmax(found / self.temperature, 1),
            F.log_softmax(told / self.temperature, 1),
            reduction="batchmean",
            log_target=True,
        )
        return (1 - self.weight) * loss + self.weight * self.temperature**2 * apart
