# SPDX-License-Identifier: Apache-2.0
"""GPUs by compute capability, from data sheets: what predictions start from, not measured."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch


class GpuSpec(NamedTuple):
    """A GPU, as far as predictions know it.

    Attributes:
        processors: multiprocessors.
        clock: in Hz.
        rate: bf16 multiply-accumulates a clock and multiprocessor; tf32 has half of it.
        l2: bytes a clock and multiprocessor that L2 supplies.
        bandwidth: of memory, in bytes per second.
        shared: bytes of shared memory that one program may have.
        waits: whether products run on while the program goes on (wgmma, tcgen05); their operands
            then need one buffer more for the same depth.
    """

    processors: int
    clock: float
    rate: int
    l2: float
    bandwidth: float
    shared: int
    waits: bool


# By compute capability; others take the nearest one below. The number of multiprocessors and the
# memory's bandwidth are those of the device where there is one: of two with the same capability, an
# H200's is half as much again as an H100's.
GPU_SPECS = {
    (8, 0): GpuSpec(108, 1.41e9, 1024, 38, 1.5e12, 163 * 1024, False),
    (8, 6): GpuSpec(84, 1.7e9, 512, 38, 0.7e12, 99 * 1024, False),
    # L2 as microbenchmarks of an H100 publish it, 5.5 to 7 TB/s; the others' is a guess.
    (9, 0): GpuSpec(132, 1.75e9, 2048, 30, 3.3e12, 227 * 1024, True),
    (10, 0): GpuSpec(148, 1.85e9, 4096, 38, 7e12, 227 * 1024, True),
    (12, 0): GpuSpec(170, 2.4e9, 512, 38, 1.7e12, 99 * 1024, False),
}


# Of the bandwidth of a data sheet, what a large copy reaches, about: 4.3 of 4.8 TB/s on an H200.
_REACHED = 0.9


def spec_of(device: torch.device | None = None) -> GpuSpec:
    """Returns what predictions know of a device; of an H100 where there is no GPU."""
    if device is None or device.type != "cuda" or not torch.cuda.is_available():
        return GPU_SPECS[9, 0]
    return _spec_of(device.index or 0)


@cache
def _spec_of(index: int) -> GpuSpec:
    capability = torch.cuda.get_device_capability(index)
    known = max((c for c in GPU_SPECS if c <= capability), default=(8, 0))
    if capability in ((8, 7), (8, 9)):
        known = (8, 6)
    found = torch.cuda.get_device_properties(index)
    spec = GPU_SPECS[known]._replace(processors=found.multi_processor_count)
    # kHz, two transfers a clock, and bits.
    kilohertz = getattr(found, "memory_clock_rate", 0)
    sheet = 2e3 * kilohertz * getattr(found, "memory_bus_width", 0) / 8
    return spec._replace(bandwidth=_REACHED * sheet) if sheet else spec


@cache
def gpu_reasons(index: int) -> list[str]:
    """Lists, in sentences, why a GPU cannot run kernels that rest on asynchronous copies."""
    if torch.version.hip:
        return ["This is a ROCm build of PyTorch; the engine was built for NVIDIA GPUs."]
    capability = torch.cuda.get_device_capability(index)
    if capability < (8, 0):
        return [
            f"Compute capability {capability[0]}.{capability[1]} is below 8.0, which has the "
            "asynchronous copies that the kernels rest on."
        ]
    return []
