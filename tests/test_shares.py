# SPDX-License-Identifier: Apache-2.0
"""Shares: what counts in the mean, the mean and the floor by bytes by hand, who is below."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import summary
from benchmarks.report import shares, write_report
from benchmarks.report.__main__ import main

Json = dict[str, Any]
# A copy moves 1000 bytes a second.
ROOFS = [{"device": "cpu", "dtype": "float32", "macs_per_s": 1e9, "bytes_per_s": 1e3}]


def layer(name: str, ratio: float, macs: int = 1000, **case: Any) -> Json:
    """A layer of 3000 MACs when dense, which take 2 s then, and of 500 bytes."""
    kind, value = case.pop("kind", "het"), case.pop("value", 4)
    estimate = {"name": "dense:nhwc", "median_s": 2.0, "ratio": ratio, "low": ratio,
                "high": ratio, "confidence": 0.96}  # fmt: skip
    return {
        "kind": "layer",
        "case": {
            "name": name, "n": 1, "c": 64, "f": 64, "h": 9, "w": 9, "k": 3, "dtype": "float32",
            "memory_format": "channels_last", "amp": False, "training": False, "device": "cpu",
            "expected": "win", "issue": None, "target": None,
            "support": {"kind": kind, "value": value}, **case,
        },
        "backend": {"asked": "cpu", "ran": "cpu"},
        "support": {"kind": kind, "digest": "0", "groups": 4, "live": 9, "density": 0.3},
        "macs": macs, "dense_macs": 3000, "bytes": 500,
        "match": {"ok": True, "worst": 0.1, "max_error": 0.1},
        "median_s": 2 / ratio, "floor_s": 0.5, "percent_of_roof": 50.0, "dense": estimate,
        "composition": None, "unfrozen": None, "prepacked": None, "verdict": "win",
    }  # fmt: skip


def file_of(*rows: Json, roofs: list[Json] = ROOFS) -> Json:
    environment = {
        "processor": "a processor", "instructions": "AVX2", "threads": 2, "gpu": None,
        "torch": "2", "python": "3", "commit": "0" * 40, "backends": ["cpu"],
    }  # fmt: skip
    return {
        "schema": 1, "name": "layers-test", "started": "2026-01-01T00:00:00+00:00",
        "environment": environment, "roofs": roofs, "rows": list(rows),
    }  # fmt: skip


def cells(data: Json, first: str) -> list[str]:
    _, lines = shares.share_lines(data)
    (found,) = (line for line in lines if line[0].replace("**", "") == first)
    return found


def test_a_share_is_speed_up_over_mac_ratio_and_bytes_may_forbid_it() -> None:
    rows = (layer("a", 2.4), layer("b", 6.0, macs=100))
    third, thirtieth = shares.mac_shares(file_of(*rows))
    assert (third.mac_ratio, third.share) == (3.0, pytest.approx(0.8))
    assert third.allowed == pytest.approx(2 / 0.5 / 3)  # 500 bytes take 0.5 s, dense 2
    assert (thirtieth.mac_ratio, thirtieth.share) == (30.0, pytest.approx(0.2))
    assert thirtieth.allowed == pytest.approx(2 / 0.5 / 30)
    assert third.missed
    assert not shares.mac_shares(file_of(layer("c", 2.7)))[0].missed


def test_the_mean_is_geometric_by_family_and_by_part() -> None:
    rows = (
        layer("a", 1.5),  # 0.5
        layer("b", 6.0, value=8),  # 2.0
        layer("c", 3.0, kind="self_group", value=70),  # 1.0
        layer("d", 12.0, macs=100, kind="trained_group", value=90, k=1),  # 0.4, bytes allow 0.13
        layer("e", 4.8, kind="self_group", value=90, target=2.0),  # 1.6
    )
    data = file_of(*rows)
    assert cells(data, "HetConv")[1:] == ["2", "1.000", "0.50", "2.00", "0.87", "1", "1.33", "0"]
    assert cells(data, "HetConv, p=8")[1:3] == ["1", "2.000"]
    whole = (1.0 * 0.4 * 1.6) ** (1 / 3)
    assert cells(data, "self-grouping")[1:] == [
        "3", f"{whole:.3f}", "0.40", "1.60", "0.75", "1", "0.13", "1",
    ]  # fmt: skip
    assert cells(data, "self-grouping, 90 %")[1:3] == ["2", "0.800"]
    assert cells(data, "self-grouping, 1×1")[1:3] == ["1", "**0.400**"]
    assert cells(data, "self-grouping, 3×3 in channels_last with a target of its own")[1] == "1"
    _, missed = shares.missed_lines(data)
    assert [line[0] for line in missed] == ["d", "a"]  # the lowest first
    assert missed[0] == ["d", "self-grouping", "30.00", "12.00", "0.400", "0.75", "0.13"]


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "bfloat16"},
        {"dtype": "float32", "amp": True},
        {"training": True},
        {"expected": "lose"},
        {"device": "cuda"},
        {"kind": "grouped"},
        {"kind": "irregular"},
        {"kind": "dense"},
    ],
    ids=str,
)
def test_rows_of_another_kind_do_not_count(change: Json) -> None:
    data = file_of(layer("a", 2.4), layer("b", 0.1, **change))
    assert [share.case["name"] for share in shares.mac_shares(data)] == ["a"]
    assert shares.uncounted(data) == 0


@pytest.mark.parametrize("change", [{"memory_format": "contiguous"}, {"k": 5}, {"stride": 2}])
def test_formats_kernels_and_strides_count_all_the_same(change: Json) -> None:
    assert len(shares.mac_shares(file_of(layer("a", 2.4, **change)))) == 1


def test_wrong_and_disturbed_rows_are_left_out_and_counted() -> None:
    wrong, disturbed = layer("w", 1.0), layer("d", 1.0)
    del wrong["dense"]
    disturbed["disturbed"] = ["load"]
    data = file_of(layer("a", 2.7), wrong, disturbed)
    assert [share.case["name"] for share in shares.mac_shares(data)] == ["a"]
    assert "2 rows are left out" in shares.share_page(data)
    assert "2 rows are left out" in shares.share_report(data)[-1]
    assert shares.share_report(file_of(disturbed)) == [shares.left_out_sentence(file_of(disturbed))]
    assert "left out" not in shares.share_page(file_of(layer("a", 2.7)))


def test_without_a_copy_rate_there_is_no_floor() -> None:
    data = file_of(layer("a", 2.4), roofs=[ROOFS[0] | {"dtype": "bfloat16"}])
    assert shares.mac_shares(data)[0].allowed is None
    assert cells(data, "HetConv")[-2:] == ["", ""]
    assert shares.missed_lines(data)[1][0][-1] == ""


def test_a_page_without_misses_says_so_and_a_file_of_others_says_nothing() -> None:
    assert shares.share_page(file_of(layer("a", 3.0))).endswith("No layer is below.")
    assert shares.share_report(file_of(layer("a", 3.0, training=True))) == []


def test_the_committed_table_is_counted_again_here() -> None:
    """The same mean by other means: a product and a root, over rows chosen by hand."""
    data = summary.results(summary.LAYERS_FILE)
    for family, kinds in (("HetConv", ["het"]), ("self-grouping", ["self_group", "trained_group"])):
        product, count = 1.0, 0
        for row in data["rows"]:
            case = row["case"]
            plain = (case["dtype"], case["amp"], case["training"]) == ("float32", False, False)
            if plain and case["expected"] == "win" and case["support"]["kind"] in kinds:
                product *= row["dense"]["ratio"] * row["macs"] / row["dense_macs"]
                count += 1
        assert count > 20
        assert cells(data, family)[1] == str(count)
        assert cells(data, family)[2].strip("*") == f"{product ** (1 / count):.3f}"


def test_the_report_prints_them_and_has_them_on_its_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "layers-test.json"
    path.write_text(json.dumps(file_of(layer("slow", 1.5), layer("fast", 6.0))))
    other = copy.deepcopy(file_of(layer("training", 1.0, training=True)))
    (tmp_path / "others.json").write_text(json.dumps(other))
    assert main([str(tmp_path), "--shares"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("layers-test.json: a processor")
    assert "others" not in said
    assert "slow" in said
    assert "fast" not in said
    assert not (tmp_path / "report.html").exists()
    pytest.importorskip("matplotlib", reason="it draws the figures")
    page, *_ = write_report([path], tmp_path / "out")
    section = page.read_text().split('<section id="shares">')[1].split("</section>")[0]
    assert "slow" in section
    assert "1.000" in section
    assert "**" not in section
