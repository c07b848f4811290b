# SPDX-License-Identifier: Apache-2.0
"""The choice of a kernel and its tables for a Problem, and what it is predicted to take.

There are kernels for narrow groups, and on Hopper for wide groups; fprop and dgrad have one for
scattered groups. The one that is predicted to be fastest is taken. The clocks come from
`narrow_tiles`, `wide_tiles`, `wide_wgrad_tiles` and `scattered_tiles`; here the launch, packing and
device memory are added. All constants are data sheets and arithmetic: **no GPU has confirmed
them**. What was chosen is kept with the Support.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ...errors import ArgumentError, BackendError
from ...problem import Problem
from ..gpu import parts
from ..gpu.constants import constants_of
from ..gpu.devices import GpuSpec, spec_of
from .narrow_tiles import NarrowTiling, choose_narrow, choose_wgrad
from .narrow_wgrad_lowering import UNIT_VALUES, WgradTables
from .scattered_tiles import ScatteredTiling, choose_scattered
from .wide_lowering import WideTables, lower_wide, wide_windows
from .wide_tiles import WideTiling, choose_wide
from .wide_wgrad_tiles import WideWgradTiling, choose_wide_wgrad
from .windows import windows

# "narrow", "wide" or "scattered" leaves only that kernel, the last one but for wgrad; for tests and
# for tuning.
ONLY_KERNEL: str | None = None
# Whether TMA may bring tiles; for tests and for comparisons with cp.async.
TMA = True
# Seconds that a launch more in the same call takes.
_NEXT_LAUNCH = 3e-6
# Clocks in which a unit of wgrad reads one pixel of both operands from shared memory.
_UNIT_READS = 1.25
# The kernels for narrow groups keep weights in shared memory, or read them again for each tile;
# more bytes of them are no narrow groups.
_MOST_WEIGHTS = 2**18
_SHORT_NUMBERS = "it takes bfloat16 and float16 alone; backend='triton' takes float32."


@dataclass(frozen=True)
class CudaChoice:
    """How a Problem is run; each kernel has its own, with its tables.

    Attributes:
        seconds: predicted, for the whole call.
        efficiency: useful over executed multiply-accumulates.
    """

    seconds: float
    efficiency: float


@dataclass(frozen=True)
class NarrowChoice(CudaChoice):
    """fprop or dgrad by the kernel for narrow groups.

    Attributes:
        how: tables, buffers and whether weights stay in shared memory.
    """

    how: NarrowTiling


@dataclass(frozen=True)
class WideChoice(CudaChoice):
    """fprop or dgrad by the kernel for wide groups.

    Attributes:
        how: tables, and what a block of threads holds.
        every: which rows and columns the operand that is read is taken at: each n-th.
    """

    how: WideTiling
    every: tuple[int, int]


@dataclass(frozen=True)
class ScatteredChoice(CudaChoice):
    """fprop or dgrad by the kernel for scattered groups.

    Attributes:
        how: tables, and what a block of threads holds.
    """

    how: ScatteredTiling


@dataclass(frozen=True)
class NarrowWgradChoice(CudaChoice):
    """wgrad by the kernel for narrow groups.

    Attributes:
        tables: the lowering.
        buffers: tiles of both operands in shared memory.
        no_tma: why TMA does not bring them; empty where it does.
    """

    tables: WgradTables
    buffers: int
    no_tma: str


@dataclass(frozen=True)
class WideWgradChoice(CudaChoice):
    """wgrad by the kernel for wide groups.

    Attributes:
        how: tables, and what a block of threads holds.
        every: which rows and columns of x are taken: each n-th.
    """

    how: WideWgradTiling
    every: tuple[int, int]


CudaGatherChoice = NarrowChoice | WideChoice | ScatteredChoice
CudaWgradChoice = NarrowWgradChoice | WideWgradChoice


def best(problem: Problem) -> CudaChoice | str:
    """Picks how a Problem is run, or says in sentences why it cannot be; kept with the Support."""
    geometry = problem.geometry
    key = (
        *("cuda choice", ONLY_KERNEL, TMA, parts.WITHOUT),
        *(problem.verb, problem.dtype, problem.device, problem.batch),
        *(problem.height, problem.width, geometry.tail),
    )
    found: CudaChoice | str | None = problem.support.derived.get(key)
    if found is None:
        found = problem.support.derived[key] = _found(problem)
    return found


def best_cuda_gather(problem: Problem) -> CudaGatherChoice:
    """Picks how fprop or dgrad is run.

    Raises:
        BackendError: no tile fits.
    """
    found = best(problem)
    if not isinstance(found, CudaGatherChoice):
        raise BackendError(str(found))
    return found


def best_cuda_wgrad(problem: Problem) -> CudaWgradChoice:
    """Picks how wgrad is run.

    Raises:
        BackendError: no tile fits.
    """
    found = best(problem)
    if not isinstance(found, CudaWgradChoice):
        raise BackendError(str(found))
    return found


def _found(problem: Problem) -> CudaChoice | str:
    """Returns the fastest predicted way of those that can be, or why none can."""
    spec = spec_of(problem.device)
    gradient = problem.verb == "wgrad"
    narrow: Callable[[Problem, GpuSpec], CudaChoice] = _wgrad if gradient else _gather
    wide: Callable[[Problem, GpuSpec], CudaChoice] = _wide_wgrad if gradient else _wide
    ways: list[CudaChoice] = []
    sentences = []
    for name, reason, make in (
        ("narrow", _narrow_reason(problem), narrow),
        ("wide", _wide_reason(problem), wide),
        ("scattered", _scattered_reason(problem), _scattered),
    ):
        if ONLY_KERNEL not in ((None, name, "scattered") if gradient else (None, name)):
            continue
        if not reason:
            try:
                ways.append(make(problem, spec))
                continue
            except (ArgumentError, BackendError) as error:
                reason = str(error)
        sentences.append(f"The kernel for {name} groups: {reason}")
    return min(ways, key=lambda way: way.seconds) if ways else " ".join(sentences)


def _narrow_reason(problem: Problem) -> str:
    """Says why the kernels for narrow groups are not for a Problem; empty when they are."""
    gradient, single = problem.verb == "wgrad", problem.dtype == torch.float32
    if gradient and single:
        return _SHORT_NUMBERS
    absent = parts.left_out("cuda-wgrad" if gradient else "cuda-narrow")
    if single:
        absent = absent or parts.left_out("cuda-tf32")
    if absent:
        return absent
    most = _MOST_WEIGHTS // problem.dtype.itemsize
    if problem.support.live <= most:
        return ""
    return f"there are {problem.support.live} live weights, and shared memory holds at most {most}."


def _wide_reason(problem: Problem) -> str:
    """Says why the kernels for wide groups are not for a Problem; empty when they are."""
    if absent := parts.left_out("cuda-wide-wgrad" if problem.verb == "wgrad" else "cuda-wide"):
        return absent
    if problem.dtype == torch.float32:
        return _SHORT_NUMBERS
    if problem.device.type != "cuda":  # the kernels on the CPU, in tests
        return ""
    capability = torch.cuda.get_device_capability(problem.device.index or 0)
    if capability != (9, 0):
        return (
            "it is machine code for compute capability 9.0 alone (wgmma, sm_90a), and this is "
            f"{capability[0]}.{capability[1]}."
        )
    from ... import _cuda

    built = _cuda.architectures()
    if "90a" not in built.split("_"):
        return f"it was built for {built}, without 90a; build it with HETCONV_CUDA_ARCHS=90a."
    return ""


def _scattered_reason(problem: Problem) -> str:
    """Says why the kernel for scattered groups is not for a Problem; empty when it is."""
    if problem.verb == "wgrad":
        return "it has no wgrad."
    if problem.dtype == torch.float32:
        return _SHORT_NUMBERS
    return parts.left_out("cuda-scattered")


def _no_tma(problem: Problem) -> str:
    """Says why a device or its driver has no TMA; empty where they have."""
    if not TMA:
        return "TMA is switched off"
    if absent := parts.left_out("cuda-tma"):
        return absent.rstrip(".")
    if problem.device.type != "cuda":  # the kernels on the CPU, in tests
        return ""
    major, minor = torch.cuda.get_device_capability(problem.device.index or 0)
    if major < 9:
        return f"TMA came with compute capability 9.0, and this is {major}.{minor}"
    from ... import _cuda

    return str(_cuda.tma_unsupported())


def _gather(problem: Problem, spec: GpuSpec) -> NarrowChoice:
    back = problem.verb == "dgrad"
    size = problem.height, problem.width
    found = windows(problem.geometry, size, back)
    item = problem.dtype.itemsize
    how = choose_narrow(problem.support, found, problem.batch, back, spec, _no_tma(problem), item)
    packed = how.tables.positions.size
    seconds = _whole(problem, how.clocks, packed, spec)
    return NarrowChoice(seconds, min(1.0, problem.support.live / max(packed, 1)), how)


def _wide(problem: Problem, spec: GpuSpec) -> WideChoice:
    back, size = problem.verb == "dgrad", (problem.height, problem.width)
    classes, every = wide_windows(problem.geometry, size, back)
    read = problem.output_size if back else size
    image = -(-read[0] // every[0]), -(-read[1] // every[1])
    # Neither images nor tiles matter to the tables, so that packed weights serve all of them.
    key = ("cuda wide tables", back, problem.geometry.tail)
    tables: WideTables | None = problem.support.derived.get(key)
    if tables is None:
        tables = problem.support.derived[key] = lower_wide(problem.support, classes, back)
    how = choose_wide(tables, classes, image, problem.batch, spec)
    seconds = _whole(problem, how.clocks, tables.size, spec)
    efficiency = min(1.0, problem.macs / how.executed) if how.executed else 1.0
    return WideChoice(seconds, efficiency, how, every)


def _wide_wgrad(problem: Problem, spec: GpuSpec) -> WideWgradChoice:
    size = problem.height, problem.width
    (window,), every = wide_windows(problem.geometry, size, False)
    image = -(-size[0] // every[0]), -(-size[1] // every[1])
    how = choose_wide_wgrad(problem.support, window, image, problem.batch, spec)
    seconds = constants_of(problem.device).launch + 2 * _NEXT_LAUNCH
    seconds += _running(problem, how.plan.clocks, spec)
    return WideWgradChoice(seconds, min(1.0, problem.macs / how.plan.executed), how, every)


def _scattered(problem: Problem, spec: GpuSpec) -> ScatteredChoice:
    back = problem.verb == "dgrad"
    size = (problem.height, problem.width) if back else problem.output_size
    how = choose_scattered(problem.geometry, size, problem.batch, spec, back)
    seconds = _whole(problem, how.clocks, len(how.tables.steps) * 128 * how.shape.side**2, spec)
    efficiency = min(1.0, problem.macs / how.executed) if how.executed else 1.0
    return ScatteredChoice(seconds, efficiency, how)


def _whole(problem: Problem, clocks: float, packed: int, spec: GpuSpec) -> float:
    """Returns the seconds of fprop or dgrad, with the launch and packing of so many weights."""
    seconds = constants_of(problem.device).launch + _running(problem, clocks, spec)
    # Weights are packed at each call: read, looked up and written.
    return seconds + _NEXT_LAUNCH + packed * (2 * problem.dtype.itemsize + 4) / spec.bandwidth


def _running(problem: Problem, clocks: float, spec: GpuSpec) -> float:
    """Returns the seconds of a kernel itself: what it computes, or what it moves."""
    return max(clocks / spec.clock, problem.bytes_moved / spec.bandwidth)


def _wgrad(problem: Problem, spec: GpuSpec) -> NarrowWgradChoice:
    (window,) = windows(problem.geometry, (problem.height, problem.width), False)
    tables, buffers, why = choose_wgrad(problem.support, window, spec, _no_tma(problem))
    units = tables.positions.size // UNIT_VALUES
    pixels = tables.height * tables.width
    rows, cols = problem.output_size
    tiles = problem.batch * -(-rows // tables.height) * -(-cols // tables.width)
    rate = spec.rate * (0.625 if spec.waits else 1.0)
    clocks = units * pixels * max(UNIT_VALUES / rate, _UNIT_READS)
    moved = len(tables.chunks) * 16 * (tables.halo_pixels + pixels) / 128
    clocks = (clocks + moved) * max(tiles / spec.processors, 1.0)
    partials = spec.processors * tables.positions.size * 8 / spec.bandwidth
    seconds = constants_of(problem.device).launch + 2 * _NEXT_LAUNCH
    seconds = seconds + _running(problem, clocks, spec) + partials
    efficiency = min(1.0, problem.support.live / max(tables.positions.size, 1))
    return NarrowWgradChoice(seconds, efficiency, tables, buffers, why)
