# SPDX-License-Identifier: Apache-2.0
"""Roofs: the ceilings of this machine, measured, so that a time can be given as a share of them."""

from __future__ import annotations

from collections.abc import Callable
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
        dtype: of the operands; for uint8 and int8 the product is PyTorch's of int8 matrices, with
            int32 sums, and no convolution is measured.
        rounds: samples of each.
        size: edge of the matrices; by default 1536 on a CPU and 8192 on a GPU.
    """
    device = torch.device(device)
    edge = size or (1536 if device.type == "cpu" else 8192)
    generator = torch.Generator().manual_seed(0)
    # Random operands: zeros draw less power and ran 13 % faster on a GPU.
    integer = not dtype.is_floating_point
    kind = torch.float32 if integer else dtype
    a, b = (torch.randn(edge, edge, generator=generator).to(device, kind) for _ in "ab")
    source = torch.ones(4 * last_level_cache(device) // 4, dtype=torch.float32, device=device)
    sink, product = torch.empty_like(source), torch.empty_like(a)
    images, channels, side = (8, 256, 28) if device.type == "cpu" else (64, 512, 56)
    x = torch.randn(images, channels, side, side, generator=generator).to(device, kind)
    x = x.contiguous(memory_format=torch.channels_last)
    w = torch.randn(channels, channels, 3, 3, generator=generator).to(device, kind)
    variants: dict[str, Callable[[], object]] = {
        "product": lambda: torch.mm(a, b, out=product),
        "convolution": lambda: torch.conv2d(x, w, padding=1),
        "copy": lambda: sink.copy_(source),
    }
    if integer:
        left, right = (t.mul(40).clamp(-127, 127).to(torch.int8) for t in (a, b))
        variants = {"product": lambda: torch._int_mm(left, right), "copy": variants["copy"]}
    timings = interleaved(
        variants,
        rounds=rounds,
        warmup=1,
        device=device,
    )
    moved = 2 * source.numel() * source.element_size()
    return Roofs(
        macs_per_s=max(
            work / min(timings.samples[name])
            for name, work in (
                ("product", edge**3),
                ("convolution", x.numel() * channels * 9),
            )
            if name in timings.samples
        ),
        bytes_per_s=moved / min(timings.samples["copy"]),
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
    )
