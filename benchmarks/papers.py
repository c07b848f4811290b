# SPDX-License-Identifier: Apache-2.0
"""The papers' numbers beside those that are measured here, as one table for the README.

A paper's number is a ratio of multiply-accumulates (MACs) or of weights: none has measured a time.
"""

from __future__ import annotations

import json
import statistics
from typing import NamedTuple

from benchmarks import summary
from benchmarks.method_rows import RESNET50, RESNET110, VGG16
from hetconv_kernels.files import Json
from hetconv_kernels.measure import tables


class Claim(NamedTuple):
    """A method, what its paper says, and where the same is measured here.

    Attributes:
        method: as its line in benchmarks/lenet.json is called.
        said: by the paper, with the network that it is said of; empty where no number is known.
        network: of the table of speed; empty where the paper's own network is LeNet-5.
        line: of the table of speed.
    """

    method: str
    said: str
    network: str = ""
    line: str = ""


# The MACs by which tests/test_seed_numbers.py reproduces the tables: 313.5 M of VGG-16 become
# 105.8 M, and 4.09 G of ResNet-50 1.56 G and 1.12 G.
CLAIMS = (
    Claim("HetConv", "2.96× fewer MACs (VGG-16, p=4)", VGG16, "HetConv p=4"),
    Claim("self-grouping", "2.62× fewer MACs (ResNet-50, 70 %)", RESNET50, "self-grouping 70 %"),
    Claim("WSP", "3.65× fewer MACs (ResNet-50, 70 %)", RESNET50,
          "WSP, as many channels as the paper's 70 %"),
    Claim("filter correlation", "", VGG16, "filters removed, 6× fewer MACs, widths of 8"),
    Claim("Play and Prune", "6.43× fewer MACs (VGG-16)", VGG16,
          "filters removed, 6.43× fewer MACs"),
    Claim("stability", "6.03× fewer MACs (VGG-16)", VGG16, "filters removed, 6.03× fewer MACs"),
    Claim("frequency pruning", "9.2× fewer MACs (ResNet-110), transforms not counted", RESNET110,
          "frequency pruning, the paper's rates"),
    Claim("frequency pruning, whole bands", "", RESNET110,
          "frequency pruning, the paper's rates, whole bands"),
    Claim("ADMM", "167× fewer weights (LeNet-5)"),
    Claim("ADMM, distilled", ""),
)  # fmt: skip


def papers_table() -> str:
    """Lays the table out: a line for each method, from methods-speed.json and lenet.json."""
    header = (
        "method", "the paper", "measured: network", "fewer MACs", "times as fast",
        "LeNet-5: fewer weights", "accuracy, points", "times as fast",
    )  # fmt: skip
    rows = [
        (claim.method, claim.said, *_speed_cells(claim), *_lenet_cells(claim.method))
        for claim in CLAIMS
    ]
    return tables.markdown_table(header, rows, left=3)


def _speed_cells(claim: Claim) -> tuple[str, str, str]:
    if not claim.network:
        return "", "", ""
    row = next(
        row for row in summary.methods()["speed"]["speed"]
        if (row["network"], row["name"]) == (claim.network, claim.line)
    )  # fmt: skip
    fast = row["speedup"][0]
    shown = f"{fast:.2f}×"
    return (
        f"{claim.network.partition(',')[0]}, {claim.line}",
        f"{row['macs'][0] / row['macs'][1]:.2f}×",
        f"**{shown}**" if fast < 1 else shown,
    )


def _lenet_cells(method: str) -> tuple[str, str, str]:
    lines = [line for line in lenet_lines() if line["name"] == method]
    if not lines:
        return "", "", ""
    fewer = [line["weights"][0] / line["weights"][1] for line in lines]
    points = [100 * (line["accuracy"][1] - line["accuracy"][0]) for line in lines]
    fast = [line["speedup"][0] for line in lines]
    spread = f" ± {statistics.stdev(points):.2f}" if len(points) > 1 else ""
    return (
        f"{statistics.mean(fewer):.1f}×",
        f"{statistics.mean(points):+.2f}{spread}",
        f"{statistics.mean(fast):.2f}×",
    )


def lenet_lines() -> list[Json]:
    """Reads the lines of benchmarks/lenet.json."""
    found: list[Json] = json.loads((summary.HERE / "lenet.json").read_text())["lines"]
    return found


def papers_provenance() -> str:
    """Says what the numbers are of, and where they were measured."""
    record = json.loads((summary.HERE / "lenet.json").read_text())
    lines = record["lines"]
    seeds = {line["seed"] for line in lines}
    return (
        "The papers give ratios of MACs or of weights, and no times. Networks of their shapes are "
        "untrained here, compressed to a rate alone, and timed against the dense network "
        f"({summary.methods_provenance('speed')}). LeNet-5 is trained on 7,000 digits of MNIST and "
        f"judged by 2,000 others: mean of up to {len(seeds)} seeds, points against dense with "
        f"their deviation ({summary.lines_provenance(record, lines)}). "
        "[All tables](docs/methods/index.md)."
    )
