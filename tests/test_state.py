# SPDX-License-Identifier: Apache-2.0
"""The state of a compression: killed anywhere it continues, and nothing else is read from it."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fresh
import pytest
import torch
from compressing import (
    Columns,
    Killed,
    assert_same_network,
    batches,
    check_kills,
    killed_at,
    run,
    tiny,
)
from torch import nn

from hetconv_kernels import methods
from hetconv_kernels.compression import Run
from hetconv_kernels.compression.identity import digest, weights_of
from hetconv_kernels.errors import ArgumentError, HetconvError


@pytest.mark.parametrize("seed", range(6))
def test_killed_twice_and_resumed_is_bit_equal(seed: int, tmp_path: Path) -> None:
    check_kills(Columns(epochs=4), tmp_path, seed)


def test_killed_within_an_epoch_of_adam(tmp_path: Path) -> None:
    calls = 0

    def train_step(model: nn.Module, batch: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 11:  # the third batch of the third epoch
            raise Killed
        return nn.functional.cross_entropy(model(batch[0] + torch.randn(1)), batch[1])

    options = {
        "train_step": train_step,
        "optimizer": lambda p: torch.optim.Adam(p, 0.01),
        "state": tmp_path / "state.pt",
    }
    with pytest.raises(Killed):
        run(Columns(epochs=4), **options)
    resumed = run(Columns(epochs=4), **options)
    assert calls == 11 + 8  # two of four epochs were kept
    calls = 100
    whole = run(Columns(epochs=4), **(options | {"state": None}))
    assert_same_network(resumed.model, whole.model)


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_training_that_diverges_stops_before_its_epoch_is_kept(
    loss: float, tmp_path: Path
) -> None:
    added = [0.0, loss]  # the second epoch diverges

    def train_step(model: nn.Module, batch: Any) -> torch.Tensor:
        if train_step.batches == 4:
            added.pop(0)
        train_step.batches += 1
        return nn.functional.cross_entropy(model(batch[0]), batch[1]) + added[0]

    train_step.batches = 0
    options = {"train_step": train_step, "state": tmp_path / "state.pt"}
    expected = r"mean loss of train, epoch 2/2: received (nan|inf).*smaller learning rate"
    with pytest.raises(HetconvError, match=expected):
        run(Columns(), **options)
    kept = torch.load(options["state"], weights_only=True)
    assert all(torch.isfinite(v).all() for v in _tensors(kept))
    added[:] = [0.0, 0.0]
    assert len(run(Columns(), **options).history) == len(run(Columns()).history)
    assert train_step.batches == 4 + 4 + 4  # the first epoch was kept


def test_a_finished_run_is_not_done_again(tmp_path: Path) -> None:
    first = run(Columns(), state=tmp_path / "state.pt")

    def never(model: nn.Module, batch: Any) -> torch.Tensor:
        raise AssertionError("trained again")

    again = run(Columns(), state=tmp_path / "state.pt", train_step=never)
    assert_same_network(first.model, again.model)


_SCRIPT = """
import json, os, signal, sys
sys.path.insert(0, sys.argv[1])
import torch
from compressing import run
from hetconv_kernels import methods
from hetconv_kernels.compression.identity import digest, weights_of

_, _, state, name, settings, die_at = sys.argv

def train_step(model, batch):
    train_step.calls += 1
    if train_step.calls == int(die_at):
        os.kill(os.getpid(), signal.SIGKILL)
    return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])

train_step.calls = 0
method = getattr(methods, name)(**json.loads(settings))
report = run(method, state=state, train_step=train_step)
print(json.dumps([report.history, digest(weights_of(report.model)), train_step.calls]))
"""
_SPEND: dict[str, Any] = {"tolerance": 1.0, "epochs": 1}
# The settings of each method, and in which of its training steps it dies: after it has saved.
_KILLED: dict[str, tuple[dict[str, Any], int]] = {
    "Het": ({"p": 2, "epochs": 3}, 7),
    "SelfGrouping": (
        {"target": 0.3, "clusters": 2, "schedule": "LG", "local_epochs": 1, "epochs": 2}, 7,
    ),
    "WeakSubnetwork": ({"percentile": 0.6, "epochs": 3}, 7),
    "FilterCorrelation": (
        _SPEND | {"fraction": 0.2, "pair_epochs": 1, "tune_epochs": 1, "episodes": 2}, 11,
    ),
    "PlayAndPrune": (
        _SPEND | {"prune_epochs": 2, "recover_epochs": 1, "rounds": 2, "threshold": 0.2}, 11,
    ),
    "Stability": (_SPEND | {"fraction": 0.2, "probe_epochs": 1, "tune_epochs": 1, "steps": 2}, 11),
    "FrequencyPruning": ({"search_epochs": 3, "epochs": 2, "stem": True}, 7),
    # The sensitivity of four layers is measured first, in 4·41 calls for each of the rates.
    "ADMM": ({"rates": [0.5, 0.8], "admm_epochs": 1, "updates": 2, "retrain_epochs": 1}, 171),
}  # fmt: skip


@pytest.mark.parametrize("name", _KILLED)
def test_a_process_that_is_really_killed_continues(name: str, tmp_path: Path) -> None:
    settings, step = _KILLED[name]

    def start(die_at: int) -> subprocess.CompletedProcess[str]:
        here, state = str(Path(__file__).resolve().parent), str(tmp_path / "state.pt")
        return fresh.python(
            _SCRIPT, here, state, name, json.dumps(settings), str(die_at),
            imported=["torch._dynamo"],  # which fake tensors import, slowly
        )  # fmt: skip

    def train_step(model: nn.Module, batch: Any) -> torch.Tensor:
        train_step.calls += 1
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    assert start(step).returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]
    resumed = start(0)
    assert resumed.returncode == 0, resumed.stderr
    train_step.calls = 0
    whole = run(getattr(methods, name)(**settings), train_step=train_step)
    history, weights, calls = json.loads(resumed.stdout)
    assert history == list(whole.history)
    assert weights == digest(weights_of(whole.model))
    assert calls < train_step.calls  # what was saved is not done again


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"method": Columns(keep=2, epochs=1)}, "method.keep"),
        ({"seed": 1}, "seed"),
        ({"model": nn.Sequential(nn.Conv2d(5, 7, 3))}, "layers.0"),
        ({"model": tiny(seed=1)}, "weights at the start"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_state_of_another_run_is_refused(
    change: dict[str, Any], what: str, tmp_path: Path
) -> None:
    run(Columns(epochs=1), state=tmp_path / "state.pt")
    arguments = {"method": Columns(epochs=1), "state": tmp_path / "state.pt"} | change
    with pytest.raises(ArgumentError, match=f"^{what}.* of the state"):
        run(**arguments)


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04 cut"])
def test_a_damaged_state_is_one_sentence(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "state.pt").write_bytes(content)
    with pytest.raises(HetconvError, match="cannot be read"):
        run(Columns(), state=tmp_path / "state.pt")


def test_a_truncated_state_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    run(Columns(epochs=1), state=path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(HetconvError, match="cannot be read"):
        run(Columns(epochs=1), state=path)


def test_a_state_holds_no_code(tmp_path: Path) -> None:
    run(Columns(epochs=1), state=tmp_path / "state.pt")
    content = torch.load(tmp_path / "state.pt", weights_only=True)
    assert json.loads(content["journal"])[1]["what"] == "drop"


def test_a_state_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(HetconvError, match="cannot be written"):
        run(Columns(epochs=1), state=tmp_path / "file" / "state.pt")


def test_a_journal_of_other_rounds_is_refused(tmp_path: Path) -> None:
    class Renamed(Columns):
        def run(self, run: Run) -> None:
            run.round("another", lambda: self._drop(run))

    Renamed.__name__ = "Columns"
    with pytest.raises(Killed), killed_at(2, written=True):
        run(Columns(), state=tmp_path / "state.pt")
    with pytest.raises(HetconvError, match="round 1 of the state"):
        run(Renamed(), state=tmp_path / "state.pt")


def sgd(rate: float, momentum: float = 0.0) -> Any:
    return lambda parameters: torch.optim.SGD(parameters, rate, momentum=momentum)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"optimizer": sgd(0.02)}, r"training\.optimizer\.groups\.0\.lr"),
        ({"optimizer": sgd(0.01, 0.5)}, r"training\.optimizer\.groups\.0\.momentum"),
        ({"optimizer": torch.optim.AdamW}, r"training\.optimizer"),
        ({"data": [(torch.ones(4, 5, 6, 6), torch.tensor([0, 1, 2, 0]))] * 2}, r"training\.data"),
        ({"data": lambda epoch: batches(epoch)[:1] * 2}, None),  # its code is not looked into
        ({"data": lambda epoch: [(x[:5], y[:5]) for x, y in batches()]}, r"training\.data"),
        ({"eval_data": batches()[:1]}, r"training\.eval_data"),
        ({"example": torch.randn(2, 5, 6, 6)}, r"training\.example\.shape\.0"),
        ({"key": {"temperature": 2.0}}, r"key\.temperature"),
        ({"key": {"teacher": torch.ones(3)}}, r"key\.teacher"),
    ],
    ids=["rate", "momentum", "optimizer", "data", "code", "batch", "eval", "example", "key",
         "tensor"],
)  # fmt: skip
def test_a_state_is_refused_when_anything_that_decides_the_result_changed(
    change: dict[str, Any], what: str | None, tmp_path: Path
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        same: dict[str, Any] = {"optimizer": sgd(0.01), "state": tmp_path / "state.pt"}
        run(Columns(epochs=1), **same)
        if what is None:
            run(Columns(epochs=1), **(same | change))
            return
        with pytest.raises(ArgumentError, match=f"^{what}.* of the state"):
            run(Columns(epochs=1), **(same | change))


def test_the_state_of_an_earlier_version_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    run(Columns(epochs=1), state=path)
    content = torch.load(path, weights_only=True)
    torch.save(content | {"format": "hetconv_kernels.compress/1"}, path)
    with pytest.raises(HetconvError, match=r"format of the state .*received hetconv_kernels\.com"):
        run(Columns(epochs=1), state=path)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Goes through the floating-point tensors of nested containers."""
    if isinstance(value, torch.Tensor):
        yield from [value] if value.is_floating_point() else []
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)
