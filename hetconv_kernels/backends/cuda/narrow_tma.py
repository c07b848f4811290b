# SPDX-License-Identifier: Apache-2.0
"""Boxes: what TMA, from compute capability 9.0 on, can bring of the tiles of the narrow kernels.

One thread asks for a whole tile with its halo, [rows, columns, channels], and pixels outside of
the image come as zeros. A box is dense in shared memory, so one of as many channels as the odd
pitch has room for lies just as the tile that cp.async brings. The rules are those of
cuTensorMapEncodeTiled (CUDA driver API, "Tensor Map Object Management").
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

from .fields import NarrowClass
from .narrow_slots import LANES

MOST_MAPS = 4  # classes whose halos TMA brings: one tensor map each
TMA_ALIGN = 128  # of the places in shared memory that boxes are copied to, in bytes
HALO = [NarrowClass.HALO_H, NarrowClass.HALO_W]  # columns of `classes`
_MOST_SIDE = 256  # places of a box along one axis
_MOST_STRIDE = 2**39  # elements: strides are below 2**40 bytes


def refusal(
    classes: npt.NDArray[np.int32],
    sides: npt.NDArray[np.int32],
    pitch: int,
    chunks: npt.NDArray[np.int32],
    loads: Sequence[Sequence[int]],
) -> str:
    """Says why TMA cannot bring tiles as boxes; empty if it can.

    Args:
        classes: the classes of pixels that read them.  # int32 [classes, 14]
        sides: rows and columns of the tiles.  # int32 [tiles, 2]
        pitch: from pixel to pixel, in 16 bytes.
        chunks: of the tables.
        loads: begin and count of the chunks that come together.
    """
    if (classes[:, NarrowClass.LOAD_W] != 1).any():
        return "adjacent outputs do not read adjacent columns"
    side = max(pitch * LANES, int(sides.max()))
    if side > _MOST_SIDE:
        return f"a tile has {side} places along one axis, and a box at most {_MOST_SIDE}"
    for begin, count in loads:
        if (np.diff(chunks[begin : begin + count]) != 1).any():
            return "channels that are read together are not adjacent"
    return ""


def tma_readable(tensor: Tensor) -> bool:
    """Tells whether boxes can be cut out of an operand in channels_last order.

    No axis may lie within the one inside it, as the images of an expanded tensor do.
    """
    least = tensor.shape[1]
    for axis in (3, 2, 0):
        size, stride = tensor.shape[axis], tensor.stride(axis)
        if size > 1:
            if not least <= stride < _MOST_STRIDE:
                return False
            least = stride * size
    return True


def round_up(size: int, grain: int = 16) -> int:
    """Returns the bytes that so many take up in pieces of `grain`."""
    return -(-size // grain) * grain
