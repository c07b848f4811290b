# SPDX-License-Identifier: Apache-2.0
"""How good are the predictions that `auto` rests on? Measures `vendor` and `cpu` beside them.

    python -m benchmarks.calibrate [--out FILE] [--rounds N]
    python -m benchmarks.calibrate --device cuda [--results DIR] [--out FILE]

Measures random layers on both backends beside both predictions, fits the seconds of
`hetconv_kernels.backends.cost_model` to every second row, and reports on the other rows, which no
fit has seen, how often the committed predictions pick the faster backend and what a wrong pick
costs.
On a GPU, see `benchmarks.calibrate_gpu`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

import hetconv_kernels as hk
from benchmarks.record import environment
from hetconv_kernels import ops
from hetconv_kernels.backends import get_backend
from hetconv_kernels.backends.cpu_plans import columns_of_tiles, direct_plan
from hetconv_kernels.files import Json
from hetconv_kernels.measure.timing import interleaved
from hetconv_kernels.problem import make_geometry

SHOWN = ("vendor_s", "predicted_vendor_s", "cpu_s", "predicted_cpu_s")


def drawn_supports(
    channels: int, filters: int, kernel: int, rng: np.random.Generator
) -> list[hk.Support]:
    """Lists Supports of every kind for one shape."""
    found = [hk.Support.dense(channels, filters, kernel)]
    found += [
        hk.Support.het(channels, filters, kernel, p) for p in (2, 4, 8, channels) if kernel > 1
    ]
    for share in (0.5, 0.3, 0.1):
        labels = rng.integers(0, 16, filters)
        keep = rng.random((16, channels)) < share
        found.append(hk.Support.self_grouped(labels, keep, kernel))
        found.append(hk.Support.from_mask(rng.random((filters, channels, kernel, kernel)) < share))
    return found


def drawn_layers(count: int) -> list[tuple[hk.Support, int, int, int]]:
    """Draws layers: (Support, batch, image side, stride)."""
    rng, choice = np.random.default_rng(0), random.Random(0)
    shapes = [
        (c, f, k, n, side, stride)
        for (c, side), k, n, stride in itertools.product(
            [(16, 56), (32, 56), (64, 56), (96, 28), (128, 28), (256, 14), (512, 7)],
            (1, 3, 5),
            (1, 8),
            (1, 2),
        )
        for f in (c, 2 * c)
        if c * f * k * k * n * side * side < 3e10
    ]
    picked = []
    for _ in range(count):
        c, f, k, n, side, stride = choice.choice(shapes)
        picked.append((choice.choice(drawn_supports(c, f, k, rng)), n, side, stride))
    return picked


def measure_layer(support: hk.Support, n: int, side: int, stride: int, rounds: int) -> Json:
    """Times one layer on both backends, interleaved, on the frozen weight."""
    kernel = support.kernel[0]
    geometry = make_geometry(support, stride, kernel // 2, frozen=True)
    x = torch.randn(n, support.channels, side, side).contiguous(memory_format=torch.channels_last)
    w = torch.randn(support.live) / 10
    problem = ops.describe("fprop", geometry, x, x, w, (side, side))
    codes = {name: hk.backends.CODES[name] for name in ("vendor", "cpu")}
    with torch.no_grad():
        timings = interleaved(
            {name: lambda code=code: ops.run_fprop(x, w, geometry, None, code)
             for name, code in codes.items()},
            rounds=rounds,
        )  # fmt: skip
    engine, plan = get_backend("cpu"), direct_plan(problem)
    oh, ow = problem.output_size
    return {
        "layer": f"{n}x{support.channels}x{side}^2->{support.filters} k{kernel} s{stride} "
        f"{support.kind} {support.density:.2f}",
        "vendor_s": timings.median("vendor"),
        "cpu_s": timings.median("cpu"),
        "ratio": timings.speedup("cpu", "vendor").value,
        "predicted_vendor_s": get_backend("vendor").estimate(problem),
        "predicted_cpu_s": engine.estimate(problem),
        "form": plan.form,
        "macs": problem.dense_macs,
        "weights": math.prod(support.shape),
        "bytes": problem.bytes_moved,
        "operations": n * oh * ow * plan.cost,
        "loads": n * oh * ow * columns_of_tiles(problem) / 16,
        "images": n * plan.cost,
        "packed": plan.packed_elements,
    }


def fit_terms(rows: list[Json], terms: tuple[str, ...], time: str) -> dict[str, float]:
    """Fits seconds as a sum of non-negative terms and a constant, by relative error.

    Reweighted so that it is about the sum of absolute errors: few rows far off, as a shared machine
    makes them, do not pull the others away.
    """
    y = np.array([r[time] for r in rows])
    columns = np.array([[*(r[term] for term in terms), 1.0] for r in rows]) / y[:, None]
    norm, active = np.linalg.norm(columns, axis=0), list(range(len(terms) + 1))
    weight = np.ones(len(y))
    for _ in range(15):
        while True:  # drop terms that would be negative
            scaled = columns[:, active] / norm[active]
            solution = np.linalg.lstsq(scaled * weight[:, None], weight, rcond=None)[0]
            if (solution >= 0).all():
                break
            active.pop(int(solution.argmin()))
        weight = 1 / np.sqrt(np.maximum(np.abs(scaled @ solution - 1), 0.05))
    names = (*terms, "call")
    return {names[i]: float(v / norm[i]) for i, v in zip(active, solution, strict=True)}


def judge_picks(rows: list[Json]) -> dict[str, float]:
    """Reports how often the faster backend is picked, and the cost of the worst wrong pick."""
    right, worst = 0, 1.0
    for r in rows:
        pick = "cpu" if r["predicted_cpu_s"] < r["predicted_vendor_s"] else "vendor"
        best = min(r["cpu_s"], r["vendor_s"])
        cost = r[f"{pick}_s"] / best
        right += cost <= 1.05
        worst = max(worst, cost)
    return {"cases": len(rows), "right_within_5_percent": right / len(rows), "worst_cost": worst}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, fits, judges, prints, and writes the rows; 2 without the GPU that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--count", type=int, default=140)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(arguments)
    if options.device == "cuda":
        from benchmarks import calibrate_gpu

        return calibrate_gpu.main(options.results, options.out)
    rows = []
    for support, n, side, stride in drawn_layers(options.count):
        rows.append(measure_layer(support, n, side, stride, options.rounds))
        row, micros = rows[-1], [round(rows[-1][name] * 1e6) for name in SHOWN]
        print(f"{row['layer']:<62} {micros} us  x{row['ratio']:.2f}", flush=True)
    half = rows[::2]
    print(f"seconds fitted to every second row, on {torch.get_num_threads()} threads:")
    print("  dense  ", fit_terms(half, ("macs", "weights", "bytes"), "vendor_s"))
    for name in ("filters", "pixels"):
        of_form = [r for r in half if (r["form"] == "filters") == (name == "filters")]
        print(
            f"  {name:<7}", fit_terms(of_form, ("operations", "loads", "images", "packed"), "cpu_s")
        )
    errors = [abs(np.log(r["predicted_cpu_s"] / r["cpu_s"])) for r in rows[1::2]]
    print(f"median error of the cpu prediction: x{np.exp(statistics.median(errors)):.2f}")
    print("on the rows not used for fitting:", judge_picks(rows[1::2]))
    if options.out:
        found = {"environment": environment(), "unseen": judge_picks(rows[1::2]), "rows": rows}
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
