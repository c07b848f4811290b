# SPDX-License-Identifier: Apache-2.0
"""Where is PyTorch's own convolution wrong on this CPU? A fuzz of what `vendor` passes on.

    python -m benchmarks.pytorch_faults [--cases N] [--seed N] [--dtypes LIST] [--everything]

Random layers run through `vendor`, forward and both gradients, beside float64, in processes whose
allocator fills every piece of memory with huge numbers, so that what is left unwritten shows; a
process that crashes is a fault too, and the next one goes on after it. What `vendor` refuses is
left out unless --everything is given, which is how the class that it refuses was found. Exits with
1 where something that `vendor` accepts is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import torch

import hetconv_kernels as hk
from hetconv_kernels import ops
from hetconv_kernels.backends import get_backend
from hetconv_kernels.backends.common import has_idle_taps
from hetconv_kernels.problem import VERBS, Geometry, make_geometry
from hetconv_kernels.testing import error_bound, oracle

TORCH_DTYPES = {
    name: getattr(torch, name) for name in ("bfloat16", "float16", "float32", "float64")
}
# glibc fills what it hands out with the complement of this byte: 0x7f7f is huge in every dtype.
PERTURBED = {"GLIBC_TUNABLES": "glibc.malloc.perturb=128"}
SIDES = (1, 2, 3, 4, 5, 8, 16, 23, 26)
KERNELS, STRIDES, DILATIONS = (1, 2, 3, 4, 5, 7), (1, 1, 2, 3, 5), (1, 1, 2, 3)


def draw_case(seed: int) -> tuple[Geometry, tuple[int, int, int], torch.memory_format, int]:
    """Draws a layer, its images (batch, height, width), their layout, and threads."""
    chance = random.Random(seed)
    while True:
        groups = chance.choice((1, 1, 1, 2, 4))
        channels, filters = groups * chance.randint(1, 24), groups * chance.randint(1, 32)
        kernel, stride, dilation = (
            (chance.choice(values), chance.choice(values))
            for values in (KERNELS, STRIDES, DILATIONS)
        )
        extent = [(k - 1) * (d if k > 1 else 1) for k, d in zip(kernel, dilation, strict=True)]
        pads = chance.randint(0, extent[0] + 1), chance.randint(0, extent[1] + 1)
        images = chance.randint(1, 3), chance.choice(SIDES), chance.choice(SIDES)
        support = (
            hk.Support.grouped(channels, filters, kernel, groups)
            if groups > 1
            else hk.Support.dense(channels, filters, kernel)
        )
        geometry = make_geometry(support, stride, pads, dilation)
        if min(geometry.output_size(*images[1:])) >= 1:
            layout = chance.choice((torch.contiguous_format, torch.channels_last))
            return geometry, images, layout, chance.choice((1, 2))


def examine(seed: int, dtype: torch.dtype, everything: bool) -> list[dict[str, Any]] | None:
    """Runs one layer and lists what is wrong of it; None where `vendor` refuses it."""
    geometry, (n, height, width), layout, threads = draw_case(seed)
    torch.set_num_threads(threads)
    support = geometry.support
    generator = torch.Generator().manual_seed(seed)

    def tensor(*shape: int) -> torch.Tensor:
        values = torch.randint(-3, 4, shape, generator=generator).to(dtype)
        return values.contiguous(memory_format=layout)

    x = tensor(n, support.channels, height, width)
    w = tensor(*support.shape)
    dy = tensor(n, support.filters, *geometry.output_size(height, width))
    problem = ops.describe("fprop", geometry, x, x, w, (height, width))
    vendor = get_backend("vendor")
    idle = has_idle_taps(problem)
    if vendor.unsupported_reasons(problem) and not everything:
        return None
    # Asked directly, for --everything may run what `vendor` refuses.
    results = {
        "fprop": lambda: vendor.fprop(problem)(x, w, None, None, None),
        "dgrad": lambda: vendor.dgrad(ops.describe("dgrad", geometry, dy, dy, w, (height, width)))(
            dy, w
        ),
        "wgrad": lambda: vendor.wgrad(ops.describe("wgrad", geometry, dy, x, w, (height, width)))(
            dy, x
        ),
    }
    exact, most = (
        double_truth(geometry, *(f(t.double()) for t in (x, w, dy))) for f in (_same, torch.abs)
    )
    depths = support.channels * w[0, 0].numel(), support.filters * w[0, 0].numel(), dy[:, 0].numel()
    found = []
    for verb, depth in zip(VERBS, depths, strict=True):
        result = results[verb]()
        bound = error_bound(most[verb], depth, dtype)
        wrong = ~((result.double() - exact[verb]).abs() <= bound)
        if wrong.any():
            fault = {
                "verb": verb,
                "wrong": int(wrong.sum()),
                "of": wrong.numel(),
                "received": float(result[wrong][0]),
                "expected": float(exact[verb][wrong][0]),
            }
            found.append(fault | _described(seed, dtype, idle))
    return found


def double_truth(
    geometry: Geometry, x: torch.Tensor, w: torch.Tensor, dy: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Computes y, dx and dw in float64, where oneDNN has no part."""
    x, w = x.requires_grad_(), w.requires_grad_()
    y = oracle(x, w, geometry)
    dx, dw = torch.autograd.grad(y, (x, w), dy)
    mask = torch.tensor(geometry.support.mask)
    return {"fprop": y.detach(), "dgrad": dx, "wgrad": dw.masked_fill(~mask, 0)}


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone()


def _described(seed: int, dtype: torch.dtype, idle: bool) -> dict[str, Any]:
    geometry, images, layout, threads = draw_case(seed)
    return {
        "seed": seed,
        "dtype": str(dtype).removeprefix("torch."),
        "layer": f"{geometry.support} stride {geometry.stride} pads {geometry.pads} "
        f"dilation {geometry.dilation}",
        "images": images,
        "layout": str(layout).removeprefix("torch."),
        "threads": threads,
        "idle_taps": idle,
    }


def child(first: int, last: int, dtype: str, everything: bool) -> None:
    """Examines the seeds in [first, last): a line when one begins, and one for what it gave."""
    for seed in range(first, last):
        print(json.dumps({"begun": seed}), flush=True)
        found = examine(seed, TORCH_DTYPES[dtype], everything)
        print(json.dumps({"refused": found is None, "faults": found or []}), flush=True)


def faults(first: int, last: int, dtype: str, everything: bool = False) -> Iterator[dict[str, Any]]:
    """Yields, for each layer, {"refused", "faults"}; goes on in a new process after a crash."""
    while first < last:
        command = [sys.executable, "-m", "benchmarks.pytorch_faults", "--child", str(first)]
        command += ["--seed", str(first), "--cases", str(last - first), "--dtypes", dtype]
        done = subprocess.run(
            command + ["--everything"] * everything,
            env=os.environ | PERTURBED,
            capture_output=True,
            text=True,
            check=False,
        )
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        begun = [line["begun"] for line in lines if "begun" in line]
        yield from (line for line in lines if "refused" in line)
        if done.returncode == 0:
            return
        if done.returncode > 0 or not begun:
            raise RuntimeError(f"the process of seed {first} failed:\n{done.stderr}")
        geometry, (_, height, width), *_ = draw_case(begun[-1])
        x = torch.empty(1, geometry.support.channels, height, width, dtype=TORCH_DTYPES[dtype])
        w = torch.empty(geometry.support.shape, dtype=x.dtype)
        idle = has_idle_taps(ops.describe("fprop", geometry, x, x, w, (height, width)))
        crash = _described(begun[-1], x.dtype, idle) | {"verb": f"signal {-done.returncode}"}
        yield {"refused": False, "faults": [crash]}
        first = begun[-1] + 1


def main() -> int:
    """Runs the fuzz and prints what it found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", type=int, default=500, help="layers for each dtype")
    parser.add_argument("--seed", type=int, default=0, help="of the first layer")
    parser.add_argument("--dtypes", default=",".join(TORCH_DTYPES), help="separated by commas")
    parser.add_argument("--everything", action="store_true", help="also what vendor refuses")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    last = given.seed + given.cases
    if given.child is not None:
        child(given.seed, last, given.dtypes, given.everything)
        return 0
    wrong = 0
    for dtype in given.dtypes.split(","):
        cases = list(faults(given.seed, last, dtype, given.everything))
        found = [fault for case in cases for fault in case["faults"]]
        for fault in found:
            print(json.dumps(fault), flush=True)
        refused = sum(case["refused"] for case in cases)
        print(f"{dtype}: {len(cases)} layers, {refused} refused, {len(found)} faults", flush=True)
        wrong += len(found)
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
