# SPDX-License-Identifier: Apache-2.0
"""A Python whose GPU is a stand-in, for rehearsals of `make gpu` in processes of their own.

    python tests/stand_in.py -m MODULE ARGUMENTS

Tensors that ask for CUDA live on the CPU, streams and graphs are `rehearsal`'s, and the choice of
kernels is the real one. In the place of each kernel the reference computes, and does what STAND_IN
says of that part, in JSON: ``fails``, ``ends``, ``hangs``, ``wrong``, or one of those with
``later-`` before it, which begins after the smoke tests. STAND_IN_BATCHES, a list, makes the table
longer: two layers for each.
"""

from __future__ import annotations

import dataclasses
import json
import os
import runpy
import sys
import time
from typing import Any

import numpy as np
import pytest
import rehearsal
import torch
from pretending import build_for
from torch.overrides import TorchFunctionMode

FAULTS: dict[str, str] = json.loads(os.environ.get("STAND_IN", "{}"))
# Images of the table's cases.
BATCHES: list[int] = json.loads(os.environ.get("STAND_IN_BATCHES", "[2]"))


class OnCpu(TorchFunctionMode):
    """Turns CUDA devices in calls of PyTorch into the CPU; computes everything."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.device:
            return func(*args, **(kwargs or {}))
        kwargs = {name: rehearsal._cpu(value) for name, value in (kwargs or {}).items()}
        return func(*map(rehearsal._cpu, args), **kwargs)


def act(part: str, result: Any) -> Any:
    """Does what a part does: returns the result, or worse."""
    later = "benchmarks.primitives" in sys.argv
    fault = FAULTS.get(part, "")
    if fault.startswith("later-"):
        fault = fault.removeprefix("later-") if later else ""
    if fault == "fails":
        raise RuntimeError(f"CUDA error: an illegal memory access was encountered ({part})")
    if fault == "ends":
        os._exit(139)
    while fault == "hangs":
        time.sleep(60)
    return result + 1 if fault == "wrong" else result


def part_of(engine: str, problem: Any, choice: Any) -> str:
    """Names the part that a choice belongs to."""
    if engine == "triton":
        if problem.verb == "wgrad":
            return "triton-wgrad" if choice.box is None else "triton-wgrad-tma"
        return "triton-gather" if choice.box is None else "triton-tma"
    how = getattr(choice, "how", choice)
    if hasattr(how, "plan"):
        return "cuda-wide-wgrad"
    if hasattr(how, "shape"):
        if not hasattr(how.shape, "cluster"):
            return "cuda-scattered"
        if how.shape.flat_pitch:
            return "cuda-flat"
        return "cuda-cluster" if how.shape.cluster == 2 else "cuda-wide"
    if problem.dtype == torch.float32:
        return "cuda-tf32"
    if not how.no_tma:
        return "cuda-tma"
    return "cuda-wgrad" if problem.verb == "wgrad" else "cuda-narrow"


def stand_in(engine: str) -> type:
    """Makes a class in the place of an engine's calls."""
    from hetconv_kernels.backends.reference import Reference

    class Call:
        def __init__(self, problem: Any, choice: Any) -> None:
            self.part = part_of(engine, problem, choice)
            own = dataclasses.replace(problem, device=torch.device("cpu"))
            self.made = getattr(Reference(), problem.verb)(own)
            self.rest = (None, None, None) if problem.verb == "fprop" else ()

        def run(self, first: Any, second: Any, *more: Any) -> Any:
            return act(self.part, self.made(first, second, *(more[:3] or self.rest)))

    return Call


def rate(clocks: int, values: int, blocks: int, steps: int, *_: int) -> None:
    """Stands for the probe: writes what the kernel would."""
    import ctypes

    act("cuda-rate", 0)
    written = (clocks, ctypes.c_int64, steps * 1024), (values, ctypes.c_float, 64.0 * steps)
    for place, kind, number in written:
        wrong = FAULTS.get("cuda-rate") == "wrong" and kind is ctypes.c_float
        filled = np.ctypeslib.as_array((kind * (2 * blocks)).from_address(place))
        filled[:] = number + wrong


def install(patch: pytest.MonkeyPatch) -> None:
    """Puts everything in its place, but for `rehearsal`."""
    import hetconv_kernels as hk
    from benchmarks import bench, primitives, smoke
    from benchmarks.cases import Case, het_case
    from hetconv_kernels import backends
    from hetconv_kernels.backends import cuda
    from hetconv_kernels.backends.triton import calls, wgrad_calls
    from hetconv_kernels.measure.roofline import Roofs

    build_for(patch, "90a")
    hk._cuda.wide_rate = rate  # type: ignore[attr-defined]
    patch.setitem(backends._engines(), "cuda", cuda.Cuda())
    for name in ("NarrowCall", "WideCall", "ScatteredCall", "NarrowWgradCall", "WideWgradCall"):
        patch.setattr(cuda, name, stand_in("cuda"))
    patch.setattr(calls, "GatherCall", stand_in("triton"))
    patch.setattr(wgrad_calls, "WgradCall", stand_in("triton"))
    patch.setattr(bench, "ENGINES", ("triton", "cuda"))
    patch.setattr(smoke, "IMAGES", 2)
    patch.setattr(smoke, "REPEATS", 2)
    patch.setattr(smoke, "_SIZES", ((7, 7),))
    cases = [
        Case(
            "gpu-narrow", 2, 64, 64, 6, 6, 3, het_case(8), stride=1, device="cuda", dtype="bfloat16"
        ),
        Case(
            "gpu-wide", 2, 256, 256, 6, 6, 3, het_case(4), stride=1, device="cuda", dtype="bfloat16"
        ),
    ]
    for case in list(cases):
        more = BATCHES[1:]
        cases += [dataclasses.replace(case, n=n, name=f"{case.name}-{n}") for n in more]
    rows = [(case, verb) for case in cases for verb in bench.VERBS]
    patch.setattr(primitives, "rows_of", lambda full: rows)
    patch.setattr(primitives, "measure_roofs", lambda *_: Roofs(4e14, 3e12, "cuda", "bfloat16"))


def main() -> None:
    """Runs a module as ``python -m`` does."""
    _, option, module, *arguments = sys.argv
    assert option == "-m"
    torch.set_num_threads(1)
    patch = pytest.MonkeyPatch()
    patch.setattr(rehearsal, "OnCpu", OnCpu)
    sys.path.insert(0, os.getcwd())
    with rehearsal.rehearsal(patch):
        install(patch)
        if module == "benchmarks.primitives":
            from benchmarks.primitives import main as table

            sys.argv = [module, *arguments]
            sys.exit(table(arguments))
        if module == "benchmarks.smoke":
            from benchmarks import smoke

            sys.exit(smoke.main(arguments))
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__")


if __name__ == "__main__":
    main()
