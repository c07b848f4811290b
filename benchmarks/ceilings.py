# SPDX-License-Identifier: Apache-2.0
"""The ceilings that a benchmark's times are held to, in every dtype that it measures."""

from __future__ import annotations

import torch

from hetconv_kernels.measure.roofline import Roofs, measure_roofs

# Multiply-accumulates of a vector lane of 32 bits for each instruction: vdpbf16ps and vpdpbusd.
_LANES = {torch.bfloat16: 2, torch.int8: 4}


def ceilings(device: str, dtype: torch.dtype, rounds: int = 25) -> Roofs:
    """Measures the ceilings; a CPU's in low precision follow from those in float32.

    PyTorch's products and convolutions stay far below the rate of the instructions for bfloat16 and
    int8, which do two and four multiply-accumulates where one in float32 does one: that multiple of
    the float32 rate is the ceiling, where nothing was measured above it.

    Args:
        device: where.
        dtype: of the operands.
        rounds: samples of each rate; the best counts.
    """
    if device != "cpu" or dtype not in _LANES:
        return measure_roofs(device, dtype, rounds=rounds)
    roofs = measure_roofs(device, torch.float32, rounds=rounds)
    rate = _LANES[dtype] * roofs.macs_per_s
    if dtype == torch.bfloat16:
        rate = max(rate, measure_roofs(device, dtype, rounds=rounds).macs_per_s)
    return Roofs(rate, roofs.bytes_per_s, device, str(dtype).removeprefix("torch."))
