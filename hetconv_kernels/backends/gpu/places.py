# SPDX-License-Identifier: Apache-2.0
"""Places: where the weights of a Support lie in the memory of a canonical weight."""

from __future__ import annotations

import numpy as np

from ...masks import Int32Array, IntArray
from ...support import Support


def memory_places(positions: IntArray, support: Support, form: str) -> Int32Array:
    """Turns flat dense positions into places in the memory of a canonical weight of that form."""
    f, c, kh, kw = support.shape
    if form == "live":
        place = np.cumsum(support.mask.reshape(-1)) - 1
    elif form == "channels_last":
        flat = np.arange(f * kh * kw * c).reshape(f, kh, kw, c)
        place = flat.transpose(0, 3, 1, 2).reshape(-1)
    else:
        place = np.arange(f * c * kh * kw)
    return np.where(positions < 0, -1, place[positions]).astype(np.int32)
