# SPDX-License-Identifier: Apache-2.0
"""Layers on a GPU: operands, and comparisons with the oracle, shared by tests of engines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

import hetconv_kernels as hk
from hetconv_kernels import ops
from hetconv_kernels.backends import ENGINE_OF_CODE, get_backend
from hetconv_kernels.problem import Geometry, make_geometry
from hetconv_kernels.testing import error_bound, oracle

LAST = torch.channels_last


@contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory reads NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def operands(
    geometry: Geometry, dtype: torch.dtype, n: int = 5, size: tuple[int, int] = (14, 18)
) -> Any:
    s = geometry.support

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda").to(dtype).contiguous(memory_format=LAST)

    dy = random(n, s.filters, *geometry.output_size(*size))
    return random(n, s.channels, *size), random(*s.shape), dy


def compare(
    geometry: Geometry,
    dtype: torch.dtype,
    code: int,
    size: tuple[int, int] = (14, 18),
    verbs: tuple[str, ...] = ("fprop", "dgrad", "wgrad"),
    n: int = 5,
) -> None:
    """Compares the primitives of a forced engine with the oracle; dead weights are NaN."""
    s = geometry.support
    x, w, dy = operands(geometry, dtype, n, size)
    mask = torch.tensor(s.mask, device="cuda")

    def truth(*values: torch.Tensor) -> Any:
        tx, tw, tdy = (v.double().requires_grad_() for v in values)
        y = oracle(tx, tw, geometry)
        dx, dw = torch.autograd.grad(y, (tx, tw), tdy)
        return y.detach(), dx, torch.where(mask, dw, 0.0)

    exact, sizes = truth(x, w, dy), truth(x.abs(), w.abs(), dy.abs())
    dead = torch.where(mask, w, float("nan")).contiguous(memory_format=LAST)
    runs = {
        "fprop": lambda: ops.run_fprop(x, dead, geometry, None, code),
        "dgrad": lambda: ops.run_dgrad(dy, dead, geometry, size, code),
        "wgrad": lambda: ops.run_wgrad(dy, x, geometry, s.shape, dtype, code),
    }
    taps = s.kernel[0] * s.kernel[1]
    depths = s.channels * taps, s.filters * taps, dy[:, 0].numel()
    for name, value, whole, depth in zip(runs, exact, sizes, depths, strict=True):
        if name not in verbs:
            continue
        error = (runs[name]().double() - value).abs()
        assert (error <= error_bound(whole, depth, dtype)).all(), f"{name}: {error.max()}"


def compare_huge(code: int) -> None:
    """Compares parts of a tensor of more than 2**31 elements with the whole."""
    torch.use_deterministic_algorithms(False)  # filling it would take long
    geometry = make_geometry(hk.Support.het(32, 32, 3, p=2), 1, 1)
    w = torch.randn(32, 32, 3, 3, device="cuda", dtype=torch.bfloat16)
    x = torch.empty(66, 1024, 1024, 32, device="cuda", dtype=torch.bfloat16).normal_()
    x = x.permute(0, 3, 1, 2)
    p = ops.describe("fprop", geometry, x, x, w, x.shape[2:])
    assert get_backend(ENGINE_OF_CODE[code]).unsupported_reasons(p) == []
    y = ops.run_fprop(x, w, geometry, None, code)
    last = ops.run_fprop(x[-1:].clone(), w, geometry, None, code)
    torch.testing.assert_close(y[-1:], last, atol=2e-2, rtol=2e-2)
    dw = ops.run_wgrad(y, x, geometry, tuple(w.shape), torch.float32, code)
    halves = [
        ops.run_wgrad(y[a:b], x[a:b], geometry, tuple(w.shape), torch.float32, code)
        for a, b in ((0, 33), (33, 66))
    ]
    torch.testing.assert_close(
        dw, halves[0] + halves[1], rtol=1e-2, atol=float(1e-2 * dw.abs().max())
    )
