# SPDX-License-Identifier: Apache-2.0
"""What several tests draw from: masks with all that a Support allows, and Plans."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from hetconv_kernels import Support
from hetconv_kernels.backends.triton.plan import Block, Plan


def random_mask(seed: int = 0, shape: tuple[int, ...] = (6, 5, 3, 2), density: float = 0.4) -> Any:
    return np.random.default_rng(seed).random(shape) < density


@st.composite
def masks(draw: st.DrawFn) -> Any:
    """Masks with repeated rows, empty filters and unread channels."""
    f, c = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    kernel = draw(st.sampled_from([(1, 1), (1, 3), (2, 2), (3, 3)]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows = rng.random((draw(st.integers(1, f)), c, *kernel)) < draw(
        st.sampled_from([0, 0.2, 0.6, 1])
    )
    mask = rows[rng.integers(len(rows), size=f)]
    mask[:, rng.random(c) < 0.2] = False
    mask[rng.random(f) < 0.2] = False
    return mask


@st.composite
def blocks(draw: st.DrawFn) -> Block:
    align = draw(st.integers(1, 3))
    return Block(
        filters=draw(st.integers(1, 6)),
        channels=align * draw(st.integers(1, 3)),
        align=align,
        gap=draw(st.integers(0, 4)),
    )


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    return Plan(Support.from_mask(draw(masks())), draw(blocks()))
