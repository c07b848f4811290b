# SPDX-License-Identifier: Apache-2.0
"""Networks of timm and torchvision by name on the command line; what is no such name is told."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
from external import package
from torch import nn

from hetconv_kernels import cli
from hetconv_kernels.errors import ArgumentError, HetconvError
from hetconv_kernels.factory import call_factory, is_factory

NAMES = {
    "timm": "mobilenetv3_small_050",
    "torchvision": "squeezenet1_1",
}


@pytest.mark.parametrize("zoo", NAMES)
def test_a_network_by_its_name(zoo: str) -> None:
    package(zoo)
    text = f"{zoo}:{NAMES[zoo]}"
    assert is_factory(text)
    assert isinstance(call_factory(text, "MODEL"), nn.Module)


def test_a_segmenter_of_torchvision_loads_nothing() -> None:
    package("torchvision")
    assert isinstance(call_factory("torchvision:lraspp_mobilenet_v3_large", "MODEL"), nn.Module)


@pytest.mark.parametrize("zoo", NAMES)
def test_a_name_that_is_not_there_is_told_with_what_is_near(zoo: str) -> None:
    package(zoo)
    near = NAMES[zoo].replace("net", "nett")
    with pytest.raises(ArgumentError, match=f"Did you mean .*{NAMES[zoo]}"):
        call_factory(f"{zoo}:{near}", "--model")


@pytest.mark.parametrize("zoo", NAMES)
def test_without_the_package_a_sentence_says_how_to_get_it(
    zoo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, zoo, None)
    monkeypatch.setitem(sys.modules, f"{zoo}.models", None)
    with pytest.raises(HetconvError, match=f"pip install {zoo}"):
        call_factory(f"{zoo}:anything", "--model")


def test_what_the_package_raises_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def create_model(name: str, pretrained: bool) -> Any:
        raise RuntimeError("no such head")

    zoo = types.ModuleType("timm")
    zoo.create_model, zoo.list_models = create_model, lambda: ["net"]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "timm", zoo)
    with pytest.raises(HetconvError, match=r"--model: timm:net raised RuntimeError .*no such head"):
        call_factory("timm:net", "--model")


def test_the_commands_take_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package("timm")
    out = tmp_path / "net.safetensors"
    words = ["timm:mobilenetv3_small_050", "--size", "32", "--batch", "1"]
    assert cli.main(["optimize", *words, "-o", str(out)]) == cli.OK, capsys.readouterr().err
    assert cli.main(["run", str(out), *words[1:], "--seconds", "0.1"]) == cli.OK
    assert cli.main(["profile", "timm:no_such_net"]) == cli.FAILURE
    assert "which timm has not" in capsys.readouterr().err
