# SPDX-License-Identifier: Apache-2.0
"""Measures the tiles of the Triton engine on a GPU and writes its committed table.

    python -m benchmarks.tune [--full] [--most N] [--budget S]

For each layer of `cases` it times the choices that the cost model thinks best, for fprop, dgrad and
wgrad, and keeps the fastest in ``hetconv_kernels/backends/triton/table.json``, which is written
after each layer. Entries of other GPUs stay.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from benchmarks.cases import GPU_CASES, Case
from hetconv_kernels import ops
from hetconv_kernels.backends.triton import table
from hetconv_kernels.backends.triton.picking import TritonChoice, all_choices, attempt
from hetconv_kernels.measure import timing
from hetconv_kernels.problem import Problem, make_geometry

Fastest = tuple[str, float]
Entries = dict[str, dict[str, object]]


def problems_of(case: Case) -> list[Problem]:
    """Describes the primitives of a case, without memory for its tensors."""
    support = case.build_support()
    geometry = make_geometry(support, case.stride, case.k // 2)
    device = torch.device(case.device, 0) if case.device == "cuda" else torch.device(case.device)
    found = []
    for verb, shape in (
        ("fprop", (case.n, case.c, case.h, case.w)),
        ("dgrad", (case.n, case.f, *case.output)),
        ("wgrad", (case.n, case.f, *case.output)),
    ):
        _, c, h, w = shape
        strides = (c * h * w, 1, w * c, c)
        first = torch.empty_strided(shape, strides, dtype=getattr(torch, case.dtype), device="meta")
        weight = torch.empty(support.shape, dtype=first.dtype, device="meta")
        made = ops.describe(verb, geometry, first, first, weight, (case.h, case.w))
        found.append(Problem(**{**vars_of(made), "device": device}))
    return found


def vars_of(problem: Problem) -> dict[str, object]:
    """Returns the fields of a Problem."""
    return {name: getattr(problem, name) for name in problem.__dataclass_fields__}


def measured_entries(
    cases: Iterable[Case],
    capability: tuple[int, int],
    measure: Callable[[Problem, Sequence[TritonChoice]], Fastest],
    most: int,
) -> Iterator[Entries]:
    """Measures cases; after each one gives all entries so far.

    Of two problems with one key the slower one decides.
    """
    found: Entries = {}
    for case in cases:
        for problem in problems_of(case):
            name, seconds = measure(problem, all_choices(problem)[:most])
            key = table.table_key(problem, capability)
            print(f"{key:<70} {name:<40} {seconds * 1e6:9.2f} us", flush=True)
            if key not in found or float(str(found[key]["seconds"])) < seconds:
                found[key] = {"name": name, "seconds": seconds}
        yield found


def timed(problem: Problem, choices: Sequence[TritonChoice]) -> Fastest:
    """Times choices in turns."""
    calls = {c.name: attempt(problem, c) for c in choices}
    timings = timing.interleaved(calls, rounds=9, device=problem.device)
    name = timings.fastest(list(calls))
    return name, timings.median(name)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and writes; 2 where there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--full", action="store_true", help="all GPU cases, not the quick ones")
    parser.add_argument("--most", type=int, default=8, help="choices to time, best predicted first")
    parser.add_argument(
        "--budget", type=float, default=float("inf"), help="seconds after which no layer is begun"
    )
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(f"torch {torch.__version__} finds no CUDA device: nothing was measured.")
        return 2
    cases = [c for c in GPU_CASES if options.full or c.quick]
    before, started, layers = table.table_entries(), time.monotonic(), 0
    found: Entries = {}
    for found in measured_entries(cases, torch.cuda.get_device_capability(), timed, options.most):
        layers += 1
        whole = {"entries": dict(sorted({**before, **found}.items()))}
        table.TABLE_FILE.write_text(json.dumps(whole, indent=1) + "\n")
        if time.monotonic() - started > options.budget:
            break
    print(
        f"{len(found)} entries of {layers} layers (of {len(cases)}) are in {table.TABLE_FILE.name}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
