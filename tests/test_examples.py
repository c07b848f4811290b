# SPDX-License-Identifier: Apache-2.0
"""The examples run, at their smallest."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from cifar import write_cifar
from external import package

import hetconv_kernels as hk

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
pytestmark = pytest.mark.one_thread


def run(name: str, monkeypatch: pytest.MonkeyPatch, *words: str) -> dict[str, Any]:
    """Runs an example as a command; returns what it has defined."""
    monkeypatch.setattr(sys, "argv", [name, *words])
    return runpy.run_path(str(EXAMPLES / name), run_name="__main__")


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


def test_transfer(monkeypatch, capsys) -> None:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    run("transfer.py", monkeypatch, "--train-epochs", "4", "--epochs", "1",
        "--transfer-epochs", "4")  # fmt: skip
    dense, small = capsys.readouterr().out.strip().splitlines()[-2:]
    right = [float(line.split()[1]) for line in (dense, small)]
    macs = [float(line.split()[-3]) for line in (dense, small)]
    assert (dense.split(":")[0], small.split(":")[0]) == ("dense", "compressed")
    assert min(right) > 0.4  # of five classes
    assert macs[1] < 0.8 * macs[0]


def test_segmentation(monkeypatch, tmp_path: Path, capsys) -> None:
    words = ["--train-epochs", "10", "--epochs", "4", "--batches", "6", "--width", "8",
             "--out", str(tmp_path)]  # fmt: skip
    run("segmentation.py", monkeypatch, *words)
    last = capsys.readouterr().out.strip().splitlines()[-1]
    before, after, optimised = (float(w.strip(",")) for w in last.split() if w[0].isdigit())
    assert min(before, after) > 0.6  # all pixels give a third
    assert optimised == pytest.approx(after, abs=0.01)
    assert hk.load(tmp_path / "unet.safetensors") is not None


@pytest.mark.slow  # torchvision, which `make external` installs
def test_detection(monkeypatch, tmp_path: Path, capsys) -> None:
    package("torchvision")
    words = ["--train-epochs", "2", "--epochs", "1", "--batches", "4", "--out", str(tmp_path)]
    made = run("detection.py", monkeypatch, *words)
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith("Found ")
    assert float(last.split()[-4]) > 1.5  # times fewer MACs
    loaded = hk.load(tmp_path / "detector.safetensors", into=made["detector"]())
    assert loaded.backbone.layers[0].out_channels < 16


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
