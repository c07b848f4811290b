# SPDX-License-Identifier: Apache-2.0
"""Cases of the narrow CUDA kernels, for halos that cp.async brings and those that TMA brings."""

from __future__ import annotations

from functools import cache

import numpy as np
import shim
import torch

from hetconv_kernels import Support
from hetconv_kernels.backends.cuda.narrow_lowering import BlockShape
from hetconv_kernels.problem import Geometry, make_geometry

HET = Support.het(64, 64, 3, p=8)


SAME = make_geometry(HET, 1, 1)


def ragged(filters: int, channels: int, groups: int, keep: float, kernel: int = 3) -> Support:
    """A self-grouped Support with unequal clusters, each on channels of its own choice."""
    rng = np.random.default_rng(filters * 1000 + channels)
    labels = np.sort(rng.integers(0, groups, filters))
    return Support.self_grouped(labels, rng.random((groups, channels)) < keep, kernel)


def masked(filters: int, channels: int, kernel: tuple[int, int], density: float) -> Support:
    """A Support of single weights, and one filter without any."""
    rng = np.random.default_rng(filters * 100 + channels)
    mask = rng.random((filters, channels, *kernel)) < density
    mask[filters // 2] = False
    return Support.from_mask(mask)


LAYERS = {
    "het8": make_geometry(HET, 1, 1),
    "het4": make_geometry(Support.het(64, 64, 3, p=4), 1, 1),
    "interleaved": make_geometry(Support.het(64, 64, 3, p=4, order="interleaved"), 1, 1),
    "interleaved-uneven": make_geometry(Support.het(40, 24, 3, p=3, order="interleaved"), 1, 1),
    "wide": make_geometry(Support.het(128, 128, 3, p=8), 1, 1),
    "ragged": make_geometry(ragged(64, 64, 4, 0.3), 1, 1),
    "ragged-narrow": make_geometry(ragged(48, 32, 7, 0.4), 1, 1),
    "grouped": make_geometry(Support.grouped(64, 64, 3, 8), 1, 1),
    "dense-1x1": make_geometry(Support.dense(16, 24, 1)),
    "dense-5x5": make_geometry(Support.dense(8, 8, 5), 1, 2),
    "stride": make_geometry(Support.het(32, 32, 3, p=4), 2, 1),
    "stride-1x1": make_geometry(Support.dense(16, 16, 1), 2),
    "stride-3": make_geometry(Support.grouped(16, 32, 3, 2), (3, 2), 1),
    "dilated": make_geometry(Support.het(32, 32, 3, p=4), 1, 2, 2),
    "dilated-stride": make_geometry(Support.het(16, 16, 3, p=2), 2, (1, 3), (1, 3)),
    "pads": make_geometry(Support.het(16, 16, 3, p=2), 1, (0, 3, 2, 1)),
    "row": make_geometry(masked(16, 16, (1, 3), 0.5), 1, (0, 1)),
    "scattered": make_geometry(masked(24, 16, (3, 3), 0.2), 1, 1),
    "one-filter-group": make_geometry(Support.grouped(16, 16, 3, 16), 1, 1),
}


SIZES = {"dense-1x1": (5, 9), "stride": (9, 12), "stride-1x1": (7, 8), "pads": (6, 7)}


DTYPES = (torch.bfloat16, torch.float16)


def epilogues(geometry: Geometry, boxes: bool = False, **more: object) -> list[shim.Case]:
    """Cases of all epilogues; with the same operands each time."""
    parts = [("scale",), ("shift",), ("residual",), ("scale", "shift", "residual"), ("residual",)]
    shape = BlockShape(4, 8, 1, 1, 64) if geometry.support.filters == 136 else None
    cases = []
    for index, (act, epilogue) in enumerate(zip(shim.ACTS, parts, strict=True)):
        torch.manual_seed(index)
        how = {"dtype": DTYPES[index % 2], "act": act, "epilogue": epilogue, "shape": shape}
        how |= {"vectors": index != 3, "buffers": 1 + index % 2, "resident": index % 2 == 0}
        own = {**how, **more}
        cases.append(shim.fprop_case(geometry.support, geometry, (5, 11), boxes=boxes, **own))
    return cases


BLOCKS = [
    (HET, BlockShape(8, 16, 4, 1, 64)),
    (HET, BlockShape(5, 7, 2, 1, 3)),
    (Support.het(64, 128, 3, p=4), BlockShape(4, 8, 1, 2, 4)),
    (Support.het(64, 128, 3, p=4), BlockShape(4, 8, 1, 1, 4)),
    (Support.het(64, 40, 3, p=4, order="interleaved"), BlockShape(4, 8, 1, 1, 3)),
    (ragged(64, 64, 4, 0.3), BlockShape(4, 8, 2, 1, 2)),
    (Support.dense(8, 8, 1), BlockShape(11, 19, 8, 1, 64)),  # one tile, and so a block without any
]


def blocks(stride: tuple[int, int], **how: object) -> list[shim.Case]:
    """Cases of blocks of all shapes, each with a stride of 1 and with that one."""
    return [
        shim.fprop_case(support, make_geometry(support, each, 1), (9, 17), 1, shape=shape, **how)
        for support, shape in BLOCKS
        for each in ((1, 1), stride)
    ]


@cache
def random_case(seed: int, boxes: bool = False) -> shim.Case:
    """A case that nobody thought of."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    channels, filters = (int(rng.choice([8, 16, 24, 32, 48, 64])) for _ in range(2))
    kernel = tuple(int(n) for n in rng.choice([1, 2, 3, 3, 3, 5], 2))
    kind = rng.choice(["het", "grouped", "ragged", "masked", "dense"])
    if kind == "het":
        odd = tuple(n | 1 for n in kernel)
        order = str(rng.choice(["blocked", "interleaved"]))
        support = Support.het(channels, filters, odd, p=int(rng.integers(1, 9)), order=order)
    elif kind == "grouped":
        support = Support.grouped(channels, filters, kernel, int(rng.choice([1, 2, 4, 8])))
    elif kind == "ragged":
        groups = int(rng.integers(1, 6))
        keep = rng.random((groups, channels)) < rng.uniform(0.1, 0.9)
        support = Support.self_grouped(rng.integers(0, groups, filters), keep, kernel)
    elif kind == "masked":
        support = masked(filters, channels, kernel, float(rng.uniform(0.02, 0.5)))
    else:
        support = Support.dense(channels, filters, kernel)
    stride = tuple(int(n) for n in rng.choice([1, 1, 1, 2, 3], 2))
    dilation = tuple(int(n) for n in rng.choice([1, 1, 1, 2, 3], 2))
    reach = [d * (k - 1) for d, k in zip(dilation, support.kernel, strict=True)]
    pads = tuple(int(rng.integers(0, reach[n // 2] + 2)) for n in range(4))
    geometry = make_geometry(support, stride, pads, dilation)
    size = tuple(int(rng.integers(reach[n] + 1, reach[n] + 12)) for n in range(2))
    batch, dtype = int(rng.integers(1, 4)), DTYPES[int(rng.integers(2))]
    live, buffers = bool(rng.integers(2)), [None, 1, 2][int(rng.integers(3))]
    verb = rng.choice(["fprop", "dgrad", "wgrad"])
    if verb == "wgrad":
        w_dtype = dtype if rng.integers(2) else torch.float32
        return shim.wgrad_case(support, geometry, size, batch, dtype, w_dtype, live, buffers, boxes)
    how: dict[str, object] = {"buffers": buffers, "resident": bool(rng.integers(2)), "live": live}
    how["boxes"] = boxes
    if verb == "fprop":
        how["act"] = str(rng.choice(shim.ACTS))
        asked = [n for n in ("scale", "shift", "residual") if rng.integers(2)]
        how["epilogue"] = tuple(asked)
    return shim.fprop_case(support, geometry, size, batch, dtype, verb == "dgrad", **how)
