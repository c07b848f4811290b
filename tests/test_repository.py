# SPDX-License-Identifier: Apache-2.0
"""Rules about the tree itself: sizes, licence lines, imports, docstrings."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tree import ROOT, files_with, modules, read

import hetconv_kernels as hk

SOURCE_SUFFIXES = {".py", ".h", ".cpp", ".cu"}
TEXT_SUFFIXES = SOURCE_SUFFIXES | {".md", ".toml", ".txt", ".in", ".json", ".yaml", ".yml", ""}

SOFT_LINES, HARD_LINES = 400, 600
# Files between the two limits, each with the reason why it is still one noun.
LONGER_FILES = {
    "hetconv_kernels/io.py": "the format of a file: what is written, and what is believed of it",
    "hetconv_kernels/problem.py": "Geometry and Problem, and the rules that make one of the other",
    "tests/test_kept_weights.py": "one table of origins and changes of a weight, for all engines",
    "hetconv_kernels/support.py": "Support with all its constructors, its algebra and its JSON",
    "setup.py": "the build of all compiled parts, in the one file that pip runs",
    "hetconv_kernels/ops.py": "the schemas of the primitives with their fakes and bodies",
    "hetconv_kernels/autograd.py": "every derivative of the primitives, forward mode too",
    "hetconv_kernels/graph/channels.py": "one walk over a graph with all that it can meet",
    "tests/test_observers.py": "the list of all observers that torch has, in one place",
    "hetconv_kernels/backends/cpu.py": "the primitives and the product, one face of the engine",
    "hetconv_kernels/nn/frequency.py": "the transform and the one layer that it is for",
    "hetconv_kernels/backends/cpu_int8.py": "the eight operations in 8 bits, one face",
    "hetconv_kernels/backends/vendor.py": "the dense convolution, and what it is kept away from",
    "hetconv_kernels/profiling/measure.py": "one measurement: what is counted, timed and packed",
    "tests/test_profiling.py": "the profile, its timelines and its command, on the same networks",
    "csrc/cpu/fprop_winograd.h": "one form: transforms, products and the way back",
}

# A module has tests/test_<its name>.py or test_<its folder>.py; these are tested elsewhere.
TESTED_BY = {
    "hetconv_kernels._version": "test_repository",
    "hetconv_kernels.backends.cpu_int8": "test_int8_calls",
    "hetconv_kernels.clocks": "test_timing",
    "hetconv_kernels.compression.outside": "test_rounds",
    "hetconv_kernels.factory": "test_bad_input",
    "hetconv_kernels.graph.pairs": "test_pair_rules",
    "hetconv_kernels.graph.plain": "test_rules",
    "hetconv_kernels.option_types": "test_bad_input",
}

# Words of one machine or one workplace, spelt in halves so that this file does not hold them.
FOREIGN = [
    first + second
    for first, second in (
        ("/wor", "k/"),
        ("/tm", "p/"),
        ("/roo", "t/"),
        ("/hom", "e/"),
        ("/opt/whe", "els"),
        ("/opt/py", "pi"),
        ("../sha", "red"),
        ("shared/des", "ign"),
        ("shared/meth", "ods"),
        ("shared/kern", "els"),
        ("can_start_", "another"),
        ("give_", "back"),
        ("budget_", "left"),
        ("device machi", "ne is lent"),
    )
]


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs this interpreter in the root of the tree, with compiled Python files kept."""
    environment = {
        key: value
        for key, value in os.environ.items()
        if key not in ("PYTHONDONTWRITEBYTECODE", "HETCONV_BACKEND")
    }
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_no_file_is_too_long() -> None:
    lengths = {path.as_posix(): read(path).count("\n") for path in files_with(SOURCE_SUFFIXES)}
    assert {name: lines for name, lines in lengths.items() if lines > HARD_LINES} == {}
    longer = {name for name, lines in lengths.items() if lines > SOFT_LINES}
    assert longer <= set(LONGER_FILES), "split it, or give the reason in LONGER_FILES"
    assert set(LONGER_FILES) <= set(lengths), "LONGER_FILES names a file that is gone"


def test_no_test_imports_another_test_file() -> None:
    """What two of them use stands in a module of helpers, such as layers.py."""
    imported = re.compile(r"^\s*(?:from|import)\s+(test_\w+)", re.M)
    hits = [
        f"{path}: {name}"
        for path in files_with({".py"})
        if path.parts[0] == "tests"
        for name in imported.findall(read(path))
    ]
    assert not hits, "\n".join(hits)


def test_no_module_imports_itself_by_way_of_others() -> None:
    """At import: what a function imports when it is called, and types alone, are left out."""
    names = {"hetconv_kernels", *modules()}
    arrows = {name: top_level_imports(name, names) & names for name in names}
    assert sum(map(len, arrows.values())) > 2 * len(names)
    while free := {name for name, wanted in arrows.items() if not wanted & set(arrows) - {name}}:
        arrows = {name: wanted for name, wanted in arrows.items() if name not in free}
    assert arrows == {}, "these import one another"


def top_level_imports(name: str, names: set[str]) -> set[str]:
    """Lists what importing a module imports, but for the folders that it is in."""
    module = importlib.import_module(name)
    assert module.__file__ is not None
    package = name if hasattr(module, "__path__") else name.rpartition(".")[0]
    found = set()
    for node in ast.parse(Path(module.__file__).read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            inner = {f"{base}.{alias.name}" for alias in node.names}
            found |= inner & names or {base}
    return {each for each in found if each != package and not name.startswith(f"{each}.")}


def test_every_source_names_its_licence_at_the_top() -> None:
    without = []
    for path in files_with(SOURCE_SUFFIXES):
        text = read(path)
        if text and "SPDX-License-Identifier: Apache-2.0" not in text.splitlines()[0]:
            without.append(path.as_posix())
    assert not without, "\n".join(without)


def test_nothing_refers_to_one_machine() -> None:
    hits = []
    for path in files_with(TEXT_SUFFIXES):
        text = read(path)
        hits += [f"{path}: {word}" for word in FOREIGN if word in text]
    assert not hits, "\n".join(hits)


def test_no_unfinished_work_is_left_unmarked() -> None:
    """A reminder names its issue, `TODO(#12)`, so that it is found again."""
    reminder = re.compile(r"\b(TO" r"DO|FIX" r"ME|XX" r"X)\b(?!\(#\d+\))")
    hits = [
        f"{path}:{number}"
        for path in files_with(SOURCE_SUFFIXES)
        for number, line in enumerate(read(path).splitlines(), 1)
        if reminder.search(line)
    ]
    assert not hits, "\n".join(hits)


def test_every_module_has_its_test_file() -> None:
    tests = {path.stem for path in (ROOT / "tests").glob("test_*.py")}
    names = [name for name in modules() if not hasattr(importlib.import_module(name), "__path__")]
    missing = []
    for name in names:
        *_, folder, stem = name.split(".")
        if not {f"test_{stem}", f"test_{folder}", TESTED_BY.get(name)} & tests:
            missing.append(name)
    assert not missing, "\n".join(missing)
    assert set(TESTED_BY) <= set(names), "TESTED_BY names a module that is gone"


def test_the_version_stands_in_one_place() -> None:
    text = read("hetconv_kernels/_version.py")
    assert f'__version__ = "{hk.__version__}"' in text
    others = [
        path.as_posix()
        for path in files_with({".py", ".toml"})
        if re.search(rf"version.*[\"']{re.escape(hk.__version__)}[\"']", read(path))
    ]
    assert others == ["hetconv_kernels/_version.py"]


def test_the_version_is_the_installed_one() -> None:
    try:
        installed = importlib.metadata.version("hetconv-kernels")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("runs from the tree, not installed (make test PY=...)")
    assert installed == hk.__version__


def test_every_public_name_has_a_docstring() -> None:
    without = []
    for module_name in ["hetconv_kernels", *modules()]:
        module = importlib.import_module(module_name)
        assert module.__doc__, f"{module_name} has no docstring"
        for name in getattr(module, "__all__", []):
            public = getattr(module, name)
            documented = inspect.isroutine(public) or inspect.isclass(public)
            if documented and not inspect.getdoc(public):
                without.append(f"{module_name}.{name}")
    assert not without, "\n".join(without)


def test_every_name_in_all_exists() -> None:
    missing = [
        f"{module_name}.{name}"
        for module_name in ["hetconv_kernels", *modules()]
        for name in getattr(importlib.import_module(module_name), "__all__", [])
        if not hasattr(importlib.import_module(module_name), name)
    ]
    assert not missing, "\n".join(missing)


def test_import_is_lean() -> None:
    """Importing the package loads no optional package and does not touch the GPU."""
    code = """
import json, sys, torch
before = set(sys.modules)
import hetconv_kernels
optional = {"triton", "matplotlib", "sklearn", "rich", "safetensors", "pytest", "torch._dynamo"}
print(json.dumps([sorted(optional & (set(sys.modules) - before)), torch.cuda.is_initialized()]))
"""
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[], False]


def test_import_takes_less_than_0_3_s_beyond_torch() -> None:
    """The fastest of several fresh interpreters: other load on the machine only ever adds time."""
    code = (
        "import time, torch; start = time.perf_counter(); import hetconv_kernels;"
        "print(time.perf_counter() - start)"
    )
    seconds = []
    while len(seconds) < 6 and (not seconds or min(seconds) >= 0.3):
        done = run_python("-c", code)
        assert done.returncode == 0, done.stderr
        seconds.append(float(done.stdout))
    assert min(seconds) < 0.3, f"seconds in fresh interpreters: {seconds}"


def test_the_makefile_has_the_commands_that_the_readme_names() -> None:
    makefile = read("Makefile")
    named = set(re.findall(r"`make ([a-z]+)", read("README.md")))
    assert {"demo", "test"} <= named
    assert [name for name in sorted(named) if not re.search(rf"^{name}:", makefile, re.M)] == []
