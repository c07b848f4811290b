# SPDX-License-Identifier: Apache-2.0
"""AveragePool: the mean of each window of an image, by the engine where that pays."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..arena import allocate
from ..backends import ENGINE_OF_CODE
from ..errors import ArgumentError, InputTypeError, mismatch
from ..integers import INT32_MAX, as_count
from ..observers import observed, transforms_active
from ..pooling import Pool
from ..problem import DTYPES, memory_format
from .base import STAND_IN, ForcedBackend, as_step

try:
    from .. import _cpu
except ImportError:  # nothing is compiled here
    _cpu = None  # type: ignore[assignment]

_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_LAST = torch.channels_last
# The engine adds a window's pixels one after another, PyTorch in a tree, which errs less.
_MOST_TAPS = 4096
# The engine shares rows of the result among threads and passes over the image in pieces of its
# channels: beyond a core's cache, in elements, PyTorch reads faster.
_NEAR = 2**18


class AveragePool(ForcedBackend):
    """Average pooling, for inference: what `optimize` puts in the place of PyTorch's.

    The engine sums in float32, in one order whatever the number of threads. It is asked where the
    image is in channels_last, in float32 or bfloat16, on the CPU, and not too large for it; and
    wherever it is forced. Everything else is PyTorch's: other images, calls that want a gradient,
    and those that are traced, compiled, exported or profiled.

    Args:
        pool: the windows; None for those that divide the image into ``output_size``.
        output_size: height and width of the result, in pixels; None keeps that of the image.
        inside: whether to divide by the taps inside the image, not by all of the window.
        keepdim: whether an output of one pixel is still an image.
        backend: ``"cpu"`` forces the engine, another one PyTorch; None follows `use_backend`.

    Shape:
        x [N, C, H, W] -> [N, C, PH, PW], or [N, C] where not keepdim; all with or without N.

    Raises:
        ArgumentError: windows or an output size that no image has; a result of several pixels that
            is to be no image.
    """

    def __init__(
        self,
        pool: Pool | None = None,
        output_size: tuple[int | None, int | None] = (1, 1),
        inside: bool = False,
        keepdim: bool = True,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if pool is not None:
            pool.check_values()
        height, width = (
            None if size is None else as_count("output_size", size) for size in output_size
        )
        for name, flag in (("inside", inside), ("keepdim", keepdim)):
            if not isinstance(flag, bool):
                raise ArgumentError(mismatch(name, flag, "True or False"))
        if not keepdim and (pool is not None or (height, width) != (1, 1)):
            several = f"{pool or (height, width)} without keepdim"
            raise ArgumentError(mismatch("windows", several, "all of the image"))
        self.pool, self.inside, self.keepdim, self.backend = pool, inside, keepdim, backend
        self.output_size = (height, width)

    def windows(self, height: int, width: int) -> Pool | None:
        """Returns the windows on an image; None where they are of several sizes."""
        if self.pool is not None:
            return self.pool
        rows, columns = self.output_size
        rows, columns = rows or height, columns or width
        if not rows or not columns or height % rows or width % columns:
            return None
        kernel = (height // rows, width // columns)
        return Pool(kernel, kernel, (0, 0)) if min(kernel) else None

    def by_engine(self, x: Tensor) -> bool:
        """Tells whether the engine takes an image, or a twin of its kind and size.

        Args:
            x: the image.  # [N, C, H, W]
        """
        if _cpu is None or not x.is_cpu or x.dtype not in _NAMES or not x.numel():
            return False
        size = x.shape[2], x.shape[3]
        windows = self.windows(*size)
        engine = ENGINE_OF_CODE[self._backend_code()]
        if windows is None or engine not in ("auto", "cpu") or max(x.shape) > INT32_MAX:
            return False
        if engine == "cpu":
            return True
        if not x.is_contiguous(memory_format=_LAST) or math.prod(windows.kernel) > _MOST_TAPS:
            return False
        shared = windows.output_size(*size) == (1, 1) and len(x) >= torch.get_num_threads()
        return shared or x.numel() <= _NEAR

    def forward(self, x: Tensor) -> Tensor:
        """Averages; the result has the image's dtype and memory format.

        Raises:
            ArgumentError: no image, or one that no window fits in.
            InputTypeError: another dtype or layout than layers take.
        """
        if type(x) is STAND_IN:
            recorded: Tensor = as_step(self, x)
            return recorded
        _check_kind(x)
        if x.dim() == 3:
            return self.forward(x.unsqueeze(0)).squeeze(0)
        # First what a compiler understands.
        if observed(x) or transforms_active() or (x.requires_grad and torch.is_grad_enabled()):
            return self._by_torch(x)
        self._check_size(x.shape[2], x.shape[3])
        return self._by_engine(x) if self.by_engine(x) else self._by_torch(x)

    def _by_engine(self, x: Tensor) -> Tensor:
        last = memory_format(x, x) == _LAST
        x = x.contiguous(memory_format=_LAST)
        n, c, h, w = x.shape
        windows = self.windows(h, w)
        assert windows is not None
        size = windows.output_size(h, w)
        y = allocate(self, (n, c, *size), x.dtype, x.device, _LAST)
        window = _cpu.Pool(*windows, size)
        threads = torch.get_num_threads()
        _cpu.average_pool(
            _NAMES[x.dtype], x.data_ptr(), (n, h, w, c), y.data_ptr(), window, self.inside, threads
        )
        if not self.keepdim:
            return y.flatten(1)
        return y if last else y.contiguous()

    def _by_torch(self, x: Tensor) -> Tensor:
        if self.pool is None and self.output_size == (1, 1):
            # What adaptive pooling does there too, but exporters write what it does with strides.
            return x.mean((2, 3), keepdim=self.keepdim)
        if self.pool is None:
            return F.adaptive_avg_pool2d(x, self.output_size)
        return F.avg_pool2d(x, *self.pool, count_include_pad=not self.inside)

    def _check_size(self, height: int, width: int) -> None:
        if self.pool is not None:
            self.pool.check(height, width)
        elif min(height, width) < 1:
            raise ArgumentError(
                mismatch("input size", f"{height}x{width}", "an image that has pixels")
            )

    def describe(self) -> dict[str, Any]:
        """Returns what the constructor takes, as plain data."""
        pool = None if self.pool is None else [list(part) for part in self.pool]
        names = ("output_size", "inside", "keepdim", "backend")
        return {"pool": pool} | {name: getattr(self, name) for name in names}

    def extra_repr(self) -> str:
        """Says the windows, or the size of the result."""
        if self.pool is None:
            return f"output_size={self.output_size}, keepdim={self.keepdim}"
        return f"pool={tuple(self.pool)}, inside={self.inside}"


def _check_kind(x: Tensor) -> None:
    """Refuses what is no image of numbers that layers take."""
    if x.dim() not in (3, 4):
        raise ArgumentError(mismatch("input shape", tuple(x.shape), "[N, C, H, W] or [C, H, W]"))
    if x.dtype not in DTYPES or x.layout != torch.strided:
        raise InputTypeError(
            mismatch(
                "input dtype and layout",
                f"{x.dtype}, {x.layout}",
                "strided float32, float64, bfloat16 or float16",
            )
        )
