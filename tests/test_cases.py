# SPDX-License-Identifier: Apache-2.0
"""The benchmarks' own logic: cases, rivals, the gate and the record."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import fresh
import pytest
import torch
from torch.nn import functional

import hetconv_kernels as hk
from benchmarks import baselines, gate, make_supports, record, supports, table
from benchmarks.cases import CPU_CASES, GPU_CASES, GPU_SHAPES, Case, SupportSpec
from benchmarks.held_out import HELD_OUT_CASES
from benchmarks.report.schema import DISPATCH_ROW
from benchmarks.rig import OURS, Rig
from hetconv_kernels.measure import timing
from hetconv_kernels.measure.roofline import Roofs
from hetconv_kernels.measure.timing import Timings

ROOT = Path(__file__).parents[1]
BY_NAME = {case.name: case for case in (*CPU_CASES, *GPU_CASES, *HELD_OUT_CASES)}
TINY = {
    "dense": SupportSpec("dense"),
    "het": SupportSpec("het", 4),
    "het-uneven": SupportSpec("het", 5),
    "het-interleaved": SupportSpec("het", 4, "interleaved"),
    "het-depthwise": SupportSpec("het", 16),
    "grouped": SupportSpec("grouped", 4),
    "self-group": SupportSpec("self_group", supports.SMALL[0]),
    "learned-groups": SupportSpec("learned_groups", 4),
    "irregular": SupportSpec("irregular", 30),
}


def tiny(spec: SupportSpec, **more: Any) -> Case:
    return replace(Case("tiny", 2, 16, 32, 7, 6, 3, spec), **more)


# Cases -------------------------------------------------------------------------------------------


def test_names_are_unique_and_the_quick_subset_exists() -> None:
    from benchmarks.cases import _QUICK

    assert len(BY_NAME) == len(CPU_CASES) + len(GPU_CASES) + len(HELD_OUT_CASES)
    assert {case.name for case in CPU_CASES if case.quick} == _QUICK


@pytest.mark.parametrize(
    "report",
    [
        *(f"pytorch/pytorch/issues/{n}" for n in (73764, 43544, 34977, 70954, 53094)),
        "microsoft/nni/issues/2225",
        "irvinxav/Efficient-HetConv-Heterogeneous-Kernel-Based-Convolutions/issues/3",
        "QingbeiGuo/SG-CNN/issues/1",
        "ShichenLiu/CondenseNet/issues/3",
    ],
)
def test_each_report_of_slowness_is_a_named_case(report: str) -> None:
    named = [c for c in CPU_CASES if c.issue == f"https://github.com/{report}"]
    assert len(named) == 1
    assert named[0].name.rsplit("-", 1)[1] == report.rsplit("/", 1)[1]


def test_the_kinds_of_cases_that_must_not_be_missing() -> None:
    assert any(case.amp for case in CPU_CASES)
    assert {case.memory_format for case in CPU_CASES} == {"channels_last", "contiguous"}
    assert sum(case.expected == "lose" for case in CPU_CASES if case.quick) >= 3
    assert any(case.training for case in CPU_CASES if case.quick)
    rows = [case for case in GPU_CASES if case.quick]
    assert len(rows) == 6 * 4
    assert {(case.n, case.dtype) for case in rows} == {(128, "bfloat16")}


@pytest.mark.parametrize("family", ["vgg", "resnet", "densenet", "unet", "dncnn", "fpn", "odd"])
def test_every_family_of_networks_has_its_shapes(family: str) -> None:
    cases = [case for case in CPU_CASES if case.name.startswith(f"{family}-")]
    assert len(cases) >= 2
    assert all(case.output[0] > 0 for case in cases)
    assert family in ("vgg", "resnet") or any(case.quick for case in cases)
    if family == "odd":
        assert all(case.c % 8 or case.f % 8 for case in cases)


def test_a_record_names_its_command_without_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["/usr/bin/python3", "-m", "pytest", str(ROOT / "benchmarks"), "--rootdir", str(ROOT),
             "--results", "/somewhere/else/r"]  # fmt: skip
    monkeypatch.setattr(record.sys, "orig_argv", words)
    monkeypatch.setenv("HETCONV_ISA", "avx2")
    said = record.command()
    assert said.startswith("HETCONV_ISA=avx2 ")
    assert said.endswith("python -m pytest benchmarks --rootdir . --results r")


@pytest.mark.parametrize("c", [64, 128, 256, 512])
def test_the_speed_table_is_whole(c: int) -> None:
    size = {64: 56, 128: 28, 256: 14, 512: 7}[c]
    for support in ("het4", "het8", "het16", f"het{c}", "sg70", "sg90"):
        case = BY_NAME[f"8x{c}x{size}-{support}"]
        assert (case.n, case.c, case.f, case.h, case.k) == (8, c, c, size, 3)
        assert case.target is not None


def test_targets_stay_below_the_ratio_of_work() -> None:
    for case in CPU_CASES:
        if case.target is not None and case.support.kind == "het":
            support = case.build_support()
            assert 1 < case.target <= 1 / support.density, case.name


@pytest.mark.parametrize(
    "case",
    {
        c.build_support().digest: c for c in BY_NAME.values() if c.support.kind == "self_group"
    }.values(),
    ids=lambda case: case.name,
)
def test_committed_self_grouped_supports(case: Case) -> None:
    spec = case.support
    assert (
        supports.support_key(spec.value, case.c, case.f, case.k, spec.seed) in supports._committed()
    )
    support = case.build_support()
    assert support.density == pytest.approx(1 - spec.value / 100, abs=0.01)
    assert len(support.groups) >= 15
    assert len({len(group.filters) for group in support.groups}) > 1


def test_committed_supports_are_what_self_grouping_gives() -> None:
    pytest.importorskip("sklearn", reason="k-means comes from scikit-learn")
    made = supports.make_support(70, 64, 64, 3, 0)
    committed = supports.self_grouped(70, 64, 64, 3, 0)
    # Another version of k-means may cluster a few filters otherwise.
    shared = (made & committed).live / made.live
    assert shared > 0.5
    assert made.density == pytest.approx(committed.density, abs=0.01)
    entry = supports.entry_of(made)
    assert (len(entry["labels"]), entry["digest"]) == (64, f"{made.digest:016x}")


def test_only_supports_that_are_missing_or_named_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_supports, "make_support", lambda *_: hk.Support.dense(4, 4, 3))
    kept, named, missing = (60, 4, 4, 3, 0), (60, 4, 4, 3, 1), (60, 4, 4, 3, 2)
    known = {supports.support_key(*shape): {"as": "committed"} for shape in (kept, named)}
    name = supports.support_key(*named)
    found = make_supports.entries_for([kept, named, missing], known, {name})
    fresh_entry = supports.entry_of(hk.Support.dense(4, 4, 3))
    assert list(found.values()) == [{"as": "committed"}, fresh_entry, fresh_entry]
    assert set(make_supports.entries_for([named], known, set())) == {name}


def test_a_damaged_support_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    name = supports.support_key(70, 64, 64, 3, 0)
    entry = supports._committed()[name]
    wrong = {**entry, "labels": entry["labels"][::-1]}
    monkeypatch.setattr(supports, "_committed", lambda: {name: wrong})
    with pytest.raises(ValueError, match="another digest"):
        supports.self_grouped(70, 64, 64, 3, 0)


def test_work_of_a_case_by_hand() -> None:
    case = tiny(SupportSpec("het", 4), n=2, stride=2)
    support = case.build_support()
    live = 32 * (9 * 4 + 12)
    assert support.live == live
    assert case.output == (4, 3)
    assert case.macs(live) == live * 2 * 4 * 3 == 2 * support.macs(4, 3)
    assert case.bytes(live) == 4 * (2 * 16 * 7 * 6 + 2 * 32 * 4 * 3 + live)
    assert replace(case, training=True).macs(live) == 3 * case.macs(live)
    assert replace(case, amp=True).bytes(live) * 2 == case.bytes(live)


def test_gpu_shapes_are_what_the_networks_have() -> None:
    c, f, size, stride = GPU_SHAPES["r50-conv4s2"]
    case = BY_NAME["gpu-r50-conv4s2-128-het4"]
    assert (case.c, case.f, case.h, case.stride) == (c, f, size, stride) == (256, 256, 28, 2)
    assert case.output == (14, 14)


# Rivals and gate ---------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", TINY.values(), ids=TINY.keys())
@pytest.mark.parametrize("stride", [1, 2])
def test_rivals_compute_the_same_function(spec: SupportSpec, stride: int) -> None:
    case = tiny(spec, stride=stride)
    support = case.build_support()
    generator = torch.Generator().manual_seed(0)
    mask = torch.as_tensor(support.mask.copy())
    weight = torch.randn(case.f, case.c, 3, 3, generator=generator) * mask
    x = torch.randn(case.n, case.c, case.h, case.w, generator=generator)
    expected = functional.conv2d(x.double(), weight.double(), None, stride, 1)
    rivals = {"dense": baselines.dense_baseline(case, weight)}
    rivals |= baselines.compositions(case, support, weight)
    assert spec.kind == "dense" or len(rivals) > 1
    for name, module in rivals.items():
        torch.testing.assert_close(
            module(x).double(), expected, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("spec", TINY.values(), ids=TINY.keys())
def test_rig_passes_its_gate(
    spec: SupportSpec, dtype: str, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "rotations", lambda *_: 2)  # layers as small take thousands
    with torch.set_grad_enabled(training):
        bench = Rig(tiny(spec, dtype=dtype, training=training), "auto", rotate=True)
        match = bench.check()
    assert match.ok, match
    assert match.worst > 0  # a bound that nothing comes near would show nothing
    assert all(len(calls) == 2 for calls in bench.variants.values())


@pytest.mark.parametrize("backend", hk.available_backends("cpu"))
def test_rig_runs_the_backend_it_was_told(backend: str) -> None:
    with torch.no_grad():
        bench = Rig(tiny(TINY["het"], amp=True), backend)
        assert bench.check().ok
    assert bench.ran() == backend


def test_gate_refuses_a_missing_weight_a_shift_and_nan() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 64, 9, 9, generator=generator)
    weight = torch.randn(32, 64, 3, 3, generator=generator)
    truth = gate.truth(x, weight, None, stride=1, padding=1, dtype=torch.float32)
    right = functional.conv2d(x, weight, padding=1)
    assert truth.match([right]).ok
    hole = weight.clone()
    hole[5, 17, 2, 0] = 0
    assert not truth.match([functional.conv2d(x, hole, padding=1)]).ok
    assert not truth.match([right.roll(1, dims=3)]).ok
    poisoned = right.clone()
    poisoned[1, 3, 0, 0] = float("nan")
    match = truth.match([poisoned])
    assert not match.ok
    assert match.worst == float("inf")
    assert match.to_dict() == {"ok": False, "worst": None, "max_error": None}


def test_gate_refuses_wrong_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 8, 6, 6, generator=generator)
    weight = torch.randn(4, 8, 3, 3, generator=generator)
    dy = torch.randn(2, 4, 6, 6, generator=generator)
    truth = gate.truth(x, weight, dy, stride=1, padding=1, dtype=torch.float32)
    y, dx, dw = (value.float() for value in truth.values)
    assert truth.match([y, dx, dw]).ok
    assert not truth.match([y, dx * 1.001, dw]).ok
    assert not truth.match([y, dx, dw.flip(2)]).ok


# Record ------------------------------------------------------------------------------------------

_TIMES = {
    "ours": (1.0e-3,) * 6,
    "ours-unfrozen": (1.1e-3,) * 6,
    "dense:nchw": (2.5e-3,) * 6,
    "dense:nhwc": (2.0e-3,) * 6,
    "composition:grouped+1x1:nhwc": (1.5e-3,) * 6,
}


def made_row(times: dict[str, tuple[float, ...]] = _TIMES) -> dict[str, Any]:
    with torch.no_grad():
        bench = Rig(tiny(TINY["het"], target=1.9), "auto")
        timings = Timings("dense:nchw", times, dict.fromkeys(times, 1))
        roofs = Roofs(1e11, 1e10, "cpu", "float32")
        return record.layer_row(bench, bench.check(), timings, roofs)


def test_a_row_compares_with_the_fastest_of_each_role() -> None:
    row = made_row()
    assert row["dense"]["name"] == "dense:nhwc"
    assert row["dense"]["ratio"] == pytest.approx(2.0)
    assert row["composition"]["ratio"] == pytest.approx(1.5)
    assert row["unfrozen"]["ratio"] == pytest.approx(2.0 / 1.1)
    assert row["prepacked"] is None
    assert row["verdict"] == "win"
    assert row["dense_macs"] / row["macs"] == pytest.approx(3.0)
    assert row["floor_s"] == max(row["macs"] / 1e11, row["bytes"] / 1e10)
    assert row["percent_of_roof"] == pytest.approx(100 * row["floor_s"] / 1e-3)


@pytest.mark.parametrize(
    ("low", "high", "said"), [(1.01, 1.2, "win"), (0.9, 1.1, "even"), (0.8, 0.99, "lose")]
)
def test_verdict_needs_the_whole_interval(low: float, high: float, said: str) -> None:
    assert record.verdict({"low": low, "high": high}) == said


def test_record_writes_rows_as_they_come_and_they_fit_the_schema(tmp_path: Path) -> None:
    kept = record.Record(tmp_path / "results", "layers-test")
    kept.add_roofs(Roofs(1e11, 1e10, "cpu", "float32"))
    for rows in (1, 2):
        kept.add(made_row())
        data = json.loads(kept.path.read_text())
        assert len(data["rows"]) == rows
        assert record.problems(data) == []
    assert data["schema"] == record.SCHEMA_VERSION
    assert data["environment"]["torch"] == torch.__version__


def test_a_mismatch_is_recorded_without_times(tmp_path: Path) -> None:
    kept = record.Record(tmp_path, "layers-test")
    with torch.no_grad():
        wrong = gate.Agreement(False, float("inf"), float("inf"))
        kept.add(record.layer_row(Rig(tiny(TINY["het"]), "auto"), wrong))
    (row,) = json.loads(kept.path.read_text())["rows"]
    assert "median_s" not in row
    assert not row["match"]["ok"]


def test_record_refuses_what_departs_from_the_schema(tmp_path: Path) -> None:
    kept = record.Record(tmp_path, "layers-test")
    row = made_row()
    row["dense"]["ratio"] = float("nan")
    with pytest.raises(ValueError, match=r"rows\[0\].dense.ratio"):
        kept.add(row)
    assert not kept.path.exists()


@pytest.mark.parametrize(
    ("value", "schema", "message"),
    [
        (3, {"type": "string"}, r"\$: int is no string"),
        (True, {"type": "number"}, r"\$: bool is no number"),
        (1.5, {"type": "integer"}, r"\$: float is no integer"),
        ({}, {"type": "object", "required": ["a"]}, r"\$: 'a' is missing"),
        ({"a": ["x", 1]}, {"properties": {"a": {"items": {"type": "string"}}}}, r"\$\.a\[1\]"),
        (
            {"z": 1},
            {"type": "object", "additionalProperties": {"type": "string"}},
            r"\$\.z: int is no string",
        ),
        (2, {"enum": [1]}, r"2 is none of \[1\]"),
        ("x", {"anyOf": [{"type": "null"}, {"type": "number"}]}, r"str is no null"),
    ],
)
def test_schema_problems_are_found(value: object, schema: dict[str, Any], message: str) -> None:
    found = record.problems(value, schema)
    assert len(found) == 1
    assert re.search(message, found[0])


def test_committed_results_fit_the_schema() -> None:
    for path in (ROOT / "benchmarks" / "results").rglob("*.json"):
        assert record.problems(json.loads(path.read_text())) == [], path.name


def test_table_shows_losses_targets_and_mismatches() -> None:
    loss = made_row({**_TIMES, "dense:nhwc": (0.5e-3,) * 6})
    wrong = made_row()
    for key in ("dense", "composition", "verdict", "median_s"):
        del wrong[key]
    header, _, win, lost, mismatch = table.layer_table([made_row(), loss, wrong])
    assert header.index("× dense") > 0
    assert win.endswith("win")
    assert re.search(r" 2\.00  \[2\.00, 2\.00\] +1\.9 +1\.50", win)
    assert lost.endswith("LOSE")
    assert " 1.9  missed " in lost
    assert "missed" not in win
    assert "MISMATCH" in mismatch
    loss["case"]["expected"] = "lose"
    assert table.layer_table([loss])[2].endswith("lose (expected)")


def test_dispatch_table_says_when_a_target_is_missed() -> None:
    times = {"dense": (5e-6,) * 6, "ours": (12e-6,) * 6}
    timings = Timings("dense", times, {"dense": 1, "ours": 1})
    row = record.dispatch_row("without grad", "auto", 4.0, timings)
    assert row["extra_us"] == pytest.approx(7.0)
    assert record.problems(row, DISPATCH_ROW) == []
    assert table.dispatch_table([row])[2].endswith("≤ 4  missed")


def test_benchmarks_run_from_pytest_to_json(tmp_path: Path) -> None:
    done = fresh.python(
        "", "benchmarks", "-k", "lose-tiny", "-q", "--results", str(tmp_path), "--name", "test",
        "--seconds", "0.2", "--backend", "vendor", module="pytest",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads((tmp_path / "layers-test.json").read_text())
    assert record.problems(data) == []
    (row,) = data["rows"]
    assert row["backend"] == {"asked": "vendor", "ran": "vendor"}
    assert row["match"]["ok"]
    assert set(row["timings"]["variants"]) >= {OURS, "dense:nchw", "dense:nhwc"}
    assert "lose-tiny" in done.stdout.split("hetconv layers")[1]
