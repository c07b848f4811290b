# SPDX-License-Identifier: Apache-2.0
"""How good are the predictions that `auto` rests on? Measures `vendor` and `cpu` beside them.

    python -m benchmarks.calibrate [--out FILE] [--rounds N]

Writes, for each of some hundred layers, both measured times and both predictions, fits the rates of
`hetconv_kernels.backends.rates` to the even rows, and reports on the odd rows, which were not used
for fitting, how often the faster backend is picked and what a wrong pick costs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch

import hetconv_kernels as hk
from hetconv_kernels import ops
from hetconv_kernels.backends import get_backend
from hetconv_kernels.problem import make_geometry
from hetconv_kernels.timing import interleaved

Row = dict[str, Any]
SHOWN = ("vendor_s", "predicted_vendor_s", "cpu_s", "predicted_cpu_s")


def supports(
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


def layers(count: int) -> list[tuple[hk.Support, int, int, int]]:
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
        picked.append((choice.choice(supports(c, f, k, rng)), n, side, stride))
    return picked


def measure(support: hk.Support, n: int, side: int, stride: int, rounds: int) -> Row:
    """Times one layer on both backends, interleaved, on the frozen weight."""
    kernel = support.kernel[0]
    geometry = make_geometry(support, stride, kernel // 2)
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
    engine = get_backend("cpu")
    return {
        "layer": f"{n}x{support.channels}x{side}^2->{support.filters} k{kernel} s{stride} "
        f"{support.kind} {support.density:.2f}",
        "vendor_s": timings.median("vendor"),
        "cpu_s": timings.median("cpu"),
        "ratio": timings.speedup("cpu", "vendor").value,
        "dense_macs": problem.dense_macs,
        "operations": engine.operations(problem),  # type: ignore[attr-defined]
        "form": engine._plan(problem).form,  # type: ignore[attr-defined]
        "bytes": problem.bytes_moved,
        "predicted_vendor_s": get_backend("vendor").estimate(problem),
        "predicted_cpu_s": engine.estimate(problem),
    }


def fit(rows: list[Row], work: str, time: str) -> tuple[float, float, float]:
    """Fits seconds = work / rate + bytes / bandwidth + call, by relative non-negative error."""
    a = np.array([[r[work], r["bytes"], 1.0] for r in rows])
    y = np.array([r[time] for r in rows])
    scale = 1 / y
    columns = a * scale[:, None]
    norm = np.linalg.norm(columns, axis=0)
    active = list(range(3))
    while True:  # drop terms that would be negative
        solution = np.linalg.lstsq(columns[:, active] / norm[active], np.ones(len(y)), rcond=None)[
            0
        ]
        if (solution >= 0).all():
            break
        active.pop(int(solution.argmin()))
    full = np.zeros(3)
    full[active] = solution / norm[active]
    return tuple(full)  # type: ignore[return-value]


def judge(rows: list[Row]) -> dict[str, float]:
    """Reports how often the faster backend is picked, and the cost of the worst wrong pick."""
    right, worst = 0, 1.0
    for r in rows:
        pick = "cpu" if r["predicted_cpu_s"] < r["predicted_vendor_s"] else "vendor"
        best = min(r["cpu_s"], r["vendor_s"])
        cost = r[f"{pick}_s"] / best
        right += cost <= 1.05
        worst = max(worst, cost)
    return {"cases": len(rows), "right_within_5_percent": right / len(rows), "worst_cost": worst}


def main() -> None:
    """Measures, fits, judges, prints, and writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--count", type=int, default=140)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    rows = []
    for support, n, side, stride in layers(options.count):
        rows.append(measure(support, n, side, stride, options.rounds))
        row, micros = rows[-1], [round(rows[-1][name] * 1e6) for name in SHOWN]
        print(f"{row['layer']:<62} {micros} us  x{row['ratio']:.2f}", flush=True)
    threads = torch.get_num_threads()
    for name, work in (("vendor", "dense_macs"), ("cpu", "operations")):
        rate, bandwidth, call = fit(rows[::2], work, f"{name}_s")
        print(
            f"fit {name}: {1 / rate / threads if rate else 0:.3g} {work}/s a thread, "
            f"{1 / bandwidth if bandwidth else 0:.3g} B/s, {call * 1e6:.1f} us a call"
        )
    errors = [abs(np.log(r["predicted_cpu_s"] / r["cpu_s"])) for r in rows[1::2]]
    print(f"median error of the cpu prediction: x{np.exp(statistics.median(errors)):.2f}")
    print("on the rows not used for fitting:", judge(rows[1::2]))
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
