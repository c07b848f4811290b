# SPDX-License-Identifier: Apache-2.0
"""The measured ceilings and the floor they give."""

from __future__ import annotations

from hetconv_kernels.measure import roofline


def test_roofs_are_measured_and_make_a_floor() -> None:
    measured = roofline.measure_roofs(rounds=1, size=256)
    assert measured.macs_per_s > 1e6
    assert measured.bytes_per_s > 1e6
    assert measured.dtype == "float32"
    plain = roofline.Roofs(1e9, 1e8, "cpu", "float32")
    assert plain.floor(macs=2e9, bytes_moved=1e8) == 2.0
    assert plain.floor(macs=1e9, bytes_moved=3e8) == 3.0
