# SPDX-License-Identifier: Apache-2.0
"""Parts of the GPU engines, each of which can be left out where it was found faulty.

HETCONV_WITHOUT, a list of names with commas between them, leaves parts out of a whole process:
what they would have run goes to another kernel or engine, and `explain` says why. `make gpu` sets
it to what failed the smoke tests.
"""

from __future__ import annotations

import os

from ...errors import BackendError, mismatch

# Name -> what it is.
PARTS = {
    "cuda-narrow": "fprop and dgrad of narrow groups",
    "cuda-tf32": "fprop and dgrad of narrow groups in float32",
    "cuda-tma": "tiles of narrow groups brought by TMA",
    "cuda-wgrad": "wgrad of narrow groups",
    "cuda-wide": "fprop and dgrad of wide groups",
    "cuda-wide-wgrad": "wgrad of wide groups",
    "cuda-cluster": "clusters of two blocks for wide groups",
    "cuda-flat": "tiles of flattened rows for wide groups",
    "cuda-scattered": "fprop and dgrad of scattered groups",
    "triton-gather": "fprop and dgrad through pointers",
    "triton-tma": "fprop and dgrad on tiles brought by TMA",
    "triton-wgrad": "wgrad through pointers",
    "triton-wgrad-tma": "wgrad on tiles brought by TMA",
}
VARIABLE = "HETCONV_WITHOUT"


def named(text: str) -> frozenset[str]:
    """Reads a list of parts.

    Raises:
        BackendError: it names something else.
    """
    names = frozenset(name.strip() for name in text.split(",") if name.strip())
    if not names <= PARTS.keys():
        unknown = ", ".join(sorted(names - PARTS.keys()))
        raise BackendError(mismatch(VARIABLE, repr(unknown), f"some of {', '.join(PARTS)}"))
    return names


# What this process does without.
WITHOUT = named(os.environ.get(VARIABLE, ""))


def left_out(name: str) -> str:
    """Says that a part is left out; empty where it is not."""
    return f"{PARTS[name]} ({name}) are left out by {VARIABLE}." if name in WITHOUT else ""
