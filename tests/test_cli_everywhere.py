# SPDX-License-Identifier: Apache-2.0
"""What holds for every command: JSON for programs, completion by the shell, a user's own functions.

The commands come from the parser, so that one which is added is tested too.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import hetconv_kernels as hk
from hetconv_kernels import cli, factory
from hetconv_kernels.models import digits_net

Capture = pytest.CaptureFixture[str]
WHOLE = cli._parser(["explain", *cli._ELSEWHERE])
COMMANDS = cli._commands(WHOLE)
# What makes each command quick; in a folder with a network, its weights and a results file.
QUICK = {
    "info": [],
    "explain": ["--channels", "8", "--size", "6"],
    "profile": ["layer", "--channels", "8", "--size", "6", "--rounds", "5", "--seconds", "0.1"],
    "run": ["layer", "--channels", "8", "--size", "6", "--rounds", "6", "--seconds", "0.1"],
    "optimize": ["layer", "--channels", "8", "--size", "6", "-o", "fast.safetensors"],
    "demo": ["--quick", "--steps", "4", "--out", "demo"],
    "compress": ["het", "--weights", "net.pt", "--set", "epochs=1", "--no-measure", "--out", "out"],
    "quantize": ["--weights", "net.pt", "--images", "8", "--no-measure", "--out", "out"],
    "bench": [],
}
OWN = """
import torch
from hetconv_kernels.models import digits_net

def net():
    return digits_net().eval()

def net_and_input():
    return net(), torch.randn(2, 1, 8, 8)

def loaders():
    torch.manual_seed(0)
    batches = [(torch.randn(4, 1, 8, 8), torch.arange(4)) for _ in range(2)]
    return batches, batches, batches
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in: weights of the digits' network, a results file, functions of a user."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    torch.save(digits_net().state_dict(), "net.pt")
    committed = Path(cli.__file__).parents[1] / "benchmarks" / "results" / "dispatch-full.json"
    Path("results.json").write_bytes(committed.read_bytes())
    Path("ownnets.py").write_text(OWN)
    monkeypatch.delitem(sys.modules, "ownnets", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])

    def quick(command: list[str], **_: Any) -> SimpleNamespace:
        print("pytest's own words", file=_["stdout"])
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(cli, "subprocess", SimpleNamespace(run=quick))
    return tmp_path


def test_the_list_of_commands_is_the_parsers() -> None:
    assert set(QUICK) == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_prints_one_json_document_and_nothing_else(
    name: str, here: Path, capsys: Capture
) -> None:
    for package in {"demo": ["sklearn", "matplotlib"]}.get(name, []):
        pytest.importorskip(package, reason=f"{name} needs it")
    if name in ("compress", "quantize"):
        pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    assert cli.main([name, *QUICK[name], "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)
    assert "Traceback" not in said.err


@pytest.mark.parametrize("option", ["--settings", "--ncu", "--passes=1"])
def test_what_ends_a_command_early_is_json_too(option: str, here: Path, capsys: Capture) -> None:
    command = ["compress", "admm"] if option == "--settings" else ["profile", *QUICK["profile"]]
    assert cli.main([*command, option, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)


def test_a_speedup_that_was_missed_is_exit_code_1_with_its_json(
    here: Path, capsys: Capture
) -> None:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    words = [word for word in QUICK["compress"] if word != "--no-measure"]
    assert cli.main(["compress", *words, "--json", "--require-speedup", "1000"]) == 1
    said = capsys.readouterr()
    assert json.loads(said.out)["method"] == "HetConv"
    assert "1000" in said.err


def test_what_one_command_writes_the_next_one_takes(here: Path, capsys: Capture) -> None:
    pytest.importorskip("safetensors", reason="the safetensors extra is not installed")
    own = ["--data", "ownnets:loaders", "--no-measure", "--out", "out"]
    words = ["het", "--model", "ownnets:net", "--weights", "net.pt", "--set", "epochs=1", *own]
    assert cli.main(["compress", *words]) == 0
    assert "hetconv quantize out/het.safetensors" in capsys.readouterr().out
    whole = hk.load("out/het.safetensors").state_dict()
    for name, value in torch.load("out/het.pt", weights_only=True).items():
        assert name.endswith("_extra_state") or torch.equal(whole[name], value)
    assert cli.main(["quantize", "out/het.safetensors", *own]) == 0
    words = ["--size", "8", "--rounds", "6", "--seconds", "0.1", "--json"]
    for file in ("out/het.safetensors", "out/network.safetensors"):
        capsys.readouterr()
        assert cli.main(["run", file, *words]) == 0
        assert json.loads(capsys.readouterr().out)


# module:function ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["profile", "run", "optimize"])
@pytest.mark.parametrize("function", ["net", "net_and_input"])
def test_a_network_may_come_from_a_function(
    name: str, function: str, here: Path, capsys: Capture
) -> None:
    more = ["-o", "own.safetensors"] if name == "optimize" else ["--seconds", "0.1"]
    assert cli.main([name, f"ownnets:{function}", "--size", "8", *more, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("command", [["compress", "het", "--set", "epochs=1"], ["quantize"]])
def test_network_and_data_may_come_from_functions(
    command: list[str], here: Path, capsys: Capture
) -> None:
    words = ["--model", "ownnets:net", "--data", "ownnets:loaders", "--train-epochs", "1",
             "--no-measure", "--out", "own", "--json"]  # fmt: skip
    assert cli.main([*command, *words]) == 0
    record = json.loads(capsys.readouterr().out)
    found = record["test_accuracy"]
    values = list(found.values()) if isinstance(found, dict) else found
    assert len(values) == 2
    assert all(value * 8 % 1 == 0 for value in values), "of the eight images of the user"


def test_quantize_calibrates_on_as_many_images_of_a_user_as_asked(here: Path) -> None:
    from hetconv_kernels.quantization import command

    options = argparse.Namespace(data="ownnets:loaders", batch=4, validation=0, images=6)
    _, batches = command._read(options)
    assert [len(images) for images in batches] == [4, 2]


def test_every_command_that_wants_a_model_a_method_or_a_layer_has_an_example() -> None:
    assert set(COMMANDS) - set(cli.EXAMPLES) == {"info", "demo"}


@pytest.mark.parametrize("name", cli.EXAMPLES)
def test_the_examples_of_a_command_are_in_its_help_and_parse(name: str, capsys: Capture) -> None:
    for line in cli.EXAMPLES[name]:
        program, *words = shlex.split(line)
        assert (program, words[0]) == ("hetconv", name)
        options, rest = cli._parser([name]).parse_known_args(words)
        assert rest == (["-k", "het4"] if "-k" in words else [])
        assert options.command == name
    assert cli.main([name, "--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"  {line}\n" in said for line in cli.EXAMPLES[name])


@pytest.mark.parametrize("name", COMMANDS)
def test_what_names_a_network_or_data_says_that_it_may_be_a_function(name: str) -> None:
    named = {"target", "model", "data"}
    texts = {a.dest: a.help or "" for a in COMMANDS[name]._actions if a.dest in named}
    assert all("module:function" in text for text in texts.values()), texts
    assert bool(texts) == (name in ("profile", "run", "optimize", "compress", "quantize"))


def test_factories_are_told_from_paths_and_names() -> None:
    assert factory.is_factory("ownnets:net")
    assert not factory.is_factory("digits_net")
    assert not factory.is_factory("/data/a:b")


# completion --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_knows_every_command_and_option(shell: str, capsys: Capture) -> None:
    pytest.importorskip("shtab", reason="the completion extra is not installed")
    assert cli.main(["--print-completion", shell]) == 0
    script = capsys.readouterr().out
    for name, command in COMMANDS.items():
        assert name in script
        for action in command._actions:
            for option in action.option_strings[-1:]:  # the long form; tcsh's script has no other
                assert option in script or option.removeprefix("--") in script, (name, option)


def test_bash_completes_commands_options_and_choices(capsys: Capture) -> None:
    pytest.importorskip("shtab", reason="the completion extra is not installed")
    assert cli.main(["--print-completion", "bash"]) == 0
    script = capsys.readouterr().out

    def completed(*words: str) -> set[str]:
        ask = (
            f"{script}\nCOMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}\n"
            '_shtab_hetconv "" "" ""; printf "%s\\n" "${COMPREPLY[@]}"'
        )
        done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True)
        return set(done.stdout.split())

    assert {"quantize", "profile"} - completed("hetconv", "") == set()
    assert completed("hetconv", "qua") == {"quantize"}
    assert "--observer" in completed("hetconv", "quantize", "--obs")
    assert "minmax" in completed("hetconv", "quantize", "--observer", "")


def test_completion_without_shtab_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert cli.main(["--print-completion", "bash"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "hetconv-kernels[completion]" in said.err


def test_the_version_needs_no_command(capsys: Capture) -> None:
    assert cli.main(["--version"]) == 0
    assert hk.__version__ in capsys.readouterr().out
