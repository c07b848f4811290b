# SPDX-License-Identifier: Apache-2.0
"""The three primitives on a GPU, one by one, against cuDNN and against compositions.

    python -m benchmarks.primitives [--full] [--shard I/N] [--backend triton] [--seconds S]

Each row is checked against float64 on the first and last image before it is timed: cold L2 by
rotating buffers, CUDA-graph replays, variants in turns. Our other engines for GPUs that take a row
are measured in it too. Rows are written as they finish, and a run that was cut short goes on where
it stopped; the table comes last. Without ``--full``: 6 shapes × batch 128 × fprop, dgrad, wgrad ×
four Supports, in bf16.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import hetconv_kernels as hk
from benchmarks import baselines, gate
from benchmarks.cases import GPU_CASES, GPU_SHAPES, Case, het
from benchmarks.record import Record, verdict
from benchmarks.table import primitive_table
from hetconv_kernels import ops, timing
from hetconv_kernels.errors import BackendError
from hetconv_kernels.packing import dense_weight, live_weight
from hetconv_kernels.problem import make_geometry
from hetconv_kernels.roofs import Roofs, measure_roofs

VERBS = ("fprop", "dgrad", "wgrad")
RESULTS = Path(__file__).parent / "results"
# Where torch.compile(max-autotune) of the composition is measured as well, with --full.
COMPILED_SHAPES = ("r50-conv2", "r50-conv3", "r50-conv4", "r50-conv5")
LAST = torch.channels_last
# Measured beside the engine that was asked for, where they take a row.
ENGINES = ("triton", "cuda")
Call = Callable[[], Any]


def rows_of(full: bool) -> list[tuple[Case, str]]:
    """Lists what is measured: the quick table, or all shapes, batches, Supports and dtypes."""
    wanted = [c for c in GPU_CASES if c.name.rsplit("-", 2)[0].removeprefix("gpu-") in GPU_SHAPES]
    quick = [c for c in wanted if c.quick]
    if not full:
        return list(itertools.product(quick, VERBS))
    others = [
        replace(c, dtype=dtype, name=f"{c.name}-{dtype}", quick=False)
        for c in quick
        for dtype in ("float16", "float32")
        if c.support == het(4)
    ]
    return list(itertools.product([*wanted, *others], VERBS))


class Bench:
    """One case: tensors on rotating buffers, our primitives and their rivals.

    Attributes:
        case: what is measured.
        support: its Support.
        variants: verb -> name -> calls; names begin with ``ours``, ``dense`` or ``composition``.
    """

    def __init__(self, case: Case, backend: str, compiled: bool = False) -> None:
        self.case, self.code = case, hk.backends.backend_code(backend)
        self.support = case.build_support()
        self.geometry = make_geometry(self.support, case.stride, case.k // 2)
        device, self.dtype = torch.device(case.device), getattr(torch, case.dtype)
        generator = torch.Generator().manual_seed(1)
        sets = 1
        if device.type == "cuda":
            sets = timing.rotations(case.bytes(self.support.live), device)

        def random(*shape: int) -> Tensor:
            drawn = torch.randn(*shape, generator=generator).to(device, self.dtype)
            return drawn.contiguous(memory_format=LAST)

        mask = torch.as_tensor(self.support.mask.copy(), device=device)
        self.weight = random(case.f, case.c, case.k, case.k) * mask
        self.live = live_weight(self.support, self.weight)
        self.inputs = [random(case.n, case.c, case.h, case.w)]
        self.grads = [random(case.n, case.f, *case.output)]
        for _ in range(sets - 1):  # the values are the same, the places in memory are not
            self.inputs.append(self.inputs[0].clone(memory_format=torch.preserve_format))
            self.grads.append(self.grads[0].clone(memory_format=torch.preserve_format))
        module, self.compiled = self._composition(), compiled
        self.variants = {verb: dict(self._variants(verb, module)) for verb in VERBS}

    def check(self, verb: str) -> gate.Match:
        """Compares all variants of a verb with float64; dead gradients do not count."""
        case = self.case
        images: Any = [0, -1] if verb != "wgrad" and case.n > 1 else slice(None)
        truth = gate.truth(
            self.inputs[0][images],
            self.weight,
            self.grads[0][images],
            stride=case.stride,
            padding=case.k // 2,
            dtype=self.dtype,
        )
        place = VERBS.index(verb)
        value, bound = truth.values[place], truth.bounds[place]
        if verb == "wgrad":
            value = dense_weight(self.support, value, value.dtype)
        matches = []
        for name, calls in self.variants[verb].items():
            result = calls[0]()
            if isinstance(result, tuple):
                continue  # a composition's gradients of its own, differently shaped weights
            if verb == "wgrad" and not name.startswith("ours"):
                result = dense_weight(self.support, result, result.dtype)
            found = result if verb == "wgrad" else result[images]
            matches.append(gate.Truth((value,), (bound,)).match((found,)))
        return max(matches, key=lambda match: match.worst)

    def _variants(self, verb: str, module: nn.Module | None) -> Iterator[tuple[str, list[Call]]]:
        pairs = list(zip(self.inputs, self.grads, strict=True))
        yield "ours", [self._ours(verb, x, dy, self.code) for x, dy in pairs]
        for name, code in self._others(verb):
            yield f"ours-{name}", [self._ours(verb, x, dy, code) for x, dy in pairs]
        if verb == "fprop":
            yield "ours-unfrozen", [self._ours("unfrozen", x, dy, self.code) for x, dy in pairs]
        yield "dense", [self._dense(verb, x, dy) for x, dy in pairs]
        if module is None:
            return
        if verb == "fprop":
            yield "composition", [lambda x=x: module(x) for x in self.inputs]
            if self.compiled:
                best = torch.compile(module, mode="max-autotune-no-cudagraphs", fullgraph=True)
                yield "composition-compiled", [lambda x=x: best(x) for x in self.inputs]
        elif isinstance(module, baselines.GroupedPlusPointwise):
            convs = (module.grouped, module.pointwise)
            yield "composition", [self._gradients(verb, convs, x, dy) for x, dy in pairs]
        elif isinstance(module, nn.Conv2d):
            yield "composition", [self._gradients(verb, (module,), x, dy) for x, dy in pairs]

    def _others(self, verb: str) -> Iterator[tuple[str, int]]:
        """Lists our other engines that take this verb."""
        x, first = self.inputs[0], self.inputs[0] if verb == "fprop" else self.grads[0]
        weight = self.live if verb == "fprop" else self.weight
        size = tuple(x.shape[2:])
        problem = ops.describe(verb, self.geometry, first, x, weight, size)
        for name in ENGINES:
            code = hk.backends.CODES[name]
            if code == self.code or name not in hk.available_backends(x.device.type):
                continue
            if not hk.backends.get_backend(name).unsupported_reasons(problem):
                yield name, code

    def _ours(self, verb: str, x: Tensor, dy: Tensor, code: int) -> Call:
        geometry, w, live = self.geometry, self.weight, self.live
        size, shape = tuple(x.shape[2:]), tuple(w.shape)
        if verb == "dgrad":
            return lambda: ops.run_dgrad(dy, w, geometry, size, code)
        if verb == "wgrad":
            return lambda: ops.run_wgrad(dy, x, geometry, shape, w.dtype, code)
        weight = w if verb == "unfrozen" else live
        return lambda: ops.run_fprop(x, weight, geometry, None, code)

    def _dense(self, verb: str, x: Tensor, dy: Tensor) -> Call:
        case, w = self.case, self.weight
        if verb == "fprop":
            return lambda: torch.conv2d(x, w, None, case.stride, case.k // 2)
        return lambda: self._backward(verb, x, w, dy, case.stride, case.k // 2, 1)

    def _gradients(self, verb: str, convs: Sequence[nn.Conv2d], x: Tensor, dy: Tensor) -> Call:
        """The gradient of a sum of convolutions of one input, as autograd would compute it."""
        parts = [(c.weight.detach(), self.case.stride, c.padding[0], c.groups) for c in convs]

        def run() -> Any:
            found = [self._backward(verb, x, w, dy, s, int(p), g) for w, s, p, g in parts]
            if verb == "wgrad":
                return tuple(found)
            return found[0] if len(found) == 1 else found[0] + found[1]

        return run

    @staticmethod
    def _backward(
        verb: str, x: Tensor, w: Tensor, dy: Tensor, stride: int, padding: int, groups: int
    ) -> Tensor:
        wanted = (verb == "dgrad", verb == "wgrad", False)
        found = torch.ops.aten.convolution_backward(
            dy, x, w, None, [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], groups, wanted
        )
        return found[0 if verb == "dgrad" else 1]

    def _composition(self) -> nn.Module | None:
        found = baselines.compositions(self.case, self.support, self.weight)
        found.pop("mask-per-call", None)
        if not found:
            return None
        module: nn.Module = next(iter(found.values())).to(memory_format=LAST)  # type: ignore[call-overload]
        return module.requires_grad_(False)


def measure(bench: Bench, verb: str, backend: str, seconds: float, roofs: Roofs) -> dict[str, Any]:
    """Checks and times one verb of a case, and makes its row."""
    case, live = bench.case, bench.support.live
    geometry, x = bench.geometry, bench.inputs[0]
    described = ops.describe("fprop", geometry, x, x, bench.weight, tuple(x.shape[2:]))
    engine = hk.backends.choose(described, bench.code).backend
    match = bench.check(verb)
    row: dict[str, Any] = {
        "kind": "primitive",
        "case": case.to_dict(),
        "verb": verb,
        "backend": {"asked": backend, "ran": engine.name},
        "efficiency": engine.efficiency(described),
        "macs": case.macs(live),
        "dense_macs": case.macs(case.f * case.c * case.k**2),
        "bytes": case.bytes(live),
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
    )
    floor, median = roofs.floor(row["macs"], row["bytes"]), timings.median("ours")
    row |= {"median_s": median, "floor_s": floor, "percent_of_roof": 100 * floor / median}
    for role in ("dense", "composition"):
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
    others = {name: f"ours-{name}" for name in ENGINES if f"ours-{name}" in timings.samples}
    row["engines"] = {name: timings.median(sample) for name, sample in others.items()}
    row["verdict"] = verdict(row["dense"])
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
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
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
    wanted = rows_of(options.full)[part - 1 :: parts]
    return run(record, wanted, options.backend, options.seconds, options.full)


def run(
    record: Record,
    wanted: Sequence[tuple[Case, str]],
    backend: str,
    seconds: float,
    full: bool = False,
) -> int:
    """Measures the rows that the record lacks, and prints them all."""
    done, wrong = resumed(record), 0
    roofs: dict[str, Roofs] = {}
    todo = [(c, v) for c, v in wanted if (c.name, v) not in done]
    for case, pairs in itertools.groupby(todo, key=lambda pair: pair[0]):
        if case.dtype not in roofs:
            roofs[case.dtype] = measure_roofs(case.device, getattr(torch, case.dtype))
            record.add_roofs(roofs[case.dtype])
        compiled = full and case.n == 128 and any(f"-{s}-" in case.name for s in COMPILED_SHAPES)
        with torch.no_grad():
            bench = Bench(case, backend, compiled)
            for _, verb in pairs:
                try:
                    row = measure(bench, verb, backend, seconds, roofs[case.dtype])
                except BackendError as refusal:
                    print(f"{case.name} {verb}: {refusal}", flush=True)
                    continue
                record.add(row)
                wrong += not row["match"]["ok"]
                shown = f"{row['median_s'] * 1e6:9.2f} us" if "median_s" in row else "MISMATCH"
                print(f"{case.name:<36} {verb:<6} {shown}", flush=True)
        del bench
        if case.device == "cuda":
            torch.cuda.empty_cache()
    for line in primitive_table(record.data["rows"]):
        print(line)
    print(f"written to {record.path}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
