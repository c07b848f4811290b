# SPDX-License-Identifier: Apache-2.0
"""Measures the tiles of the Triton engine on a GPU and writes its committed table.

    python -m benchmarks.tune [--full] [--most N]

For each layer of `cases` it times the choices that the cost model thinks best, fprop and dgrad, and
keeps the fastest in ``hetconv_kernels/backends/triton/table.json``. Entries of other GPUs stay.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch

from benchmarks.cases import GPU_CASES, Case
from hetconv_kernels import ops, timing
from hetconv_kernels.backends.triton import choice, table
from hetconv_kernels.problem import Problem, make_geometry

Fastest = tuple[str, float]


def problems(case: Case) -> list[Problem]:
    """Describes fprop and dgrad of a case, without memory for its tensors."""
    support = case.build_support()
    geometry = make_geometry(support, case.stride, case.k // 2)
    device = torch.device(case.device, 0) if case.device == "cuda" else torch.device(case.device)
    found = []
    for verb, shape in (
        ("fprop", (case.n, case.c, case.h, case.w)),
        ("dgrad", (case.n, case.f, *case.output)),
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


def entries(
    cases: Iterable[Case],
    capability: tuple[int, int],
    measure: Callable[[Problem, Sequence[choice.GatherChoice]], Fastest],
    most: int,
) -> dict[str, dict[str, object]]:
    """Measures cases and returns their entries; of two with one key the slower case decides."""
    found: dict[str, dict[str, object]] = {}
    for case in cases:
        for problem in problems(case):
            best = sorted(choice.gather_choices(problem), key=lambda c: c.seconds)[:most]
            name, seconds = measure(problem, best)
            key = table.key_of(problem, capability)
            print(f"{key:<70} {name:<40} {seconds * 1e6:9.2f} us", flush=True)
            if key not in found or float(str(found[key]["seconds"])) < seconds:
                found[key] = {"name": name, "seconds": seconds}
    return found


def timed(problem: Problem, choices: Sequence[choice.GatherChoice]) -> Fastest:
    """Times choices in turns."""
    calls = {c.name: partial(choice._try, problem, c, []) for c in choices}
    timings = timing.interleaved(calls, rounds=9, device=problem.device)
    name = timings.fastest(list(calls))
    return name, timings.median(name)


def main() -> int:
    """Measures and writes; 2 where there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--full", action="store_true", help="all GPU cases, not the quick ones")
    parser.add_argument("--most", type=int, default=8, help="choices to time, best predicted first")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print(f"torch {torch.__version__} finds no CUDA device: nothing was measured.")
        return 2
    cases = [c for c in GPU_CASES if options.full or c.quick]
    found = entries(cases, torch.cuda.get_device_capability(), timed, options.most)
    whole = {**table.entries(), **found}
    table.PATH.write_text(json.dumps({"entries": dict(sorted(whole.items()))}, indent=1) + "\n")
    print(f"{len(found)} entries written to {table.PATH.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
