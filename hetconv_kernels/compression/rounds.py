# SPDX-License-Identifier: Apache-2.0
"""Rounds: `compress` inside a training loop of the user's own, such as accelerate's.

rounds = Rounds(network, hk.methods.SelfGrouping(target=0.7), example=images)
optimizer = torch.optim.SGD(rounds.network.parameters(), lr=0.01)
for epoch in rounds.epochs(optimizer):
    for x, label in loader:
        optimizer.zero_grad()
        loss = F.cross_entropy(rounds.network(x), label)
        loss.backward()
        epoch.before_step()
        optimizer.step()
        epoch.after_step(loss)
print(rounds.report)
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, HetconvError, InputTypeError, mismatch
from .base import compress
from .method import Method
from .outside import Epoch, OutsideLoop, Stopped
from .report import CompressionReport

# What the loop does itself, or what a method that waits for it cannot.
_NOT_HERE = ("data", "train_step", "optimizer", "state", "key")


class Rounds:
    """The rounds of a method, between which a loop of the user's trains.

    The method runs as in `compress`, in a thread of its own, and waits whenever it wants an epoch
    trained. One of the two threads always waits for the other. With the same batches, seed and
    optimiser the result is that of `compress`, bit by bit; but for the sensitivity by which `ADMM`
    divides its rates: it is of the weights here, since the training batches are the loop's.

    Attributes:
        network: what is to be trained: a copy of the given one, in plain layers.

    Args:
        model: the network, trained; it is not changed.
        method: such as ``SelfGrouping(target=0.7)``.
        example: an input, for shapes, MACs and times.  # [N, C, H, W]
        evaluate: as of `compress`.
        eval_data: as of `compress`.
        settings: more arguments of `compress`, such as ``skip``, ``seed`` and ``measure``; not
            ``data``, ``train_step`` and ``optimizer``, which are the loop's, and not ``state``: a
            loop that is killed begins anew.

    Raises:
        InputTypeError, ArgumentError, HetconvError: as `compress`.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        *,
        example: Tensor,
        evaluate: Callable[[nn.Module], float] | None = None,
        eval_data: Iterable[Any] | None = None,
        **settings: Any,
    ) -> None:
        wrong = [name for name in settings if name in _NOT_HERE]
        if wrong:
            raise ArgumentError(
                mismatch("settings of Rounds", wrong[0], "those that are not the loop's",
                         "hk.compress has a loop of its own, which continues from a state.")
            )  # fmt: skip
        if not isinstance(example, Tensor):
            raise InputTypeError(mismatch("example", type(example).__name__, "a tensor"))
        self._report: CompressionReport | None = None
        self._loop = OutsideLoop()
        self._device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

        def call() -> None:
            if self._device is not None:
                torch.cuda.set_device(self._device)  # a new thread is on the first one
            try:
                found: object = compress(
                    model, method, data=self._loop, example=example, evaluate=evaluate,
                    eval_data=eval_data, **settings,
                )  # fmt: skip
            except Stopped:
                found = None
            except BaseException as error:  # noqa: BLE001 (raised again in the loop's thread)
                found = error
            self._loop.end(found)

        context = contextvars.copy_context()
        self._thread = threading.Thread(
            target=context.run, args=(call,), name="hetconv rounds", daemon=True
        )
        self._thread.start()
        self._next: Epoch | None = self._await()
        self.network = self._next.network if self._next is not None else self.report.model

    def epochs(self, optimizer: torch.optim.Optimizer | None = None) -> Iterator[Epoch]:
        """Goes through the epochs that the method asks for; its own work is done in between.

        Args:
            optimizer: whose learning rate falls as in `compress`, and which forgets its momentum
                where a stage begins. None leaves both to the loop.
        """
        rates = [] if optimizer is None else [float(g["lr"]) for g in optimizer.param_groups]
        while self._next is not None:
            epoch = self._next
            if optimizer is not None:
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * epoch.scale
                if epoch.first:
                    optimizer.state.clear()
            yield epoch
            self.done(epoch)

    @property
    def current(self) -> Epoch | None:
        """The epoch that is to be trained now; None when the method has all that it wanted."""
        return self._next

    def done(self, epoch: Epoch) -> None:
        """Says that an epoch was trained, and waits until the method asks for the next.

        `epochs` does it; a loop that cannot be written around an iterator calls it.

        Raises:
            ArgumentError: it is not the one that was asked for.
            Whatever the method raises.
        """
        if epoch is not self._next:
            raise ArgumentError(mismatch("epoch", "another one", "the one in `current`"))
        self._loop.answer(epoch)
        self._next = self._await()

    @property
    def finished(self) -> bool:
        """Whether the method has got all its epochs, so that there is a report."""
        return self._report is not None

    @property
    def report(self) -> CompressionReport:
        """What came of it.

        Raises:
            HetconvError: the method has not got all its epochs.
        """
        if self._report is None:
            raise HetconvError(
                "There is no report yet: the method asks for more epochs. Train until `epochs` "
                "ends, or give the method fewer."
            )
        return self._report

    def close(self) -> None:
        """Ends the method where it is; does nothing after the last epoch."""
        if self._thread.is_alive() and self._next is not None:
            self._loop.stop()
            self._next = None
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self.close()

    def _await(self) -> Epoch | None:
        """Waits for the next epoch that the method asks for; None when it has ended."""
        found = self._loop.asked()
        if isinstance(found, Epoch):
            return found
        self._thread.join()
        self._next = None
        if isinstance(found, BaseException):
            raise found
        self._report = found
        return None
