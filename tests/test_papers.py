# SPDX-License-Identifier: Apache-2.0
"""The README's table of the papers' numbers beside those that are measured here."""

from __future__ import annotations

import re
import statistics

import pytest

from benchmarks import papers, readme, summary
from benchmarks.lenet import lenet_methods
from benchmarks.method_rows import METHOD_NETWORKS, speed_methods


def cells() -> dict[str, list[str]]:
    lines = [line[2:-2].split(" | ") for line in papers.papers_table().splitlines()[2:]]
    return {line[0]: [cell.strip() for cell in line[1:]] for line in lines}


def test_every_method_has_a_line_and_every_line_is_of_a_method() -> None:
    assert [claim.method for claim in papers.CLAIMS] == [*cells()]
    assert set(cells()) == {*lenet_methods(), "frequency pruning, whole bands"}
    for claim in papers.CLAIMS:
        assert (claim.network in METHOD_NETWORKS) == bool(claim.network)
        assert not claim.network or claim.line in speed_methods(claim.network)


@pytest.mark.parametrize(
    ("method", "dense", "left"),
    # Millions of multiply-accumulates, as tests/test_seed_numbers.py has them.
    [("HetConv", 313.464, 105.846), ("self-grouping", 4089.2, 1560), ("WSP", 4089.2, 1120)],
)
def test_what_a_paper_says_is_the_ratio_of_its_own_table(
    method: str, dense: float, left: float
) -> None:
    said = next(claim.said for claim in papers.CLAIMS if claim.method == method)
    assert said.startswith(f"{dense / left:.2f}× fewer MACs")


def test_what_is_measured_is_that_of_the_records() -> None:
    speed = {(r["network"], r["name"]): r for r in summary.methods()["speed"]["speed"]}
    for claim in papers.CLAIMS:
        _, network, macs, fast, weights, points, _ = cells()[claim.method]
        if claim.network:
            row = speed[claim.network, claim.line]
            assert network.startswith(claim.network.split(",")[0])
            assert macs == f"{row['macs'][0] / row['macs'][1]:.2f}×"
            lost = row["speedup"][0] < 1
            shown = f"{row['speedup'][0]:.2f}×"
            assert fast == (f"**{shown}**" if lost else shown)
        else:
            assert (network, macs, fast) == ("", "", "")
        lines = [line for line in papers.lenet_lines() if line["name"] == claim.method]
        if not lines:
            assert (weights, points) == ("", "")
            continue
        assert float(weights.rstrip("×")) == pytest.approx(
            statistics.mean(r["weights"][0] / r["weights"][1] for r in lines), abs=0.051
        )
        found = [100 * (r["accuracy"][1] - r["accuracy"][0]) for r in lines]
        number = re.match(r"[+-][\d.]+", points)
        assert number
        assert float(number[0]) == pytest.approx(statistics.mean(found), abs=0.0051)


def test_it_stands_in_the_readme_with_where_it_was_measured() -> None:
    text = readme.measured_section()
    assert papers.papers_table() in text
    assert papers.papers_provenance() in text
    assert "1 threads" not in text
