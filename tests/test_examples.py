# SPDX-License-Identifier: Apache-2.0
"""The examples run, at their smallest."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from cifar import write_cifar

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(name: str, monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", [name, *words])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_digits(monkeypatch, tmp_path: Path, capsys) -> None:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    run("digits.py", monkeypatch, "--epochs", "1", "--train-epochs", "2",
        "--folder", str(tmp_path))  # fmt: skip
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith("runs of 8 channels, groups of 16 filters")


def test_cifar_on_a_small_set_in_the_original_format(monkeypatch, tmp_path: Path, capsys) -> None:
    write_cifar(tmp_path, {"data_batch_1.bin": 10, "data_batch_2.bin": 6, "test_batch.bin": 4})
    words = [str(tmp_path), "--train-epochs", "1", "--epochs", "1", "--validation", "4",
             "--batch", "6", "--out", str(tmp_path / "out")]  # fmt: skip
    run("cifar.py", monkeypatch, *words)
    out = capsys.readouterr().out
    assert "HetConv" in out
    assert "the 4 test images" in out
    run("cifar.py", monkeypatch, *words)  # the dense weights and the state are there
    assert "epoch" not in capsys.readouterr().err


@pytest.mark.slow  # three interpreters; test_ranks.py has two processes in every run
@pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo"
)
def test_ddp_under_torchrun(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(EXAMPLES / "train_ddp.py"), "--epochs", "1", "--folder", str(tmp_path)],
        capture_output=True, text=True, check=False, timeout=300, cwd=EXAMPLES.parent,
        env={**__import__("os").environ, "PYTHONPATH": str(EXAMPLES.parent),
             "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("HetConv: live weights") == 1
    assert (tmp_path / "state.pt").exists()
