# SPDX-License-Identifier: Apache-2.0
"""wgrad of the native engine in both forms: values, bits, threads, poison, what is written."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

import hetconv_kernels as hk
from hetconv_kernels import ops
from hetconv_kernels.backends import get_backend
from hetconv_kernels.problem import make_geometry
from hetconv_kernels.testing import error_bound

_cpu = pytest.importorskip("hetconv_kernels._cpu", reason="the native engine is not built here")

FORMS = ("pixels", "channels")
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
RNG = np.random.default_rng(3)
SUPPORTS = {
    "dense": hk.Support.dense(20, 18, 3),
    "het": hk.Support.het(64, 64, 3, p=4),
    "het-narrow": hk.Support.het(64, 32, 3, p=8),
    "het-interleaved": hk.Support.het(36, 40, 3, p=4, order="interleaved"),
    "depthwise-like": hk.Support.het(32, 32, 3, p=32),
    "uneven": hk.Support.het(50, 45, 3, p=8),
    "grouped": hk.Support.grouped(24, 48, (1, 3), 4),
    "self-grouped": hk.Support.self_grouped(np.arange(60) % 5, RNG.random((5, 40)) < 0.3, 3),
    "pointwise": hk.Support.self_grouped(np.arange(40) % 3, RNG.random((3, 70)) < 0.4, 1),
    "irregular": hk.Support.from_mask(RNG.random((9, 11, 3, 3)) < 0.3),
    "empty": hk.Support.from_mask(np.zeros((4, 5, 3, 3), bool)),
}


def engine_wgrad(
    support: hk.Support,
    x: torch.Tensor,
    dy: torch.Tensor,
    form: str = "channels",
    isa: str = "",
    threads: int = 2,
    layout: torch.memory_format = torch.contiguous_format,
    **geometry: Any,
) -> torch.Tensor:
    """Runs one form of the engine into a gradient that is NaN before."""
    mask = np.ascontiguousarray(support.mask).view(np.uint8)
    plan = _cpu.Wgrad(mask, str(x.dtype).removeprefix("torch."), isa, form)
    assert plan.form == form
    dw = torch.full(support.shape, float("nan"), dtype=x.dtype).contiguous(memory_format=layout)
    options = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), **geometry}
    plan.wgrad(
        x.data_ptr(),
        x.stride(),
        (x.shape[0], *x.shape[2:]),
        dy.data_ptr(),
        dy.stride(),
        dy.shape[2:],
        dw.data_ptr(),
        dw.stride(),
        threads=threads,
        **options,
    )
    return dw


def operands(
    support: hk.Support, n: int, size: tuple[int, int], dtype: torch.dtype, **geometry: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws x and dy of a layer."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(n, support.channels, *size, generator=generator).to(dtype)
    w = torch.zeros(support.shape)
    y = torch.nn.functional.conv2d(x.float(), w, padding=(1, 1), **geometry)
    return x, torch.randn(y.shape, generator=generator).to(dtype)


def check(
    support: hk.Support, x: torch.Tensor, dy: torch.Tensor, dw: torch.Tensor, **geometry: Any
) -> None:
    """Compares with float64 at live weights; dead ones must be as they were, NaN."""
    live = torch.tensor(support.mask)
    options = {"padding": (1, 1), **geometry}
    exact, bound = (
        torch.nn.grad.conv2d_weight(a, support.shape, b, **options)
        for a, b in ((x.double(), dy.double()), (x.double().abs(), dy.double().abs()))
    )
    allowed = error_bound(bound, x.shape[0] * dy.shape[2] * dy.shape[3], x.dtype)
    assert bool(((dw.double() - exact).abs() <= allowed)[live].all())
    assert bool(dw[~live].isnan().all()), "a dead weight was written"


@pytest.mark.parametrize("isa", _cpu.isas())
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", SUPPORTS)
def test_both_forms_equal_float64(name: str, form: str, layout: str, isa: str) -> None:
    support = SUPPORTS[name]
    x, dy = operands(support, 3, (13, 19), torch.float32)
    x, dy = (t.contiguous(memory_format=LAYOUTS[layout]) for t in (x, dy))
    for result in LAYOUTS.values():
        check(support, x, dy, engine_wgrad(support, x, dy, form, isa, layout=result))


@pytest.mark.parametrize("isa", _cpu.isas())
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["het", "het-narrow", "self-grouped"])
def test_other_types(name: str, form: str, dtype: torch.dtype, isa: str) -> None:
    support = SUPPORTS[name]
    x, dy = operands(support, 2, (9, 11), dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    check(support, x, dy, engine_wgrad(support, x, dy, form, isa))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["het", "self-grouped"])
@pytest.mark.parametrize(
    "geometry",
    [{"stride": (2, 2)}, {"dilation": (3, 2)}, {"stride": (3, 1), "dilation": (1, 5)}],
    ids=str,
)
def test_strides_and_dilations(geometry: dict[str, Any], name: str, form: str) -> None:
    support = SUPPORTS[name]
    x, dy = operands(support, 2, (17, 21), torch.float32, **geometry)
    for layout in LAYOUTS.values():
        x = x.contiguous(memory_format=layout)
        check(support, x, dy, engine_wgrad(support, x, dy, form, **geometry), **geometry)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("n", "size"), [(1, (150, 160)), (2, (3, 900)), (7, (7, 7)), (1, (1, 1))], ids=str
)
def test_many_bands_strips_and_images(n: int, size: tuple[int, int], form: str) -> None:
    for name in ("het", "self-grouped"):
        support = SUPPORTS[name]
        x, dy = operands(support, n, size, torch.float32)
        x = x.contiguous(memory_format=torch.channels_last)
        check(support, x, dy, engine_wgrad(support, x, dy, form))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("support", [SUPPORTS["het"], hk.Support.het(192, 192, 3, p=2)], ids=str)
def test_every_number_of_threads(support: hk.Support, form: str) -> None:
    """Few sums: a copy for each thread. Many sums (the second): the tiles are shared out."""
    x, dy = operands(support, 5, (8, 9), torch.float32)
    for threads in (1, 2, 3, 8):
        first = engine_wgrad(support, x, dy, form, threads=threads)
        check(support, x, dy, first)
        again = engine_wgrad(support, x, dy, form, threads=threads)
        assert torch.equal(first.nan_to_num(), again.nan_to_num()), "not the same bits"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["het", "het-narrow", "depthwise-like", "uneven", "self-grouped"])
def test_nan_stays_with_the_weights_that_read_it(name: str, form: str) -> None:
    support = SUPPORTS[name]
    x, dy = operands(support, 2, (9, 10), torch.float32)
    x[0, 5, 4, 4] = float("nan")
    dy[1, 2, 3, 3] = float("inf")
    dw = engine_wgrad(support, x, dy, form)
    live = torch.tensor(support.mask)
    touched = torch.zeros_like(live)
    touched[:, 5] = touched[2] = True
    assert bool(dw[live & ~touched].isfinite().all())
    assert bool(dw[:, 5][live[:, 5]].isnan().all())


def test_wide_groups_take_channels_in_vectors_and_irregular_ones_pixels() -> None:
    forms = {
        name: _cpu.Wgrad(np.ascontiguousarray(SUPPORTS[name].mask).view(np.uint8)).form
        for name in ("het", "het-narrow", "irregular")
    }
    assert forms == {"het": "channels", "het-narrow": "channels", "irregular": "pixels"}


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(ValueError, match="'filters' is not auto, pixels or channels"):
        _cpu.Wgrad(np.ones((4, 4, 3, 3), np.uint8), form="filters")


def test_an_empty_batch_gives_zeros() -> None:
    support = SUPPORTS["het"]
    x, dy = torch.empty(0, 64, 5, 5), torch.empty(0, 64, 5, 5)
    for form in FORMS:
        live = torch.tensor(support.mask)
        assert bool((engine_wgrad(support, x, dy, form)[live] == 0).all())


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_gradient_has_the_weights_shape_and_layout(layout: str, live: bool) -> None:
    support = SUPPORTS["self-grouped"]
    geometry = make_geometry(support, 1, 1)
    x, dy = operands(support, 2, (6, 7), torch.float32)
    x = x.contiguous(memory_format=LAYOUTS[layout])
    shape = (support.live,) if live else support.shape
    code = hk.backends.CODES
    ours, theirs = (
        ops.run_wgrad(dy, x, geometry, shape, torch.float32, code[name])
        for name in ("cpu", "reference")
    )
    assert ours.stride() == theirs.stride()
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-4)


# Batch, channels, filters, kernel, stride, side: many pixels for few weights.
LARGE = (
    (4, 16, 16, 3, 1, 64),
    (4, 32, 64, 3, 2, 56),
    (1, 32, 16, 3, 1, 160),
    (8, 32, 32, 1, 2, 64),
    (64, 32, 64, 3, 1, 8),
)


@cache
def large_case(shape: tuple[int, ...], layout: str) -> tuple[Any, ...]:
    """Draws a case, with its gradient in float64 and PyTorch's own in float32."""
    n, channels, filters, kernel, stride, side = shape
    generator, pad = torch.Generator().manual_seed(11), kernel // 2
    out = (side + 2 * pad - kernel) // stride + 1
    x = torch.rand(n, channels, side, side, generator=generator)
    dy = torch.randn(n, filters, out, out, generator=generator)
    x, dy = (t.contiguous(memory_format=LAYOUTS[layout]) for t in (x, dy))
    support = hk.Support.dense(channels, filters, kernel)
    how = {"stride": (stride, stride), "padding": (pad, pad)}
    exact, theirs = (
        torch.nn.grad.conv2d_weight(a, support.shape, b, **how)
        for a, b in ((x.double(), dy.double()), (x, dy))
    )
    return support, x, dy, exact, theirs, how


@pytest.mark.parametrize("isa", _cpu.isas())
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_float32_errs_at_most_twice_as_much_as_pytorch(
    shape: tuple[int, ...], form: str, layout: str, isa: str
) -> None:
    """Activations of one sign, as after a ReLU: one long chain of sums would lose bits."""
    support, x, dy, exact, theirs, how = large_case(shape, layout)
    ours = engine_wgrad(support, x, dy, form, isa, **how)
    mine, allowed = ((dw.double() - exact).square().mean().sqrt() for dw in (ours, theirs))
    assert mine <= 2 * allowed + torch.finfo(torch.float32).eps * exact.square().mean().sqrt()


@pytest.mark.parametrize("form", FORMS)
def test_long_sums_do_not_lose_a_unit(form: str) -> None:
    """2**24 + 1 is no float32: in one chain every pixel after the first large sum would be lost."""
    support = hk.Support.dense(32, 32, 1)
    x = torch.ones(1, 32, 1, 2048)
    x[..., 0] = 2.0**24
    dy = torch.ones(1, 32, 1, 2048)
    x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
    dw = engine_wgrad(support, x, dy, form, padding=(0, 0), threads=1)
    # Only what shares the first block with the large number may be lost.
    assert bool((dw >= 2.0**24 + 2048 - 512).all())


def test_more_work_is_predicted_to_take_longer() -> None:
    engine, times = get_backend("cpu"), []
    for p in (16, 4, 1):
        support = hk.Support.het(64, 64, 3, p)
        geometry = make_geometry(support, 1, 1)
        x, dy = operands(support, 2, (20, 20), torch.float32)
        like = torch.empty(support.shape, device="meta")
        times.append(engine.estimate(ops.describe("wgrad", geometry, dy, x, like, (20, 20))))
    assert 0 < times[0] < times[1] < times[2]
