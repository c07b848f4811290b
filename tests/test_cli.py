# SPDX-License-Identifier: Apache-2.0
"""The command line: what it prints, and the exit codes that scripts rely on."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import fresh
import pytest
import torch

import hetconv_kernels as hk
from hetconv_kernels import cli
from hetconv_kernels.errors import HetconvError
from hetconv_kernels.measure import tables

Capture = pytest.CaptureFixture[str]


def run(*arguments: str) -> int:
    return cli.main(arguments)


def sentence_on_stderr(capsys: Capture) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("hetconv: ")
    assert "Traceback" not in captured.err
    return captured.err


# Usage -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["info", "--nonsense"],
        ["explain", "--kind", "round"],
        ["explain", "--size", "wide"],
        ["explain", "--p", "four"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_exit_code_2(arguments: list[str], capsys: Capture) -> None:
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("usage: hetconv")


@pytest.mark.parametrize("command", [[], ["info"], ["explain"], ["bench"]], ids=str)
def test_help_is_exit_code_0_and_names_the_exit_codes(command: list[str], capsys: Capture) -> None:
    assert run(*command, "--help") == 0
    text = capsys.readouterr().out
    for code in ("0    done", "1    could not", "2    wrong usage", "130  interrupted"):
        assert code in text


def test_version(capsys: Capture) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out == f"hetconv {hk.__version__}\n"


def test_module_runs_and_stays_light() -> None:
    script = (
        "import sys, hetconv_kernels.cli\n"
        "heavy = {'rich', 'sklearn', 'matplotlib', 'triton', 'pytest'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    light = fresh.python(script)
    assert light.returncode == 0, light.stderr
    done = fresh.python("", "explain", "--backend", "none-such", module="hetconv_kernels")
    assert done.returncode == 1
    assert done.stderr.startswith("hetconv: ")
    assert "Traceback" not in done.stderr


def test_an_interrupt_is_exit_code_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: argparse.Namespace) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_info", interrupted)
    assert run("info") == 130


# info --------------------------------------------------------------------------------------------


def test_info_names_versions_and_backends(capsys: Capture) -> None:
    assert run("info") == 0
    text = capsys.readouterr().out
    assert torch.__version__ in text
    for name in hk.available_backends():
        assert name in text


def test_info_as_json_is_what_the_function_returns(capsys: Capture) -> None:
    assert run("info", "--json") == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(hk.info(), default=str))


def test_rich_and_plain_say_the_same(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    pytest.importorskip("rich")
    monkeypatch.setenv("COLUMNS", "400")

    def words(command: str, rich: bool) -> set[str]:
        monkeypatch.setattr(tables, "has_rich", lambda: rich)
        assert run(command) == 0
        # Without the frames, the rules, and measured or predicted times.
        text = re.sub(r"[─-╿]|-{2,}", " ", capsys.readouterr().out)
        return {word for word in text.split() if not re.fullmatch(r"[\d.]+", word)}

    assert words("info", rich=True) == words("info", rich=False)


# explain -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        ["--kind", "het"],
        ["--kind", "het", "--p", "8", "--order", "interleaved", "--memory-format", "channels_last"],
        ["--kind", "dense", "--filters", "16", "--stride", "2"],
        ["--kind", "grouped", "--p", "2", "--dtype", "bfloat16"],
        ["--kind", "mask", "--density", "0.1", "--size", "9x5", "--batch", "2"],
    ],
    ids=" ".join,
)
def test_explain_names_the_backend_that_runs(options: list[str], capsys: Capture) -> None:
    small = ["--channels", "16", "--size", "8"]
    assert run("explain", *small, *options) == 0
    text = capsys.readouterr().out
    assert run("explain", *small, *options, "--json") == 0
    data = json.loads(capsys.readouterr().out)
    assert data["chosen"] in hk.available_backends()
    assert data["chosen"] in text


@pytest.mark.parametrize("backend", hk.available_backends("cpu"))
def test_explain_obeys_a_forced_backend(backend: str, capsys: Capture) -> None:
    assert run("explain", "--channels", "8", "--size", "6", "--backend", backend, "--json") == 0
    assert json.loads(capsys.readouterr().out)["chosen"] == backend


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--p", "65"], "p of a HetConv"),
        (["--kernel", "4"], "even kernel"),
        (["--kind", "grouped", "--p", "3"], "groups"),
        (["--backend", "none-such"], "none-such"),
        (["--device", "none-such"], "none-such"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_done_is_one_sentence_and_exit_code_1(
    options: list[str], said: str, capsys: Capture
) -> None:
    assert run("explain", *options) == 1
    assert said in sentence_on_stderr(capsys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_device_that_is_not_there_is_exit_code_1(capsys: Capture) -> None:
    assert run("explain", "--device", "cuda") == 1
    assert "device 'cuda' cannot be used" in sentence_on_stderr(capsys)


# demo --------------------------------------------------------------------------------------------


@pytest.fixture
def fake_demo(monkeypatch: pytest.MonkeyPatch) -> list[argparse.Namespace]:
    seen: list[argparse.Namespace] = []
    module = ModuleType("hetconv_kernels.demo")

    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--steps", type=int, default=7)
        parser.add_argument("--fail", action="store_true")

    def execute(options: argparse.Namespace) -> int:
        seen.append(options)
        if options.fail:
            raise HetconvError("no photograph.")
        return 5

    vars(module).update(add_arguments=add_arguments, run=execute)
    monkeypatch.setitem(sys.modules, "hetconv_kernels.demo", module)
    monkeypatch.setattr(hk, "demo", module, raising=False)
    return seen


def test_demo_takes_its_own_options_and_gives_its_code(
    fake_demo: list[argparse.Namespace], capsys: Capture
) -> None:
    assert run("demo", "--steps", "3") == 5
    assert fake_demo[0].steps == 3
    assert run("demo", "--pictures", "3") == 2
    assert "unrecognized arguments: --pictures" in capsys.readouterr().err
    assert run("demo", "--fail") == 1
    assert sentence_on_stderr(capsys) == "hetconv: no photograph.\n"


def test_the_real_demo_has_options() -> None:
    assert run("demo", "--help") == 0


# bench -------------------------------------------------------------------------------------------


def test_bench_without_a_checkout_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Capture
) -> None:
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "site-packages" / "pkg" / "cli.py"))
    assert run("bench") == 2
    assert "not part of an installed package" in sentence_on_stderr(capsys)


def test_bench_without_pytest_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    found = cli.importlib.util.find_spec
    monkeypatch.setattr(
        cli.importlib.util, "find_spec", lambda n: None if n == "pytest" else found(n)
    )
    assert run("bench") == 2
    assert "pip install pytest" in sentence_on_stderr(capsys)


@pytest.mark.parametrize(("code", "expected"), [(0, 0), (1, 1), (2, 1), (3, 1), (4, 2), (5, 2)])
def test_bench_is_a_thin_front_to_pytest(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: int, expected: int
) -> None:
    seen: list[Any] = []

    def fake(command: list[str], **options: Any) -> SimpleNamespace:
        seen.append((command, options))
        return SimpleNamespace(returncode=code)

    monkeypatch.setattr(cli.subprocess, "run", fake)
    arguments = ["--full", "--gpu", "--backend", "vendor", "--results", str(tmp_path), "-k", "het4"]
    assert run("bench", *arguments) == expected
    command, options = seen[0]
    assert command[1:3] == ["-m", "pytest"]
    assert Path(command[3]).name == "benchmarks"
    text = " ".join(command)
    for part in ("--full", "-m gpu", "--backend vendor", f"--results {tmp_path}", "-k het4"):
        assert part in text
    assert options["cwd"] == Path(command[3]).parent


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="needs AVX2"
)
def test_bench_holds_every_library_to_an_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the variables do is seen by asking each library in a process that has them."""
    seen: list[dict[str, str]] = []

    def fake(command: list[str], **options: Any) -> SimpleNamespace:
        seen.append(options["env"])
        return SimpleNamespace(returncode=0)

    real = cli.subprocess.run
    monkeypatch.setattr(cli.subprocess, "run", fake)
    assert run("bench", "--isa", "avx2") == 0
    script = (
        "import torch, hetconv_kernels as hk\n"
        "print(torch.backends.cpu.get_cpu_capability())\n"
        "if 'cpu' in hk.available_backends():\n"
        "    from hetconv_kernels import _cpu\n"
        "    print(*_cpu.isas())\n"
    )
    command = [sys.executable, "-c", script]
    done = real(command, env=seen[0], capture_output=True, text=True, check=False)
    said = done.stdout.split()
    assert done.returncode == 0, done.stderr
    assert said[0] == "AVX2"
    assert said[1:] in ([], ["avx2"])
