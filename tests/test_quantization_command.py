# SPDX-License-Identifier: Apache-2.0
"""``hetconv quantize``: from a trained network, or a compressed one in a file, to 8 bits."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import hetconv_kernels as hk
from hetconv_kernels.cli import main
from hetconv_kernels.models import digits_net
from hetconv_kernels.nn import QuantizedConv2d

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
pytest.importorskip("safetensors", reason="the safetensors extra is not installed")


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    torch.save(digits_net().state_dict(), tmp_path / "net.pt")
    return tmp_path / "net.pt"


def test_a_network_is_quantised_judged_and_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["quantize", "--train-epochs", "1", "--images", "32", "--observer", "mse",
             "--qat-epochs", "1", "--no-measure", "--out", str(tmp_path / "out")]  # fmt: skip
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "features.0" in printed
    record = json.loads((tmp_path / "out" / "quantize.json").read_text())
    assert list(record["test_accuracy"]) == ["float32", "calibrated", "trained"]
    assert record["observer"] == "mse"
    before, calibrated, trained = record["test_accuracy"].values()
    assert before > 0.4, "one epoch teaches it something"
    assert calibrated > before - 0.05
    assert trained > before - 0.05
    loaded = hk.load(tmp_path / "out" / "network.safetensors")
    assert sum(isinstance(m, QuantizedConv2d) for m in loaded.modules()) == 4


def test_a_compressed_network_comes_from_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    sparse = hk.convert(digits_net(), hk.rules.het(p=4)).model.eval()
    hk.save(sparse, tmp_path / "sparse.safetensors")
    words = ["quantize", str(tmp_path / "sparse.safetensors"), "--images", "16", "--no-measure",
             "--skip", "classifier.3", "--out", str(tmp_path)]  # fmt: skip
    assert main(words) == 0
    assert "it is in skip" in capsys.readouterr().out
    loaded = hk.load(tmp_path / "network.safetensors")
    assert loaded.get_submodule("features.3").support.kind.startswith("het")


@pytest.mark.parametrize("qat", ["0", "1"])
def test_a_user_s_network_and_data_are_quantised(
    qat: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own_quantised_code.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "from torch.utils.data import DataLoader, TensorDataset\n"
        "def net():\n"
        "    return nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 3))\n"
        "def data():\n"
        "    x = torch.randn(12, 2, 6, 6, generator=torch.Generator().manual_seed(0))\n"
        "    y = torch.arange(12) % 3\n"
        "    return tuple(DataLoader(TensorDataset(x, y), batch_size=4) for _ in range(3))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    words = ["quantize", "--model", "own_quantised_code:net", "--data", "own_quantised_code:data",
             "--train-epochs", "1", "--images", "6", "--qat-epochs", qat,
             "--no-measure"]  # fmt: skip
    assert main(words) == 0
    assert "the test data that nothing above has seen" in capsys.readouterr().out
    record = json.loads((tmp_path / "outputs" / "quantize" / "quantize.json").read_text())
    assert record["images"] == 6
    assert len(record["test_accuracy"]) == 2 + int(qat)
    loaded = hk.load(tmp_path / "outputs" / "quantize" / "network.safetensors")
    assert loaded(torch.randn(2, 2, 6, 6)).shape == (2, 3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere.safetensors"], "one network, not two"),
        (["--data", "nowhere"], "no such folder"),
        (["--percentile", "20", "--observer", "percentile"], "percentile"),
        (["--skip", "nothing"], "names of layers"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_mistakes_are_one_sentence(
    words: list[str], message: str, weights: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert main(["quantize", "--weights", str(weights), "--out", str(tmp_path), *words]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
