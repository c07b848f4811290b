# SPDX-License-Identifier: Apache-2.0
"""Settings by layer: the first pattern that fits counts, and each has to fit one."""

from __future__ import annotations

import pytest

from hetconv_kernels.compression.wildcards import check_patterns, first_that_fits
from hetconv_kernels.errors import ArgumentError

CHOSEN = {"features.0": 1, "features.*": 2, "*.0": 3}


@pytest.mark.parametrize(
    ("name", "value"),
    [("features.0", 1), ("features.3", 2), ("head.0", 3), ("head.1", None), ("features", None)],
)
def test_the_first_pattern_that_fits_counts(name: str, value: int | None) -> None:
    assert first_that_fits(name, CHOSEN) == value


def test_without_patterns_nothing_fits() -> None:
    assert first_that_fits("features.0", None) is None


def test_a_pattern_that_fits_nothing_is_named_with_what_there_is() -> None:
    check_patterns("rates", CHOSEN, ["features.0", "features.1"])
    check_patterns("rates", None, [])
    with pytest.raises(ArgumentError, match=r"rates: received 'head.\*'.*'features.0'"):
        check_patterns("rates", CHOSEN | {"head.*": 4}, ["features.0"])
