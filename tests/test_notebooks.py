# SPDX-License-Identifier: Apache-2.0
"""The notebooks run from top to bottom, and hold nothing that only one machine has seen."""

from __future__ import annotations

import builtins
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import hetconv_kernels as hk
from hetconv_kernels import compression

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
NAMES = [path.stem for path in NOTEBOOKS]
# What a notebook needs beyond the package.
NEEDS = {
    "quick_start": ("safetensors",),
    "compress": ("sklearn", "safetensors"),
    "quantise": ("sklearn", "onnx", "onnxscript"),
}


def cells(path: Path, kind: str) -> list[str]:
    """Lists the sources of the cells of a kind."""
    found = json.loads(path.read_text())["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == kind]


def test_the_notebooks_are_these_and_docs_and_readme_lead_to_them() -> None:
    assert set(NAMES) == {"quick_start", "compress", "quantise", "profile"}
    page = (ROOT / "docs" / "ecosystem.md").read_text()
    assert all(f"notebooks/{path.name}" in page for path in NOTEBOOKS)
    assert "examples/notebooks" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_a_notebook_runs(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for module in NEEDS.get(path.stem, ()):
        pytest.importorskip(module, reason=f"{module} is not installed")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "notebook"}
    monkeypatch.setitem(sys.modules, "notebook", type(sys)("notebook"))
    threads = torch.get_num_threads()
    try:
        for number, text in enumerate(cells(path, "code")):
            exec(compile(text, f"{path.name}, cell {number}", "exec"), namespace)
    finally:
        torch.set_num_threads(threads)


def test_a_notebook_that_fails_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = json.loads(NOTEBOOKS[0].read_text())
    broken["cells"] = [{"cell_type": "code", "source": ["x = 1\n", "assert x == 2"]}]
    path = tmp_path / "broken.ipynb"
    path.write_text(json.dumps(broken))
    with pytest.raises(AssertionError):
        test_a_notebook_runs(path, monkeypatch, tmp_path)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_a_notebook_is_whole_and_holds_no_outputs(path: Path) -> None:
    found = json.loads(path.read_text())
    assert (found["nbformat"], found["metadata"]["license"]) == (4, "Apache-2.0")
    assert len({cell["id"] for cell in found["cells"]}) == len(found["cells"])
    for cell in found["cells"]:
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
    assert cells(path, "markdown")[0].startswith("# ")
    assert len(path.read_text().splitlines()) < 400


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_what_the_words_of_a_notebook_name_is_there(path: Path) -> None:
    import re

    for text in cells(path, "markdown"):
        for target in re.findall(r"\]\(([^)]+)\)", text):
            assert (path.parent / target).exists(), target
        for name in re.findall(r"`(\w+)\(?`", text):
            known = [hk, hk.nn, hk.methods, hk.datasets, compression, torch, builtins]
            given = name in ("max_drop", "onnx", "onnxscript", "p")
            assert given or any(hasattr(module, name) for module in known), name
