# SPDX-License-Identifier: Apache-2.0
"""The tables of all methods, at their smallest, and what the full runs recorded."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import hetconv_kernels as hk
from benchmarks import method_tables, methods, summary
from benchmarks.data import PHOTOGRAPH_FILES
from benchmarks.method_rows import METHOD_NETWORKS, rows, speed_methods
from benchmarks.problems import (
    ACCURACY_TOLERANCE,
    PROBLEMS,
    PSNR_TOLERANCE,
    Denoising,
    TaskSettings,
)
from benchmarks.report.schema import METHODS_SCHEMA, METHODS_TABLE_SCHEMA, problems
from hetconv_kernels import compression
from hetconv_kernels.measure import timing

pytest.importorskip("sklearn", reason="the digits and photographs come with scikit-learn")
pytestmark = pytest.mark.one_thread
FOLDER = Path(methods.__file__).parent
TOLERANCES = {"digits": ACCURACY_TOLERANCE, "psnr": PSNR_TOLERANCE}
FULL = TaskSettings(15, 5, 30, 30, 0.01, 0.01, 0.1)


@pytest.fixture(autouse=True)
def small(monkeypatch: Any) -> None:
    """Samples are of single calls: their times are not looked at."""
    short = functools.partial(timing.interleaved, min_time=0.0)
    monkeypatch.setattr(timing, "interleaved", short)


def quick(tmp_path: Path, part: str, *more: str) -> Any:
    words = ["--quick", "--part", part, "--seconds", "0.001", "--out", str(tmp_path / "work")]
    assert methods.main([*words, "--publish", str(tmp_path), *more]) == 0
    return json.loads((tmp_path / f"methods-{part}.json").read_text())


def titles() -> set[str]:
    classes = [value for value in vars(compression).values() if isinstance(value, type)]
    return {c.title for c in classes if issubclass(c, compression.Method) and c.title}


@pytest.mark.parametrize("part", ["digits", "psnr"])
def test_quick_run_has_every_method(part: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(Denoising, "photographs", tmp_path / "none")
    record = quick(tmp_path, part)
    assert problems(record, METHODS_SCHEMA) == []
    for paper in (True, False) if part == "digits" else (True,):
        assert {r["method"] for r in record[part] if r["paper"] is paper} == titles()
    text = (tmp_path / "methods.md").read_text()
    for row in record[part]:
        assert row["name"] in text
        assert row["macs"][1] > 0
        assert min(row["seconds"]) > 0
        dense, found = row[f"test_{'psnr' if part == 'psnr' else 'accuracy'}"]
        fits = found >= dense - TOLERANCES[part]
        assert row["within"] == (fits and row["macs"][1] <= row["macs"][0] / 2)
        assert not row["elsewhere"]


def test_a_denoiser_is_judged_on_photographs_that_were_fetched(
    tmp_path: Path, monkeypatch: Any
) -> None:
    images = pytest.importorskip("PIL.Image")
    folder = tmp_path / "photographs"
    folder.mkdir()
    for place, name in enumerate(PHOTOGRAPH_FILES):
        grey = torch.arange(64 * 80, dtype=torch.int64).reshape(64, 80).mul(place + 1) % 256
        rgb = grey[..., None].expand(-1, -1, 3).to(torch.uint8).numpy()
        images.fromarray(rgb).save(folder / name)
    monkeypatch.setattr(Denoising, "photographs", folder)
    row = quick(tmp_path, "psnr", "--only", "WSP")["psnr"][0]
    assert [Path(name).stem for name in PHOTOGRAPH_FILES] == [*row["elsewhere"]]
    problem = PROBLEMS["psnr"](tmp_path / "work" / "psnr", True)
    dense = problem.elsewhere(problem.standard)
    assert {name: pair[0] for name, pair in row["elsewhere"].items()} == dense
    for before, after in row["elsewhere"].values():
        assert 5 < after < 60
        assert before != after
    monkeypatch.setattr(summary, "methods", lambda: {"psnr": {"psnr": [row]}})
    header, _, line = summary.methods_table("psnr").splitlines()
    assert header.endswith("| on 7 other photographs | of dense |")
    assert line.split("|")[-2].strip() == f"{sum(dense.values()) / 7:.2f}"


def test_a_second_call_goes_on_and_a_third_measures_anew(tmp_path: Path, monkeypatch: Any) -> None:
    made = []
    real = methods.quality

    def counted(problem: Any, row: Any, seconds: float) -> Any:
        made.append(row.name)
        return real(problem, row, seconds)

    monkeypatch.setattr(methods, "quality", counted)
    first = quick(tmp_path, "psnr", "--only", "WSP 60 %")["psnr"]
    assert made == ["WSP 60 %", "WSP 60 %, widths of 8"]
    both = quick(tmp_path, "psnr", "--only", "HetConv p=4, projected")["psnr"]
    assert made[2:] == ["HetConv p=4, projected"]  # what is there is not made again
    assert [r["name"] for r in both] == ["HetConv p=4, projected", *made[:2]]
    assert both[1:] == first
    anew = quick(tmp_path, "psnr", "--only", "widths of 8", "--again")["psnr"]
    assert made[3:] == ["WSP 60 %, widths of 8"]
    assert anew[:2] == both[:2]
    # The network is the trained one; its time is another.
    for key in ("test_psnr", "history", "macs"):
        assert anew[2][key] == both[2][key]
    assert anew[2]["seconds"] != both[2]["seconds"]
    assert anew[2]["took_s"] >= both[2]["took_s"]


def test_speed_of_one_network(tmp_path: Path, monkeypatch: Any) -> None:
    network = hk.models.resnet20, (1, 3, 32, 32), ("layer1.*",)
    monkeypatch.setattr(methods, "METHOD_NETWORKS", {"ResNet-20": network})
    record = quick(tmp_path, "speed")
    assert problems(record, METHODS_SCHEMA) == []
    (row,) = record["speed"]
    assert (row["network"], row["name"]) == ("ResNet-20", next(iter(speed_methods("ResNet-20"))))
    ratios = {layer["name"]: layer["macs"][0] / layer["macs"][1] for layer in row["layers"]}
    assert ratios["layer2.1.conv1"] == pytest.approx(3)  # p = 4: 9 / (9/4 + 3/4)
    assert ratios["layer1.0.conv1"] == 1


def test_lines_of_the_speed_part_are_of_all_networks(tmp_path: Path) -> None:
    names = [name for name, _ in methods.cases("speed", tmp_path, False, 1)]
    assert len(names) == len(set(names)) == sum(len(speed_methods(n)) for n in METHOD_NETWORKS)


def test_settings_of_the_full_run_are_those_of_the_papers_where_they_say_so() -> None:
    for row in rows(FULL):
        hardware = {"granularity": 1, "tile": 0, "multiple": 1, "bands": False,
                    "projection": "irregular"}  # fmt: skip
        settings = dataclasses.asdict(row.method)
        ours = [name for name, value in hardware.items() if settings.get(name, value) != value]
        assert not (row.paper and ours), row.name


def record_of(name: str, part: str, **more: Any) -> dict[str, Any]:
    judged = {"tolerance": 0.5, "within": False, "paper": True} | more
    quality = {"network": "net"} if part == "speed" else judged
    return {
        "name": name, "method": "m", "settings": {}, "layers": [], "live": [8, 2], "macs": [9, 3],
        "seconds": [0.004, 0.002], "speedup": [2.0, 1.5, 2.5], "macs_saved": 2 / 3,
        "compacted": True, **quality,
    }  # fmt: skip


def test_the_joined_table_has_a_cell_for_what_was_measured() -> None:
    parts = {
        "digits": [record_of("a", "digits", test_accuracy=[0.99, 0.985], within=True)],
        "psnr": [record_of("a", "psnr", test_psnr=[31.25, 30.5])],
        "speed": [record_of("b of 8", "speed")],
    }
    table = method_tables.joined_table(parts)
    assert problems(table, METHODS_TABLE_SCHEMA) == []
    assert table["columns"] == ["digits", "psnr", "net"]
    first, second = table["rows"]
    assert (first["name"], first["form"], second["form"]) == ("a", "paper", "ours")
    assert first["cells"].keys() == {"digits", "psnr"}
    assert first["cells"]["psnr"]["quality"] == [31.25, 30.5]
    assert second["cells"]["net"]["macs_ratio"] == 3
    lines = method_tables.joined_markdown(table).splitlines()
    speed = "3.00× | 2.00× [1.50, 2.50]"
    assert lines[4] == (
        f"| a | paper | 0.985 (0.990) | {speed} | **30.50 (31.25)** | {speed} |  |  |"
    )
    assert lines[5] == f"| b of 8 | ours |  |  |  |  |  |  | {speed} |"
    assert len({line.count("|") for line in lines[2:6]}) == 1
    for part, records in parts.items():
        text = method_tables.part_table(part, records)
        assert "2.00× [1.50, 2.50]" in text
        assert ("NO" in text) == (part == "psnr")


def test_a_departure_from_the_schema_is_not_published(tmp_path: Path) -> None:
    wrong = {"format": "other", "environment": {}, "seconds": 1.0, "digits": [{"name": 3}]}
    with pytest.raises(ValueError, match=r"methods-digits.json departs from its schema"):
        methods.publish({"digits": wrong}, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("part", methods.METHOD_PARTS)
def test_records_of_the_full_runs_are_of_these_rows(part: str, tmp_path: Path) -> None:
    path = FOLDER / f"methods-{part}.json"
    if not path.exists():
        pytest.skip("the full run was not recorded yet")
    record = json.loads(path.read_text())
    assert problems(record, METHODS_SCHEMA) == []
    names = [f"{r['network']}: {r['name']}" if part == "speed" else r["name"] for r in record[part]]
    if part == "speed":
        assert names == [name for name, _ in methods.cases(part, tmp_path, False, 1)]
        return
    problem = PROBLEMS[part](tmp_path, False)
    chosen = [row.name for row in rows(problem.settings)]
    assert names == [n for n in chosen if part == "digits" or n not in methods.ONCE]
    for row in record[part]:
        key = method_tables.quality_key([row])
        assert row[key][0] > {"test_accuracy": 0.97, "test_psnr": 29}[key]
        # Where the predicted path is the dense one, nothing is saved; the table says so.
        if part == "digits" and row["paper"] and "by prediction" not in row["name"]:
            assert row["within"], f"{row['name']}: {row[key]}, {row['macs']}"


def test_the_joined_table_is_that_of_the_records(tmp_path: Path) -> None:
    parts = {p: json.loads(path.read_text())[p] for p in methods.METHOD_PARTS
             if (path := FOLDER / f"methods-{p}.json").exists()}  # fmt: skip
    table = json.loads((FOLDER / "methods.json").read_text())
    assert problems(table, METHODS_TABLE_SCHEMA) == []
    assert table == json.loads(json.dumps(method_tables.joined_table(parts)))
    assert (FOLDER / "methods.md").read_text() == method_tables.joined_markdown(table)
