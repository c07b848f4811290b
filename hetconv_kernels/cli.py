# SPDX-License-Identifier: Apache-2.0
"""The command line: ``hetconv info | explain | demo | compress | quantize | bench | profile | …``.

Each command imports what it needs when it runs, so that ``hetconv --help`` is quick.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from . import json_output
from ._version import __version__
from .errors import HetconvError
from .measure import tables

OK, FAILURE, USAGE, INTERRUPTED = 0, 1, 2, 130
_EXIT_CODES = """exit codes:
  0    done
  1    could not be done; one sentence on stderr says why
  2    wrong usage: unknown command or option, a bad value, or a part that is not installed
  130  interrupted
"""


# What a user would type, by command; the help shows them.
EXAMPLES = {
    "explain": ("hetconv explain --channels 128 --size 28 --p 4",),
    "profile": (
        "hetconv profile resnet20 --het 4 --optimize --timeline timeline.html",
        "hetconv profile timm:resnet18 --size 224 --batch 8",
    ),
    "run": (
        "hetconv run outputs/optimized.safetensors --size 224 --batch 1 --threads 1 --threads 2",
        "hetconv run resnet18 --het 4 --dtype int8",
    ),
    "optimize": (
        "hetconv optimize resnet18 --het 4 -o fast.safetensors",
        "hetconv optimize mynets:resnet --dtype bf16",
    ),
    "compress": (
        "hetconv compress self-grouping --set target=0.7",
        "hetconv compress wsp --model mynets:net --weights net.pt --data mynets:loaders",
    ),
    "quantize": (
        "hetconv quantize outputs/compress/self-grouping.safetensors --max-drop 0.005",
        "hetconv quantize --model mynets:net --weights net.pt --data mynets:loaders",
    ),
    "bench": ("hetconv bench -k het4", "hetconv bench --full --results results"),
}


class UsageError(HetconvError):
    """A command cannot run in this installation or with these options."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: the arguments after the program's name; by default those of the process.

    Returns:
        The exit code: 0 done, 1 failure, 2 usage, 130 interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _parser(arguments[:1])
    try:
        options, rest = parser.parse_known_args(arguments)
        if rest and options.command != "bench":
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
    except SystemExit as stop:  # argparse has printed the help or the mistake
        return int(stop.code or 0)
    except UsageError as error:
        print(f"hetconv: {error}", file=sys.stderr)
        return USAGE
    options.rest = rest
    command: Callable[[argparse.Namespace], int] = options.run
    try:
        code = command(options)
        sys.stdout.flush()
        return code
    except UsageError as error:
        print(f"hetconv: {error}", file=sys.stderr)
        return USAGE
    except HetconvError as error:
        print(f"hetconv: {error}", file=sys.stderr)
        return FAILURE
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except OSError as error:  # the machine refuses: a full disk, no rights, no such file
        print(f"hetconv: {error}", file=sys.stderr)
        _give_up_on_a_full_stdout()
        return FAILURE
    except MemoryError:
        print("hetconv: there is not enough memory for these sizes.", file=sys.stderr)
        return FAILURE


def _give_up_on_a_full_stdout() -> None:
    """Sends the rest nowhere if stdout cannot be written, so that no traceback comes at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser(asked: Sequence[str]) -> argparse.ArgumentParser:
    """Builds the parser; options that need imports only for the command that is asked for."""
    parser = argparse.ArgumentParser(
        prog="hetconv",
        description="Structured-sparse convolutions that are fast: explain, time, compress, run.",
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"hetconv {__version__}")
    parser.add_argument(
        "--print-completion",
        choices=("bash", "zsh", "tcsh"),
        action=_PrintCompletion,
        help="print a shell's completion of this command line (needs shtab)",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> Any:
        sub = commands.add_parser(
            name,
            help=text,
            description=text,
            epilog=_examples(name) + _EXIT_CODES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run=run)
        return sub

    info = command("info", _info, "what is built and found on this machine")
    json_output.add_argument(info)
    explaining = command("explain", _explain, "which backend runs a layer, and why")
    if "explain" in asked:
        from . import layer_options

        layer_options.add_layer_arguments(explaining)
    for name, found in _ELSEWHERE.items():
        sub = command(name, partial(_elsewhere, found), found.text)
        if name in asked:
            found.load().add_arguments(sub)
    bench = command("bench", _bench, "measure this machine (a front to benchmarks/ of a checkout)")
    json_output.add_argument(bench)
    bench.add_argument("--full", action="store_true", help="all cases, not the quick subset")
    bench.add_argument("--backend", action="append", help="force this backend (repeatable)")
    bench.add_argument("--gpu", action="store_true", help="only the GPU table")
    bench.add_argument("--results", type=Path, help="folder for the JSON files")
    bench.add_argument(
        "--isa", choices=tuple(_HELD_TO), help="hold our engine, PyTorch and oneDNN to it"
    )
    bench.epilog = f"Other options go to pytest.\n\n{bench.epilog}"
    return parser


def _examples(name: str) -> str:
    lines = "".join(f"  {line}\n" for line in EXAMPLES.get(name, ()))
    return f"examples:\n{lines}\n" if lines else ""


class _PrintCompletion(argparse.Action):
    """Prints shtab's script of completion: a file, so that no TAB has to import torch."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        try:
            import shtab
        except ImportError:
            raise UsageError(
                "completion of the shell needs shtab: pip install 'hetconv-kernels[completion]'"
            ) from None
        whole = _parser(["explain", *_ELSEWHERE])
        for sub in (whole, *_commands(whole).values()):
            for option in sub._actions:
                if option.type is Path:
                    option.complete = shtab.FILE  # type: ignore[attr-defined]
        print(shtab.complete(whole, shell=values))
        parser.exit()


def _commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Returns the parsers of the commands, by name."""
    found = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return dict(found.choices)


# info --------------------------------------------------------------------------------------------


def _info(options: argparse.Namespace) -> int:
    from .info import info

    found = info()
    if options.json:
        print(json.dumps(found, indent=2, default=str))
    else:
        tables.show_table(("what", "found"), _flat(found), "hetconv_kernels")
    return OK


def _flat(value: object, name: str = "") -> list[tuple[str, str]]:
    """Lists the leaves of nested mappings as (dotted name, text)."""
    if isinstance(value, dict) and value:
        return [
            row
            for key, item in value.items()
            for row in _flat(item, f"{name}.{key}" if name else str(key))
        ]
    if isinstance(value, list | tuple):
        return [(name, ", ".join(map(str, value)) or "none")]
    return [(name, "none" if value is None or value == {} else str(value))]


# explain -----------------------------------------------------------------------------------------


def _explain(options: argparse.Namespace) -> int:
    import torch

    from .layer_options import build_input, build_layer
    from .measure.explain import explain

    layer = build_layer(options)
    x = build_input(options, options.channels, options.size)
    with torch.no_grad():
        explanation = explain(layer, x)
    if options.json:
        print(json.dumps(explanation.to_dict(), indent=2, default=str))
    else:
        _print(str(explanation))
    return OK


# what other modules do --------------------------------------------------------------------------


class _Elsewhere(NamedTuple):
    """A command whose module is imported when it is asked for: `add_arguments` and `run`."""

    module: str
    text: str
    shows: bool = False  # run is given what prints

    def load(self) -> Any:
        return importlib.import_module(self.module, __package__)


_ELSEWHERE = {
    "profile": _Elsewhere(
        ".measure.profiling.command",
        "where the time of a network or layer goes, and why",
        shows=True,
    ),
    "run": _Elsewhere(
        ".measure.profiling.latency",
        "what a call of a network takes: latency and images a second",
        shows=True,
    ),
    "optimize": _Elsewhere(
        ".graph.command", "make a network fast for inference, and save it", shows=True
    ),
    "demo": _Elsewhere(".demo", "train, compress and time a denoiser on photographs"),
    "compress": _Elsewhere(".compression.command", "compress a network by one of eight methods"),
    "quantize": _Elsewhere(".quantization.command", "make a network compute in 8 bits"),
}


def _elsewhere(found: _Elsewhere, options: argparse.Namespace) -> int:
    run = found.load().run
    return int(run(options, _print) if found.shows else run(options))


# bench -------------------------------------------------------------------------------------------


_HELD_TO = {
    "avx2": {"HETCONV_ISA": "avx2", "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
}


def _bench(options: argparse.Namespace) -> int:
    folder = Path(__file__).resolve().parents[1] / "benchmarks"
    if not (folder / "conftest.py").is_file():
        raise UsageError(
            "the benchmarks are not part of an installed package. Clone the repository, and run "
            "`make bench`, or `hetconv bench` from a checkout."
        )
    if importlib.util.find_spec("pytest") is None:
        raise UsageError("the benchmarks need pytest: pip install pytest pytest-benchmark")
    command = [sys.executable, "-m", "pytest", str(folder), "--rootdir", str(folder.parent)]
    command += ["--full"] * options.full + ["-m", "gpu"] * options.gpu
    for name in options.backend or ():
        command += ["--backend", name]
    if options.results:
        command += ["--results", str(options.results.resolve())]
    held = _HELD_TO[options.isa] if options.isa else {}
    sys.stdout.flush()
    results, started = options.results or folder / "results", time.time()
    done = subprocess.run(
        [*command, *options.rest],
        cwd=folder.parent,
        env={**os.environ, **held},
        stdout=sys.stderr if options.json else None,
        check=False,
    )
    if options.json:
        written = [p for p in sorted(results.glob("*.json")) if p.stat().st_mtime >= started]
        print(json.dumps({"passed": done.returncode == 0, "files": list(map(str, written))}))
    # pytest: 0 passed, 1 failed, 2 interrupted, 3 internal, 4 usage, 5 nothing collected.
    return {0: OK, 4: USAGE, 5: USAGE}.get(done.returncode, FAILURE)


# output ------------------------------------------------------------------------------------------


def _print(text: str) -> None:
    if tables.has_rich():
        from rich.console import Console

        Console().print(text, markup=False, soft_wrap=True)
    else:
        print(text)
