# SPDX-License-Identifier: Apache-2.0
"""The benchmark of throughput: what it counts, whom it compares, what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import throughput
from benchmarks.cases import SupportSpec
from benchmarks.networks import NetworkCase
from hetconv_kernels.errors import ArgumentError

CASE = NetworkCase("small", "resnet20", SupportSpec("het", 2), n=4, size=16)


def clockwork(step: float) -> tuple[Callable[[], None], Callable[[], float], list[float]]:
    """Returns a call that takes ``step`` seconds, its clock, and when the calls ended."""
    now, ended = [0.0], []

    def run() -> None:
        now[0] += step
        ended.append(now[0])

    return run, lambda: now[0], ended


def test_calls_before_the_window_do_not_count_and_the_last_counts_by_its_share() -> None:
    run, clock, ended = clockwork(1.0)
    assert throughput.counted(run, 2.5, 6.5, clock) == pytest.approx(3.5)
    assert ended == [1, 2, 3, 4, 5, 6, 7]  # the window is from 3, when the third call ended


@pytest.mark.parametrize("step", [0.1, 0.25])
def test_a_call_of_a_fraction_of_a_second_is_counted_so_often(step: float) -> None:
    run, clock, _ = clockwork(step)
    assert throughput.counted(run, 0.0, 2.0, clock) == pytest.approx(2.0 / step)


def test_ours_is_compared_with_the_fastest_of_each_role_round_by_round() -> None:
    rates = {
        "ours": [20.0] * 7,
        "dense:a": [5.0] * 7,
        "dense:b": [10.0] * 7,
        "composition:a": [40.0] * 7,
    }
    row = throughput.row(CASE, 2, rates)
    assert (row["dense"]["name"], row["dense"]["ratio"]) == ("dense:b", 2.0)
    assert (row["composition"]["name"], row["composition"]["ratio"]) == ("composition:a", 0.5)
    assert row["images_per_s"]["ours"] == 20.0
    assert "| **0.50** |" in throughput.shown_rows([row])


def test_a_role_that_nobody_plays_is_left_empty() -> None:
    row = throughput.row(CASE, 1, {"ours": [1.0] * 6, "dense:a": [1.0] * 6})
    assert "composition" not in row
    assert throughput.shown_rows([row]).splitlines()[-1].count("|") == 10


def test_an_unknown_network_is_refused() -> None:
    with pytest.raises(ArgumentError, match="'nothing'"):
        throughput.main(["nothing"])


def test_processes_run_beside_each_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(throughput, "NETWORKS", (CASE,))
    out = tmp_path / "t.json"
    options = [
        "--peer",
        "eager",
        "--processes",
        "2",
        "--rounds",
        "6",
        "--seconds",
        "0.02",
        "--out",
        str(out),
    ]
    assert throughput.main(["small", *options]) == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert row["processes"] == 2
    assert set(row["samples"]) == {"ours", "dense:eager", "composition:eager"}
    assert all(len(rates) == 6 for rates in row["samples"].values())
    assert min(min(rates) for rates in row["samples"].values()) > 0
    assert torch.get_num_threads() >= 1
