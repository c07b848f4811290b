# SPDX-License-Identifier: Apache-2.0
"""`make gpu` rehearsed: each part fails, hangs or answers wrongly, and the others are measured.

The driver is the real one, and so are the processes, the choice of kernels and the table; only a
kernel's work is a stand-in's (tests/stand_in.py).
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import session, smoke
from benchmarks.watch import Log
from hetconv_kernels.backends.gpu import constants, parts
from hetconv_kernels.errors import BackendError

ROOT = Path(__file__).resolve().parents[1]
EVERYTHING = os.environ.get("HETCONV_AOT_ALL") == "1"
KINDS = ("fails", "hangs", "wrong")
# A child that is as quick as a part's process is not: it does at once what it is told to.
CHILD = """
import json, os, sys, time
name, faults = sys.argv[-1], json.loads(os.environ["STAND_IN"])
print(name, "starts", flush=True)
fault = faults.get(name)
while fault == "hangs": time.sleep(60)
if fault == "fails": os._exit(139)
print("result " + json.dumps({"status": "wrong" if fault else "ok", "detail": "by lot"}))
sys.exit(1 if fault else 0)
"""


def test_every_part_of_an_engine_has_a_check() -> None:
    assert set(smoke.CHECKS) == {*parts.PARTS, "cuda-rate"}
    assert {name.split("-")[0] for name in smoke.CHECKS[:6]} == {"cuda"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", smoke.CHECKS)
def test_each_fault_of_each_part_is_found_and_leaves_out_that_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: str
) -> None:
    monkeypatch.setenv("STAND_IN", json.dumps({name: kind}))
    few = [name, *[other for other in smoke.CHECKS if other != name][:1]]
    child = [sys.executable, "-c", CHILD]
    found = smoke.run_parts(few, child, 1.5, tmp_path, Log(tmp_path / "log"))
    named = {"fails": "failed", "hangs": "hung", "wrong": "wrong"}[kind]
    assert [found[each]["status"] for each in few] == [named, "ok"]
    assert json.loads((tmp_path / "smoke.json").read_text()) == found
    # What needs a faulty part is left out with it, and a probe is no part.
    needing = [other for other, needs in smoke.NEEDS.items() if name in needs]
    assert set(smoke.without(found)) == ({name, *needing} - {"cuda-rate"})
    assert smoke.left_out_because(name, found) == found[name]["detail"]
    assert {smoke.left_out_because(other, found) for other in needing} <= {f"it needs {name}"}
    said = (tmp_path / "log").read_text()
    assert said.index(f"smoke: {name} begins") < said.index(f"{name} starts")


def rehearsed(folder: Path, faults: dict[str, str], limit: float) -> Any:
    """Runs the whole session with a stand-in; returns its status, words, findings and rows."""
    python = f"{sys.executable} {ROOT / 'tests' / 'stand_in.py'}"
    command = [sys.executable, "-m", "benchmarks.session", "--no-build", "--tests"]
    command += ["--results", str(folder), "--python", python, "--limit", str(limit)]
    command += ["--quiet", str(limit), "--seconds", "500"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"STAND_IN": json.dumps(faults), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=560,
    )
    path = folder / "primitives-quick.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    found = json.loads((folder / "smoke.json").read_text())
    return done.returncode, done.stdout + done.stderr, found, rows


stands_in = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or torch.cuda.is_available(),
    reason="needs Triton, and no GPU",
)
# With HETCONV_AOT_ALL=1 every part has each fault in one of the rehearsals, and is right in one.
FAULTS = [
    {
        name: kind
        for place, name in enumerate(smoke.CHECKS)
        if (kind := (*KINDS, "")[(place + turn) % 4])
    }
    for turn in range(4)
]
# On an ordinary day one part hangs: each waits for its limit.
SOME_FAULTS = {"cuda-cluster": "wrong", "cuda-tma": "hangs", "triton-wgrad": "fails"}


@stands_in
@pytest.mark.parametrize("faults", FAULTS if EVERYTHING else [SOME_FAULTS])
def test_a_whole_session_brings_the_table_of_the_parts_that_are_right(
    tmp_path: Path, faults: dict[str, str]
) -> None:
    status, said, found, rows = rehearsed(tmp_path, faults, limit=25)
    assert status == 1, said
    named = {"fails": "failed", "hangs": "hung", "wrong": "wrong"}
    needed = {n for n, needs in smoke.NEEDS.items() if faults.keys() & set(needs)}
    for name in smoke.CHECKS:
        if name not in needed:
            assert found[name]["status"] == named.get(faults.get(name, ""), "ok"), said
    # All rows are there, with times of dense, and with each engine that has a part for them.
    assert [(r["case"]["name"], r["verb"]) for r in rows] == list(
        itertools.product(("gpu-narrow", "gpu-wide"), ("fprop", "dgrad", "wgrad"))
    ), said
    good = set(smoke.CHECKS) - faults.keys() - needed
    for row in rows:
        assert "dense" in row["timings"]["variants"]
        parts_of_row = {"triton-wgrad", "triton-wgrad-tma"}
        if row["verb"] != "wgrad":
            # Boxes are for where the CUDA engine's wide kernel is not built, or left out.
            wide = "cuda-wide" in good
            parts_of_row = {"triton-gather"} if wide else {"triton-gather", "triton-tma"}
        ours = [name for name in row["timings"]["variants"] if name.startswith("ours")]
        assert bool(good & parts_of_row) == ("ours" in ours), (row["case"]["name"], row["verb"])
        if row["case"]["name"] == "gpu-wide" and row["verb"] != "wgrad":
            assert ("cuda-wide" in good) == ("ours-cuda" in ours)
    log = (tmp_path / "gpu.log").read_text()
    for name in faults.keys() - {"cuda-rate"}:
        assert f"make gpu: {name} is LEFT OUT" in log
    assert "verdict" in log  # the table itself


@stands_in
@pytest.mark.parametrize("kind", ["hangs", "ends", "wrong"])
def test_a_fault_after_the_smoke_tests_costs_one_variant(tmp_path: Path, kind: str) -> None:
    if kind != "wrong" and not EVERYTHING:
        pytest.skip("HETCONV_AOT_ALL=1 runs it: it waits for a hang in each row")
    faults = {"cuda-cluster": f"later-{kind}"}
    status, said, found, rows = rehearsed(tmp_path, faults, limit=20)
    assert status == 1, said
    assert all(check["status"] == "ok" for check in found.values()), found
    assert len(rows) == 6
    for row in rows:
        assert row["median_s"] > 0
        bad = row["case"]["name"] == "gpu-wide" and row["verb"] != "wgrad"
        assert list(row.get("left_out", {})) == (["ours-cuda"] if bad else []), said


@stands_in
def test_a_table_fills_the_constants_of_auto(tmp_path: Path) -> None:
    """From the rows that a GPU's session writes to the entry of that GPU, by the commands."""
    stand_in = [sys.executable, str(ROOT / "tests" / "stand_in.py"), "-m"]
    environment = os.environ | {"STAND_IN_BATCHES": "[2, 1, 3]", "PYTHONPATH": str(ROOT)}
    out = tmp_path / "constants.json"

    def run(*command: str) -> tuple[int, str]:
        done = subprocess.run(
            [*stand_in, *command, "--results", str(tmp_path)],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr

    calibrate = ("benchmarks.calibrate", "--device", "cuda", "--out", str(out))
    assert run(*calibrate)[0] == 2  # nothing was measured
    status, said = run("benchmarks.primitives", "--worker")
    assert status == 0, said
    assert len(json.loads((tmp_path / "primitives-quick.json").read_text())["rows"]) == 18
    assert not out.exists()
    status, said = run(*calibrate)
    assert status == 0, said
    assert "no fit has seen, committed: {'cases': 9" in said
    assert "no fit has seen, fitted: {'cases': 9" in said
    written = json.loads(out.read_text())
    entry = written["devices"]["rehearsed"]
    assert (entry["measured"], entry["rows"]) == (True, 9)
    assert 0 < entry["vendor"] <= 1.5
    nominal = written["nominal"]
    assert nominal == json.loads(constants.CONSTANTS_FILE.read_text())["nominal"]
    # Both engines have rows enough, so that both shares are of this clock and not nominal.
    for engine, share in entry["ours"].items():
        assert 0 < share != nominal["ours"][engine], engine


def test_the_driver_needs_the_standard_library_only() -> None:
    code = "import sys, benchmarks.session; print({'torch', 'numpy'} & sys.modules.keys())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


def test_tests_of_cuda_come_first_and_none_is_forgotten() -> None:
    found = session.tests()
    assert found[:3] == [f"tests/test_gpu_{n}.py" for n in ("cuda_wide", "cuda", "engines")]
    assert {"tests/test_gpu.py", "tests/test_gpu_triton.py"} <= set(found)
    assert len(found) == len(set(found))


def test_a_test_is_named_before_it_begins(tmp_path: Path) -> None:
    file = tmp_path / "test_it.py"
    file.write_text(
        "def test_a():\n    print('own')\n\ndef test_b():\n    import os\n    os._exit(9)\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.announce", str(file)]
    done = subprocess.run(
        [*command, "-c", os.devnull, "--rootdir", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    begun = [line for line in done.stdout.splitlines() if line.startswith("begin ")]
    assert [line.rpartition("::")[2] for line in begun] == ["test_a", "test_b"], done.stdout


@pytest.mark.parametrize("text", ["", "cuda-wide", "cuda-wide, triton-tma"])
def test_parts_are_read_from_a_list(text: str) -> None:
    assert parts.named(text) == {name.strip() for name in text.split(",") if name}


def test_an_unknown_part_is_refused() -> None:
    with pytest.raises(BackendError, match="HETCONV_WITHOUT: received 'cuda-wild'"):
        parts.named("cuda-wide,cuda-wild")
