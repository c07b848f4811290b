# SPDX-License-Identifier: Apache-2.0
"""The choice of tables for a Problem, kept with the Support, and what it is predicted to take.

The clocks come from `tiles`; here the launch, packing and device memory are added. All constants
are data sheets and arithmetic: **no GPU has confirmed them**.
"""

from __future__ import annotations

from typing import NamedTuple

from ...errors import ArgumentError, BackendError
from ...problem import Problem
from ..parts import Part, part_of
from ..rates import GPU_LAUNCH
from .tiles import Choice, choose, choose_wgrad
from .wgrad_lowering import UNIT_VALUES, WgradTables
from .windows import windows

# Seconds that a launch more in the same call takes.
_NEXT_LAUNCH = 3e-6
# Clocks in which a unit of wgrad reads one pixel of both operands from shared memory.
_UNIT_READS = 1.25


class GatherChoice(NamedTuple):
    """How fprop or dgrad is run.

    Attributes:
        how: tables, buffers and whether weights stay in shared memory.
        seconds: predicted, for the whole call.
        efficiency: useful over executed multiply-accumulates.
    """

    how: Choice
    seconds: float
    efficiency: float


class WgradChoice(NamedTuple):
    """How wgrad is run.

    Attributes:
        tables: the lowering.
        buffers: tiles of both operands in shared memory.
        seconds: predicted, for the whole call.
        efficiency: useful over executed multiply-accumulates.
    """

    tables: WgradTables
    buffers: int
    seconds: float
    efficiency: float


def best(problem: Problem) -> GatherChoice | WgradChoice | str:
    """Picks how a Problem is run, or says in a sentence why it cannot be; kept with the Support."""
    geometry = problem.geometry
    key = (
        "cuda choice",
        *(problem.verb, problem.dtype, problem.device, problem.batch),
        *(problem.height, problem.width, geometry.tail),
    )
    found: GatherChoice | WgradChoice | str | None = problem.support.derived.get(key)
    if found is None:
        part = part_of(problem.device)
        try:
            found = _wgrad(problem, part) if problem.verb == "wgrad" else _gather(problem, part)
        except (ArgumentError, BackendError) as error:
            found = str(error)
        problem.support.derived[key] = found
    return found


def gather_choice(problem: Problem) -> GatherChoice:
    """Picks how fprop or dgrad is run.

    Raises:
        BackendError: no tile fits.
    """
    found = best(problem)
    if not isinstance(found, GatherChoice):
        raise BackendError(str(found))
    return found


def wgrad_choice(problem: Problem) -> WgradChoice:
    """Picks how wgrad is run.

    Raises:
        BackendError: no tile fits.
    """
    found = best(problem)
    if not isinstance(found, WgradChoice):
        raise BackendError(str(found))
    return found


def _gather(problem: Problem, part: Part) -> GatherChoice:
    back = problem.verb == "dgrad"
    size = problem.height, problem.width
    how = choose(problem.support, windows(problem.geometry, size, back), problem.batch, back, part)
    packed = how.tables.positions.size
    memory = problem.bytes_moved / part.bandwidth
    seconds = GPU_LAUNCH + max(how.clocks / part.clock, memory)
    # Weights are packed at each call: read, looked up and written.
    seconds += _NEXT_LAUNCH + packed * (2 * problem.dtype.itemsize + 4) / part.bandwidth
    return GatherChoice(how, seconds, min(1.0, problem.support.live / max(packed, 1)))


def _wgrad(problem: Problem, part: Part) -> WgradChoice:
    (window,) = windows(problem.geometry, (problem.height, problem.width), False)
    tables, buffers = choose_wgrad(problem.support, window, part)
    units = tables.positions.size // UNIT_VALUES
    pixels = tables.height * tables.width
    rows, cols = problem.output_size
    tiles = problem.batch * -(-rows // tables.height) * -(-cols // tables.width)
    rate = part.rate * (0.625 if part.waits else 1.0)
    clocks = units * pixels * max(UNIT_VALUES / rate, _UNIT_READS)
    moved = len(tables.chunks) * 16 * (tables.halo_pixels + pixels) / 128
    compute = (clocks + moved) * max(tiles / part.processors, 1.0) / part.clock
    partials = part.processors * tables.positions.size * 8 / part.bandwidth
    memory = problem.bytes_moved / part.bandwidth
    seconds = GPU_LAUNCH + 2 * _NEXT_LAUNCH + max(compute, memory) + partials
    return WgradChoice(
        tables, buffers, seconds, min(1.0, problem.support.live / max(tables.positions.size, 1))
    )
