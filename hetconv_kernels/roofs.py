# SPDX-License-Identifier: Apache-2.0
"""Roofs: the ceilings of this machine, measured, so that a time can be given as a share of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .timing import interleaved, last_level_cache


@dataclass(frozen=True)
class Roofs:
    """The ceilings that were measured on this machine, in one dtype.

    Attributes:
        macs_per_s: multiply-accumulates per second of a large matrix product or dense convolution,
            whichever is faster (on some CPUs the library's product is far from the peak).
        bytes_per_s: bytes read plus bytes written per second of a large copy.
        device: where.
        dtype: of the operands.
    """

    macs_per_s: float
    bytes_per_s: float
    device: str
    dtype: str

    def floor(self, macs: float, bytes_moved: float) -> float:
        """Returns the least time in seconds for that work: the roofline."""
        return max(macs / self.macs_per_s, bytes_moved / self.bytes_per_s)


def measure_roofs(
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    rounds: int = 25,
    size: int | None = None,
) -> Roofs:
    """Measures the arithmetic and the copy ceiling of a device.

    The best of ``rounds`` samples counts, since a ceiling is what the machine can do undisturbed.

    Args:
        device: where.
        dtype: of the operands.
        rounds: samples of each.
        size: edge of the matrices; by default 1536 on a CPU and 8192 on a GPU.
    """
    device = torch.device(device)
    edge = size or (1536 if device.type == "cpu" else 8192)
    generator = torch.Generator().manual_seed(0)
    # Random operands: zeros draw less power and ran 13 % faster on a GPU.
    a, b = (torch.randn(edge, edge, generator=generator).to(device, dtype) for _ in "ab")
    source = torch.ones(4 * last_level_cache(device) // 4, dtype=torch.float32, device=device)
    sink, product = torch.empty_like(source), torch.empty_like(a)
    images, channels, side = (8, 256, 28) if device.type == "cpu" else (64, 512, 56)
    x = torch.randn(images, channels, side, side, generator=generator).to(device, dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    w = torch.randn(channels, channels, 3, 3, generator=generator).to(device, dtype)
    timings = interleaved(
        {
            "product": lambda: torch.mm(a, b, out=product),
            "convolution": lambda: torch.conv2d(x, w, padding=1),
            "copy": lambda: sink.copy_(source),
        },
        rounds=rounds,
        warmup=1,
        device=device,
    )
    moved = 2 * source.numel() * source.element_size()
    return Roofs(
        macs_per_s=max(
            edge**3 / min(timings.samples["product"]),
            x.numel() * channels * 9 / min(timings.samples["convolution"]),
        ),
        bytes_per_s=moved / min(timings.samples["copy"]),
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
    )
