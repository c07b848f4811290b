# SPDX-License-Identifier: Apache-2.0
"""Rates that predictions rest on, and where they come from."""

from __future__ import annotations

from typing import NamedTuple


class CpuRates(NamedTuple):
    """What one core does, and what a call costs.

    Attributes:
        macs: float32 multiply-accumulates of the dense convolution, per second and thread.
        operations: weighted vector multiply-adds of the engine, per second and thread.
        bandwidth: bytes a second, all threads together.
        dense_call: seconds of a dense call that does nothing.
        engine_call: seconds of an engine call that does nothing.
    """

    macs: float
    operations: float
    bandwidth: float
    dense_call: float
    engine_call: float


# By instruction set.
CPU_RATES = {
    "avx512": CpuRates(5.5e10, 5.5e10 / 16, 3e10, 5e-6, 8e-6),
    "avx2": CpuRates(5.5e10, 5.5e10 / 16, 3e10, 5e-6, 8e-6),
    "generic": CpuRates(5.5e10, 5.5e10 / 16, 3e10, 5e-6, 8e-6),
}
