# SPDX-License-Identifier: Apache-2.0
"""Training loops that are not ours: a method that asks for an epoch waits until one was trained."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from torch import nn

    from .run import Run

# What the loop answers instead of a loss when it will train no more.
_STOP = object()


class Stopped(BaseException):
    """Unwinds a method whose loop has ended; no handler of errors may catch it."""


class Epoch:
    """One epoch that a method asks for.

    Attributes:
        scale: of the learning rate.
        first: whether a stage begins, for which the optimiser should forget its momentum.
        losses: of the batches, as far as they were told.

    Args:
        run: whose network is trained.
        penalty: computes what is added to the loss of each batch.
        after_step: called after each step of the optimiser.
        scale, first: as the attributes.
    """

    def __init__(
        self,
        run: Run,
        scale: float,
        penalty: Callable[[], Tensor] | None,
        after_step: Callable[[], None] | None,
        first: bool,
    ) -> None:
        self._run, self._penalty, self._after_step = run, penalty, after_step
        self.scale, self.first = scale, first
        self.losses: list[float] = []

    @property
    def network(self) -> nn.Module:
        """The network to train."""
        return self._run.model

    def before_step(self) -> None:
        """Adds the gradient of the method's penalty, and takes that of dead weights away.

        Call it between ``backward`` and the optimiser's step, where gradients are not scaled.
        """
        if self._penalty is not None:
            self._penalty().backward()
        self._run.project(gradients=True)

    def after_step(self, loss: float | Tensor | None = None) -> None:
        """Keeps dead weights zero; call it after each step of the optimiser.

        Args:
            loss: of the batch, for the report.
        """
        self._run.project()
        if self._after_step is not None:
            self._after_step()
        if loss is not None:
            self.losses.append(float(loss))


class OutsideLoop:
    """Stands where `hk.compress` has its data: asks another thread for each epoch, and waits.

    Of the two threads one always waits for the other, so that nothing runs at the same time.
    """

    def __init__(self) -> None:
        self._asked: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def __call__(self, epoch: int) -> Iterable[Any]:
        """Has no batches of its own."""
        return ()

    # In the method's thread ---------------------------------------------------------------------

    def run(self, epoch: Epoch) -> float:
        """Has an epoch trained, and returns its mean loss."""
        self._asked.put(epoch)
        answer = self._answers.get()
        if answer is _STOP:
            raise Stopped
        return float(answer)

    def end(self, result: object) -> None:
        """Says that no more is asked for."""
        self._asked.put(result)

    # In the loop's thread -----------------------------------------------------------------------

    def asked(self) -> Any:
        """Waits for the next epoch, or for the result."""
        return self._asked.get()

    def answer(self, epoch: Epoch) -> None:
        """Says that an epoch was trained."""
        self._answers.put(sum(epoch.losses) / len(epoch.losses) if epoch.losses else 0.0)

    def stop(self) -> None:
        """Says that no epoch will be trained any more."""
        self._answers.put(_STOP)
