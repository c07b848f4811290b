# SPDX-License-Identifier: Apache-2.0
"""The Lightning callback: a fit in rounds, whose result is that of `hk.compress`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fresh
import pytest
import torch
import torch.nn.functional as F_
from compressing import Columns, assert_same_network, batches, quietly, run, tiny
from torch import nn

from hetconv_kernels.compression import FilterCorrelation, FrequencyPruning, SelfGrouping
from hetconv_kernels.compression import lightning as callbacks
from hetconv_kernels.errors import ArgumentError, HetconvError

pl = pytest.importorskip("lightning.pytorch", reason="the lightning extra is not installed")

METHODS = {
    "self-grouping": SelfGrouping(
        target=0.4, step=0.2, clusters=2, schedule="LG", local_epochs=1, epochs=2
    ),
    "correlation": FilterCorrelation(
        fraction=0.2, pair_epochs=1, tune_epochs=1, tolerance=1.0, episodes=2, epochs=1
    ),
    "frequency": FrequencyPruning(search_epochs=2, epochs=1),
}


pytestmark = pytest.mark.one_thread


@pytest.fixture(autouse=True)
def _quietly() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on workers and logging
        yield


class Batches:
    """A loader that draws its batches anew at each epoch, as `compressing.batches` does."""

    def __iter__(self) -> Iterator[Any]:
        yield from batches()  # drawn when the first is wanted: Lightning makes more iterators

    def __len__(self) -> int:
        return 4


class Module(pl.LightningModule):
    def __init__(self, scheduled: bool = False) -> None:
        super().__init__()
        self.model, self.scheduled = tiny(), scheduled
        self.rates: list[float] = []

    def training_step(self, batch: Any, number: int) -> torch.Tensor:
        x, label = batch
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        return F_.cross_entropy(self.model(x), label)

    def configure_optimizers(self) -> Any:
        sgd = torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
        if not self.scheduled:
            return sgd
        return [sgd], [torch.optim.lr_scheduler.ConstantLR(sgd, factor=1.0)]


def trainer(folder: Path, *callback: Any, epochs: int = 50, **settings: Any) -> Any:
    return pl.Trainer(
        max_epochs=epochs, callbacks=list(callback), accelerator="cpu", devices=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, **settings,
    )  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_a_fit_gives_what_compress_gives_bit_by_bit(name: str, tmp_path: Path) -> None:
    expected = run(METHODS[name])
    module = Module()
    callback = callbacks.Compression(METHODS[name], **quietly())
    fit = trainer(tmp_path, callback)
    fit.fit(module, Batches())
    assert_same_network(callback.report.model, expected.model)
    assert callback.report.history == expected.history
    trained = sum(
        isinstance(entry["result"], dict) and "loss" in entry["result"]
        for entry in expected.history
    )
    assert fit.current_epoch == trained < 50, "the fit ends when the method is done"
    assert module.model is callback.report.model


def test_a_scheduler_of_the_modules_own_keeps_the_learning_rate(tmp_path: Path) -> None:
    rates = {}
    for scheduled in (False, True):
        module = Module(scheduled)
        callback = callbacks.Compression(Columns(epochs=3), **quietly())
        trainer(tmp_path, callback).fit(module, Batches())
        rates[scheduled] = sorted(set(module.rates), reverse=True)
    assert rates[False] == pytest.approx([0.01, 0.001, 0.0001])
    assert rates[True] == [0.01]


def test_accumulated_gradients_make_a_step_of_several_batches(tmp_path: Path) -> None:
    module = Module()
    callback = callbacks.Compression(Columns(epochs=2), **quietly())
    fit = trainer(tmp_path, callback, accumulate_grad_batches=2)
    fit.fit(module, Batches())
    assert fit.global_step == 2 * 2
    assert callback.report.live[1] < callback.report.live[0]


def test_a_fit_that_ends_early_has_no_report_and_leaves_no_thread(tmp_path: Path) -> None:
    module = Module()
    callback = callbacks.Compression(Columns(epochs=4), **quietly())
    trainer(tmp_path, callback, epochs=2).fit(module, Batches())
    with pytest.raises(HetconvError, match="the method asks for more epochs"):
        callback.report  # noqa: B018
    assert not callback.rounds._thread.is_alive()
    with pytest.raises(HetconvError, match="in no fit"):
        callbacks.Compression(Columns(), **quietly()).report  # noqa: B018


class Breaks(Module):
    def training_step(self, batch: Any, number: int) -> torch.Tensor:
        raise KeyError("mine")


def test_a_fit_that_breaks_ends_the_method(tmp_path: Path) -> None:
    callback = callbacks.Compression(Columns(), **quietly())
    with pytest.raises(KeyError, match="mine"):
        trainer(tmp_path, callback).fit(Breaks(), Batches())
    assert not callback.rounds._thread.is_alive()


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    callback = callbacks.Compression(Columns(), network="body", **quietly())
    with pytest.raises(ArgumentError, match="attribute 'body' of Module: received NoneType"):
        trainer(tmp_path, callback).fit(Module(), Batches())
    first = trainer(tmp_path, epochs=1)
    first.fit(Module(), Batches())
    first.save_checkpoint(tmp_path / "x.ckpt")
    fit = trainer(tmp_path, callbacks.Compression(Columns(), **quietly()))
    with pytest.raises(ArgumentError, match="ckpt_path of a fit under compression"):
        fit.fit(Module(), Batches(), ckpt_path=str(tmp_path / "x.ckpt"))


def test_other_stages_are_left_alone(tmp_path: Path) -> None:
    class Tested(Module):
        def test_step(self, batch: Any, number: int) -> None:
            self.model(batch[0])

    module, callback = Tested(), callbacks.Compression(Columns(), **quietly())
    network: nn.Module = module.model
    trainer(tmp_path, callback).test(module, Batches(), verbose=False)
    assert module.model is network
    assert callback.rounds is None


def test_without_the_library_a_sentence_says_how_to_get_it() -> None:
    code = (
        "import sys; sys.modules['lightning'] = None\n"
        "from hetconv_kernels.compression import lightning\n"
        "try: lightning.Compression\n"
        "except lightning.HetconvError as error: print(error)"
    )
    done = fresh.python(code)
    assert done.returncode == 0, done.stderr
    assert "pip install 'hetconv-kernels[lightning]'" in done.stdout
