# SPDX-License-Identifier: Apache-2.0
"""Machine code without a GPU: every Hopper configuration, and one tile for each other generation.

`make aot` compiles all of them for all generations and with the oldest supported Triton. Results
are kept in build/aot by what they are made from, so that only a change of a kernel compiles again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from hetconv_kernels.backends.triton import aot, shipped

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "aot"
SOURCES = sorted((ROOT / "hetconv_kernels" / "backends" / "triton").glob("*.py"))
ONE_TILE = r"^(gather-bf16-128x128x64|wgrad-bf16-64x128x128)$"
# A Triton beside the installed one, as `make aot` gives the oldest.
OTHER = os.environ.get("HETCONV_AOT_TRITON", "")
EVERYTHING = os.environ.get("HETCONV_AOT_ALL") == "1"

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


def digest() -> str:
    """Names what the results are made from: the kernels' sources, and Triton's version."""
    version = OTHER or metadata.version("triton")
    text = b"".join(path.read_bytes() for path in SOURCES)
    return f"{hashlib.sha256(text + version.encode()).hexdigest()[:16]}"


def rows(capability: int, pattern: str) -> dict[str, dict[str, Any]]:
    """Compiles, in a process without the interpreter, what is not known yet; returns all rows."""
    path = FOLDER / f"sm{capability}-{digest()}.json"
    known = {r["name"]: r for r in json.loads(path.read_text())} if path.exists() else {}
    names = [c.name for c in shipped.chosen(capability, pattern)]
    missing = [name for name in names if name not in known]
    if missing:
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        if OTHER:
            paths = [OTHER, str(ROOT), environment.get("PYTHONPATH", "")]
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        FOLDER.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        expression = "^(" + "|".join(missing) + ")$"
        done = subprocess.run(
            [
                sys.executable,
                *("-m", "hetconv_kernels.backends.triton.aot"),
                *("--capability", str(capability), "--name", expression, "--out", str(part)),
            ],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert part.exists(), done.stdout + done.stderr
        known |= {r["name"]: r for r in json.loads(part.read_text())}
        part.write_text(json.dumps(list(known.values()), indent=1) + "\n")
        part.replace(path)
    return {name: known[name] for name in names}


@pytest.mark.parametrize("configuration", shipped.chosen(90), ids=lambda c: c.name)
def test_hopper(configuration: shipped.Configuration) -> None:
    row = rows(90, "")[configuration.name]
    assert row["problems"] == [], row


@pytest.mark.parametrize("capability", [80, 100, 120])
def test_other_generations(capability: int) -> None:
    found = rows(capability, "" if EVERYTHING else ONE_TILE)
    assert len(found) >= (20 if EVERYTHING else 2)
    assert {name: row["problems"] for name, row in found.items() if row["problems"]} == {}


def test_no_more_than_40_configurations_are_shipped() -> None:
    names = [c.name for c in shipped.configurations()]
    assert len(names) == len(set(names)) <= 40


# The assertions can fail ------------------------------------------------------------------------

GOOD = aot.Compiled(
    name="gather-bf16-128x128x64",
    capability=90,
    stages=4,
    buffers=[4, 4],
    from_shared=False,
    matrix={"HGMMA": 8},
    copies={"LDGSTS": 8},
    registers=128,
    stack=0,
    spills=0,
    local=0,
    shared=131072,
    limit=232448,
    loads=0,
    seconds=1.0,
    triton="3.9.0",
)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"matrix": {"HMMA": 64}}, "no HGMMA"),
        ({"copies": {}}, "no asynchronous copies"),
        ({"buffers": [4, 2]}, "buffers for 4 stages"),
        ({"buffers": [4]}, "buffers for 4 stages"),
        ({"stack": 336}, "336 B of stack"),
        ({"local": 2}, "2 local accesses"),
        ({"shared": 300000}, "300000 B of shared memory"),
        ({"loads": 16}, "16 synchronous loads"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else "-".join(value),
)
def test_lost_speed_is_noticed(change: dict[str, Any], words: str) -> None:
    configuration = shipped.configurations()[0]
    assert configuration.name == GOOD.name
    assert aot.problems(GOOD, configuration) == []
    found = aot.problems(dataclasses.replace(GOOD, **change), configuration)
    assert len(found) == 1
    assert words in found[0]


def test_a_box_that_goes_through_registers_is_noticed() -> None:
    boxed = next(c for c in shipped.configurations() if c.box is not None)
    assert aot.problems(dataclasses.replace(GOOD, from_shared=True), boxed) == []
    assert aot.problems(GOOD, boxed) == ["an operand of the product goes through registers"]
