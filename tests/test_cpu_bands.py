# SPDX-License-Identifier: Apache-2.0
"""The native engine's cuts: bands, strips, images side by side, rows together, rows pooled first.

How an image is cut follows from its size, the number of channels and the threads; the result may
not. Outputs begin as NaN, so that a pixel that no band writes is seen.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F_
from torch import Tensor

import hetconv_kernels as hk
from hetconv_kernels.testing import error_bound

pytestmark = pytest.mark.skipif(
    "cpu" not in hk.available_backends(), reason="the native engine is not built here"
)
if "cpu" in hk.available_backends():
    from hetconv_kernels import _cpu

FORMS = ("filters", "pixels", "columns")
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
# Images, height, width: rows that end in a vector's middle and rows that do not, a last band that
# is lower, one row, strips of columns, small images side by side.
# One pixel beyond whole vectors.
SIZES = [(2, 13, 56), (1, 9, 112), (1, 7, 700), (1, 2, 1500), (5, 14, 14), (8, 7, 7), (3, 1, 40)]
SIZES += [(1, 14, 14)]
# Filters, channels: small, and so many that few rows fit in the cache.
WIDTHS = [(20, 24), (72, 96)]
CASES = [(size, widths) for size in SIZES for widths in WIDTHS]
CASES += [((1, 5, 300), (520, 130)), ((3, 14, 14), (520, 130))]


def drawn(filters: int, channels: int, kernel: int = 3) -> hk.Support:
    """A Support without two filters alike: pixels in vectors."""
    rng = np.random.default_rng(filters)
    return hk.Support.from_mask(rng.random((filters, channels, kernel, kernel)) < 0.1)


def engine(
    support: hk.Support,
    x: Tensor,
    form: str,
    threads: int,
    *,
    stride: int = 1,
    act: str = "none",
    pool: bool = False,
    isa: str = "",
) -> tuple[Tensor, Tensor]:
    """Returns what the engine computes, pooled 2 x 2 or not, and the weight.

    Nothing of what it cannot pool because whole rows do not fit in its workspace.
    """
    generator = torch.Generator().manual_seed(3)
    w = torch.randn(*support.shape, generator=generator, dtype=torch.float64).to(x.dtype)
    w[~torch.tensor(support.mask)] = float("nan")
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    shift = torch.randn(support.filters, generator=generator).to(wide)
    name = str(x.dtype).removeprefix("torch.")
    plan = _cpu.Plan(support.mask.view(np.uint8).copy(), name, isa, form)
    assert plan.form == form
    packed = plan.pack(w.data_ptr(), w.stride(), name)
    pad = support.kernel[0] // 2
    out = tuple((size + 2 * pad - support.kernel[0]) // stride + 1 for size in x.shape[2:])
    shape = tuple(size // 2 for size in out) if pool else out
    y = torch.full((len(x), support.filters, *shape), float("nan"), dtype=x.dtype)
    if x.is_contiguous(memory_format=torch.channels_last):
        y = y.contiguous(memory_format=torch.channels_last)
    done = plan.fprop(
        packed, x.data_ptr(), x.stride(), (len(x), *x.shape[2:]), y.data_ptr(), y.stride(), out,
        (stride, stride), (pad, pad), (1, 1), shift=shift.data_ptr(), act=act, threads=threads,
        pool=_cpu.Pool((2, 2), (2, 2), (0, 0), shape) if pool else None,
    )  # fmt: skip
    assert done or pool
    return y if done else y[:0], w.nan_to_num()


def check(support: hk.Support, x: Tensor, y: Tensor, w: Tensor, stride: int = 1) -> None:
    """Compares with float64, to the bound of the longest sum."""
    generator = torch.Generator().manual_seed(3)
    torch.randn(*support.shape, generator=generator, dtype=torch.float64)
    shift = torch.randn(support.filters, generator=generator).double()
    geometry = {"stride": stride, "padding": support.kernel[0] // 2}
    exact = F_.conv2d(x.double(), w.double(), shift, **geometry)
    size = F_.conv2d(x.double().abs(), w.double().abs(), shift.abs(), **geometry)
    depth = int(support.mask.sum(axis=(1, 2, 3)).max()) + 1
    assert bool(((y.double() - exact).abs() <= error_bound(size, depth, x.dtype)).all())


def image(n: int, channels: int, size: tuple[int, int], layout: str) -> Tensor:
    x = torch.randn(n, channels, *size, generator=torch.Generator().manual_seed(n))
    return x.contiguous(memory_format=LAYOUTS[layout])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("size", "widths"), CASES, ids=str)
def test_any_image_is_cut_into_what_it_is(
    size: tuple[int, int, int], widths: tuple[int, int], form: str, layout: str
) -> None:
    support = drawn(*widths)
    x = image(size[0], widths[1], size[1:], layout)
    first, w = engine(support, x, form, 1)
    check(support, x, first, w)
    again, _ = engine(support, x, form, 3)
    assert torch.equal(again, first)


@pytest.mark.parametrize("isa", _cpu.isas() if "cpu" in hk.available_backends() else [])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [(1, 27, 113), (2, 28, 28), (1, 5, 700)], ids=str)
def test_any_vectors_and_strides(size: tuple[int, int, int], form: str, isa: str) -> None:
    support = drawn(40, 64)
    for stride in (1, 2):
        x = image(size[0], 64, size[1:], "channels_last")
        y, w = engine(support, x, form, 2, stride=stride, isa=isa)
        check(support, x, y, w, stride)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("act", ["none", "relu", "relu6", "silu"])
@pytest.mark.parametrize("form", ["pixels", "columns"])
@pytest.mark.parametrize("size", [(2, 13, 57), (1, 8, 112), (1, 6, 601), (3, 2, 4)], ids=str)
def test_the_largest_first_is_the_largest_last(
    size: tuple[int, int, int], form: str, act: str, dtype: torch.dtype
) -> None:
    """Shift, ReLU and rounding keep the order of numbers, so the same bits come out; and NaN."""
    for widths in WIDTHS:
        support = drawn(*widths)
        x = image(size[0], widths[1], size[1:], "channels_last").to(dtype)
        x[0, 3, 0, 1], x[0, 5, 1, 0], x[-1, 7, 1, 1] = (float(v) for v in ("nan", "inf", "-inf"))
        whole, _ = engine(support, x, form, 2, act=act)
        pooled, _ = engine(support, x, form, 2, act=act, pool=True)
        if len(pooled) == 0:
            assert act == "silu"  # a row of 601 pixels of 96 channels is too much
            continue
        want = F_.max_pool2d(whole, 2)
        torch.testing.assert_close(pooled, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("form", FORMS)
def test_of_many_layouts_the_latest_are_kept(form: str) -> None:
    """Each width has its offsets: 200 of them are neither kept for good nor searched through."""
    support = hk.Support.het(8, 8, 3, p=4)
    plan = _cpu.Plan(support.mask.view(np.uint8).copy(), "float32", _cpu.isas()[0], form)
    w = torch.randn(support.shape)
    packed = plan.pack(w.data_ptr(), w.stride(), "float32")
    for width in (*range(3, 203), 3):
        x = torch.randn(1, 8, 4, width)
        y = torch.full((1, 8, 4, width), float("nan"))
        plan.fprop(
            packed, x.data_ptr(), x.stride(), (1, 4, width), y.data_ptr(), y.stride(), (4, width),
            (1, 1), (1, 1), (1, 1), threads=2,
        )  # fmt: skip
        assert 1 <= plan.layouts <= 32
    exact = F_.conv2d(x, w * torch.tensor(support.mask), padding=1)
    torch.testing.assert_close(y, exact, atol=1e-5, rtol=1e-5)
