# SPDX-License-Identifier: Apache-2.0
"""Rates that predictions rest on; ``python -m benchmarks.calibrate`` fits those of a CPU."""

from __future__ import annotations

from typing import NamedTuple

import torch


class CpuRates(NamedTuple):
    """What one core does, and what a call costs.

    Attributes:
        macs: float32 multiply-accumulates of the dense convolution, per second and thread.
        operations: weighted vector multiply-adds of the native engine, per second and thread.
        dense_call: seconds of a dense call that does next to nothing.
        engine_call: seconds of an engine call that does next to nothing.
        bandwidth: bytes a second, all threads together.
    """

    macs: float
    operations: float
    dense_call: float
    engine_call: float
    bandwidth: float


# By instruction set.
CPU_RATES = {
    "avx512": CpuRates(5.5e10, 3.4e9, 5e-6, 8e-6, 3e10),
    "avx2": CpuRates(2.8e10, 3.4e9, 5e-6, 8e-6, 3e10),
    "generic": CpuRates(1.4e10, 3.4e9, 5e-6, 8e-6, 3e10),
}
# Dense MAC/s, byte/s and seconds a launch of a GPU: nominal, nothing was fitted.
GPU_RATES = (1e14, 2e12, 5e-6)


def dense_isa() -> str:
    """Names the instruction set that PyTorch's own kernels use here."""
    capability = torch.backends.cpu.get_cpu_capability().lower()
    return capability if capability in CPU_RATES else "generic"
