# SPDX-License-Identifier: Apache-2.0
"""The three primitives on a GPU, one by one, against cuDNN and against compositions.

    python -m benchmarks.primitives [--full] [--shard I/N] [--backend triton] [--budget S]

Each variant of a row is checked against float64 (the first and last image; of wgrad some filters)
and timed by itself before all are timed together: cold L2 by rotating buffers, CUDA-graph replays,
variants in turns. A variant that is wrong or fails is named and left out; the others are timed.
Our other engines for GPUs that take a row are measured in it too. Rows are written as they finish,
and a run that was cut short goes on where it stopped; the table comes last. What hangs, or takes
the GPU's context down, is left out by a new process, which measures the others. Without
``--full``: 6 shapes × batch 128 × fprop, dgrad, wgrad × four Supports, in bf16, and training steps
of HetConv with p=4; and fprop of these for one image, which is about launches and latency.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
import traceback
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import hetconv_kernels as hk
from benchmarks import RESULTS
from benchmarks.bench import TRAINING_STEP, Bench
from benchmarks.cases import GPU_CASES, GPU_SHAPES, Case, het_case
from benchmarks.gate import Agreement
from benchmarks.record import Record, comparison, disturbed, verdict
from benchmarks.table import primitive_table
from benchmarks.watch import BEGIN, Log, end_on_term, restarted
from hetconv_kernels.errors import BackendError
from hetconv_kernels.measure import timing
from hetconv_kernels.measure.roofline import Roofs, measure_roofs
from hetconv_kernels.problem import VERBS

# Where torch.compile(max-autotune) of the composition is measured as well, with --full, at p=4.
COMPILED_SHAPES = ("r50-conv2", "r50-conv3", "r50-conv4", "r50-conv5")


# What a process says when it ends because it can do nothing more on its GPU.
LOST = 3
# What an engine does that cannot run a row, which is no fault.
REFUSED = "refused"
# Of a name to be left out: all variants, or all verbs.
ALL = "*"


class ContextLost(Exception):
    """Something has left the GPU in a state in which this process can do nothing more."""


def rows_of(full: bool) -> list[tuple[Case, str]]:
    """Lists what is measured: the quick table, or all shapes, batches, Supports and dtypes."""
    wanted = [c for c in GPU_CASES if c.name.rsplit("-", 2)[0].removeprefix("gpu-") in GPU_SHAPES]
    quick = [c for c in wanted if c.quick]
    # HetConv first: should the time run out, its rows are there.
    quick.sort(key=lambda c: c.support.kind != "het")
    steps = [(c, TRAINING_STEP) for c in quick if c.support == het_case(4)]
    if not full:
        one = {c.name.replace("-128-", "-1-") for c, _ in steps}
        single = [c for c in wanted if c.name in one]
        place = sum(c.support.kind == "het" for c in quick)
        cases = [*quick[:place], *single, *quick[place:]]
        rows = [*itertools.product(quick, VERBS), *steps, *((c, "fprop") for c in single)]
        return sorted(rows, key=lambda row: cases.index(row[0]))  # the verbs of a case together
    others = [
        replace(c, dtype=dtype, name=f"{c.name}-{dtype}", quick=False)
        for c in quick
        for dtype in ("float16", "float32")
        if c.support == het_case(4)
    ]
    cases = [*wanted, *others]
    rows = [*itertools.product(cases, VERBS), *steps]
    return sorted(rows, key=lambda row: cases.index(row[0]))


def shard_of(rows: Sequence[tuple[Case, str]], part: int, parts: int) -> list[tuple[Case, str]]:
    """Returns the rows of every `parts`-th case, so that a case's tensors are made once."""
    mine = set(list(dict.fromkeys(case for case, _ in rows))[part - 1 :: parts])
    return [row for row in rows if row[0] in mine]


def begin(case: Case, verb: str = ALL, variant: str = ALL) -> str:
    """Says what is begun, for who watches this process; returns its name."""
    name = f"{case.name}/{verb}/{variant}"
    print(BEGIN + name, flush=True)
    return name


def measure_verb(
    bench: Bench,
    verb: str,
    backend: str,
    seconds: float,
    roofs: Roofs,
    without: Collection[str] = (),
) -> dict[str, Any]:
    """Checks and times one verb of a case, variant by variant, and makes its row.

    Args:
        bench: the case.
        verb: or a whole step.
        backend: that is asked for.
        seconds: for the timing.
        roofs: of the device.
        without: names of what is left out, as `begin` says them.

    Raises:
        ContextLost: a variant left the GPU unusable.
    """
    case, live = bench.case, bench.support.live
    times = len(VERBS) if verb == TRAINING_STEP else 1
    described = bench.described("fprop" if verb == TRAINING_STEP else verb)
    left_out: dict[str, str] = {}
    matches = {}
    for name in bench.variants[verb]:
        if begin(case, verb, name) in without:
            left_out[name] = "hung, or ended its process"
            continue
        try:
            matches[name] = bench.check(verb, name)
            if matches[name].ok:
                _timed(bench, verb, [name], seconds, rounds=1)
            else:
                left_out[name] = f"wrong by {matches[name].worst:.3g} times what is allowed"
        except BackendError as refusal:
            left_out[name] = f"{REFUSED}: {str(refusal)[:300]}"
        except RuntimeError as error:
            traceback.print_exc(limit=-6, file=sys.stdout)
            left_out[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            if not usable(case.device):
                raise ContextLost(name) from None
    good = [name for name in bench.variants[verb] if name not in left_out]
    # Where the engine that was asked for is left out, the row is of another one of ours.
    ours = [n for n in good if n == "ours" or (n.startswith("ours-") and n != "ours-unfrozen")]
    subject = ours[0] if ours else ""
    ran = subject.removeprefix("ours-")
    if ran in ("", "ours"):
        code = bench.code if subject else hk.backends.CODES["vendor"]
        ran = hk.backends.choose(described, code).backend.name
    judged = [matches[name] for name in good if name in matches] if subject else []
    judged = judged or list(matches.values()) or [Agreement(False, math.inf, math.inf)]
    row: dict[str, Any] = {
        "kind": "primitive",
        "case": case.to_dict(),
        "verb": verb,
        "backend": {"asked": backend, "ran": ran},
        "efficiency": hk.backends.get_backend(ran).efficiency(described),
        "macs": times * case.macs(live),
        "dense_macs": times * case.macs(case.f * case.c * case.k**2),
        "bytes": times * case.bytes(live),
        "match": max(judged, key=lambda match: match.worst).to_dict(),
    }
    if good and begin(case, verb) in without:
        left_out[ALL] = "hung, or ended its process, as all were timed together"
    if left_out:
        row["left_out"] = left_out
    if "dense" not in good or ALL in left_out:
        return row
    timings = _timed(bench, verb, good, seconds, rounds=25, target=subject or "dense")
    row["timings"] = timings.to_dict()
    if not subject:  # the others keep their times
        row["rivals"] = {name: timings.median(name) for name in timings.samples}
        return row | disturbed(timings)
    floor, median = roofs.floor(row["macs"], row["bytes"]), timings.median(subject)
    row |= {"median_s": median, "floor_s": floor, "percent_of_roof": 100 * floor / median}
    for role in ("dense", "composition", "compiled"):
        names = [name for name in timings.samples if name.split("-")[0] == role]
        row[role] = comparison(timings, names, subject) if names else None
    row["engines"] = {n.removeprefix("ours-"): timings.median(n) for n in ours if n != subject}
    row["verdict"] = verdict(row["dense"], timings.disturbed)
    return row | disturbed(timings)


def _timed(
    bench: Bench, verb: str, names: Sequence[str], seconds: float, rounds: int, target: str = ""
) -> timing.Timings:
    """Times variants in turns; one round of one variant shows that it can be captured and run."""
    on_gpu = bench.case.device == "cuda"
    return timing.interleaved(
        {name: bench.variants[verb][name] for name in names},
        baseline="dense" if "dense" in names else names[0],
        target=target or names[0],
        rounds=rounds,
        warmup=2 if rounds > 1 else 0,
        max_seconds=seconds if rounds > 1 else None,
        cold=on_gpu,
        graph=on_gpu,
        device=bench.case.device,
        retake=2 if rounds > 1 else 0,
    )


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
    record.data["rows"], record.data["roofs"] = before["rows"], before["roofs"]
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
    parser.add_argument("--leave-out", action="append", default=[], metavar="CASE/VERB/VARIANT")
    parser.add_argument("--quiet", type=float, default=45.0, help="seconds of silence = a hang")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(f"torch {torch.__version__} finds no CUDA device: nothing was measured.")
        return 2
    part, parts = map(int, options.shard.split("/"))
    if not 1 <= part <= parts:
        parser.error(f"--shard {options.shard}: expected I/N with 1 <= I <= N")
    if not options.worker:
        end_on_term()
        status, lost = restarted(
            [sys.executable, "-m", "benchmarks.primitives", *arguments, "--worker"],
            Log(),
            limit=options.budget + 60,
            quiet=options.quiet,
            option="--leave-out",
            done=(0, 1, 2),
        )
        if lost:
            print(f"FAILED and left out: {', '.join(lost)}")
        return status or int(bool(lost))
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = True  # both sides of a float32 row
    name = f"primitives-{'full' if options.full else 'quick'}"
    record = Record(options.results, name if parts == 1 else f"{name}-{part}of{parts}")
    wanted = shard_of(rows_of(options.full), part, parts)
    without = frozenset(options.leave_out)
    more = (options.seconds, options.full, options.budget, without)
    try:
        status = run_rows(record, wanted, options.backend, *more)
    except ContextLost as lost_context:
        print(f"{lost_context}: the GPU's context is lost", flush=True)
        return LOST
    if without:
        print(f"FAILED and left out: {', '.join(sorted(without))}")
    return status or int(bool(without))


def run_rows(
    record: Record,
    wanted: Sequence[tuple[Case, str]],
    backend: str,
    seconds: float,
    full: bool = False,
    budget: float = float("inf"),
    without: Collection[str] = (),
) -> int:
    """Measures the rows that the record lacks, and prints them all; 1 when one went wrong.

    Raises:
        ContextLost: a case left the GPU unusable; what was measured before is written.
    """
    done, wrong, started = resumed(record), 0, time.monotonic()
    roofs = {found["dtype"]: Roofs(**found) for found in record.data["roofs"]}
    todo = [(c, v) for c, v in wanted if (c.name, v) not in done]
    late: list[str] = []
    for case, pairs in itertools.groupby(todo, key=lambda pair: pair[0]):
        if time.monotonic() - started > budget:
            late += [f"{case.name} {verb}" for _, verb in pairs]
            continue
        if begin(case) in without:
            wrong += 1
            continue
        if case.dtype not in roofs:
            roofs[case.dtype] = measure_roofs(case.device, getattr(torch, case.dtype))
            record.add_roofs(roofs[case.dtype])
        try:
            wrong += _case(record, case, pairs, backend, seconds, full, roofs[case.dtype], without)
        except ContextLost:
            raise
        except Exception:  # noqa: BLE001  one row that fails is no reason to lose the others
            wrong += 1
            traceback.print_exc(limit=-6, file=sys.stdout)
            print(f"{case.name}: FAILED", flush=True)
            if not usable(case.device):
                raise ContextLost(case.name) from None
        if case.device == "cuda":
            torch.cuda.empty_cache()
    for line in [*ceiling_words(record.data["roofs"]), *primitive_table(record.data["rows"])]:
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
    without: Collection[str] = (),
) -> int:
    """Measures the rows of one case; returns how many were wrong."""
    compiled = full and case.n == 128 and case.support == het_case(4)
    compiled = compiled and any(f"-{shape}-" in case.name for shape in COMPILED_SHAPES)
    wrong = 0
    with torch.no_grad():
        bench = Bench(case, backend, compiled)
        for _, verb in pairs:
            row = measure_verb(bench, verb, backend, seconds, roofs, without)
            record.add(row)
            faults = [r for r in row.get("left_out", {}).values() if not r.startswith(REFUSED)]
            wrong += not row["match"]["ok"] or bool(faults)
            shown = f"{row['median_s'] * 1e6:9.2f} us" if "median_s" in row else "NOT TIMED"
            print(f"{case.name:<36} {verb:<6} {shown}", flush=True)
            for name, reason in row.get("left_out", {}).items():
                print(f"{case.name:<36} {verb:<6} {name} is LEFT OUT: {reason}", flush=True)
    return wrong


def ceiling_words(roofs: Sequence[dict[str, Any]]) -> list[str]:
    """Lists the measured ceilings in words; the floors come from them."""
    return [
        f"ceilings, {r['dtype']}: {2e-12 * r['macs_per_s']:.1f} TFLOP/s (the best of a product and "
        f"a convolution), {1e-12 * r['bytes_per_s']:.2f} TB/s (a copy)"
        for r in roofs
    ]


if __name__ == "__main__":
    sys.exit(main())
