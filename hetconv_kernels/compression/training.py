# SPDX-License-Identifier: Apache-2.0
"""Training: the user's callables and data, and one epoch made of them."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ArgumentError, InputTypeError, mismatch
from ..measure import stats
from . import ranks

TrainStep = Callable[[nn.Module, Any], Tensor]
Evaluate = Callable[[nn.Module], float]
Data = Iterable[Any] | Callable[[int], Iterable[Any]]
MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Training:
    """How a network is trained and judged.

    Attributes:
        data: batches, iterated once an epoch; or a callable of the epoch's number that returns
            them. A ``train_step`` that finds its own data takes ``data=range(steps)``.
        train_step: ``(model, batch) -> loss``, a scalar with a gradient; the optimiser is stepped
            for it. None is cross-entropy on batches ``(x, label)``.
        evaluate: ``(model) -> float``, larger is better; it is called in evaluation mode.
        eval_data: batches ``(x, label)``; the top-1 accuracy on them where ``evaluate`` is None.
        optimizer: ``(parameters) -> optimizer``. None is SGD 0.01, momentum 0.9, weight decay 1e-4,
            as self-grouping and WSP fine-tune with.
    """

    data: Data | None = None
    train_step: TrainStep | None = None
    evaluate: Evaluate | None = None
    eval_data: Iterable[Any] | None = None
    optimizer: MakeOptimizer | None = None

    def __post_init__(self) -> None:
        for name in ("train_step", "evaluate", "optimizer"):
            value = getattr(self, name)
            if value is not None and not callable(value):
                raise InputTypeError(mismatch(name, type(value).__name__, "a callable or None"))
        for name in ("data", "eval_data"):
            value = getattr(self, name)
            if value is None or isinstance(value, Iterable) or (name == "data" and callable(value)):
                continue
            raise InputTypeError(mismatch(name, type(value).__name__, "an iterable of batches"))
        if isinstance(self.data, Iterator):
            raise InputTypeError(
                mismatch(
                    "data",
                    f"a {type(self.data).__name__}, which can be read only once",
                    "an iterable that starts anew at each epoch, or a callable of the epoch",
                    "Pass a list, a DataLoader, or a function that makes the iterator.",
                )
            )

    @property
    def can_judge(self) -> bool:
        """Whether there is a way to measure accuracy."""
        return self.evaluate is not None or self.eval_data is not None

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Builds the optimiser of one stage of training."""
        parameters = [p for p in model.parameters() if p.requires_grad]
        if self.optimizer is not None:
            return self.optimizer(parameters)
        return torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=1e-4)

    def batches(self, epoch: int) -> Iterable[Any]:
        """Returns the batches of one epoch.

        Raises:
            ArgumentError: there is no data.
        """
        if self.data is None:
            raise ArgumentError(
                mismatch("data", None, "batches, since this method trains", "Or set its epochs=0.")
            )
        if not isinstance(self.data, Iterable):
            return self.data(epoch)
        sampler = getattr(self.data, "sampler", None)
        if sampler is not None and hasattr(
            sampler, "set_epoch"
        ):  # a DistributedSampler shuffles by this number
            sampler.set_epoch(epoch)
        return self.data

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Computes the loss of one batch."""
        if self.train_step is not None:
            loss = self.train_step(model, batch)
            if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
                raise InputTypeError(
                    mismatch(
                        "result of train_step",
                        type(loss).__name__
                        if not isinstance(loss, Tensor)
                        else f"a tensor of {tuple(loss.shape)}, requires_grad={loss.requires_grad}",
                        "the loss: a scalar tensor with a gradient",
                        "Leave backward and the optimiser's step to hk.compress.",
                    )
                )
            return loss
        x, label = pair_of(batch, model)
        with stats.fitting(x):
            found = model(x)
        return cross_entropy(found, label)

    def judge(self, model: nn.Module) -> float | None:
        """Measures the accuracy in evaluation mode, averaged over all ranks; None if unknown."""
        if not self.can_judge:
            return None
        with _mode(model, False), torch.no_grad():
            if self.evaluate is not None:
                return ranks.sum_over_ranks(float(self.evaluate(model))) / ranks.world_size()
            right = seen = 0.0
            for batch in self.eval_data or ():
                x, label = pair_of(batch, model)
                with stats.fitting(x):
                    found = model(x)
                if not isinstance(found, Tensor) or found.dim() < 2 or len(found) != len(label):
                    raise _no_classes(found, label, "")
                right += float((found.argmax(1) == label).sum())
                seen += len(label)
        seen = ranks.sum_over_ranks(seen)
        if not seen:
            raise ArgumentError(mismatch("eval_data", "no batches", "at least one"))
        return ranks.sum_over_ranks(right) / seen


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds torch's, numpy's and Python's global generators, and puts them back afterwards."""
    python, old = random.getstate(), np.random.get_state()  # noqa: NPY002  # augmentations use it
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed % 2**64)  # of a round's number too, any integer is a seed
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(old)  # noqa: NPY002


@contextlib.contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    before = model.training
    model.train(training)
    try:
        yield
    finally:
        model.train(before)


def cross_entropy(found: Any, label: Tensor) -> Tensor:
    """Computes the loss of outputs [N, classes] under labels [N].

    Raises:
        ArgumentError: they are none for cross-entropy.
    """
    try:
        return nn.functional.cross_entropy(found, label)
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        raise _no_classes(found, label, error) from error


def _no_classes(found: Any, label: Tensor, reason: object) -> ArgumentError:
    """Says that outputs and labels are none for cross-entropy and top-1 accuracy."""
    most = f" up to {int(label.max())}" if label.numel() and not label.is_complex() else ""
    shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
    said = f" It says: {str(reason).splitlines()[0]}" if str(reason) else ""
    return ArgumentError(
        mismatch(
            "outputs and labels",
            f"{shape} and {str(label.dtype).removeprefix('torch.')} {list(label.shape)}{most}",
            "[N, classes] and int64 [N] below the number of classes",
            "Pass train_step and evaluate for anything else.",
        )
        + said
    )


def pair_of(batch: Any, model: nn.Module) -> tuple[Tensor, Tensor]:
    """Takes a batch apart, and moves it to where a network is.

    Raises:
        InputTypeError: it is no pair (x, label).
    """
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise InputTypeError(
            mismatch(
                "a batch",
                type(batch).__name__,
                "a pair (x, label)",
                "Pass train_step and evaluate for anything else.",
            )
        )
    # A quantised network has buffers only.
    held = itertools.chain(model.parameters(), model.buffers())
    device = next((t.device for t in held), torch.device("cpu"))
    return batch[0].to(device), batch[1].to(device)
