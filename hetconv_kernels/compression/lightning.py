# SPDX-License-Identifier: Apache-2.0
"""A Lightning callback that compresses a network while `Trainer.fit` trains it.

    callback = lightning.Compression(hk.methods.SelfGrouping(target=0.7), example=images)
    Trainer(max_epochs=100, callbacks=[callback]).fit(module, loader)
    print(callback.report)

Needs the ``lightning`` extra.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, HetconvError, mismatch
from .method import Method
from .outside import Epoch
from .report import CompressionReport
from .rounds import Rounds

if TYPE_CHECKING:
    # At run time the library is imported when the class is asked for: see __getattr__.
    from lightning.pytorch import Callback as Compression

__all__ = ["Compression"]

_made: list[Any] = []


def __getattr__(name: str) -> Any:
    if name != "Compression":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if not _made:
        _made.append(_make(_library()))
    return _made[0]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _library() -> Any:
    try:
        import lightning.pytorch
    except ImportError as error:
        raise HetconvError(
            "the callback needs lightning: pip install 'hetconv-kernels[lightning]'"
        ) from error
    return lightning.pytorch


def _make(library: Any) -> Any:
    class Compression(library.Callback):
        """Runs a method in rounds between the epochs of a fit.

        The network is an attribute of the LightningModule. When the fit is set up, it is replaced
        by a copy in plain layers that trains under the method's masks; when the method has all the
        epochs that it wants, the fit ends, and the attribute holds the compressed network.

        The learning rate falls as in `hk.compress` where the module has no scheduler of its own. A
        fit that continues from a checkpoint is refused: which weights exist is not in it.

        Attributes:
            rounds: what runs, see `Rounds`; None before the fit.

        Args:
            method: such as ``hk.methods.SelfGrouping(target=0.7)``.
            example: an input, on any device.  # [N, C, H, W]
            network: the name of the attribute.
            settings: more arguments of `Rounds`, such as ``eval_data`` and ``skip``.
        """

        def __init__(
            self, method: Method, example: Tensor, *, network: str = "model", **settings: Any
        ) -> None:
            self._method, self._example, self._name = method, example, network
            self._settings = settings
            self.rounds: Rounds | None = None
            self._steps, self._rates = 0, list[list[float]]()

        @property
        def report(self) -> CompressionReport:
            """What came of it.

            Raises:
                HetconvError: there was no fit, or it ended before the method had its epochs.
            """
            if self.rounds is None:
                raise HetconvError("There is no report yet: the callback was in no fit.")
            return self.rounds.report

        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            """Puts the network that is compressed in the place of the module's."""
            if stage != "fit":
                return
            model = getattr(pl_module, self._name, None)
            if not isinstance(model, nn.Module):
                raise ArgumentError(
                    mismatch(f"attribute {self._name!r} of {type(pl_module).__name__}",
                             type(model).__name__, "the network",
                             "Name it: Compression(..., network='...').")
                )  # fmt: skip
            self.rounds = Rounds(model, self._method, example=self._example, **self._settings)
            setattr(pl_module, self._name, self.rounds.network)

        def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
            """Refuses to go on from a checkpoint."""
            if self.rounds is not None and not self.rounds.finished:
                self.rounds.close()
                raise ArgumentError(
                    mismatch("ckpt_path of a fit under compression", "a checkpoint", None,
                             "Begin anew; which weights exist is not in a checkpoint.")
                )  # fmt: skip

        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            """Sets the learning rate of the epoch, and forgets momentum where a stage begins."""
            epoch, self._steps = self._epoch(), trainer.global_step
            if epoch is None:
                return
            if not trainer.lr_scheduler_configs:
                if not self._rates:
                    self._rates = [[g["lr"] for g in o.param_groups] for o in trainer.optimizers]
                for optimizer, rates in zip(trainer.optimizers, self._rates, strict=True):
                    for group, rate in zip(optimizer.param_groups, rates, strict=True):
                        group["lr"] = rate * epoch.scale
            if epoch.first:
                for optimizer in trainer.optimizers:
                    optimizer.state.clear()

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            """Adds the penalty's gradient; gradients are not scaled here."""
            epoch = self._epoch()
            if epoch is not None:
                with torch.enable_grad():
                    epoch.before_step()

        def on_train_batch_end(
            self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            """Keeps dead weights zero after each step."""
            epoch = self._epoch()
            if epoch is not None and trainer.global_step != self._steps:
                self._steps = trainer.global_step
                loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
                epoch.after_step(loss.detach() if isinstance(loss, Tensor) else None)

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            """Lets the method work, and ends the fit when it wants no more epochs."""
            epoch = self._epoch()
            if epoch is not None and self.rounds is not None:
                self.rounds.done(epoch)
            trainer.should_stop = trainer.should_stop or self._epoch() is None

        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            """Ends the method with the fit."""
            if self.rounds is not None:
                self.rounds.close()

        def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
            """Gives the module the compressed network."""
            if stage != "fit" or self.rounds is None:
                return
            self.rounds.close()
            if self.rounds.finished:
                setattr(pl_module, self._name, self.rounds.report.model)

        def _epoch(self) -> Epoch | None:
            return None if self.rounds is None else self.rounds.current

    return Compression
