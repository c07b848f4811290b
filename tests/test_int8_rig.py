# SPDX-License-Identifier: Apache-2.0
"""The benchmark of layers in low precision: cases, rivals, and the gate before the clock."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import record, table
from benchmarks.cases import CPU_CASES, Case, SupportSpec
from benchmarks.int8_rig import Int8Rig
from benchmarks.report import schema
from benchmarks.rig import OURS, OURS_FLOAT32, Rig
from hetconv_kernels.measure import timing
from hetconv_kernels.measure.roofline import Roofs

TINY = {
    "dense": SupportSpec("dense"),
    "het": SupportSpec("het", 4),
    "depthwise": SupportSpec("het", 16),
    "gathered": SupportSpec("het", 5),
    "self-group": SupportSpec("self_group", 70),
}


def tiny(kind: str, **more: object) -> Case:
    c = 64 if kind == "self-group" else 16
    return replace(Case("tiny", 2, c, c, 7, 6, 3, TINY[kind], dtype="int8"), **more)


def test_the_rows_of_the_speed_table_are_there_in_both_precisions() -> None:
    by_name = {case.name: case for case in CPU_CASES}
    for c, size in ((64, 56), (128, 28), (256, 14), (512, 7)):
        for support in ("het4", "het8", "het16", f"het{c}", "sg70", "sg90"):
            whole = by_name[f"8x{c}x{size}-{support}"]
            half, quarter = (by_name[f"{whole.name}-{dtype}"] for dtype in ("bf16", "int8"))
            assert (half.dtype, half.target_float32) == ("bfloat16", 1.7)
            assert (quarter.dtype, quarter.target_float32) == ("int8", 3.3)
            assert quarter.target == (2.6 if support == "het4" else None)
            assert quarter.support == half.support == whole.support
            assert quarter.bytes(quarter.macs(1)) * 4 == whole.bytes(whole.macs(1))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kind", TINY)
def test_everybody_is_within_a_step_and_ours_is_the_reference(kind: str, stride: int) -> None:
    with torch.no_grad():
        rig = Int8Rig(tiny(kind, stride=stride), "reference")
        assert rig.check().ok
    roles = {name.split(":")[0] for name in rig.variants}
    assert roles >= {OURS, OURS_FLOAT32, "dense"}
    assert ("composition" in roles) == (kind in ("het", "depthwise", "self-group"))
    assert rig.ran() == "reference"
    assert rig.variants[OURS][0]().dtype == torch.uint8  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["dense:inductor", "composition:grouped+1x1", OURS])
def test_a_step_too_many_is_noticed(name: str) -> None:
    with torch.no_grad():
        rig = Int8Rig(tiny("het"), "reference")
        right = rig.variants[name][0]
        steps = 1 if name == OURS else 3

        def wrong() -> torch.Tensor:
            y = right().clone()  # type: ignore[attr-defined]
            place = tuple((y < 200).nonzero()[0].tolist())
            y[place] += steps
            return y

        rig.variants[name] = [wrong]
        assert not rig.check().ok


def test_a_row_has_the_ratio_to_our_own_float32() -> None:
    case = tiny("het")
    with torch.no_grad():
        rig = Int8Rig(case, "reference")
        timings = timing.interleaved(
            rig.variants, baseline="dense:inductor", target=OURS, rounds=6, max_seconds=0.2
        )
    row = record.layer_row(rig, rig.check(), timings, Roofs(1e11, 1e10, "cpu", "int8"))
    assert schema.problems(json.loads(json.dumps(row)), schema.LAYER_ROW) == []
    assert row["float32"]["name"] == OURS_FLOAT32
    header, _, line = table.layer_table([row])
    assert "× float32" in header
    assert f"{row['float32']['ratio']:.2f}" in line


def test_a_layer_in_bfloat16_stands_beside_itself_in_float32() -> None:
    with torch.no_grad():
        rig = Rig(tiny("het", dtype="bfloat16"), "auto")
        assert rig.check().ok
    found = rig.variants[OURS_FLOAT32][0]()
    assert found.dtype == torch.float32  # type: ignore[attr-defined]
    assert rig.variants[OURS][0]().dtype == torch.bfloat16  # type: ignore[attr-defined]
