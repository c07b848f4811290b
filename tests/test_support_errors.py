# SPDX-License-Identifier: Apache-2.0
"""What a Support refuses, and in what words."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from hetconv_kernels import Support
from hetconv_kernels.errors import SupportError

KEEP = np.ones((2, 3), bool)
SMALL = Support.dense(3, 4, 3)
BAD: dict[str, tuple[Callable[[], object], str]] = {
    "mask-2d": (lambda: Support(np.ones((2, 2), bool)), r"a 2-D array of bool.*4-D boolean"),
    "mask-float": (lambda: Support(np.ones((2, 2, 3, 3))), r"a 4-D array of float64.*`mask != 0`"),
    "mask-bytes": (lambda: Support(np.ones((2, 2, 3, 3), np.uint8)), r"4-D array of uint8"),
    "mask-no-filters": (lambda: Support(np.ones((0, 2, 3, 3), bool)), r"\(0, 2, 3, 3\).*no dim"),
    "mask-no-taps": (lambda: Support(np.ones((2, 2, 3, 0), bool)), r"\(2, 2, 3, 0\).*no dim"),
    "mask-too-large": (
        lambda: Support(np.broadcast_to(np.True_, (2**16, 2**16, 1, 1))),
        r"received 4294967296, expected at most 2147483647",
    ),
    "dense-too-large": (lambda: Support.dense(10**6, 10**6, 3), r"entries.*received 9000000000000"),
    "grouped-too-large": (lambda: Support.grouped(10**6, 10**6, 3, 10**6), "entries of a Support"),
    "het-too-large": (lambda: Support.het(10**6, 10**6, 3, p=4), "entries of a Support"),
    "self-grouped-too-large": (
        lambda: Support.self_grouped(np.zeros(10**5, int), np.ones((1, 10**5), bool), 3),
        "entries of a Support",
    ),
    "no-channels": (lambda: Support.dense(0, 4, 3), r"C: received 0, expected a positive integer"),
    "no-filters": (lambda: Support.dense(4, 0, 3), r"F: received 0, expected a positive integer"),
    "fraction-of-channels": (lambda: Support.dense(2.5, 4, 3), r"C: received 2\.5"),  # type: ignore
    "kernel-zero": (lambda: Support.dense(4, 4, 0), r"kernel size: received 0, expected one or"),
    "kernel-fraction": (lambda: Support.dense(4, 4, 3.0), r"kernel size: received 3\.0"),  # type: ignore
    "kernel-none": (lambda: Support.dense(4, 4, None), r"kernel size: received None"),  # type: ignore
    "kernel-of-three": (lambda: Support.dense(4, 4, (3, 3, 3)), r"kernel size: received \(3, 3"),
    "kernel-negative": (lambda: Support.dense(4, 4, (3, -1)), r"kernel size: received \(3, -1\)"),
    "kernel-text": (lambda: Support.dense(4, 4, "33"), r"kernel size: received 33"),  # type: ignore
    "groups-zero": (lambda: Support.grouped(4, 4, 3, 0), r"groups=0.*a divisor of both"),
    "groups-fraction": (lambda: Support.grouped(4, 4, 3, 2.0), r"groups=2\.0"),  # type: ignore
    "groups-not-dividing-c": (
        lambda: Support.grouped(6, 8, 3, 4),
        r"groups=4 with C=6, F=8, expected a divisor.*Uneven groups: Support\.self_grouped",
    ),
    "groups-not-dividing-f": (lambda: Support.grouped(8, 6, 3, 4), "a divisor of both C and F"),
    "p-zero": (lambda: Support.het(8, 8, 3, p=0), r"p of a HetConv: received 0, expected.*C=8"),
    "p-negative": (lambda: Support.het(8, 8, 3, p=-2), r"received -2, expected"),
    "p-over-c": (lambda: Support.het(8, 16, 3, p=9), r"received 9, expected an integer from 1"),
    "p-fraction": (lambda: Support.het(8, 8, 3, p=2.0), r"p of a HetConv: received 2\.0"),  # type: ignore
    "even-kernel": (lambda: Support.het(8, 8, 4), r"\(4, 4\), expected odd.*Support\.from_mask"),
    "even-width": (lambda: Support.het(8, 8, (3, 2)), r"\(3, 2\), expected odd sizes"),
    "order": (lambda: Support.het(8, 8, 3, order="random"), r"'random', expected 'blocked' or"),
    "labels-2d": (lambda: Support.self_grouped([[0, 1]], KEEP, 3), r"labels: received int64"),
    "labels-float": (lambda: Support.self_grouped([0.0, 1.0], KEEP, 3), r"received float64 \(2,\)"),
    "labels-none": (lambda: Support.self_grouped([], KEEP, 3), r"non-empty 1-D integer array"),
    "labels-too-high": (lambda: Support.self_grouped([0, 2], KEEP, 3), r"0…2, expected.*0 to 1"),
    "labels-negative": (lambda: Support.self_grouped([-1, 0], KEEP, 3), r"received -1…0"),
    "keep-1d": (lambda: Support.self_grouped([0], KEEP[0], 3), r"keep: received bool \(3,\)"),
    "keep-int": (lambda: Support.self_grouped([0], [[1, 0]], 3), r"keep: received int64 \(1, 2\)"),
    "keep-empty": (lambda: Support.self_grouped([0], KEEP[:, :0], 3), r"non-empty boolean"),
    "within-other-shape": (
        lambda: Support.self_grouped([0, 1], KEEP, 3, within=SMALL),
        r"within: received \(4, 3, 3, 3\), expected \(2, 3, 3, 3\)",
    ),
    "intersection": (
        lambda: SMALL & Support.dense(4, 3, 3),
        r"received \(3, 4, 3, 3\), expected the shape \(4, 3, 3, 3\)",
    ),
    "permute-too-short": (lambda: SMALL.permute([0, 1]), r"order of filters.*permutation of 0…3"),
    "permute-twice": (lambda: SMALL.permute(channels=[0, 1, 1]), r"channels: received \[0, 1, 1\]"),
    "permute-floats": (lambda: SMALL.permute(channels=[0.0, 1.0, 2.0]), r"permutation of 0…2"),
    "permute-booleans": (
        lambda: Support.dense(2, 2, 1).permute([False, True]),
        r"order of filters: received \[False, True\]",
    ),
}


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_refused_in_words(call: Callable[[], object], message: str) -> None:
    with pytest.raises(SupportError, match=message) as caught:
        call()
    assert "received" in str(caught.value)
    assert "expected" in str(caught.value)


def test_intersection_with_something_else_is_a_type_error() -> None:
    with pytest.raises(TypeError):
        SMALL & SMALL.mask  # type: ignore[operator]
