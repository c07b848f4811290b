# SPDX-License-Identifier: Apache-2.0
"""The command `hetconv profile`, and the lines for Nsight Compute that it prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from profiled import ROOFS

import hetconv_kernels as hk
from hetconv_kernels import cli
from hetconv_kernels.measure import profiling

Capture = pytest.CaptureFixture[str]
SMALL = ["layer", "--channels", "8", "--size", "5x6", "--rounds", "5", "--seconds", "0.1"]


@pytest.fixture
def quick_roofs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "hetconv_kernels.measure.roofline.measure_roofs", lambda *_: ROOFS["float32"]
    )


@pytest.mark.usefixtures("quick_roofs")
def test_a_layer_from_the_command_line(tmp_path: Path, capsys: Capture) -> None:
    trace = tmp_path / "t.json"
    assert cli.main(["profile", *SMALL, "--backend", "vendor", "--trace", str(trace)]) == 0
    text = capsys.readouterr().out
    assert "HetConv2d on (1, 8, 5, 6)" in text
    assert "forced" in text
    assert trace.is_file()
    assert cli.main(["profile", *SMALL, "--dense", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["layers"]
    assert row["speedup"] is not None


@pytest.mark.usefixtures("quick_roofs")
def test_a_network_and_a_saved_file(tmp_path: Path, capsys: Capture) -> None:
    quick = ["--rounds", "5", "--seconds", "0.1", "--json"]
    assert cli.main(["profile", "digits_net", "--het", "2", "--optimize", *quick]) == 0
    data = json.loads(capsys.readouterr().out)
    assert any(la["macs"] < la["dense_macs"] for la in data["layers"])
    pytest.importorskip("safetensors", reason="io needs the safetensors extra")
    hk.save(hk.models.digits_net().eval(), tmp_path / "net.safetensors")
    path = str(tmp_path / "net.safetensors")
    assert cli.main(["profile", path, "--size", "8", *quick]) == 0
    assert "(1, 1, 8, 8)" in json.loads(capsys.readouterr().out)["input"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["resnet19"], "received 'resnet19'"),
        (["layer", "--het", "4"], "--kind het"),
        (["gone.safetensors"], "gone.safetensors is not there"),
        (["resnet20", "--device", "moon"], "cannot be used"),
        (["resnet20", "--backend", "fast"], "unknown"),
        ([*SMALL, "--proton", "p"], "expected a CUDA device"),
    ],
)
@pytest.mark.usefixtures("quick_roofs")
def test_the_command_refuses_in_one_sentence(
    arguments: list[str], said: str, capsys: Capture
) -> None:
    assert cli.main(["profile", *arguments]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("hetconv: ")
    assert said in captured.err
    assert "Traceback" not in captured.err


def test_ncu_lines_describe_the_same_layer(capsys: Capture) -> None:
    options = ["--kind", "mask", "--channels", "8", "--size", "5x6", "--backend", "triton"]
    assert cli.main(["profile", "layer", *options, "--ncu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.startswith("#") for line in lines] == [True, False, True, False]
    for line in lines[1::2]:
        for part in ("--profile-from-start off", "--kernel-name regex:fprop_kernel", "--size 5x6",
                     "--device cuda", "--kind mask", "--passes 1"):  # fmt: skip
            assert part in line
    assert cli.main(["profile", "resnet20", "--het", "4", "--ncu"]) == 0
    assert "--kind" not in capsys.readouterr().out


def test_passes_only_runs(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    seen: list[int] = []
    real = hk.nn.HetConv2d.forward

    def counted(self: Any, x: torch.Tensor) -> torch.Tensor:
        seen.append(x.shape[1])
        return real(self, x)

    monkeypatch.setattr(hk.nn.HetConv2d, "forward", counted)
    assert cli.main(["profile", *SMALL, "--passes", "3"]) == 0
    assert seen == [8] * 5
    assert capsys.readouterr().out == ""


def test_the_command_compiles(tmp_path: Path, capsys: Capture) -> None:
    words = ["profile", "digits_net", "--het", "2", "--rounds", "5", "--seconds", "0.1"]
    out = tmp_path / "t.html"
    assert cli.main([*words, "--compile", "--timeline", str(out)]) == 0
    assert ", compiled on (" in capsys.readouterr().out
    assert out.is_file()
    assert cli.main(["profile", "digits_net", "--compile", "--ncu"]) == 0
    assert "--compile --passes 1" in capsys.readouterr().out


def test_ncu_commands_name_the_kernel_when_there_is_one() -> None:
    one = profiling.ncu_commands(["layer", "--size", "5x6"], ["triton", "torch"])
    assert all("--kernel-name regex:fprop_kernel" in line for line in one)
    assert all(line.endswith("profile layer --size 5x6 --passes 1") for line in one)
    assert not any("kernel-name" in line for line in profiling.ncu_commands([], ["vendor"]))
    assert not any("kernel-name" in line for line in profiling.ncu_commands([], []))
