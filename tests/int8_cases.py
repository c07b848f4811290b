# SPDX-License-Identifier: Apache-2.0
"""Random layers in 8 bits, and their outputs by NumPy in whole numbers: an oracle of its own.

One layer is convolved once: with x = u − o for unsigned bytes u, the sum over a filter is
Σ u·w − (o + zero)·Σ w inside the image, so that all zero points and both dtypes of x follow from
two convolutions. What follows them is float32, operation by operation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import hetconv_kernels as hk
from hetconv_kernels.pooling import Pool
from hetconv_kernels.problem import Geometry, make_geometry
from hetconv_kernels.quantization.checks import Output

LIMITS = {torch.uint8: (0, 255), torch.int8: (-128, 127)}
KINDS = ("dense", "grouped", "het", "interleaved", "self-grouped", "ragged", "irregular")
POOLS = (
    Pool((2, 2), (2, 2), (0, 0)),
    Pool((3, 3), (2, 2), (1, 1)),
    Pool((3, 2), (1, 3), (1, 0)),
    Pool((5, 5), (3, 3), (2, 2)),
)


def draw_support(rng: np.random.Generator, kind: str) -> hk.Support:
    """Draws a Support of a kind, with sizes that no block divides, and some that one does."""
    edges = (1, 1, 2, 3, 3, 3, 5, 7)
    kh = int(rng.choice(edges))
    kw = kh if rng.random() < 0.7 else int(rng.choice(edges))
    most = 24 if kh * kw > 9 else 90
    c, f = (int(rng.choice([rng.integers(1, most), 8, 16, 32])) for _ in range(2))
    if kind == "dense":
        return hk.Support.dense(c, f, (kh, kw))
    if kind == "grouped":
        g = int(rng.integers(1, 9))
        return hk.Support.grouped(g * int(rng.integers(1, 7)), g * int(rng.integers(1, 7)), kh, g)
    if kind in ("het", "interleaved"):
        order = "blocked" if kind == "het" else "interleaved"
        odd = (kh | 1, kw | 1)
        return hk.Support.het(c, f, odd, p=int(rng.integers(1, c + 1)), order=order)
    density = rng.choice([0.0, 0.05, 0.3, 0.6, 0.95])
    if kind == "irregular":
        return hk.Support.from_mask(rng.random((f, c, kh, kw)) < density)
    groups = int(rng.integers(1, 7))
    labels = rng.integers(0, groups, f)
    if kind == "self-grouped":
        return hk.Support.self_grouped(labels, rng.random((groups, c)) < density, (kh, kw))
    return hk.Support.from_mask((rng.random((groups, c, kh, kw)) < density)[labels])


@dataclass
class Layer:
    """A layer on an image, convolved once.

    Attributes:
        geometry: the layer.
        u: the image as unsigned bytes.  # int64 [N, C, H, W]
        w: the weight, dead entries too.  # int8 [F, C, KH, KW]
        products: sums of u · w, zero outside the image.  # int64 [N, F, OH, OW]
        inside: sums of w inside the image.  # int64 [N, F, OH, OW]
    """

    geometry: Geometry
    u: np.ndarray[Any, Any]
    w: np.ndarray[Any, Any]
    products: np.ndarray[Any, Any]
    inside: np.ndarray[Any, Any]

    @property
    def support(self) -> hk.Support:
        """Which weights exist."""
        return self.geometry.support

    def image(self, dtype: torch.dtype) -> torch.Tensor:
        """Returns x: the same numbers less 128 as int8."""
        x = self.u if dtype == torch.uint8 else self.u - 128
        return torch.from_numpy(x).to(dtype).contiguous(memory_format=torch.channels_last)

    def weight(self, live: bool) -> torch.Tensor:
        """Returns the canonical weight, dense or live."""
        return torch.from_numpy(self.w[self.support.mask] if live else self.w)

    def sums(self, dtype: torch.dtype, zero: int) -> np.ndarray[Any, Any]:
        """Returns Σ (x − zero) · w.  # int64 [N, F, OH, OW]"""
        offset = zero if dtype == torch.uint8 else zero + 128
        return self.products - offset * self.inside


def convolved(geometry: Geometry, u: np.ndarray[Any, Any], w: np.ndarray[Any, Any]) -> Layer:
    """Convolves in float64, where integers below 2**53 are exact."""
    dense = torch.from_numpy(np.where(geometry.support.mask, w, 0).astype("f8"))
    top, bottom, left, right = geometry.pads

    def conv(x: torch.Tensor) -> np.ndarray[Any, Any]:
        padded = F.pad(x, (left, right, top, bottom))
        y = F.conv2d(padded, dense, None, geometry.stride, 0, geometry.dilation)
        return y.numpy().astype("i8")

    image = torch.from_numpy(u.astype("f8"))
    return Layer(geometry, u, w, conv(image), conv(torch.ones_like(image)))


def draw_layer(rng: np.random.Generator, kind: str) -> Layer:
    """Draws a layer: Support, stride, padding of each side, dilation, image and weight."""
    support = draw_support(rng, kind)
    while True:
        n, h, w = (int(rng.integers(1, most)) for most in (4, 14, 18))
        if rng.random() < 0.1:
            n, h, w = int(rng.integers(1, 20)), 1, 1
        stride, dilation = ([int(v) for v in rng.choice([1, 1, 2, 3], 2)] for _ in range(2))
        kh, kw = support.kernel
        even = rng.random() < 0.5
        pads = (kh // 2, kh // 2, kw // 2, kw // 2) if even else rng.integers(0, 4, 4).tolist()
        geometry = make_geometry(support, stride, pads, dilation)
        if min(geometry.output_size(h, w)) > 0:
            break
    u = rng.integers(0, 256, (n, support.channels, h, w))
    return convolved(geometry, u, rng.integers(-127, 128, support.shape).astype("i1"))


def finished(t: np.ndarray[Any, Any], zero: int, low: float, high: float, dtype: torch.dtype):
    """Clamps float32 and, for bytes, rounds half to even and adds the zero point."""
    assert t.dtype == np.float32
    if dtype == torch.float32:
        return np.minimum(np.maximum(t, np.float32(low)), np.float32(high))
    q = np.rint(np.minimum(np.maximum(t, np.float32(low - zero)), np.float32(high - zero)))
    return q.astype("i8") + zero


def centred(x: np.ndarray[Any, Any], zero: int, multiplier: float) -> np.ndarray[Any, Any]:
    """Returns float32(x − zero) · multiplier."""
    return (x - zero).astype("f4") * np.float32(multiplier)


def draw_bytes(rng: np.random.Generator, shape: tuple[int, ...], dtype: torch.dtype):
    """Draws a tensor of any values of a dtype, in channels_last."""
    low, high = LIMITS[dtype]
    x = torch.from_numpy(rng.integers(low, high + 1, shape)).to(dtype)
    return x.contiguous(memory_format=torch.channels_last)


def gathered(named: dict[str, Any]) -> dict[str, Any]:
    """Returns arguments with an Output made of its parts, where a case names them one by one."""
    parts = ("y_zero_point", "low", "high", "out_dtype")
    if parts[0] not in named:
        return named
    rest = {name: value for name, value in named.items() if name not in parts}
    return rest | {"output": Output(*(named[part] for part in parts))}


def draw_call(rng: np.random.Generator, layer: Layer) -> tuple[dict[str, Any], torch.Tensor]:
    """Draws what a call adds to a layer; returns fprop's arguments, and its result by NumPy."""
    x_dtype = (torch.uint8, torch.int8)[rng.integers(2)]
    zero = int(rng.integers(LIMITS[x_dtype][0], LIMITS[x_dtype][1] + 1))
    f = layer.support.filters
    bias = rng.integers(-20000, 20000, f).astype("i4")
    acc = layer.sums(x_dtype, zero) + bias[:, None, None]
    # Most outputs within the range, some beyond both ends of it.
    spread = max(1.0, float(np.abs(acc).mean()))
    multiplier = (rng.random(f) * 160 / spread).astype("f4")
    out = (torch.uint8, torch.int8, torch.float32)[rng.integers(3)]
    least, greatest = LIMITS.get(out, (-300, 300))
    y_zero = int(rng.integers(least, greatest + 1)) if out != torch.float32 else 0
    low, high = (
        (least, greatest)
        if rng.random() < 0.4
        else sorted(rng.integers(least, greatest + 1, 2).tolist())
    )
    arguments: dict[str, Any] = {
        "multiplier": torch.from_numpy(multiplier),
        "bias": torch.from_numpy(bias),
        "x_zero_point": zero,
        "output": Output(y_zero, low, high, out),
    }
    t = acc.astype("f4") * multiplier[:, None, None]
    if rng.random() < 0.35:
        dtype = (torch.uint8, torch.int8)[rng.integers(2)]
        r = draw_bytes(rng, acc.shape, dtype)
        r_zero = int(rng.integers(LIMITS[dtype][0], LIMITS[dtype][1] + 1))
        scale = float(np.float32(rng.random() + 0.01))
        arguments |= {
            "residual": r,
            "residual_multiplier": scale,
            "residual_zero_point": r_zero,
        }
        t = t + centred(r.numpy().astype("i8"), r_zero, scale)
    y = torch.from_numpy(finished(t, y_zero, low, high, out)).to(out)
    pool = POOLS[rng.integers(len(POOLS))]
    if rng.random() < 0.3 and min(pool.output_size(*y.shape[2:])) > 0:
        arguments["pool"] = pool
        y = F.max_pool2d(y.float(), pool.kernel, pool.stride, pool.padding).to(out)
    return {"x": layer.image(x_dtype), **arguments}, y
