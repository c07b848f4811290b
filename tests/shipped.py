# SPDX-License-Identifier: Apache-2.0
"""The kernel variants that are shipped, as data: what ahead-of-time compilation has to cover."""

from __future__ import annotations

import re
from dataclasses import dataclass

from hetconv_kernels.backends.triton.tiles import (
    BOX_FUSED,
    BOX_ONE,
    BOX_TILES,
    HALF_FUSED,
    HALF_ONE,
    HALF_TILES,
    SINGLE_FUSED,
    SINGLE_ONE,
    SINGLE_TILES,
    SPLIT_FUSED,
    Box,
    Tile,
)


@dataclass(frozen=True)
class Configuration:
    """One shipped kernel variant.

    Attributes:
        kernel: ``gather`` or ``tma`` (fprop and dgrad), ``wgrad`` or ``wgradtma``.
        dtype: of the operands.
        tile: its tile.
        taps: of one job, for wgrad.
        epilogue: ``plain``, or ``fused``: scale, shift, residual, ReLU and, where pointers are
            read, channel tails; ``general``: other activations, scattered filters, and pixels
            adjacent in memory instead of channels, for which nothing fast is promised.
            Boxes are also ``folded`` (stride 2) or ``ragged``, stored by pointers as segments that
            do not fill their tile are.
        precision: of products of float32.
        box: of the box kernels.
    """

    kernel: str
    dtype: str
    tile: Tile
    taps: int = 1
    epilogue: str = "plain"
    precision: str = "tf32"
    box: Box | None = None

    @property
    def name(self) -> str:
        """Its name in reports and tests."""
        t = self.tile
        taps = "x3" if self.taps == 3 else ""
        more = "" if self.epilogue == "plain" else f"-{self.epilogue}"
        more = "-" + "x".join(map(str, self.box)) + more if self.box else more
        more += "-x3" if self.precision == "tf32x3" else ""
        return f"{self.kernel}{taps}-{self.dtype}-{t.pixels}x{t.filters}x{t.channels}{more}"


def configurations() -> tuple[Configuration, ...]:
    """Lists all that is shipped: at most 50."""
    found = [Configuration("gather", "bf16", t) for t in HALF_TILES]
    found += [Configuration("gather", "bf16", t, epilogue="fused") for t in HALF_TILES[:3]]
    found += [Configuration("gather", "fp16", HALF_TILES[0])]
    found += [Configuration("gather", "bf16", HALF_TILES[2], epilogue="general")]
    found += [Configuration("wgrad", "bf16", HALF_ONE[1], epilogue="general")]
    found += [Configuration("gather", "fp32", t) for t in SINGLE_TILES]
    found += [
        Configuration("tma", "bf16", tile, box=Box(1, 16, tile.pixels // 16)) for tile in BOX_TILES
    ]
    found += [
        Configuration("tma", "bf16", BOX_TILES[2], box=Box(128, 1, 1)),
        Configuration("tma", "bf16", BOX_TILES[1], box=Box(8, 4, 4), epilogue="fused"),
        Configuration("tma", "bf16", BOX_TILES[1], box=Box(1, 8, 16), epilogue="folded"),
        Configuration("tma", "bf16", BOX_TILES[1], box=Box(32, 2, 2), epilogue="ragged"),
    ]
    found += [Configuration("gather", "fp32", t, precision="tf32x3") for t in SINGLE_TILES]
    found += [Configuration("wgrad", "bf16", t, 3) for t in HALF_FUSED]
    found += [Configuration("wgrad", "bf16", t) for t in HALF_ONE]
    found += [Configuration("wgradtma", "bf16", t, 3, box=Box(1, 8, 8)) for t in BOX_FUSED]
    found += [Configuration("wgradtma", "bf16", t, box=Box(64, 1, 1)) for t in BOX_ONE]
    found += [Configuration("wgrad", "fp32", t, 3) for t in SINGLE_FUSED]
    found += [Configuration("wgrad", "fp32", t) for t in SINGLE_ONE]
    split = [SPLIT_FUSED.get(t, t) for t in SINGLE_FUSED]
    found += [Configuration("wgrad", "fp32", t, 3, precision="tf32x3") for t in split]
    found += [Configuration("wgrad", "fp32", t, precision="tf32x3") for t in SINGLE_ONE]
    return tuple(found)


def chosen(capability: int, pattern: str = "") -> list[Configuration]:
    """Lists the configurations that are shipped for a capability; boxes are for Hopper."""
    shipped = [c for c in configurations() if c.box is None or capability == 90]
    return [c for c in shipped if re.search(pattern, c.name)]
