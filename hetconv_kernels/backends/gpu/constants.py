# SPDX-License-Identifier: Apache-2.0
"""Constants of the predictions for GPUs, as data: nominal ones, and what was measured on a device.

``constants.json`` has an entry for each GPU that ``python -m benchmarks.calibrate --device cuda``
was run on. **It has none yet**: every prediction rests on the nominal entry, whose numbers are
published ones and guesses:

- ``vendor``, cuDNN's share of the matrix unit's peak: 0.24 to 0.45 are published for 3×3 layers in
  bf16 on Hopper (inductor's convolutions, pytorch pull 174752), 0.55 is generous;
- ``ours``, the share of the speed predicted that is reached: the models count waves, tails, filled
  tiles, epilogues and launches already, what they leave out is taken to cost a quarter more.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .devices import GpuSpec

CONSTANTS_FILE = Path(__file__).with_name("constants.json")
# Tiles that cuDNN is taken to choose from: pixels, filters, and the share of its speed that they
# reach; and into how many parts a sum may be cut, which is added up by a launch more.
_TILES = ((256, 128, 1.0), (128, 128, 1.0), (128, 64, 0.8), (64, 64, 0.6))
_SPLITS = (1, 2, 4, 8)
# How much faster than bf16 a GPU's dense convolution is; float32 as TF32.
_SPEED = {torch.float32: 0.5, torch.float64: 1 / 32}


class GpuConstants(NamedTuple):
    """What predictions for a GPU are scaled by.

    Attributes:
        measured: whether they were fitted to measurements of this GPU.
        rows: so many.
        vendor: cuDNN's share of the matrix unit's peak, where its tiles fill the GPU.
        ours: for each engine, the share of the predicted speed that it reaches.
        launch: seconds of a launch.
        latency: seconds from the first to the last step of one tile that none of these count.
    """

    measured: bool
    rows: int
    vendor: float
    ours: dict[str, float]
    launch: float
    latency: float


@cache
def constant_entries() -> dict[str, Any]:
    """Returns the committed entries."""
    return dict(json.loads(CONSTANTS_FILE.read_text()))


def constants_of(device: torch.device | None = None) -> GpuConstants:
    """Returns the constants of a device; the nominal ones where it was not measured."""
    found = constant_entries()
    own, on_gpu = None, device is not None and device.type == "cuda"
    if found["devices"] and on_gpu and torch.cuda.is_available():
        own = found["devices"].get(torch.cuda.get_device_name(device))
    return GpuConstants(**(own or found["nominal"]))


def dense_gpu_seconds(
    macs: float,
    outputs: tuple[int, int],
    moved: float,
    dtype: torch.dtype,
    spec: GpuSpec,
    constants: GpuConstants,
) -> float:
    """Predicts a dense convolution by cuDNN, all but its launches, in seconds.

    Whole rounds of tiles are counted, as for our kernels: one tile takes as long as its whole sum.
    Of the tiles and cuts that it may choose from the fastest counts.

    Args:
        macs: multiply-accumulates of the convolution.
        outputs: pixels of all images, and filters (of wgrad: weights of a filter, and filters).
        moved: bytes that go to and from memory.
        dtype: of the operands.
        spec: the GPU.
        constants: of that GPU.
    """
    pixels, filters = outputs
    depth = macs / max(pixels * filters, 1)  # of each output
    rate = spec.rate * constants.vendor * _SPEED.get(dtype, 1.0)
    best = float("inf")
    for high, wide, share in _TILES:
        tiles = -(-pixels // high) * -(-filters // wide)
        for splits in _SPLITS:
            rounds = -(-tiles * splits // spec.processors)
            # Blocks that share a processor overlap, but the last round is as long as the others.
            seconds = rounds * high * wide * depth / splits / (rate * share) / spec.clock
            seconds += (splits > 1) * constants.launch / 2
            best = min(best, seconds)
    return max(best, moved / spec.bandwidth) + constants.latency
