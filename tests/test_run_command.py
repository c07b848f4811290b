# SPDX-License-Identifier: Apache-2.0
"""``hetconv run`` and ``hetconv optimize``: from a network to a file and a measured number."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import hetconv_kernels as hk
from hetconv_kernels import cli
from hetconv_kernels.errors import ArgumentError, InputTypeError
from hetconv_kernels.measure.profiling.latency import latency
from hetconv_kernels.nn.fused import FusedConv2d

Capture = pytest.CaptureFixture[str]


def test_an_optimized_network_is_saved_and_runs(tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "sub" / "small.safetensors"
    assert cli.main(["optimize", "digits_net", "--het", "2", "-o", str(out)]) == 0
    assert f"hetconv run {out}" in capsys.readouterr().out
    loaded = hk.load(out)
    assert any(isinstance(module, FusedConv2d) for module in loaded.modules())
    command = ["run", str(out), "--size", "8", "--batch", "3", "--seconds", "0.05", "--json"]
    assert cli.main([*command, "--threads", "1", "--threads", "2"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["threads"], row["batch"]) for row in rows] == [(1, 3), (2, 3)]
    for row in rows:
        assert 0 < row["low_s"] <= row["median_s"] <= row["high_s"]
        assert row["p99_s"] >= row["median_s"]
        assert row["images_per_s"] == pytest.approx(3 / row["median_s"])


def test_a_network_in_bfloat16_is_saved_in_it(tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "n.safetensors"
    command = ["optimize", "digits_net", "--het", "2", "--dtype", "bfloat16", "-o", str(out)]
    assert cli.main([*command, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["file"] == str(out)
    assert record["largest_error"] > 0
    loaded = hk.load(out)
    fused = [module for module in loaded.modules() if isinstance(module, FusedConv2d)]
    assert {layer.weight.dtype for layer in fused} == {torch.bfloat16}
    assert {layer.shift.dtype for layer in fused} == {torch.float32}


def test_threads_are_as_before_afterwards_also_after_an_error() -> None:
    before = torch.get_num_threads()

    class Broken(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert torch.get_num_threads() == 1
            raise RuntimeError("broken")

    latency(nn.Identity().eval(), torch.ones(2, 3), threads=(1,), rounds=6, max_seconds=0.01)
    assert torch.get_num_threads() == before
    with pytest.raises(RuntimeError, match="broken"):
        latency(Broken().eval(), torch.ones(2, 3), threads=(1,), rounds=6)
    assert torch.get_num_threads() == before


def test_a_report_of_latency_says_what_it_is_of() -> None:
    (row,) = latency(nn.Identity().eval(), torch.ones(4, 3), rounds=6, max_seconds=0.01)
    assert (row.batch, row.threads) == (4, torch.get_num_threads())
    assert "batch 4" in str(row)
    assert "images/s" in str(row)


def test_a_network_in_8_bits_is_not_optimized_twice(capsys: Capture) -> None:
    command = ["run", "digits_net", "--dtype", "int8", "--optimize", "--seconds", "0.05"]
    assert cli.main(command) == 0
    assert "images/s" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [0, -1, 1.5, "2"])
def test_a_number_of_threads_that_cannot_be_is_refused(wrong: object) -> None:
    with pytest.raises(ArgumentError, match="threads"):
        latency(nn.Identity().eval(), torch.ones(1), threads=(wrong,))  # type: ignore[arg-type]


def test_what_is_no_network_is_refused() -> None:
    with pytest.raises(InputTypeError):
        latency(torch.relu, torch.ones(1))  # type: ignore[arg-type]
    with pytest.raises(InputTypeError):
        latency(nn.Identity().eval(), "x")
    with pytest.raises(ArgumentError, match="rounds"):
        latency(nn.Identity().eval(), torch.ones(1), rounds=5)


@pytest.mark.parametrize(
    "command",
    [
        ["run", "nothing-of-the-kind"],
        ["run", "missing.safetensors"],
        ["optimize", "missing.safetensors"],
        ["optimize", "digits_net", "--dtype", "float64"],
        ["optimize", "digits_net", "-o", "/proc/none/x.safetensors"],
        ["optimize", "digits_net", "-o", "digits.onnx"],
        ["optimize", "digits_net", "-o", "digits"],
    ],
    ids=" ".join,
)
def test_what_cannot_be_done_is_said_in_one_sentence(command: list[str], capsys: Capture) -> None:
    assert cli.main(command) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("hetconv: ")
    assert "Traceback" not in captured.err


def test_a_name_that_nothing_has_is_told_with_the_nearest(capsys: Capture) -> None:
    assert cli.main(["run", "resnet21"]) == 1
    assert "Did you mean resnet20?" in capsys.readouterr().err
    assert cli.main(["run", "qqqq"]) == 1
    assert "Did you mean" not in capsys.readouterr().err


def test_an_optimized_network_goes_under_no_name_of_another_kind(
    tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "digits.onnx"
    assert cli.main(["optimize", "digits_net", "--size", "8", "-o", str(out)]) == 1
    said = capsys.readouterr().err
    assert "ends in .safetensors" in said
    assert "export.to_onnx" in said
    assert not out.exists()


@pytest.mark.parametrize(
    "command",
    [["run", "digits_net", "--threads", "0"], ["run", "digits_net", "--rounds", "3"]],
    ids=" ".join,
)
def test_wrong_options_are_usage(command: list[str]) -> None:
    assert cli.main(command) == 2
