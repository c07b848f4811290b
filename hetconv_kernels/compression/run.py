# SPDX-License-Identifier: Apache-2.0
"""Run: a network under compression: its masks, its rounds, and the journal that makes it resumable.

A method is written as straight code that calls rounds. Each finished round is entered in a journal
with its result, and the state is saved. After a kill the same code runs again from the top: rounds
that the journal holds return what they returned, without doing anything, and with the last of them
the saved weights come back. So whatever a method decides between two rounds may depend on the
results of rounds and on nothing else, and everything that changes weights or masks is a round.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import HetconvError, mismatch
from ..masks import BoolArray
from ..measure import stats
from ..support import Support
from . import ranks
from .interfaces import Interfaces, find_interfaces
from .outside import Epoch, OutsideLoop
from .progress import Progress
from .schedule import check_loss, step_decay
from .state import StateFile
from .training import Training, seeded

WeightLayer = nn.Conv2d | nn.Linear


class Run:
    """The network that a method works on.

    Attributes:
        model: a copy of the user's network made of plain layers, trained in place.
        layers: those that the method may compress, by name; weights [F, C, KH, KW] or [F, C].
        masks: which weights exist, by name of the layer; a layer without a mask is dense.
        kept: why other layers stay dense, by name.
        tensors: what a method wants to find again after a kill; saved with the weights.
        example: an input.  # [N, C, H, W]
        notes: remarks for the report.
        dense_rows: the work of each layer when dense, see `stats.layer_macs`.
        training: the user's callables and data.
        seed: of every round, with the round's number.

    Args:
        state: where the state is saved.
        progress: where rounds are shown.
        others: as the attributes.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: dict[str, WeightLayer],
        masks: dict[str, Tensor],
        kept: dict[str, str],
        example: Tensor,
        training: Training,
        seed: int,
        state: StateFile,
        progress: Progress,
    ) -> None:
        self.model, self.layers, self.masks, self.kept = model, layers, masks, kept
        self.example, self.training, self.seed = example, training, seed
        self._first = dict(masks)
        self.tensors: dict[str, Tensor] = {}
        self.notes: list[str] = []
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self._state, self._progress = state, progress
        self._saved = state.load()
        self._journal: list[dict[str, Any]] = []
        if self._saved is not None:
            self._journal = json.loads(self._saved["journal"])
        self._done = self._epochs = self._drawn = 0
        self._again: tuple[int, int] | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        self._optimizer_state: dict[str, Any] | None = None
        self._parallel: nn.Module | None = None
        self._interfaces: Interfaces | None = None
        # Of the plain layers, as if they were dense.
        self.dense_rows = stats.layer_macs(model, example)
        self.project()

    def note(self, text: str) -> None:
        """Adds a remark to the report; call it between rounds, on the result of one."""
        self.notes.append(text)

    @property
    def history(self) -> list[dict[str, Any]]:
        """The rounds that were done, with their results."""
        return self._journal

    # Rounds -----------------------------------------------------------------------------------

    def round(self, what: str, do: Callable[[], Any]) -> Any:
        """Does one round, or returns what it returned when it was done before the kill.

        Args:
            what: names the round, for the journal and the display.
            do: does it; its result is plain data for JSON.

        Raises:
            HetconvError: the journal tells of another round here.
        """
        number, self._done = self._done, self._done + 1
        self._drawn += 1
        if number < len(self._journal):
            entry = self._journal[number]
            if entry["what"] != what:
                raise HetconvError(
                    mismatch(
                        f"round {number} of the state {self._state.path}",
                        repr(entry["what"]),
                        repr(what),
                        "It was written by another version, or the data changed. Delete it.",
                    )
                )
            if number == len(self._journal) - 1:
                self._restore()
                self._progress.resumed(len(self._journal))
            return entry["result"]
        self._progress.begin(what)
        with seeded(self.seed * 1_000_003 + self._drawn, self.device):
            result = json.loads(json.dumps(do()))
        self._journal.append({"what": what, "result": result})
        self._save()
        self._progress.end(number, what, result)
        return result

    def evaluate(self, what: str = "accuracy") -> float | None:
        """Measures the accuracy as a round."""
        result: float | None = self.round(what, lambda: self.training.judge(self.model))
        return result

    def train(
        self,
        what: str,
        epochs: int,
        penalty: Callable[[], Tensor] | None = None,
        after_step: Callable[[], None] | None = None,
        decay: bool = True,
        after_epoch: Callable[[], None] | None = None,
    ) -> None:
        """Trains for some epochs, each a round, with a fresh optimiser; dead weights stay zero.

        Args:
            what: names the stage.
            epochs: how many.
            penalty: computes what is added to the loss of each batch.
            after_step: called after each step of the optimiser.
            decay: whether the learning rate falls to a tenth after a third and after two thirds.
            after_epoch: called at the end of each epoch's round.

        Raises:
            HetconvError: the training diverged: the mean loss of an epoch is not finite.
        """
        self._optimizer = self._parallel = None
        for epoch in range(epochs):
            last = epoch + 1 == epochs
            scale = step_decay(epoch, epochs) if decay else 1.0

            name = f"{what}, epoch {epoch + 1}/{epochs}"

            def one(
                epoch: int = epoch, last: bool = last, scale: float = scale, name: str = name
            ) -> dict[str, float]:
                loss = self._epoch(scale, penalty, after_step, not epoch)
                check_loss(name, loss)
                if after_epoch is not None:
                    after_epoch()
                if last:
                    self._optimizer = self._parallel = None
                return {"loss": loss}

            self.round(name, one)
            self._epochs += 1

    @contextlib.contextmanager
    def same_draws(self) -> Iterator[None]:
        """Makes the rounds inside draw the same batches and seeds at each use in turn.

        The first use of a pair remembers where it began, the second begins there again.
        """
        if self._again is None:
            self._again = (self._drawn, self._epochs)
        else:
            (self._drawn, self._epochs), self._again = self._again, None
        yield

    def _epoch(
        self,
        scale: float,
        penalty: Callable[[], Tensor] | None,
        after_step: Callable[[], None] | None,
        first: bool,
    ) -> float:
        if isinstance(self.training.data, OutsideLoop):
            self.model.train()
            mean = self.training.data.run(Epoch(self, scale, penalty, after_step, first))
            self.project()
            return ranks.sum_over_ranks(mean) / ranks.world_size()
        if self._optimizer is None:
            self._optimizer = self.training.make_optimizer(self.model)
            for group in self._optimizer.param_groups:
                group["base_lr"] = float(group["lr"])
            if self._optimizer_state is not None:
                self._optimizer.load_state_dict(self._optimizer_state)
        self._optimizer_state = None
        optimizer = self._optimizer
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * scale
        network = self.model
        if ranks.world_size() > 1:
            if self._parallel is None:
                self._parallel = nn.parallel.DistributedDataParallel(self.model)
            network = self._parallel
            # Each rank has its own part of the data, and draws its own augmentations.
            torch.manual_seed((torch.initial_seed() + ranks.rank()) % 2**64)
        self.model.train()
        total, count = 0.0, 0
        for batch in self.training.batches(self._epochs):
            optimizer.zero_grad()
            loss = self.training.loss(network, batch)
            total, count = total + loss.item(), count + 1
            if penalty is not None:
                loss = loss + penalty()
            loss.backward()
            self.project(gradients=True)
            optimizer.step()
            self.project()
            if after_step is not None:
                after_step()
            self._progress.batch()
        if not count:
            raise HetconvError("The data has no batches; expected at least one in each epoch.")
        ranks.same_buffers(self.model)
        return ranks.sum_over_ranks(total / count) / ranks.world_size()

    # Weights and masks ------------------------------------------------------------------------

    def weight(self, name: str) -> Tensor:
        """Returns a layer's masked weight, the mean over all ranks.  # float64 [F, C, ...], CPU"""
        layer: Any = self.model.get_submodule(name)
        mask = self.masks.get(name)
        masked = layer.weight if mask is None else layer.weight * mask
        return ranks.mean_over_ranks(masked).cpu()

    def mask(self, name: str) -> Tensor:
        """Returns which weights of a layer exist, all of them when it has no mask.  # bool"""
        found = self.masks.get(name)
        return (
            torch.ones_like(self.layers[name].weight, dtype=torch.bool) if found is None else found
        )

    def support(self, name: str) -> Support:
        """Returns the mask of a layer as a Support.  # [F, C, KH, KW]"""
        return support_of(self.mask(name))

    def choose(self, name: str, mask: BoolArray | Tensor) -> None:
        """Sets which weights of a layer exist, within the Support it came with, if any.

        Args:
            name: of the layer.
            mask: of the weight's shape, or [F, C, 1, 1] for a fully-connected layer.
        """
        weight = self.layers[name].weight
        # A copy: a Support's mask is read-only.
        chosen = torch.from_numpy(np.array(mask)) if isinstance(mask, np.ndarray) else mask
        mask = chosen.reshape(weight.shape).to(weight.device)
        within = self._first.get(name)
        self.masks[name] = mask if within is None else mask & within
        self.project()

    def alive(self, name: str) -> BoolArray:
        """Tells which filters of a layer have a weight.  # bool [F]"""
        mask = self.mask(name)
        result: BoolArray = mask.reshape(len(mask), -1).any(1).cpu().numpy()
        return result

    @torch.no_grad()
    def project(self, gradients: bool = False) -> None:
        """Zeroes dead entries of the weights, or of their gradients."""
        for name, mask in self.masks.items():
            weight = self.model.get_submodule(name).weight
            target = weight.grad if gradients else weight
            if isinstance(target, Tensor):
                target.mul_(mask)

    @property
    def interfaces(self) -> Interfaces:
        """Which layers read which; found once."""
        if self._interfaces is None:
            every = {n: m for n, m in self.model.named_modules() if isinstance(m, WeightLayer)}
            found = find_interfaces(self.model, every, self.example)
            allowed = {}
            fixed = {name: why for name, why in found.fixed.items() if name in self.layers}
            for name, readers in found.readers.items():
                locked = [
                    r.name for r in readers if r.name in self.kept and _is_locked(self, r.name)
                ]
                if name in self.layers and not locked:
                    allowed[name] = readers
                elif name in self.layers:
                    fixed[name] = f"its reader {locked[0]!r} cannot be changed"
            behind = {
                name: tuple(r for r in readers if r.name in self.layers)
                for name, readers in found.behind.items()
                if name in self.layers and name in fixed
            }
            behind = {name: readers for name, readers in behind.items() if readers}
            units = {name: found.units[name] for name in behind if name in found.units}
            self._interfaces = Interfaces(allowed, fixed, behind, units)
        return self._interfaces

    def remove(self, name: str, filters: BoolArray) -> None:
        """Removes whole filters of a layer, and the channels of all layers that read them.

        Where the width stays, those are the layers that read it next, see `Interfaces`.

        Args:
            name: of a layer in ``interfaces.readers`` or ``interfaces.behind``.
            filters: which.  # bool [F]
        """
        rows = torch.from_numpy(np.array(filters, bool))
        mask = self.mask(name).clone()
        mask[rows.to(mask.device)] = False
        self.masks[name] = mask
        found = self.interfaces
        for reader in found.readers[name] if name in found.readers else found.behind[name]:
            layer: Any = self.model.get_submodule(reader.name)
            old = self.masks.get(reader.name)
            mask = torch.ones_like(layer.weight, dtype=torch.bool) if old is None else old.clone()
            read = torch.from_numpy(reader.of_filters(len(rows)))
            mask[:, ((read >= 0) & rows[read]).to(mask.device)] = False
            self.masks[reader.name] = mask
        self.project()

    def macs(self) -> int:
        """Counts the multiply-accumulates of the network as masked, for the example."""
        return stats.macs_with(
            self.dense_rows, {name: int(m.sum()) for name, m in self.masks.items()}
        )

    def check_ranks(self) -> None:
        """Makes sure that all ranks have the same masks.

        Raises:
            HetconvError: they have not.
        """
        if ranks.world_size() > 1:
            ranks.check_same_supports({name: support_of(mask) for name, mask in self.masks.items()})

    # Going back -------------------------------------------------------------------------------

    def snapshot(self, slot: str) -> None:
        """Keeps the weights and masks under a name; call it in a round."""
        self.forget(slot)
        for key, value in self.model.state_dict().items():
            self.tensors[f"{slot}/model/{key}"] = value.detach().clone()
        for key, value in self.masks.items():
            self.tensors[f"{slot}/mask/{key}"] = value.clone()

    def revert(self, slot: str) -> None:
        """Takes back the weights and masks of a snapshot; call it in a round."""
        model, masks = f"{slot}/model/", f"{slot}/mask/"
        self.model.load_state_dict(
            {k.removeprefix(model): v for k, v in self.tensors.items() if k.startswith(model)}
        )
        self.masks = {
            k.removeprefix(masks): v.clone() for k, v in self.tensors.items() if k.startswith(masks)
        }

    def forget(self, slot: str) -> None:
        """Drops a snapshot."""
        self.tensors = {k: v for k, v in self.tensors.items() if not k.startswith(f"{slot}/")}

    # State ------------------------------------------------------------------------------------

    def _save(self) -> None:
        self.check_ranks()
        if ranks.rank() == 0:
            training = None if self._optimizer is None else self._optimizer.state_dict()
            self._state.save(
                {
                    "journal": json.dumps(self._journal),
                    "model": self.model.state_dict(),
                    "masks": self.masks,
                    "tensors": self.tensors,
                    "optimizer": training,
                }
            )
        ranks.barrier()

    def _restore(self) -> None:
        assert self._saved is not None
        self.model.load_state_dict(self._saved["model"])
        self.masks = {k: v.to(self.device) for k, v in self._saved["masks"].items()}
        self.tensors = {k: v.to(self.device) for k, v in self._saved["tensors"].items()}
        self._optimizer_state = self._saved["optimizer"]
        self._saved = None


def support_of(mask: Tensor) -> Support:
    """Makes a Support of a mask [F, C, KH, KW] or [F, C]."""
    array = mask.detach().cpu().numpy()
    return Support.from_mask(array if array.ndim == 4 else array[:, :, None, None])


def _is_locked(run: Run, name: str) -> bool:
    """Whether the inputs of a kept layer cannot be dropped: the conversion would refuse it."""
    return not run.kept[name].startswith(CHOSEN)


# How the reasons begin that are a choice and no obstacle: such a layer may lose input channels.
CHOSEN = "left out: "
