# SPDX-License-Identifier: Apache-2.0
"""Types: what README and docs print type-checks as a user would check it; signatures are real."""

from __future__ import annotations

import ast
import importlib
import inspect
import pydoc
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pages import NAMES, PAGES, TITLE, blocks
from tree import modules

import hetconv_kernels as hk

ROOT = Path(__file__).parents[1]
FLAGS = (
    "--follow-imports=silent",
    "--no-error-summary",
    "--hide-error-context",
    "--strict-equality",
    "--check-untyped-defs",
    "--warn-unreachable",
    "--allow-redefinition",
)
# Insides of PyTorch that take mypy two thirds of its time; what a page makes of them is Any.
INSIDES = ",".join(
    f"torch.{name}.*"
    for name in (
        "_dynamo", "_export", "_functorch", "_higher_order_ops", "_inductor", "_prims", "_refs",
        "_subclasses", "ao", "distributed", "export", "fx", "jit", "masked", "nested", "onnx",
        "package", "profiler", "sparse", "testing",
    )
)  # fmt: skip


def check(folder: Path) -> list[str]:
    """Type-checks the files of a folder from outside of the tree, as a user of the package."""
    command = [sys.executable, "-m", "mypy", *FLAGS, "--config-file", str(folder / "mypy.ini"),
               "--cache-dir", str(ROOT / ".mypy_cache" / "docs"), str(folder)]  # fmt: skip
    (folder / "mypy.ini").write_text(
        f"[mypy]\nmypy_path = {ROOT}\n[mypy-{INSIDES},sympy.*]\nfollow_imports = skip\n"
    )
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode in (0, 1), done.stderr
    return done.stdout.splitlines()


def write_pages(folder: Path) -> None:
    """Writes the Python of each page to a file of its own, at the page's line numbers."""
    for name, page in zip(NAMES, PAGES, strict=True):
        text = ""
        for block in blocks(page):
            if block.language == "python" and not block.title.startswith(TITLE):
                text += "\n" * (block.line - 1 - text.count("\n")) + block.text
        if text:
            (folder / (re.sub(r"\W", "_", name.removesuffix(".md")) + ".py")).write_text(text)


def test_the_code_of_readme_and_docs_type_checks(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    write_pages(tmp_path)
    assert len(list(tmp_path.glob("*.py"))) > 10
    wrong = tmp_path / "wrong.py"
    wrong.write_text("import hetconv_kernels as hk\nhk.profile(3)\nhk.methods.nothing\n")
    found = [line for line in check(tmp_path) if "error:" in line]
    assert sum("wrong.py:" in line for line in found) >= 2, "the check finds no mistake at all"
    others = [line for line in found if "wrong.py:" not in line and not of_torch(line, tmp_path)]
    assert not others, "\n".join(others)


def of_torch(line: str, folder: Path) -> bool:
    """Whether an error is in torch's own types, which do not know Module.to(memory_format=…).

    Of a page that has not changed mypy says what it found before, in the folder of that time.
    """
    path, number, _ = line.split(":", 2)
    code = (folder / Path(path).name).read_text().splitlines()[int(number) - 1]
    return "to(memory_format=" in code and line.endswith("[call-overload]")


def public_functions() -> Iterator[tuple[str, Any]]:
    for name in sorted(set(hk.__all__)):
        value = getattr(hk, name)
        inside = {name: value}
        if isinstance(value, types.ModuleType):
            inside = {f"{name}.{key}": getattr(value, key) for key in getattr(value, "__all__", ())}
        for full, item in inside.items():
            if inspect.isfunction(item):
                yield full, item


def test_public_functions_have_a_signature_with_types_and_a_help_text() -> None:
    found = dict(public_functions())
    assert {"compress", "profile", "convert", "quantization.prepare"} <= set(found)
    for name, function in found.items():
        signature = inspect.signature(function)
        parameters = signature.parameters.values()
        assert all(p.annotation is not p.empty for p in parameters), name
        assert signature.return_annotation is not signature.empty, name
        shown = pydoc.render_doc(function, renderer=pydoc.plaintext)
        assert f"{function.__name__}(" in shown, name
        assert all(p.name in shown for p in parameters), name
        assert len((function.__doc__ or "").split()) >= 2, name


def test_help_of_compress_and_profile_lists_their_arguments() -> None:
    for function, words in ((hk.compress, "train_step require_speedup SpeedupError:"),
                            (hk.profile, "max_seconds rounds dense")):  # fmt: skip
        shown = pydoc.render_doc(function, renderer=pydoc.plaintext)
        assert all(word in shown for word in words.split())
        assert inspect.isfunction(function)


def test_no_module_is_anything_but_a_module() -> None:
    """A module that can be called, or answers by a property, is opaque to every tool."""
    for name in modules():
        module = importlib.import_module(name)
        assert type(module) is types.ModuleType, name


def test_what_the_package_shows_to_type_checkers_is_what_it_gives() -> None:
    shown = ast.parse((ROOT / "hetconv_kernels" / "__init__.py").read_text())
    names = {
        alias.asname or alias.name
        for node in ast.walk(shown)
        if isinstance(node, ast.ImportFrom) and node.level
        for alias in node.names
    }
    assert set(hk.__all__) <= names
    for name in hk.__all__:
        assert getattr(hk, name) is not None
