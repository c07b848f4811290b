# SPDX-License-Identifier: Apache-2.0
"""The files and modules of the tree."""

from __future__ import annotations

import pkgutil
from pathlib import Path

import hetconv_kernels as hk

ROOT = Path(__file__).resolve().parents[1]


FOLDERS = (
    ".ci",
    "benchmarks",
    "constraints",
    "csrc",
    "docs",
    "examples",
    "hetconv_kernels",
    "tests",
)


GENERATED = {"hetconv_kernels/_build.json"}


def files_with(suffixes: set[str]) -> list[Path]:
    """Lists the files of the tree that people wrote, relative to its root."""
    below = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    return sorted(
        path.relative_to(ROOT)
        for path in [*below, *ROOT.iterdir()]
        if path.is_file()
        and path.suffix in suffixes
        and not {"__pycache__", ".git"} & set(path.parts)
        and not any(part.endswith(".egg-info") for part in path.parts)
        and path.relative_to(ROOT).as_posix() not in GENERATED
    )


def read(path: Path | str) -> str:
    """Reads a file of the tree; a stray binary file is no reason to fail."""
    return (ROOT / path).read_text(errors="replace")


def modules() -> list[str]:
    """Lists the package's Python modules by their dotted names."""
    found = pkgutil.walk_packages(hk.__path__, prefix="hetconv_kernels.")
    return [
        module.name
        for module in found
        if module.name.split(".")[-1] not in ("_cpu", "_cuda", "__main__")
    ]
