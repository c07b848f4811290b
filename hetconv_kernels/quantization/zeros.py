# SPDX-License-Identifier: Apache-2.0
"""The Support of a weight whose structure is known from its zeros alone.

In 8 bits a weight that exists may be zero as well, by rounding: about one in a hundred. A channel
that a filter reads with nearly all taps it reads with all; a tap that it has in nearly all channels
it has in all; and filters that read the same columns, but for
such holes, are taken to have one structure, the union of what they read. What is live too many is a
zero that is multiplied with, which changes no result.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from ..support import Support

# Filters belong together when at most this part of their columns is not shared.
_HOLES = 1 / 8
# A layer, kernel or tap of a filter with more than this has no zeros on purpose.
_DENSE = 7 / 8


def support_of_zeros(weight: Tensor, groups: int = 1) -> Support:
    """Finds the Support of a quantised weight.

    Example: of four filters, two read the channels 0 to 7 and two 8 to 15, and one weight of the
    first was rounded to zero. The two patterns of the first pair differ in one column of eight at
    most, so their union is taken: the Support has two groups and no hole.

    Args:
        weight: dense, whatever its groups.  # [F, C, KH, KW]
        groups: equal ones that are known already, as of a grouped convolution.

    Returns:
        A Support that has every weight that is not zero, and holes that were filled.
    """
    alive = weight.ne(0).cpu().numpy()
    f, c, kh, kw = alive.shape
    if groups > 1:
        whole = Support.grouped(c, f, (kh, kw), groups)
        return whole if alive.sum() >= _DENSE * whole.live else _closed(alive)
    if alive.mean() >= _DENSE:
        return Support.dense(c, f, (kh, kw))
    return _closed(alive)


def _closed(alive: np.ndarray) -> Support:
    """Fills the holes of kernels, of taps, and of filters that belong together."""
    kernels = alive.mean((2, 3), keepdims=True) >= _DENSE  # [F, C, 1, 1]
    taps = alive.mean(1, keepdims=True) >= _DENSE  # [F, 1, KH, KW]
    alive = alive | kernels | taps
    columns = alive.reshape(len(alive), -1)
    unions: list[np.ndarray] = []
    members: list[list[int]] = []
    # The fullest first: its holes are the fewest.
    for place in np.argsort(-columns.sum(1), kind="stable"):
        own = columns[place]
        home = _home(own, unions)
        if home is None:
            unions.append(own.copy())
            members.append([int(place)])
        else:
            unions[home] |= own
            members[home].append(int(place))
    closed = np.empty_like(columns)
    for union, filters in zip(unions, members, strict=True):
        closed[filters] = union
    return Support.from_mask(closed.reshape(alive.shape))


def _home(own: np.ndarray, unions: list[np.ndarray]) -> int | None:
    """Finds the union that a filter belongs to."""
    if not unions:
        return None
    stack = np.stack(unions)
    either = (stack | own).sum(1)
    apart = (stack ^ own).sum(1)
    ratio = apart / np.maximum(either, 1)
    best = int(ratio.argmin())
    return best if ratio[best] <= _HOLES else None
