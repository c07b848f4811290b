# SPDX-License-Identifier: Apache-2.0
"""README's code, run as printed with an install: what CI and the roots of releases run too."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / ".ci" / "first_screen.py"


def first_screen(readme: Path, python: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [python, SCRIPT, readme], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment of its own with the package in it, and no compiler on its path."""
    place = tmp_path_factory.mktemp("installed")
    venv.create(place / "env", with_pip=False, symlinks=True)
    (packages,) = (place / "env").glob("lib/python*/site-packages")
    others = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "others.pth").write_text("\n".join(others) + "\n")
    shutil.copytree(
        ROOT / "hetconv_kernels",
        packages / "hetconv_kernels",
        ignore=shutil.ignore_patterns("__pycache__", "_cuda*.so"),
    )
    return place / "env" / "bin" / "python"


def test_code_runs_as_printed_with_the_install(installed: Path, tmp_path: Path) -> None:
    """Two blocks; README's own run in test_docs, and with installs in CI's distributions."""
    readme = tmp_path / "README.md"
    readme.write_text(
        "```python\nimport torch, hetconv_kernels as hk\nlayer = hk.nn.HetConv2d(8, 8, 3)\n"
        "print(layer)\n```\n\nText.\n\n"
        "```python\nprint(layer(torch.randn(1, 8, 5, 5)).shape)\n```\n"
    )
    done = first_screen(readme, installed, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "torch.Size([1, 8, 3, 3])" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("README: 2 blocks ran with ")
    assert str(installed.parents[1]) in done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("no code", "has no code"),
        ("```python\nx = 1\n```\n", "Block 1 printed nothing"),
        ("```python\nprint(undefined)\n```\n", "NameError"),
        ("```python\nprint(1)\n```\n\n```python\nprint(y)\n```\n", "README, block 2"),
    ],
    ids=["none", "silent", "error", "second"],
)
def test_what_does_not_run_as_printed_fails(text: str, says: str, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(text)
    done = first_screen(readme, Path(sys.executable), tmp_path)
    assert done.returncode == 1
    assert says in done.stderr


def test_the_source_tree_is_not_taken_for_the_install(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("```python\nprint(1)\n```\n")
    (tmp_path / "hetconv_kernels").mkdir()
    (tmp_path / "hetconv_kernels" / "__init__.py").write_text("")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, str(SCRIPT), str(readme)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "source tree" in done.stderr
