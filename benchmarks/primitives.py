# SPDX-License-Identifier: Apache-2.0
"""The three primitives on a GPU, one by one, against cuDNN and against compositions.

    python -m benchmarks.primitives [--full] [--shard I/N] [--backend triton] [--budget S]

Each row is checked against float64 (the first and last image; of wgrad some filters) before it is
timed: cold L2 by rotating buffers, CUDA-graph replays, variants in turns. Our other engines
for GPUs that take a row are measured in it too. Rows are written as they
finish, and a run that was cut short goes on where it stopped; the table comes last. Where a case
takes the GPU's context down, a new process leaves it out and measures the others. Without
``--full``: 6 shapes × batch 128 × fprop, dgrad, wgrad × four Supports, in bf16, and training steps
of HetConv with p=4.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import hetconv_kernels as hk
from benchmarks.bench import STEP, VERBS, Bench
from benchmarks.cases import GPU_CASES, GPU_SHAPES, Case, het
from benchmarks.record import Record, disturbed, verdict
from benchmarks.table import primitive_table
from hetconv_kernels import timing
from hetconv_kernels.errors import BackendError
from hetconv_kernels.roofs import Roofs, measure_roofs

RESULTS = Path(__file__).parent / "results"
# Where torch.compile(max-autotune) of the composition is measured as well, with --full, at p=4.
COMPILED_SHAPES = ("r50-conv2", "r50-conv3", "r50-conv4", "r50-conv5")


class ContextLost(Exception):
    """A case has left the GPU in a state in which this process can do nothing more.

    Args:
        case: its name.
    """

    def __init__(self, case: str) -> None:
        super().__init__(f"{case}: the GPU's context is lost")
        self.case = case


def rows_of(full: bool) -> list[tuple[Case, str]]:
    """Lists what is measured: the quick table, or all shapes, batches, Supports and dtypes."""
    wanted = [c for c in GPU_CASES if c.name.rsplit("-", 2)[0].removeprefix("gpu-") in GPU_SHAPES]
    quick = [c for c in wanted if c.quick]
    # HetConv first: should the time run out, its rows are there.
    quick.sort(key=lambda c: c.support.kind != "het")
    steps = [(c, STEP) for c in quick if c.support == het(4)]
    if not full:
        rows = [*itertools.product(quick, VERBS), *steps]
        return sorted(rows, key=lambda row: quick.index(row[0]))  # the verbs of a case together
    others = [
        replace(c, dtype=dtype, name=f"{c.name}-{dtype}", quick=False)
        for c in quick
        for dtype in ("float16", "float32")
        if c.support == het(4)
    ]
    cases = [*wanted, *others]
    rows = [*itertools.product(cases, VERBS), *steps]
    return sorted(rows, key=lambda row: cases.index(row[0]))


def shard_of(rows: Sequence[tuple[Case, str]], part: int, parts: int) -> list[tuple[Case, str]]:
    """Returns the rows of every `parts`-th case, so that a case's tensors are made once."""
    mine = set(list(dict.fromkeys(case for case, _ in rows))[part - 1 :: parts])
    return [row for row in rows if row[0] in mine]


def measure(bench: Bench, verb: str, backend: str, seconds: float, roofs: Roofs) -> dict[str, Any]:
    """Checks and times one verb of a case, and makes its row."""
    case, live = bench.case, bench.support.live
    times = len(VERBS) if verb == STEP else 1
    described = bench.described("fprop" if verb == STEP else verb)
    engine = hk.backends.choose(described, bench.code).backend
    match = bench.check(verb)
    row: dict[str, Any] = {
        "kind": "primitive",
        "case": case.to_dict(),
        "verb": verb,
        "backend": {"asked": backend, "ran": engine.name},
        "efficiency": engine.efficiency(described),
        "macs": times * case.macs(live),
        "dense_macs": times * case.macs(case.f * case.c * case.k**2),
        "bytes": times * case.bytes(live),
        "match": match.to_dict(),
    }
    if not match.ok:
        return row
    on_gpu = case.device == "cuda"
    timings = timing.interleaved(
        bench.variants[verb],
        baseline="dense",
        target="ours",
        rounds=25,
        max_seconds=seconds,
        cold=on_gpu,
        graph=on_gpu,
        device=case.device,
        retake=2,
    )
    floor, median = roofs.floor(row["macs"], row["bytes"]), timings.median("ours")
    row |= {"median_s": median, "floor_s": floor, "percent_of_roof": 100 * floor / median}
    for role in ("dense", "composition", "compiled"):
        names = [name for name in timings.samples if name.split("-")[0] == role]
        row[role] = None
        if names:
            rival = timings.fastest(names)
            ratio = timings.speedup("ours", over=rival)
            row[role] = {
                "name": rival,
                "median_s": timings.median(rival),
                "ratio": ratio.value,
                "low": ratio.low,
                "high": ratio.high,
                "confidence": ratio.confidence,
            }
    row["engines"] = {
        name.removeprefix("ours-"): timings.median(name)
        for name in timings.samples
        if name.startswith("ours-") and name != "ours-unfrozen"
    }
    row["verdict"] = verdict(row["dense"], timings.disturbed)
    row |= disturbed(timings)
    row["timings"] = timings.to_dict()
    return row


def resumed(record: Record) -> set[tuple[str, str]]:
    """Takes over the rows of an earlier run of the same commit and device; returns their names."""
    try:
        before = json.loads(record.path.read_text())
    except (OSError, ValueError):
        return set()
    same = ("commit", "gpu", "torch")
    mine, theirs = record.data["environment"], before.get("environment", {})
    if any(mine[name] != theirs.get(name) for name in same):
        return set()
    record.data["rows"] = before["rows"]
    return {(row["case"]["name"], row["verb"]) for row in before["rows"]}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, writes and prints; 1 when a result was wrong, 2 where there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--full", action="store_true", help="all shapes, batches and dtypes")
    parser.add_argument("--shard", default="1/1", help="I/N: the I-th of N parts")
    parser.add_argument("--backend", default="triton")
    parser.add_argument("--seconds", type=float, default=1.5, help="for one row")
    parser.add_argument(
        "--budget", type=float, default=float("inf"), help="seconds after which no row is begun"
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--skip", action="append", default=[], help="a case to leave out as failed")
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(arguments)
    started = time.monotonic()
    if not torch.cuda.is_available():
        print(f"torch {torch.__version__} finds no CUDA device: nothing was measured.")
        return 2
    part, parts = map(int, options.shard.split("/"))
    if not 1 <= part <= parts:
        parser.error(f"--shard {options.shard}: expected I/N with 1 <= I <= N")
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = True  # both sides of a float32 row
    name = f"primitives-{'full' if options.full else 'quick'}"
    record = Record(options.results, name if parts == 1 else f"{name}-{part}of{parts}")
    wanted = shard_of(rows_of(options.full), part, parts)
    kept = [(case, verb) for case, verb in wanted if case.name not in options.skip]
    try:
        status = run(record, kept, options.backend, options.seconds, options.full, options.budget)
    except ContextLost as lost:
        print(f"{lost}: a new process leaves this case out.", flush=True)
        left = options.budget - (time.monotonic() - started)
        more = ("--skip", lost.case, "--budget", str(left))
        command = [sys.executable, "-m", "benchmarks.primitives", *arguments, *more]
        os.execv(sys.executable, command)
    if options.skip:
        print(f"FAILED and left out: {', '.join(options.skip)}")
    return status or int(bool(options.skip))


def run(
    record: Record,
    wanted: Sequence[tuple[Case, str]],
    backend: str,
    seconds: float,
    full: bool = False,
    budget: float = float("inf"),
) -> int:
    """Measures the rows that the record lacks, and prints them all; 1 when one went wrong.

    Raises:
        ContextLost: a case left the GPU unusable; what was measured before is written.
    """
    done, wrong, started = resumed(record), 0, time.monotonic()
    roofs: dict[str, Roofs] = {}
    todo = [(c, v) for c, v in wanted if (c.name, v) not in done]
    late: list[str] = []
    for case, pairs in itertools.groupby(todo, key=lambda pair: pair[0]):
        if time.monotonic() - started > budget:
            late += [f"{case.name} {verb}" for _, verb in pairs]
            continue
        if case.dtype not in roofs:
            roofs[case.dtype] = measure_roofs(case.device, getattr(torch, case.dtype))
            record.add_roofs(roofs[case.dtype])
        try:
            wrong += _case(record, case, pairs, backend, seconds, full, roofs[case.dtype])
        except Exception:  # noqa: BLE001  one row that fails is no reason to lose the others
            wrong += 1
            traceback.print_exc(limit=-6, file=sys.stdout)
            print(f"{case.name}: FAILED", flush=True)
            if not usable(case.device):
                raise ContextLost(case.name) from None
        if case.device == "cuda":
            torch.cuda.empty_cache()
    for line in [*ceilings(record.data["roofs"]), *primitive_table(record.data["rows"])]:
        print(line)
    if late:
        print(f"NOT MEASURED, {budget:.0f} s were over ({len(late)} rows): {', '.join(late)}")
    print(f"written to {record.path}")
    return int(bool(wrong))


def usable(device: str) -> bool:
    """Tells whether this process can still use a device; after an illegal access it cannot."""
    try:
        torch.ones(1, device=device).item()
    except RuntimeError:
        return False
    return True


def _case(
    record: Record,
    case: Case,
    pairs: Iterable[tuple[Case, str]],
    backend: str,
    seconds: float,
    full: bool,
    roofs: Roofs,
) -> int:
    """Measures the rows of one case; returns how many were wrong."""
    compiled = full and case.n == 128 and case.support == het(4)
    compiled = compiled and any(f"-{shape}-" in case.name for shape in COMPILED_SHAPES)
    wrong = 0
    with torch.no_grad():
        bench = Bench(case, backend, compiled)
        for _, verb in pairs:
            try:
                row = measure(bench, verb, backend, seconds, roofs)
            except BackendError as refusal:
                print(f"{case.name} {verb}: {refusal}", flush=True)
                continue
            record.add(row)
            wrong += not row["match"]["ok"]
            shown = f"{row['median_s'] * 1e6:9.2f} us" if "median_s" in row else "MISMATCH"
            print(f"{case.name:<36} {verb:<6} {shown}", flush=True)
    return wrong


def ceilings(roofs: Sequence[dict[str, Any]]) -> list[str]:
    """Lists the measured ceilings in words; the floors come from them."""
    return [
        f"ceilings, {r['dtype']}: {2e-12 * r['macs_per_s']:.1f} TFLOP/s (the best of a product and "
        f"a convolution), {1e-12 * r['bytes_per_s']:.2f} TB/s (a copy)"
        for r in roofs
    ]


if __name__ == "__main__":
    sys.exit(main())
