# SPDX-License-Identifier: Apache-2.0
"""Layers of the CUDA kernel for scattered groups, and cases of it for `shim`."""

from __future__ import annotations

from typing import Any

import numpy as np
import shim
import torch

from hetconv_kernels import Support
from hetconv_kernels.backends.cuda.scattered_lowering import (
    ScatteredTables,
    lower_scattered,
    scattered_jobs,
)
from hetconv_kernels.backends.cuda.scattered_tiles import ScatteredShape
from hetconv_kernels.problem import Geometry, make_geometry


def scattered(filters: int, channels: int, groups: int, kernel: int = 3) -> Support:
    """Makes groups of filters anywhere that keep single channels anywhere."""
    rng = np.random.default_rng(filters + channels + groups)
    keep = rng.random((groups, channels)) < 0.3
    return Support.self_grouped(rng.integers(0, groups, filters), keep, kernel)


def irregular() -> Support:
    mask = np.random.default_rng(0).random((24, 40, 3, 3)) < 0.05
    mask[5] = False
    return Support.from_mask(mask)


# Name: the layer, the size of its images, and slots, parts and warps.
LAYERS: dict[str, tuple[Geometry, tuple[int, int], tuple[int, int, int]]] = {
    "one-block": (make_geometry(scattered(40, 64, 3), 1, 1), (5, 9), (64, 1, 8)),
    "several-turns": (make_geometry(scattered(160, 40, 12), 1, 1), (2, 7), (64, 1, 8)),
    "several-blocks": (make_geometry(scattered(24, 104, 3), 1, 1), (3, 8), (32, 1, 8)),
    "blocks-and-turns": (make_geometry(scattered(136, 72, 14), 1, 1), (2, 3), (32, 1, 8)),
    "parts": (make_geometry(scattered(64, 64, 5), 1, 1), (4, 7), (64, 3, 8)),
    "sixteen-warps": (make_geometry(scattered(80, 64, 5), 1, 1), (2, 8), (64, 1, 16)),
    "irregular": (make_geometry(irregular(), 1, 1), (5, 5), (64, 1, 8)),
    "pointwise": (make_geometry(scattered(48, 72, 4, 1)), (3, 9), (96, 1, 8)),
    "pointwise-parts": (make_geometry(scattered(48, 72, 4, 1), 1, 1), (3, 9), (64, 2, 8)),
    "uneven-padding": (make_geometry(scattered(24, 32, 3), 1, (2, 0, 0, 3)), (4, 8), (64, 1, 8)),
    "no-weights": (
        make_geometry(Support.from_mask(np.zeros((16, 8, 3, 3), bool)), 1, 1),
        (3, 4),
        (64, 1, 8),
    ),
}


def tables_of(name: str) -> tuple[ScatteredTables, ScatteredShape]:
    geometry, _, how = LAYERS[name]
    support = geometry.support
    tables = lower_scattered(support, scattered_jobs(support), *how)
    return tables, ScatteredShape(support.kernel[0], tables.slots, tables.widest, how[2])


def case_of(
    name: str,
    batch: int = 9,
    dtype: torch.dtype = torch.bfloat16,
    act: str = "none",
    epilogue: tuple[str, ...] = (),
    integers: bool = False,
) -> shim.Case:
    """Makes a case of fprop; `epilogue` out of scale, shift and residual."""
    geometry, size, _ = LAYERS[name]
    support, out = geometry.support, geometry.output_size(*size)
    f, c = support.filters, support.channels

    def drawn(*shape: int) -> torch.Tensor:
        return (torch.randint(-2, 3, shape) if integers else torch.randn(*shape)).to(dtype)

    x, w = drawn(batch, c, *size), drawn(*support.shape)
    extras: dict[str, torch.Tensor] = {
        n: torch.randn(f) for n in ("scale", "shift") if n in epilogue
    }
    if "residual" in epilogue:
        extras["residual"] = drawn(batch, f, *out)
    truths = []
    for values in ((x, w, extras), (x.abs(), w.abs(), {n: t.abs() for n, t in extras.items()})):
        truth = shim._apply(geometry, values[0], values[1], size, False)
        terms = {n: t.double() for n, t in values[2].items()}
        truth = truth * terms.get("scale", torch.ones(()))[..., None, None]
        truth = truth + terms.get("shift", torch.zeros(()))[..., None, None]
        truths.append(truth + terms.get("residual", 0.0))
    bound = 1.2 * shim.error_bound(truths[1], c * int(np.prod(support.kernel)), dtype)
    if integers:
        assert truths[0].abs().max() <= 256, "not exact in bfloat16"
        bound = torch.zeros_like(bound)
    elif not support.live:
        bound = bound + 0.02 * truths[0].abs()
    tables, shape = tables_of(name)
    dead = ~torch.tensor(np.array(support.mask))
    numbers = {
        "kind": 3,
        "dtype": shim.CODES[dtype],
        "w_dtype": shim.CODES[dtype],
        "act": shim.ACTS.index(act),
        "x_n": c * size[0] * size[1],
        "x_h": size[1] * c,
        "x_w": c,
        "y_n": f * out[0] * out[1],
        "y_h": out[1] * f,
        "y_w": f,
        "batch": batch,
        "channels": c,
        "image_h": size[0],
        "image_w": size[1],
        "out_h": out[0],
        "out_w": out[1],
        "base_h": -geometry.pads[0],
        "base_w": -geometry.pads[2],
        "part_count": len(tables.parts),
        "most_blocks": tables.spans.shape[1] - 1,
        "side": shape.side,
        "warps": shape.warps,
        "pixel_bytes": shape.slots * 16,
        "width": shape.columns,
        "shared": shape.shared_bytes,
    }
    names = ("parts", "blocks", "segments", "begins", "jobs", "spans", "steps", "columns")
    arrays: dict[str, Any] = {
        "x": shim.last(x),
        "w": torch.where(dead, float("nan"), w.float()).to(dtype),  # dead entries are never read
        "source": tables.source(support, "contiguous"),
        "result": torch.full((batch, *out, f), torch.nan).to(dtype),
        **{n: getattr(tables, n) for n in names},
        **{n: shim.last(t) if t.dim() == 4 else t for n, t in extras.items()},
    }
    title = f"{name} {shape} {dtype} {act} {epilogue}"
    return shim.Case(
        title, numbers, arrays, shim.last(shim.activate(act, truths[0])), shim.last(bound), dtype
    )
