# SPDX-License-Identifier: Apache-2.0
"""What the tests of compressors share: a tiny network, data for it, and a way to kill a run."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import hetconv_kernels as hk
from hetconv_kernels.compression import Method, Run
from hetconv_kernels.compression.state import StateFile


class Killed(BaseException):
    """Stands for a SIGKILL: no handler of the package may catch it."""


@dataclass(frozen=True)
class Columns(Method):
    """Drops all but the first channels of every layer: simple enough to know the result."""

    title: ClassVar[str] = "columns"
    keep: int = 3
    epochs: int = 2

    def run(self, run: Run) -> None:
        run.round("drop", lambda: self._drop(run))
        run.train("train", self.epochs)

    def _drop(self, run: Run) -> int:
        for name, layer in run.layers.items():
            mask = torch.zeros_like(layer.weight, dtype=torch.bool)
            mask[:, : self.keep] = True
            run.choose(name, mask)
        return run.macs()


def tiny(seed: int = 0) -> nn.Sequential:
    """Builds a network of two convolutions (3 -> 6 -> 8) and two linear layers on 6×6 images."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(5, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.MaxPool2d(3),
            nn.Flatten(),
            nn.Linear(8 * 4, 6),
            nn.ReLU(),
            nn.Linear(6, 3),
        )


def batches(epoch: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Draws four batches of eight images whose label is the brightest of three channels."""
    x = torch.randn(32, 5, 6, 6, generator=torch.Generator().manual_seed(1))
    label = x[:, :3].mean((2, 3)).argmax(1)
    # From the global generator, which hk.compress seeds.
    order = torch.randperm(32)
    return [(x[i], label[i]) for i in order.split(8)]


def quietly() -> dict[str, Any]:
    """Returns what is given beside the training: what judges, nothing shown, nothing timed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)  # a state is of one set of data, also in another process
        judged, example = batches(), torch.randn(4, 5, 6, 6)
    return {
        "eval_data": judged,
        "example": example,
        "leave_plain": False,  # a tiny network has no layer for which a Support pays
        "progress": False,
        "measure": False,
    }


def run(method: Any, model: nn.Module | None = None, **keywords: Any) -> Any:
    """Compresses the tiny network, or another one, quietly and without timing."""
    arguments = {"data": batches, **quietly()}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a network only loses by more
    try:
        return hk.compress(tiny() if model is None else model, method, **(arguments | keywords))
    finally:
        torch.set_num_threads(threads)


@contextmanager
def killed_at(save: int, written: bool) -> Iterator[None]:
    """Kills a run at its n-th save, before or after the file is written."""
    real, count = StateFile.save, 0

    def dying(self: StateFile, content: dict[str, Any]) -> None:
        nonlocal count
        count += 1
        if count < save:
            real(self, content)
            return
        if written:
            real(self, content)
        raise Killed

    StateFile.save = dying  # type: ignore[method-assign]
    try:
        yield
    finally:
        StateFile.save = real  # type: ignore[method-assign]


def assert_same_network(one: nn.Module, two: nn.Module) -> None:
    """Compares weights, buffers and Supports bit by bit."""
    first, second = one.state_dict(), two.state_dict()
    assert first.keys() == second.keys()
    for key, value in first.items():
        same = (
            torch.equal(value, second[key]) if isinstance(value, Tensor) else value == second[key]
        )
        assert same, key


def check_kills(
    method: Any, tmp_path: Any, seed: int, make: Callable[[], nn.Module] = tiny, **keywords: Any
) -> None:
    """Kills a run at two random rounds one after the other; the result must not change."""
    whole = run(method, make(), **keywords)
    rounds = len(whole.history)
    draw, state, died = random.Random(seed), tmp_path / "state.pt", 0
    first = draw.randint(1, rounds)
    for save in (first, draw.randint(1, max(rounds - first, 1))):
        try:
            with killed_at(save, written=draw.random() < 0.5):
                run(method, make(), state=state, **keywords)
        except Killed:
            died += 1
    assert died >= 1
    resumed = run(method, make(), state=state, **keywords)
    assert resumed.history == whole.history
    assert resumed.accuracy == whole.accuracy
    assert_same_network(resumed.model, whole.model)
