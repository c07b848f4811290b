# SPDX-License-Identifier: Apache-2.0
"""Smoke tests of the GPU engines, part by part, each in a process of its own with a time limit.

    python -m benchmarks.smoke [--limit S] [--results DIR] [NAME ...]

Each part of `hetconv_kernels.backends.gpu.parts` multiplies small integers, which no rounding can
hide a wrong product of, again and again; it must equal float64 bit for bit. ``cuda-rate`` is a
probe instead: clocks of one wgmma product by where its operand begins in shared memory. What was
found is in ``smoke.json`` after every part. A part that hangs is killed.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import RESULTS
from benchmarks.watch import Log, end_on_term, run_watched

RESULT = "result "
# CUDA first: nothing is compiled for it here, and wide groups are worth most.
CHECKS = (
    "cuda-wide", "cuda-cluster", "cuda-flat", "cuda-wide-wgrad", "cuda-rate",
    "cuda-narrow", "cuda-tf32", "cuda-tma", "cuda-wgrad", "cuda-scattered",
    "triton-gather", "triton-tma", "triton-wgrad", "triton-wgrad-tma",
)  # fmt: skip
# What else a part needs to be run at all.
NEEDS = {
    "cuda-cluster": ("cuda-wide",),
    "cuda-flat": ("cuda-wide",),
    "cuda-tf32": ("cuda-narrow",),
    "cuda-tma": ("cuda-narrow",),
}
FAULTY = ("wrong", "failed", "hung")
# Images, and how often each product is repeated; the operands are exact in bf16, so in TF32.
IMAGES, REPEATS = 96, 20
_SIZES = ((28, 28), (14, 14), (7, 7))
# Rows and planes in 16-byte units, and taps: as the kernel has them, and easier ones.
RATES = {
    "rows and planes of 128 bytes": (8, 272, 1),
    "rows of 128 bytes": (8, 273, 1),
    "rows of 256 bytes, nine taps": (16, 545, 3),
    "rows of 160 bytes, nine taps": (10, 345, 3),
}
_STEPS = 4096


def main(arguments: Sequence[str] | None = None) -> int:
    """Checks the parts one after another; 1 when one is faulty."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", default=[], help=", ".join(CHECKS))
    parser.add_argument("--limit", type=float, default=40.0, help="seconds for one part")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--python", default="", help="the interpreter with its own arguments")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        return one(options.one)
    unknown = [name for name in options.names if name not in CHECKS]
    if unknown:
        parser.error(f"received {', '.join(unknown)}; expected some of {', '.join(CHECKS)}")
    end_on_term()
    python = shlex.split(options.python) or [sys.executable]
    found = run_parts(options.names or CHECKS, python, options.limit, options.results, Log())
    return int(any(check["status"] in FAULTY for check in found.values()))


def run_parts(
    names: Sequence[str], python: Sequence[str], limit: float, folder: Path, log: Log
) -> dict[str, dict[str, Any]]:
    """Checks parts, writes ``smoke.json`` after each, and returns what was found.

    Args:
        names: some of `CHECKS`.
        python: the interpreter.
        limit: seconds for one part.
        folder: for the results.
        log: for the words of the parts.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        log(f"smoke: {name} begins")
        command = [*python, "-m", "benchmarks.smoke", "--one", name]
        ended = run_watched(command, log, limit=limit)
        check: dict[str, Any] = {"status": ended.status, "detail": ""}
        for line in ended.lines:
            if line.startswith(RESULT):
                check |= json.loads(line.removeprefix(RESULT))
        if ended.status == "hung":
            check = {"status": "hung", "detail": f"killed after {ended.seconds:.0f} s"}
        elif ended.status == "failed" and check["status"] in ("ok", "failed"):
            last = next((line for line in reversed(ended.lines) if line.strip()), "no word")
            check = {"status": "failed", "detail": f"exit status {ended.code}: {last[:300]}"}
        found[name] = check | {"seconds": round(ended.seconds, 2)}
        log(f"smoke: {name:<20} {check['status'].upper():<7} {check['detail']}")
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / "smoke.json.part"
        part.write_text(json.dumps(found, indent=1) + "\n")
        part.replace(folder / "smoke.json")
    return found


def without(found: dict[str, dict[str, Any]]) -> list[str]:
    """Lists the parts that are to be left out: the faulty ones and those that need them."""
    faulty = {name for name, check in found.items() if check["status"] in FAULTY}
    faulty |= {name for name, needs in NEEDS.items() if faulty & set(needs)}
    return [name for name in CHECKS if name in faulty and name != "cuda-rate"]


def left_out_because(name: str, found: dict[str, dict[str, Any]]) -> str:
    """Says why a part is left out: for a fault of its own, or of one that it needs."""
    check = found.get(name, {"status": ""})
    own = check["status"] in FAULTY
    return str(check["detail"]) if own else f"it needs {' and '.join(NEEDS[name])}"


# One part, in its own process ---------------------------------------------------------------------


def one(name: str) -> int:
    """Checks one part here; prints what it found, and returns 1 when that is a fault."""
    import torch

    if not torch.cuda.is_available():
        return _said("absent", f"torch {torch.__version__} finds no CUDA device")
    print(f"{name} on {torch.cuda.get_device_name()}", flush=True)
    return _rate() if name == "cuda-rate" else _part(name)


def _said(status: str, detail: str, **more: Any) -> int:
    print(RESULT + json.dumps({"status": status, "detail": detail, **more}), flush=True)
    return int(status in FAULTY)


def _part(name: str) -> int:
    import hetconv_kernels as hk
    from hetconv_kernels.backends.cuda import wide_tiles
    from hetconv_kernels.backends.gpu import parts
    from hetconv_kernels.backends.triton import choice as triton_choice

    engine = name.split("-")[0]
    if engine not in hk.available_backends("cuda"):
        return _said("absent", f"the backend {engine!r} is not built here")
    kept = {name, *NEEDS.get(name, ())} | ({"cuda-wgrad"} if name == "cuda-tma" else set())
    parts.WITHOUT = frozenset(parts.PARTS.keys() - kept)
    if name == "cuda-cluster":
        wide_tiles.CLUSTER_SIZES = (2,)
    if name == "cuda-flat":
        wide_tiles.TILE_PIXELS = ()
    if name == "triton-tma":  # which are not chosen where the CUDA engine is built
        triton_choice.ONLY_LAUNCH = "tma"
    gradient = "wgrad" in name
    verbs = ("wgrad",) if gradient else ("fprop", "dgrad")
    if name == "cuda-tma":
        verbs = ("fprop", "dgrad", "wgrad")
    run = 0
    for support in _supports(name):
        for size in _SIZES:
            for verb in verbs:
                reason, wrong = _compared(name, engine, verb, support, size)
                if reason:
                    skipped = f"{verb} of {support} at {size}: {reason}"
                    print(skipped, flush=True)
                    continue
                run += 1
                if wrong:
                    return _said("wrong", f"{verb} of {support} at {size}: {wrong}")
    return _said("ok", f"{run} products of integers, exact") if run else _said("absent", skipped)


def _supports(name: str) -> list[Any]:
    import numpy as np

    from hetconv_kernels import Support

    if name in ("cuda-wide", "cuda-cluster", "cuda-flat", "cuda-wide-wgrad", "triton-tma"):
        return [Support.het(256, 256, 3, p=4), Support.dense(128, 128, 3)]
    if name == "cuda-scattered":
        rng = np.random.default_rng(0)
        keep = rng.random((16, 256)) < 0.3
        return [Support.self_grouped(rng.integers(0, 16, 256), keep, kernel) for kernel in (3, 1)]
    return [Support.het(64, 64, 3, p=4), Support.grouped(64, 64, 3, 8)]


def _compared(
    name: str, engine: str, verb: str, support: Any, size: tuple[int, int]
) -> tuple[str, str]:
    """Runs a verb; returns why the part does not, and what was wrong."""
    import torch

    from hetconv_kernels import ops
    from hetconv_kernels.backends import CODES, get_backend
    from hetconv_kernels.problem import make_geometry
    from hetconv_kernels.testing import oracle

    geometry, code = make_geometry(support, 1, support.kernel[0] // 2), CODES[engine]
    dtype = torch.float32 if name == "cuda-tf32" else torch.bfloat16
    generator = torch.Generator().manual_seed(0)

    def integers(*shape: int) -> torch.Tensor:
        drawn = torch.randint(-1, 2, shape, generator=generator)
        drawn = drawn * (torch.rand(shape, generator=generator) < 0.5)
        made = drawn.to(device="cuda", dtype=dtype)
        return made.contiguous(memory_format=torch.channels_last)

    n = max(IMAGES // 4, 1) if verb == "wgrad" else IMAGES  # sums over pixels stay exact
    x, w, dy = (integers(*shape) for shape in (
        (n, support.channels, *size), support.shape, (n, support.filters, *size)
    ))  # fmt: skip
    mask = torch.as_tensor(support.mask.copy(), device=w.device)
    leaves = [t.double().requires_grad_() for t in (x, torch.where(mask, w, 0))]
    y = oracle(*leaves, geometry)
    dx, dw = torch.autograd.grad(y, leaves, dy.double())
    truth = {"fprop": y.detach(), "dgrad": dx, "wgrad": torch.where(mask, dw, 0.0)}[verb]
    calls: dict[str, Callable[[], torch.Tensor]] = {
        "fprop": lambda: ops.run_fprop(x, w, geometry, None, code),
        "dgrad": lambda: ops.run_dgrad(dy, w, geometry, size, code),
        "wgrad": lambda: ops.run_wgrad(dy, x, geometry, support.shape, torch.float32, code),
    }
    first = x if verb == "fprop" else dy
    problem = ops.describe(verb, geometry, first, x if verb == "wgrad" else first, w, size)
    reasons = get_backend(engine).unsupported_reasons(problem)
    reasons = reasons or _not_chosen(name, problem)
    if reasons:
        return " ".join(reasons), ""
    if verb != "wgrad" and float(truth.abs().max()) > 256:
        return "", "the truth itself is not exact in bfloat16: this test is wrong"
    convolutions: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    for turn in range(REPEATS):
        # Both ways of float32; of bfloat16 there is one.
        convolutions.fp32_precision = "ieee" if turn % 2 else "tf32"
        found = calls[verb]().double()
        if not torch.equal(found, truth):
            bad = int((found != truth).sum())
            return "", f"{bad} of {truth.numel()} elements differ at run {turn}"
    return "", ""


def _not_chosen(name: str, problem: Any) -> list[str]:
    """Says why not the part that is to be checked would be run, but another one."""
    from hetconv_kernels.backends.cuda import choice

    if name == "cuda-tma":
        found: Any = choice.best(problem)
        why = found.no_tma if problem.verb == "wgrad" else found.how.no_tma
        return [f"Without TMA: {why}."] if why else []
    if name.startswith("triton-") and name.endswith("tma"):
        from hetconv_kernels.backends.triton.picking import pick_choice

        return [] if pick_choice(problem).box is not None else ["No box is chosen."]
    return []


def _rate() -> int:
    """Measures clocks of one product of 64 x 256 by 16; 128 is the rate of the matrix unit."""
    import torch

    import hetconv_kernels as hk

    if "cuda" not in hk.available_backends("cuda"):
        return _said("absent", "the backend 'cuda' is not built here")
    if torch.cuda.get_device_capability() != (9, 0):
        return _said("absent", "wgmma is of compute capability 9.0")
    from hetconv_kernels import _cuda

    blocks = torch.cuda.get_device_properties(0).multi_processor_count
    found = {}
    for form, (row, plane, taps) in RATES.items():
        clocks = torch.zeros(blocks, 2, dtype=torch.int64, device="cuda")
        values = torch.zeros(blocks, 2, device="cuda")
        stream = torch.cuda.current_stream().cuda_stream
        for _ in range(2):  # the first one warms up
            _cuda.wide_rate(
                clocks.data_ptr(), values.data_ptr(), blocks, _STEPS, row, plane, taps, stream
            )
        torch.cuda.synchronize()
        if not bool((values == 64 * _STEPS).all()):
            return _said("wrong", f"{form}: sums of ones are not {64 * _STEPS}")
        found[form] = float(clocks.double().mean()) / (_STEPS * 4 * 2)
    text = ", ".join(f"{form}: {value:.1f}" for form, value in found.items())
    return _said("ok", f"clocks of a product (128 is the full rate): {text}", clocks=found)


if __name__ == "__main__":
    sys.exit(main())
