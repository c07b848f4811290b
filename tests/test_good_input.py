# SPDX-License-Identifier: Apache-2.0
"""Good command lines: a user's own network and data, every seed, and the list of settings."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

import hetconv_kernels as hk
from hetconv_kernels import cli

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")

FAST = "--train-epochs 0 --no-measure --set epochs=0"


@pytest.fixture
def user_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's module with a small network and data, and the folder that it is in."""
    (tmp_path / "good_user_code.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "from torch.utils.data import DataLoader, TensorDataset\n"
        "def net():\n"
        "    return nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(),"
        " nn.Linear(32, 3))\n"
        "class Made:\n"
        "    @staticmethod\n"
        "    def pair(): return net(), torch.randn(5, 2, 6, 6)\n"
        "def data():\n"
        "    x = torch.randn(12, 2, 6, 6, generator=torch.Generator().manual_seed(0))\n"
        "    y = torch.arange(12) % 3\n"
        "    return tuple(DataLoader(TensorDataset(x, y), batch_size=4) for _ in range(3))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.mark.usefixtures("user_code")
def test_a_user_s_network_and_data_are_compressed_and_profiled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["compress", "het", "--model", "good_user_code:net", "--data", "good_user_code:data",
             "--train-epochs", "1", "--set", "epochs=1", "--set", "p=2", "--set", "stem=true",
             "--no-measure"]  # fmt: skip
    assert cli.main(words) == 0
    out = tmp_path / "outputs" / "compress"
    record = json.loads((out / "het.json").read_text())
    assert record["network"] == "good_user_code:net"
    assert record["batch"] == [4, 2, 6, 6]
    assert record["macs"][1] < record["macs"][0]
    assert (out / "good_user_code.net.state.pt").exists()
    first = capsys.readouterr().out
    assert cli.main(words) == 0  # both states are found again
    assert capsys.readouterr().out == first
    profile = ["profile", "good_user_code:Made.pair", "--rounds", "5", "--seconds", "0.1", "--json"]
    assert cli.main(profile) == 0
    assert json.loads(capsys.readouterr().out)["input"].startswith("(5, 2, 6, 6)")
    assert cli.main([*profile[:1], "good_user_code:net", "--size", "6", *profile[2:]]) == 0
    assert json.loads(capsys.readouterr().out)["input"].startswith("(1, 2, 6, 6)")
    assert cli.main(["profile", "good_user_code:Made.pair", "--passes", "1", "--het", "2"]) == 0


SEEDS = [str(2**63 - 1), str(2**32 + 1)]


@pytest.mark.parametrize("seed", SEEDS)
def test_every_seed_of_the_command_line_works(seed: str, tmp_path: Path) -> None:
    """Also for the shuffling of data and for k-means, which take smaller ones."""
    torch.save(hk.models.digits_net().state_dict(), tmp_path / "net.pt")
    words = ["compress", "self-grouping", "--weights", str(tmp_path / "net.pt"), "--seed", seed,
             *FAST.split(), "--set", "step=0.7", "--out", str(tmp_path)]  # fmt: skip
    assert cli.main(words) == 0


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.usefixtures("user_code")
def test_every_seed_works_where_masks_are_drawn(seed: str, tmp_path: Path) -> None:
    words = ["compress", "frequency", "--model", "good_user_code:net", "--data",
             "good_user_code:data", "--seed", seed, *FAST.split(), "--set", "search_epochs=1",
             "--set", "stem=true", "--out", str(tmp_path)]  # fmt: skip
    assert cli.main(words) == 0


def test_settings_are_plain_text(capsys: pytest.CaptureFixture[str]) -> None:
    from hetconv_kernels.compression.command import METHODS

    for method, kind in METHODS.items():
        assert cli.main(["compress", method, "--settings"]) == 0
        text = capsys.readouterr().out
        assert "`" not in text
        assert "Attributes" not in text
        assert "Raises" not in text
        for name in (field.name for field in dataclasses.fields(kind)):
            (line,) = [row for row in text.splitlines() if row.startswith(f"  {name}=")]
            assert len(line.split("  ")) > 2, line
