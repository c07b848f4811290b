# SPDX-License-Identifier: Apache-2.0
"""``hetconv compress``: on the digits, on a folder of CIFAR-10, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cifar import write_cifar

from hetconv_kernels.cli import main
from hetconv_kernels.compression import ADMM, SelfGrouping
from hetconv_kernels.compression.command import METHODS, build_method
from hetconv_kernels.errors import ArgumentError
from hetconv_kernels.models import digits_net

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
pytestmark = pytest.mark.one_thread


def test_digits_from_training_to_report_and_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["compress", "wsp", "--set", "epochs=1", "--set", "percentile=0.6", "--train-epochs",
             "1", "--no-measure", "--out", str(tmp_path)]  # fmt: skip
    assert main(words) == 0
    first = capsys.readouterr()
    assert "WSP: live weights 81,824 ->" in first.out
    assert "500 images that nothing above has seen" in first.out
    assert "dense, epoch 1/1" in first.err
    record = json.loads((tmp_path / "wsp.json").read_text())
    assert record["settings"]["percentile"] == 0.6
    assert record["macs"][1] < record["macs"][0]
    weights = torch.load(tmp_path / "wsp.pt", weights_only=True)
    assert "features.3.weight" in weights
    assert main(words) == 0
    again = capsys.readouterr()
    assert "epoch" not in again.err  # both states were found
    assert again.out == first.out


def test_a_cifar_folder_and_given_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from hetconv_kernels.models import resnet20

    write_cifar(tmp_path, {"data_batch_1.bin": 10, "test_batch.bin": 4})
    torch.save(resnet20().state_dict(), tmp_path / "resnet20.pt")
    words = ["compress", "het", "--data", str(tmp_path), "--model", "resnet20", "--weights",
             str(tmp_path / "resnet20.pt"), "--set", "epochs=1", "--batch", "6", "--validation",
             "4", "--no-measure", "--out", str(tmp_path / "out")]  # fmt: skip
    assert main(words) == 0
    assert "HetConv" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "het.json").read_text())["network"] == "resnet20"


def test_a_speed_up_that_is_required_and_missed_is_exit_code_1_with_all_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(digits_net().state_dict(), tmp_path / "net.pt")
    words = ["compress", "het", "--weights", str(tmp_path / "net.pt"), "--set", "epochs=0",
             "--require-speedup", "1000", "--batch", "4", "--out", str(tmp_path)]  # fmt: skip
    assert main(words) == 1
    printed = capsys.readouterr()
    assert "at least 1000.00× was required" in printed.err
    assert "speed-up" in printed.out
    assert (tmp_path / "het.json").exists()


@pytest.mark.parametrize("method", METHODS)
def test_settings_are_listed(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compress", method, "--settings"]) == 0
    assert "epochs=" in capsys.readouterr().out


def test_settings_are_json_or_text() -> None:
    made = build_method(SelfGrouping, ["target=0.5", "schedule=LG", "clusters=4"])
    assert made == SelfGrouping(target=0.5, schedule="LG", clusters=4)
    assert build_method(ADMM, ["rates=[0.5, 0.8]"]).rates == [0.5, 0.8]
    for wrong in ("target", "nothing=1", "target=1.5", "target=high", "rates=0.5"):
        with pytest.raises(ArgumentError):
            build_method(ADMM if wrong.startswith("rates") else SelfGrouping, [wrong])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "nowhere"], "no such folder"),
        (["--weights", "nowhere.pt"], "cannot be used"),
        (["--device", "toaster"], "toaster"),
        (["--batch", "1"], "at least 2"),
        (["--set", "p=0"], "a positive|at least 1"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_mistakes_are_one_sentence(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compress", "het", "--out", str(tmp_path / "out"), *words]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert __import__("re").search(message, error)


def test_unknown_methods_are_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compress", "magic"]) == 2
    assert "self-grouping" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "which", "what"),
    [
        (["--learning-rate", "0.02"], "digits_net", "training.optimizer.groups.0.lr"),
        (["--batch", "32"], "digits_net", "training.data.size"),
        (["--seed", "1"], "digits_net", "seed"),
        (["--train-epochs", "2"], "digits_net", "epochs"),
        (["--learning-rate", "0.02"], "wsp", "training.optimizer.groups.0.lr"),
        (["--batch", "32"], "wsp", "training.data.size"),
        (["--set", "percentile=0.5"], "wsp", "method.percentile"),
    ],
)
def test_a_changed_option_never_returns_the_result_of_another(
    words: list[str], which: str, what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = tmp_path / "net.pt"
    if which == "wsp":  # with weights given, the dense network has no state
        torch.save(digits_net().state_dict(), weights)
    given = ["--weights", str(weights)] if which == "wsp" else []
    first = ["compress", "wsp", "--set", "epochs=1", "--train-epochs", "1", "--no-measure", *given,
             "--out", str(tmp_path)]  # fmt: skip
    assert main(first) == 0
    capsys.readouterr()
    assert main([*first, *words]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"hetconv: {what}")
    assert f"{which}.state.pt" in error
