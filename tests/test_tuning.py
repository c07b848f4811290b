# SPDX-License-Identifier: Apache-2.0
"""Tuning is opt-in, keeps what it measured, and survives other writers and damaged files."""

from __future__ import annotations

import json
import time
from pathlib import Path

import fresh
import pytest
import torch

from hetconv_kernels import tuning
from hetconv_kernels.errors import ArgumentError

CPU = torch.device("cpu")


def test_what_was_put_is_there_for_the_next_process(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "tuning.json"
    tuning.Store(path).put("a", {"name": "x"})
    tuning.Store(path).put("b", [1, 2])
    again = tuning.Store(path)
    assert (again.get("a"), again.get("b"), again.get("c")) == ({"name": "x"}, [1, 2], None)
    assert sorted(p.name for p in path.parent.iterdir()) == ["tuning.json", "tuning.lock"]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"format": "another"}', '{"format": "hetconv_kernels.tuning/1"}', "\x00\xff"],
)
def test_a_damaged_file_counts_as_empty_and_is_replaced(tmp_path: Path, text: str) -> None:
    path = tmp_path / "tuning.json"
    path.write_text(text)
    store = tuning.Store(path)
    assert store.get("a") is None
    store.put("a", 1)
    assert tuning.Store(path).get("a") == 1


def test_a_folder_that_cannot_be_written_is_no_failure(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    store = tuning.Store(tmp_path / "file" / "tuning.json")
    store.put("a", 1)
    assert store.get("a") == 1


def test_concurrent_writers_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "tuning.json"
    code = """
import json, os, sys, time
from pathlib import Path
from hetconv_kernels.measure.tuning import Store
path, writers = Path(sys.argv[1]), []
for name in ("one", "two", "three"):
    writers.append(os.fork())
    if writers[-1] == 0:
        store = Store(path)
        for i in range(20):
            store.put(f"{name}-{i}", i)
        os._exit(0)
ended = 0
while ended < len(writers):
    if path.exists():  # whole at every moment
        json.loads(path.read_text())
    child, status = os.waitpid(-1, os.WNOHANG)
    assert status == 0
    ended += child != 0
    time.sleep(0.001)
"""
    done = fresh.python(code, str(path))
    assert done.returncode == 0, done.stderr
    assert len(json.loads(path.read_text())["entries"]) == 60


@pytest.fixture
def fake_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuning.Store:
    """Lets candidates on the CPU be tuned into a store of the test's own."""
    store = tuning.Store(tmp_path / "tuning.json")
    monkeypatch.setattr(tuning, "store", lambda _: store)
    monkeypatch.setattr(tuning, "is_tuning", lambda _: tuning._enabled)
    return store


def test_nothing_is_measured_unless_asked_for(fake_gpu: tuning.Store) -> None:
    calls: list[str] = []
    candidates = {name: lambda name=name: calls.append(name) for name in ("a", "b")}
    assert tuning.pick("key", candidates, CPU) is None
    assert calls == []


def test_the_fastest_is_picked_once_and_kept(fake_gpu: tuning.Store) -> None:
    calls: list[str] = []

    def candidate(name: str, seconds: float) -> None:
        calls.append(name)
        time.sleep(seconds)

    candidates = {
        "slow": lambda: candidate("slow", 0.004),
        "fast": lambda: candidate("fast", 0.001),
    }
    with tuning.tune():
        assert tuning.pick("key", candidates, CPU) == "fast"
        assert {"slow", "fast"} == set(calls)
        calls.clear()
        assert tuning.pick("key", candidates, CPU) == "fast"
    assert tuning.pick("key", candidates, CPU) == "fast"
    assert calls == []
    # A candidate that this version does not have any more is measured anew, or not at all.
    assert tuning.pick("key", {"other": calls.clear}, CPU) is None


def test_a_candidate_that_does_not_run_is_left_out(fake_gpu: tuning.Store) -> None:
    def too_large() -> None:
        raise RuntimeError("out of resources: shared memory")

    with tuning.tune():
        with pytest.warns(RuntimeWarning, match="leaves large out: out of resources"):
            assert tuning.pick("a", {"large": too_large, "small": lambda: None}, CPU) == "small"
        with pytest.warns(RuntimeWarning, match="leaves large out"):
            assert tuning.pick("b", {"large": too_large}, CPU) is None


def test_tune_is_a_switch_with_a_scope() -> None:
    assert not tuning._enabled
    with tuning.tune():
        assert tuning._enabled
        with tuning.tune(False):
            assert not tuning._enabled
        assert not tuning.is_tuning(CPU)
    assert not tuning._enabled


def test_a_capture_refuses_tuning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(ArgumentError, match="CUDA-graph capture"), tuning.tune():
        pass
    monkeypatch.setattr(tuning, "_enabled", True)
    assert not tuning.is_tuning(torch.device("cuda", 0))


def test_the_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HETCONV_CACHE", "somewhere")
    assert tuning.folder() == Path("somewhere")
    monkeypatch.delenv("HETCONV_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "elsewhere")
    assert tuning.folder() == Path("elsewhere/hetconv_kernels")
