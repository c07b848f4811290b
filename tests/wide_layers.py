# SPDX-License-Identifier: Apache-2.0
"""Layers of the wide CUDA kernel, with the tilings that they have."""

from __future__ import annotations

from typing import Any

import numpy as np

from hetconv_kernels import Support
from hetconv_kernels.backends.cuda.wide_lowering import lower_wide, wide_windows
from hetconv_kernels.backends.cuda.wide_tiles import WideTiling, choose_wide, tilings
from hetconv_kernels.backends.gpu.devices import GPU_SPECS
from hetconv_kernels.problem import Geometry, make_geometry

PART = GPU_SPECS[9, 0]


def ragged(filters: int, channels: int, groups: int, kernel: int = 3) -> Support:
    rng = np.random.default_rng(filters + channels + groups)
    keep = rng.random((groups, channels)) < 0.3
    return Support.self_grouped(np.sort(rng.integers(0, groups, filters)), keep, kernel)


# Name: the layer, and the size of its images.
LAYERS: dict[str, tuple[Geometry, tuple[int, int]]] = {
    "dense": (make_geometry(Support.dense(72, 80, 3), 1, 1), (9, 11)),
    "het2": (make_geometry(Support.het(128, 128, 3, p=2), 1, 1), (6, 9)),
    "het4": (make_geometry(Support.het(64, 256, 3, p=4), 1, 1), (7, 7)),
    "interleaved": (make_geometry(Support.het(64, 64, 3, p=4, order="interleaved"), 1, 1), (5, 8)),
    "ragged": (make_geometry(ragged(136, 88, 5), 1, 1), (7, 7)),
    "irregular": (
        make_geometry(
            Support.from_mask(np.random.default_rng(0).random((24, 40, 3, 2)) < 0.2), 1, 0
        ),
        (4, 12),
    ),
    "tall": (make_geometry(Support.dense(8, 8, 3), 1, 1), (37, 9)),
    "stride": (make_geometry(Support.het(64, 64, 3, p=2), 2, 1), (14, 15)),
    "stride-5x5": (make_geometry(Support.dense(16, 16, 5), 2, 2), (13, 20)),
    "stride-rows": (make_geometry(Support.grouped(16, 32, 3, 2), (2, 1), 1), (21, 9)),
    "pointwise": (make_geometry(Support.dense(64, 24, 1)), (9, 10)),
    "pointwise-stride": (make_geometry(Support.dense(24, 64, 1), 2), (9, 16)),
    "pointwise-stride-3": (make_geometry(Support.dense(16, 16, 1), 3, 3), (8, 13)),
    "dilated": (make_geometry(Support.dense(16, 24, 3), 1, 2, (2, 3)), (8, 12)),
    "uneven-padding": (make_geometry(Support.dense(8, 16, (3, 1)), 1, (2, 0)), (5, 17)),
    "one-row": (make_geometry(Support.dense(16, 8, 3), (2, 1), (2, 3, 1, 3), 2), (1, 13)),
    "no-weights": (make_geometry(Support.from_mask(np.zeros((16, 8, 3, 3), bool)), 1, 1), (7, 7)),
}


ALL = [(name, back) for name in LAYERS for back in (False, True)]


def tiled(name: str, back: bool, batch: int = 5) -> tuple[list[WideTiling], tuple[int, int]]:
    """Returns all tilings of a layer, and which pixels are read."""
    geometry, size = LAYERS[name]
    classes, every = wide_windows(geometry, size, back)
    read = geometry.output_size(*size) if back else size
    image = -(-read[0] // every[0]), -(-read[1] // every[1])
    tables = lower_wide(geometry.support, classes, back)
    return list(tilings(tables, classes, image, batch, PART)), every


def chosen(geometry: Geometry, size: tuple[int, int], batch: int, back: bool) -> Any:
    classes, every = wide_windows(geometry, size, back)
    read = geometry.output_size(*size) if back else size
    image = -(-read[0] // every[0]), -(-read[1] // every[1])
    return choose_wide(
        lower_wide(geometry.support, classes, back), classes, image, batch, PART
    ), every
