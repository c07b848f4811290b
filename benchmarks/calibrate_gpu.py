# SPDX-License-Identifier: Apache-2.0
"""Fits the constants of the predictions for a GPU to the table of its primitives.

    python -m benchmarks.calibrate --device cuda [--results DIR] [--out FILE]

Takes the rows that `benchmarks.primitives` wrote on this GPU (``make gpu`` does), fits to every
second one cuDNN's share of the peak, the seconds of a launch (to rows of one image) and the share
of its predictions that each engine reaches, and reports on the other rows, which no fit has seen,
how often `auto` would pick the faster one with these and with the committed constants. The entry
goes to ``hetconv_kernels/backends/gpu/constants.json``.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.bench import ENGINES
from benchmarks.cases import Case, SupportSpec
from benchmarks.tune import problems_of
from hetconv_kernels.backends import available_backends, get_backend
from hetconv_kernels.backends.dense_cost import dense_gpu_prediction
from hetconv_kernels.backends.gpu import constants
from hetconv_kernels.backends.gpu.constants import GpuConstants
from hetconv_kernels.backends.gpu.devices import GpuSpec, spec_of
from hetconv_kernels.backends.protocol import UNMEASURED_MARGIN
from hetconv_kernels.files import write_text
from hetconv_kernels.problem import Problem

# Rows that a fit needs at least (of one image: for a launch), and what is tried: shares, and
# seconds of a launch.
LEAST_ROWS, LEAST_SINGLE_ROWS = 8, 3
_SHARES = [step / 200 for step in range(10, 301)]
_LAUNCHES = [step / 10 * 1e-6 for step in range(5, 201)]


class Measured(NamedTuple):
    """One row: what cuDNN and our engines took.

    Attributes:
        problem: what they ran.
        vendor: seconds of the dense convolution.
        ours: seconds of each engine.
        predicted: seconds that each engine predicts, at a share of 1.
    """

    problem: Problem
    vendor: float
    ours: dict[str, float]
    predicted: dict[str, float]


def fit_rows(rows: Sequence[dict[str, Any]]) -> list[Measured]:
    """Brings rows of a table to what a fit needs; faulty engines have no times in them."""
    found = []
    for row in rows:
        if "timings" not in row or row["verb"] == "step":
            continue
        case = Case(**{**row["case"], "support": SupportSpec(**row["case"]["support"])})
        described = {problem.verb: problem for problem in problems_of(case)}[row["verb"]]
        samples = row["timings"]["variants"]
        medians = {name: statistics.median(one["samples_s"]) for name, one in samples.items()}
        names = {f"ours-{engine}": engine for engine in ENGINES}
        # A weight that is packed at each call, as predictions have it.
        own = "ours-unfrozen" if "ours-unfrozen" in medians else "ours"
        names[own] = row["backend"]["ran"]
        ours, predicted = {}, {}
        for name, engine in names.items():
            if name not in medians or engine not in available_backends("cuda"):
                continue
            if not get_backend(engine).unsupported_reasons(described):
                share = constants.constants_of(described.device).ours[engine]
                ours[engine] = medians[name]
                predicted[engine] = get_backend(engine).estimate(described) * share
        found.append(Measured(described, medians["dense"], ours, predicted))
    return found


def fit_shares(rows: Sequence[Measured], spec: GpuSpec, start: GpuConstants) -> GpuConstants:
    """Fits the shares to rows, by the median of the errors' logarithms.

    Args:
        rows: `LEAST_ROWS` at least.
        spec: the GPU.
        start: constants that are not fitted, and shares of engines without rows.

    Raises:
        ValueError: there are too few rows.
    """
    if len(rows) < LEAST_ROWS:
        raise ValueError(
            f"{len(rows)} rows were measured, and a fit needs {LEAST_ROWS}: run make gpu."
        )

    single = [row for row in rows if row.problem.batch == 1]
    several = [row for row in rows if row.problem.batch > 1] or rows

    def error(tried: GpuConstants, some: Sequence[Measured]) -> float:
        logs = [abs(math.log(vendor_seconds(row, spec, tried) / row.vendor)) for row in some]
        return statistics.fmean(logs)

    found = start
    for _ in range(2):  # a launch is a part of the large ones too, a share of the small ones
        share = min(_SHARES, key=lambda one: error(found._replace(vendor=one), several))
        found = found._replace(vendor=share)
        if len(single) >= LEAST_SINGLE_ROWS:
            launch = min(_LAUNCHES, key=lambda one: error(found._replace(launch=one), single))
            found = found._replace(launch=launch)
    ours = dict(start.ours)
    for engine in ENGINES:
        ratios = [row.predicted[engine] / row.ours[engine] for row in rows if engine in row.ours]
        if len(ratios) >= LEAST_ROWS // 2:
            ours[engine] = round(statistics.median(ratios), 3)
    return found._replace(measured=True, rows=len(rows), ours=ours)


def vendor_seconds(row: Measured, spec: GpuSpec, tried: GpuConstants) -> float:
    """Predicts the dense convolution of a row with some constants, in seconds."""
    return dense_gpu_prediction(row.problem, spec, tried)


def judge_auto(rows: Sequence[Measured], spec: GpuSpec, tried: GpuConstants) -> dict[str, float]:
    """Reports how often `auto` would pick what is within 5 % of the fastest, and its worst pick."""
    margin = 1.0 if tried.measured else UNMEASURED_MARGIN
    right, worst = 0, 1.0
    for row in rows:
        times = {"vendor": row.vendor, **row.ours}
        guesses = {"vendor": vendor_seconds(row, spec, tried)}
        guesses |= {e: margin * s / tried.ours[e] for e, s in row.predicted.items()}
        cost = times[min(guesses, key=lambda name: guesses[name])] / min(times.values())
        right += cost <= 1.05
        worst = max(worst, cost)
    share = right / max(len(rows), 1)
    return {"cases": len(rows), "right_within_5_percent": share, "worst_cost": worst}


def write(entry: GpuConstants, name: str, path: Path) -> None:
    """Puts the entry of a GPU into a file; those of others stay."""
    text = path.read_text() if path.exists() else constants.CONSTANTS_FILE.read_text()
    whole = json.loads(text)
    whole["devices"][name] = entry._asdict()
    write_text(path, json.dumps(whole, indent=1) + "\n")


def main(results: Path, out: Path | None) -> int:
    """Fits and writes; 2 where there is no GPU, or nothing was measured on it."""
    if not torch.cuda.is_available():
        print(f"torch {torch.__version__} finds no CUDA device: nothing was fitted.")
        return 2
    name, device = torch.cuda.get_device_name(), torch.device("cuda", torch.cuda.current_device())
    rows: list[Measured] = []
    for path in sorted(results.glob("primitives-*.json")):
        table = json.loads(path.read_text())
        if table["environment"]["gpu"] == name:
            rows += fit_rows(table["rows"])
    before, spec = constants.constants_of(device), spec_of(device)
    try:
        entry = fit_shares(rows[::2], spec, before)
    except ValueError as error:
        print(error)
        return 2
    print(f"{name}: {entry}")
    for title, tried in (("committed", before), ("fitted", entry)):
        print(f"on the rows that no fit has seen, {title}: {judge_auto(rows[1::2], spec, tried)}")
    write(entry, name, out or constants.CONSTANTS_FILE)
    print(f"written to {(out or constants.CONSTANTS_FILE).name}")
    return 0
