# SPDX-License-Identifier: Apache-2.0
"""Backends: the engines that run the three primitives, and the choice between them.

What an engine offers is in `protocol`, which engines import; this module imports them. The same
predicate, ``unsupported_reasons``, chooses and explains; nothing is copied or converted to make a
backend fit.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import cache

from ..errors import BackendError, mismatch
from ..openmp import share_openmp
from ..pooling import max_pooled
from ..problem import DTYPES, Problem
from .cost_model import POOL, POOLED
from .dense_cost import outside_program
from .protocol import UNMEASURED_MARGIN, Backend, Choice, Runner

__all__ = [
    "Backend",
    "Choice",
    "Runner",
    "available_backends",
    "choose",
    "get_backend",
    "predict",
    "use_backend",
]

# The integers travel in exported programs: a number, once given, is never reused.
CODES = {"auto": 0, "reference": 1, "vendor": 2, "cpu": 3, "triton": 4, "cuda": 5}
ENGINE_OF_CODE = {code: name for name, code in CODES.items()}
# Added to a code that travels with the weight of a frozen layer, of which engines may keep forms.
FROZEN = 256

# The device types that backends are for, where it is only one.
_ONLY_ON = {"cpu": "cpu", "triton": "cuda", "cuda": "cuda"}


@cache
def _engines() -> dict[str, Backend]:
    from .reference import Reference
    from .vendor import Vendor

    engines: dict[str, Backend] = {"vendor": Vendor()}
    if importlib.util.find_spec("hetconv_kernels._cpu") is not None and not share_openmp():
        from .cpu import Cpu

        engines["cpu"] = Cpu()
    if importlib.util.find_spec("triton") is not None:
        from .triton import Triton

        engines["triton"] = Triton()
    if importlib.util.find_spec("hetconv_kernels._cuda") is not None:
        from .cuda import Cuda

        engines["cuda"] = Cuda()
    return engines | {"reference": Reference()}


def available_backends(device: str | None = None) -> tuple[str, ...]:
    """Names the backends that this installation has, in the order in which `auto` asks them.

    Args:
        device: a device's type; leaves out the backends that are for another one.
    """
    names = tuple(_engines())
    return tuple(n for n in names if device is None or _ONLY_ON.get(n, device) == device)


def get_backend(name: str) -> Backend:
    """Returns the engine of that name.

    Raises:
        BackendError: there is none in this installation.
    """
    engine = _engines().get(name)
    if engine is None:
        known = "is not built here" if name in CODES else "is unknown"
        way_out = "`hetconv info` lists what is built."
        if name == "triton":
            way_out = "Triton is not installed: pip install 'hetconv-kernels[triton]'."
        if name == "cuda":
            way_out = "nvcc builds it where the package is installed; `hetconv info` says why not."
        raise BackendError(
            f"backend {name!r} {known}; expected one of "
            f"{', '.join(('auto', *available_backends()))}. {way_out}"
        )
    return engine


def backend_code(name: str | None) -> int:
    """Returns the integer that travels in an operator call for a backend's name.

    None stands for what `use_backend` or HETCONV_BACKEND says.

    Raises:
        BackendError: the name is unknown, or not built here.
    """
    if name is None:
        return _forced
    if name != "auto":
        get_backend(name)
    return CODES[name]


def choose(problem: Problem, code: int) -> Choice:
    """Picks the engine for a problem: a pure function of the problem and the forced code.

    Raises:
        BackendError: the backend that was asked for cannot run the problem; all its reasons are
            in the message; or the problem is one in 8 bits, which are another face.
    """
    if problem.dtype not in DTYPES:
        raise BackendError(
            mismatch(
                "dtype of a problem",
                problem.dtype,
                "a floating-point one",
                "quantization.engine has the engines in 8 bits.",
            )
        )
    if code not in ENGINE_OF_CODE:
        raise BackendError(mismatch("backend code", code, f"one of {ENGINE_OF_CODE}"))
    if code:
        engine = get_backend(ENGINE_OF_CODE[code])
        reasons = engine.unsupported_reasons(problem)
        if reasons:
            others = "" if engine.name == "vendor" else " or backend='vendor'"
            raise BackendError(
                f"backend {engine.name!r} cannot run this {problem.verb}: {' '.join(reasons)} "
                f"Use backend='auto'{others}."
            )
        return _ready(engine, problem)
    best = get_backend("vendor")
    best_time = outside_program(problem, predict(best, problem))
    if best.unsupported_reasons(problem):  # then any engine that can is better
        best, best_time = get_backend("reference"), math.inf
    for engine in _engines().values():
        if engine.name in ("vendor", "reference") or engine.unsupported_reasons(problem):
            continue
        margin = 1.0 if engine.measured(problem) else UNMEASURED_MARGIN
        time = predict(engine, problem) * margin
        if time < best_time:
            best, best_time = engine, time
    return _ready(best, problem)


def predict(engine: Backend, problem: Problem) -> float:
    """Predicts the time of one call with all that belongs to it, in seconds."""
    seconds = engine.estimate(problem)
    if problem.pool is None or problem.device.type != "cpu":
        return seconds
    share = POOLED if _pools(engine, problem) else 1.0
    return seconds + share * POOL * math.prod(problem.y_shape) * problem.dtype.itemsize


def _pools(engine: Backend, problem: Problem) -> bool:
    pools: Callable[[Problem], bool] | None = getattr(engine, "pools", None)
    return pools is not None and pools(problem)


def _ready(engine: Backend, problem: Problem) -> Choice:
    prepare = {"fprop": engine.fprop, "dgrad": engine.dgrad, "wgrad": engine.wgrad}[problem.verb]
    if problem.pool is not None and not _pools(engine, problem):
        run, pool = engine.fprop(replace(problem, pool=None)), problem.pool
        return Choice(engine, problem, lambda *operands: max_pooled(run(*operands), pool))
    return Choice(engine, problem, prepare(problem))


# The forced backend ---------------------------------------------------------------------------


def forced_code() -> int:
    """Returns the code that `use_backend` or HETCONV_BACKEND set; 0 is auto."""
    return _forced


def use_backend(name: str) -> AbstractContextManager[None]:
    """Forces a backend for the whole process, as a plain call or as a context manager.

    Like the flags of ``torch.backends`` it is one switch for all threads. ``"auto"`` lifts it.
    The environment variable HETCONV_BACKEND sets it at import.

    Raises:
        BackendError: the name is unknown, or not built here.
    """
    global _forced
    before, _forced = _forced, backend_code(name)
    return _restored(before)


@contextmanager
def _restored(before: int) -> Iterator[None]:
    global _forced
    try:
        yield
    finally:
        _forced = before


def _from_environment() -> int:
    name = os.environ.get("HETCONV_BACKEND", "auto")
    if name not in CODES:
        raise BackendError(mismatch("HETCONV_BACKEND", repr(name), f"one of {', '.join(CODES)}"))
    return CODES[name]


_forced = _from_environment()
