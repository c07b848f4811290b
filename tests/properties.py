# SPDX-License-Identifier: Apache-2.0
"""Random calls of all backends, and what each must give back: the oracle within a derived bound."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

import hetconv_kernels as hk
from hetconv_kernels import ops
from hetconv_kernels.backends import get_backend
from hetconv_kernels.problem import Geometry, make_geometry
from hetconv_kernels.support import Support
from hetconv_kernels.testing import error_bound, oracle

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


offered: Counter[str] = Counter()


refused: Counter[tuple[str, str]] = Counter()


@dataclass(frozen=True)
class Case:
    geometry: Geometry
    batch: int
    height: int
    width: int
    dtype: torch.dtype
    layout: str
    bias: bool
    live: bool
    seed: int


@st.composite
def supports(draw: st.DrawFn) -> Support:
    kh, kw = draw(st.sampled_from([(1, 1), (3, 3), (1, 3), (5, 3), (2, 2), (7, 1)]))
    channels, filters = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    odd = kh % 2 and kw % 2
    kind = draw(st.sampled_from(["dense", "grouped", "het", "self", "mask", *["het"] * bool(odd)]))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    if kind == "dense":
        return Support.dense(channels, filters, (kh, kw))
    if kind == "grouped":
        groups = draw(st.integers(1, 5))
        return Support.grouped(
            groups * draw(st.integers(1, 6)), groups * draw(st.integers(1, 6)), (kh, kw), groups
        )
    if kind == "het" and odd:
        order = draw(st.sampled_from(["blocked", "interleaved"]))
        return Support.het(channels, filters, (kh, kw), draw(st.integers(1, channels)), order)
    if kind == "self":
        clusters = draw(st.integers(1, 5))
        labels = rng.integers(0, clusters, filters)
        return Support.self_grouped(labels, rng.random((clusters, channels)) < 0.4, (kh, kw))
    density = draw(st.sampled_from([0.0, 0.1, 0.5, 0.9]))
    return Support.from_mask(rng.random((filters, channels, kh, kw)) < density)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    support = draw(supports())
    pads = draw(
        st.one_of(
            st.integers(0, 3),
            st.tuples(st.integers(0, 3), st.integers(0, 3)),
            st.tuples(*[st.integers(0, 3)] * 4),
        )
    )
    geometry = make_geometry(
        support,
        draw(st.one_of(st.integers(1, 3), st.tuples(st.integers(1, 3), st.integers(1, 3)))),
        pads,
        draw(st.one_of(st.integers(1, 3), st.tuples(st.integers(1, 3), st.integers(1, 3)))),
    )
    top, bottom, left, right = geometry.pads
    (kh, kw), (dh, dw) = support.kernel, geometry.dilation
    least_h = max(1, dh * (kh - 1) + 1 - top - bottom)
    least_w = max(1, dw * (kw - 1) + 1 - left - right)
    return Case(
        geometry,
        batch=draw(st.sampled_from([1, 2, 3, 0])),
        height=least_h + draw(st.integers(0, 9)),
        width=least_w + draw(st.integers(0, 17)),
        dtype=DTYPES[draw(st.sampled_from(["float32", "float32", *DTYPES]))],
        layout=draw(st.sampled_from(["contiguous", "channels_last", "strided"])),
        bias=draw(st.booleans()),
        live=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


def _lay_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "strided":  # a view that is dense in no memory format
        wide = torch.full((*x.shape[:3], 2 * x.shape[3] + 1), float("nan"), dtype=x.dtype)
        wide[..., 1::2] = x
        return wide[..., 1::2]
    return x


def _close(name: str, actual: torch.Tensor, truth: torch.Tensor, bound: torch.Tensor) -> None:
    assert actual.shape == truth.shape, f"{name}: shape"
    error = (actual.double() - truth).abs()
    assert bool((error <= bound).all()), (  # NaN compares false, so unwritten memory fails
        f"{name}: error {error.max().item():.3g}, bound {bound[error.argmax().item()]:.3g}"
        if error.dim() == 1
        else f"{name}: largest error over bound {(error / bound).nan_to_num(9e9).max().item():.3g}"
    )


def check(backend: str, case: Case) -> None:
    geometry, support, dtype = case.geometry, case.geometry.support, case.dtype
    generator = torch.Generator().manual_seed(case.seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    x = _lay_out(draw(case.batch, support.channels, case.height, case.width), case.layout)
    dense = draw(*support.shape)
    mask = torch.tensor(support.mask)
    # What dead entries hold must not matter.
    weight = dense[mask] if case.live else dense.masked_fill(~mask, float("nan"))
    bias = draw(support.filters) if case.bias else None
    dy = _lay_out(
        draw(case.batch, support.filters, *geometry.output_size(case.height, case.width)),
        case.layout,
    )

    problem = ops.describe("fprop", geometry, x, x, weight, x.shape[2:], {"shift": bias})
    engine = get_backend(backend)
    offered[backend] += 1
    if reasons := engine.unsupported_reasons(problem):
        refused.update((backend, reason) for reason in reasons[:1])
        return

    leaves = [t.detach().requires_grad_() for t in (x, weight, *([] if bias is None else [bias]))]
    y = hk.functional.support_conv2d(
        leaves[0],
        leaves[1],
        support,
        leaves[2] if bias is not None else None,
        geometry.stride,
        geometry.pads,
        geometry.dilation,
        backend=backend,
    )
    grads = torch.autograd.grad(y, leaves, dy)

    def truth(absolute: bool) -> list[torch.Tensor]:
        tensors = [t.double() for t in (x, dense, dy)] + [
            bias.double() if bias is not None else torch.zeros(support.filters).double()
        ]
        if absolute:
            tensors = [t.abs() for t in tensors]
        tx, tw, tdy, tb = (t.detach().requires_grad_() for t in tensors)
        ty = oracle(tx, tw, geometry, tb)
        tgrads = torch.autograd.grad(ty, [tx, tw, tb], tdy)
        dw = torch.where(mask, tgrads[1], 0.0)
        return [
            ty.detach(),
            tgrads[0],
            dw[mask] if case.live else dw,
            *([tgrads[2]] if bias is not None else []),
        ]

    pixels = case.batch * dy.shape[2] * dy.shape[3]
    taps = support.kernel[0] * support.kernel[1]
    depths = [support.channels * taps + 1, support.filters * taps, pixels, pixels]
    named = zip(
        ("y", "dx", "dw", "dbias"), (y.detach(), *grads), truth(False), truth(True), depths,
        strict=False,
    )  # fmt: skip
    for name, actual, exact, magnitude, depth in named:
        assert actual.dtype == dtype, f"{name}: dtype"
        _close(name, actual, exact, error_bound(magnitude, depth, dtype))
    if not case.live:
        assert bool((grads[1][~mask] == 0).all()), "a dead weight got a gradient"


@pytest.fixture(autouse=True)
def poison():
    """Fills every fresh allocation with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
