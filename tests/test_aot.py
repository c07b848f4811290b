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
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import aot
import pytest
import shipped

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "aot"
BACKENDS = ROOT / "hetconv_kernels" / "backends"
# What a configuration and its machine code depend on; and the devices, which say how deep it goes.
KERNELS = ("fprop", "fprop_tma", "wgrad", "wgrad_tma", "epilogue", "tiles")
TABLES = ("device_words", "fields", "geometry", "words")
SOURCES = [
    *(BACKENDS / "triton" / f"{name}.py" for name in KERNELS + TABLES),
    BACKENDS / "gpu" / "devices.py",
    *(ROOT / "tests" / name for name in ("aot.py", "shipped.py")),
]
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


def compiled(
    root: Path, capability: int, expression: str, out: Path
) -> subprocess.CompletedProcess[str]:
    """Compiles the kernels of a tree in a process without the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = [OTHER, str(root), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return subprocess.run(
        [
            sys.executable,
            str(ROOT / "tests" / "aot.py"),
            *("--capability", str(capability), "--name", expression, "--out", str(out)),
        ],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def rows(capability: int, pattern: str) -> dict[str, dict[str, Any]]:
    """Compiles, in a process without the interpreter, what is not known yet; returns all rows."""
    path = FOLDER / f"sm{capability}-{digest()}.json"
    known = {r["name"]: r for r in json.loads(path.read_text())} if path.exists() else {}
    names = [c.name for c in shipped.chosen(capability, pattern)]
    missing = [name for name in names if name not in known]
    if missing:
        FOLDER.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        done = compiled(ROOT, capability, "^(" + "|".join(missing) + ")$", part)
        assert part.exists(), done.stdout + done.stderr
        known |= {r["name"]: r for r in json.loads(part.read_text())}
        part.write_text(json.dumps(list(known.values()), indent=1) + "\n")
        part.replace(path)
    return {name: known[name] for name in names}


@pytest.mark.parametrize("configuration", shipped.chosen(90), ids=lambda c: c.name)
def test_hopper(configuration: shipped.Configuration, request: pytest.FixtureRequest) -> None:
    """Those that this session is to look at are compiled by one process."""
    asked = {
        item.callspec.params["configuration"].name
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.originalname == "test_hopper"
    }
    row = rows(90, f"^({'|'.join(sorted(asked))})$")[configuration.name]
    assert row["problems"] == [], row


@pytest.mark.parametrize("capability", [80, 100, 120])
def test_other_generations(capability: int) -> None:
    found = rows(capability, "" if EVERYTHING else ONE_TILE)
    assert len(found) >= (20 if EVERYTHING else 2)
    assert {name: row["problems"] for name, row in found.items() if row["problems"]} == {}


def test_the_digest_follows_every_kernel() -> None:
    for path in (BACKENDS / "triton").glob("*.py"):
        assert ("@triton.jit" not in path.read_text()) or path in SOURCES, path


def test_no_more_than_50_configurations_are_shipped() -> None:
    names = [c.name for c in shipped.configurations()]
    assert len(names) == len(set(names)) <= 50


SABOTAGE = {  # file, what is replaced, by what, which configuration
    "word-read-where-used": (
        "fprop.py",
        "        following = tl.load(words + s + 1)\n",
        "        word = tl.load(words + s)\n        following = word\n",
        "gather-bf16-128x128x64",
    ),
    "offset-without-its-factor": (
        "fprop.py",
        "offset = (k_h * step_h + k_w * step_w) * UNIT + channel\n",
        "offset = k_h * step_h + k_w * step_w + channel\n",
        "gather-bf16-128x64x64",
    ),
    "box-word-read-where-used": (
        "fprop_tma.py",
        "            following = tl.load(words + s + 1)  # one step ahead, see `fprop`\n",
        "            word = tl.load(words + s)\n            following = word\n",
        "tma-bf16-128x64x64-1x16x8",
    ),
}


@pytest.mark.parametrize("fault", SABOTAGE if EVERYTHING else list(SABOTAGE)[:1])
def test_a_kernel_that_loses_its_pipeline_fails(fault: str, tmp_path: Path) -> None:
    """Damages a copy of the kernels as a careless change would, and compiles it."""
    name, right, wrong, configuration = SABOTAGE[fault]
    package = tmp_path / "hetconv_kernels"
    shutil.copytree(
        ROOT / "hetconv_kernels", package, ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    path = package / "backends" / "triton" / name
    text = path.read_text()
    assert text.count(right) == 1
    path.write_text(text.replace(right, wrong))
    part = tmp_path / "rows.json"
    done = compiled(tmp_path, 90, f"^{configuration}$", part)
    assert done.returncode == 1, done.stdout + done.stderr
    (row,) = json.loads(part.read_text())
    assert any("buffers for" in p or "synchronous" in p for p in row["problems"]), row


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
    assert aot.shortcomings(GOOD, configuration) == []
    found = aot.shortcomings(dataclasses.replace(GOOD, **change), configuration)
    assert len(found) == 1
    assert words in found[0]


LOOP = [
    "HMMA.16816.F32 R4, R8, R10, R4",
    "{load}",
    "@P0 BRA 0x10",
    "LDG.E.64 R2, desc[UR4][R2.64]",
    "EXIT",
    "@!P0 BRA {back}",
]


@pytest.mark.parametrize(
    ("load", "back", "loads"),
    [
        ("LDG.E.128 R16, desc[UR4][R2.64]", "0x60", 1),
        ("LDG.E R16, desc[UR4][R2.64]", "0x60", 0),
        ("LDGSTS.E.128 [R5], desc[UR4][R2.64]", "0x60", 0),
        ("LDGSTS.E.128 [R5], desc[UR4][R2.64]", "0x10", 0),
    ],
    ids=["operand", "word", "asynchronous", "a wait behind the end"],
)
def test_loads_are_counted_where_the_loop_is(load: str, back: str, loads: int) -> None:
    lines = [text.format(load=load, back=back) for text in LOOP]
    sass = "\n".join(f"/*{16 * i:04x}*/   {text} ;" for i, text in enumerate(lines, 1))
    assert aot._loads_in_loop(sass) == loads


@pytest.mark.parametrize(("rings", "fine"), [([2, 3, 3, 3], True), ([2, 2, 3, 3], False)])
def test_wgrads_boxes_need_every_stage_of_x(rings: list[int], fine: bool) -> None:
    configuration = next(c for c in shipped.configurations() if c.kernel == "wgradtma")
    assert configuration.taps == 3
    found = dataclasses.replace(GOOD, stages=3, buffers=rings, from_shared=True)
    assert (aot.shortcomings(found, configuration) == []) == fine


def test_the_interpreter_is_refused_before_it_compiles_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert aot.main(["--capability", "90"]) == 2
    assert "unset TRITON_INTERPRET" in capsys.readouterr().out


def test_a_box_that_goes_through_registers_is_noticed() -> None:
    boxed = next(c for c in shipped.configurations() if c.box is not None)
    assert aot.shortcomings(dataclasses.replace(GOOD, from_shared=True), boxed) == []
    assert aot.shortcomings(GOOD, boxed) == ["an operand of the product goes through registers"]
