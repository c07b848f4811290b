# SPDX-License-Identifier: Apache-2.0
"""What the native engine refuses, and what it must not let through: bad input, sizes, NaN and Inf.

The engine without Python, under sanitizers and between guard pages, is in tests/native.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import hetconv_kernels as hk
from hetconv_kernels import ops
from hetconv_kernels.backends import get_backend
from hetconv_kernels.errors import ArgumentError
from hetconv_kernels.problem import Geometry, Problem, make_geometry
from hetconv_kernels.testing import oracle

pytestmark = pytest.mark.skipif(
    "cpu" not in hk.available_backends(), reason="the native engine is not built here"
)
if "cpu" in hk.available_backends():
    from hetconv_kernels import _cpu

    ISAS = _cpu.isas()
else:
    ISAS = []

DENSE = hk.Support.dense(2, 3, 3)


def convolve(x: torch.Tensor, w: torch.Tensor, support: hk.Support, **how: object) -> torch.Tensor:
    return hk.functional.support_conv2d(x, w, support, backend="cpu", **how)


def off_by_a_byte(shape: tuple[int, ...]) -> torch.Tensor:
    """A float32 tensor whose address is no multiple of four."""
    count = int(np.prod(shape))
    raw = np.zeros(4 * count + 1, np.uint8)
    start = 1 if raw.ctypes.data % 4 == 0 else 0
    x = torch.from_numpy(raw[start : start + 4 * count].view(np.float32).reshape(shape))
    assert x.data_ptr() % 4 != 0
    return x


# Addresses and strides ---------------------------------------------------------------------------


@pytest.mark.parametrize("operand", ["x", "weight", "residual", "shift"])
def test_a_misaligned_address_is_refused_by_name(operand: str) -> None:
    tensors = {
        "x": torch.zeros(1, 2, 5, 5),
        "weight": torch.zeros(3, 2, 3, 3),
        "residual": torch.zeros(1, 3, 3, 3),
        "shift": torch.zeros(3),
    }
    tensors[operand] = off_by_a_byte(tuple(tensors[operand].shape))
    x, w, residual, shift = tensors.values()
    code = hk.backends.CODES["cpu"]
    with pytest.raises(ArgumentError, match=rf"{operand}: received an address.*\.clone\(\)"):
        ops.run_fprop(x, w, make_geometry(DENSE), shift, code, True, None, residual, "none")


@pytest.mark.parametrize("verb", ["dgrad", "wgrad"])
def test_a_misaligned_gradient_is_refused(verb: str) -> None:
    x, w, geometry = torch.zeros(1, 2, 5, 5), torch.zeros(3, 2, 3, 3), make_geometry(DENSE)
    dy = off_by_a_byte((1, 3, 3, 3))
    problem = ops.describe(verb, geometry, dy, x, w, (5, 5))
    run = getattr(get_backend("cpu"), verb)(problem)
    with pytest.raises(ArgumentError, match="dy: received an address"):
        run(dy, w if verb == "dgrad" else x)


def test_zero_strides_are_read_in_place() -> None:
    weight = torch.randn(3, 2, 3, 3)
    for shape in ((1, 2, 1, 1), (1, 1, 6, 7), (1, 2, 6, 1), (1, 2, 1, 7)):
        x = torch.randn(shape).expand(3, 2, 6, 7)
        assert 0 in x.stride()
        torch.testing.assert_close(
            convolve(x, weight, DENSE, padding=1), oracle(x, weight, make_geometry(DENSE, 1, 1))
        )


# Sizes -------------------------------------------------------------------------------------------


def offered(geometry: Geometry, verb: str = "fprop", size: tuple[int, int] = (8, 8)) -> Problem:
    """A problem of that geometry and image size, without memory behind it."""
    return Problem(
        verb, geometry, 1, *size, torch.float32, geometry.support.shape, torch.float32,
        torch.device("cpu"), (2 * size[0] * size[1], size[0] * size[1], size[1], 1), False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("geometry", "size", "reason"),
    [
        (make_geometry(DENSE), (2**16, 2**16), "more than 2**31 - 1 pixels"),
        (make_geometry(DENSE), (3, 2**30 + 1), "more than 2**30 pixels along one axis"),
        (make_geometry(DENSE, 2, (0, 2**29)), (8, 8), "more than 2**30 pixels along one axis"),
        (make_geometry(DENSE, 1, 2**30, 2**30), (8, 8), "more than 2**30 pixels along one axis"),
        (make_geometry(hk.Support.dense(2, 3, (1, 65))), (8, 80), "more than 64 taps"),
    ],
    ids=["image", "axis", "padding", "dilation", "kernel"],
)
def test_sizes_beyond_32_bits_are_refused(
    geometry: Geometry, size: tuple[int, int], reason: str
) -> None:
    for verb in ("fprop", "dgrad", "wgrad"):
        reasons = get_backend("cpu").unsupported_reasons(offered(geometry, verb, size))
        assert any(reason in text for text in reasons), reasons


# A stride that no image has: along that axis there is one output.
HUGE_STRIDES = {
    "row": ((1, 2**31 - 1), 2, 1),
    "column": ((2**31 - 1, 1), 2, 1),
    "both": ((2**31 - 1, 2**31 - 1), (2, 2), 1),
    "row-dilated": ((2, 2**31 - 2), (1, 3), (1, 2)),
    "column-no-pads": ((2**30 + 5, 2), 0, 1),
    "uneven-pads": ((2**31 - 1, 1), (0, 2, 2, 0), 1),
}


@pytest.mark.parametrize("backend", ["auto", "cpu", "vendor", "reference"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", HUGE_STRIDES)
def test_a_stride_beyond_the_image_is_as_good_as_none(
    name: str, layout: torch.memory_format, backend: str
) -> None:
    """Left padding + stride - 1 once left 32 bits, and then the memory of the band."""
    stride, padding, dilation = HUGE_STRIDES[name]
    support = hk.Support.het(8, 12, 3, p=4)
    geometry = make_geometry(support, stride, padding, dilation)
    # Any stride that leaves one output means the same.
    like = make_geometry(support, tuple(min(s, 64) for s in stride), padding, dilation)
    x = torch.randn(2, 8, 6, 7, dtype=torch.float64).to(memory_format=layout)
    w = torch.randn(support.shape, dtype=torch.float64, requires_grad=True)
    x.requires_grad_()
    truth = oracle(x, w, like)
    dy = torch.randn_like(truth)
    dx, dw = torch.autograd.grad(truth, (x, w), dy)
    code = hk.backends.CODES[backend]
    torch.testing.assert_close(ops.run_fprop(x.detach(), w.detach(), geometry, backend=code), truth)
    torch.testing.assert_close(ops.run_dgrad(dy, w.detach(), geometry, (6, 7), code), dx)
    mine = ops.run_wgrad(dy, x.detach(), geometry, support.shape, torch.float64, code)
    torch.testing.assert_close(mine, dw)


@pytest.mark.parametrize("form", ["filters", "pixels", "columns"])
@pytest.mark.parametrize("isa", ISAS)
def test_every_form_takes_a_stride_beyond_the_image(isa: str, form: str) -> None:
    support = hk.Support.het(40, 36, 3, p=4)
    x, w = torch.randn(2, 40, 5, 6), torch.randn(support.shape)
    truth = oracle(x, w, make_geometry(support, (1, 60), 2))
    plan = _cpu.Plan(support.mask.view(np.uint8).copy(), "float32", isa, form)
    y = torch.full_like(truth, float("nan"))
    plan.fprop(
        plan.pack(w.data_ptr(), w.stride(), "float32"), x.data_ptr(), x.stride(), (2, 5, 6),
        y.data_ptr(), y.stride(), tuple(y.shape[2:]), (1, 2**31 - 1), (2, 2), (1, 1), threads=2,
    )  # fmt: skip
    torch.testing.assert_close(y, truth, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("form", ["pixels", "channels"])
@pytest.mark.parametrize("isa", ISAS)
def test_every_form_of_wgrad_takes_a_stride_beyond_the_image(isa: str, form: str) -> None:
    support = hk.Support.het(40, 36, 3, p=4)
    x, w = torch.randn(2, 40, 5, 6), torch.randn(support.shape, requires_grad=True)
    truth = oracle(x, w, make_geometry(support, (60, 1), 2))
    dy = torch.randn_like(truth)
    (expected,) = torch.autograd.grad(truth, w, dy)
    plan = _cpu.Wgrad(support.mask.view(np.uint8).copy(), "float32", isa, form)
    dw = torch.zeros(support.shape)
    plan.wgrad(
        x.data_ptr(), x.stride(), (2, 5, 6), dy.data_ptr(), dy.stride(), tuple(dy.shape[2:]),
        dw.data_ptr(), dw.stride(), (2**31 - 1, 1), (2, 2), (1, 1), threads=2,
    )  # fmt: skip
    torch.testing.assert_close(dw, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "geometry",
    [
        make_geometry(DENSE, 1, 2**28, 2**28),
        make_geometry(DENSE, 2**31 - 1, 1),
        make_geometry(DENSE, (1, 2**20), (1, 2**27), (1, 2**27)),
    ],
    ids=["dilation", "stride", "both"],
)
def test_huge_steps_that_fit_are_right(geometry: Geometry) -> None:
    """Only the taps inside the image count, so an explicit sum needs no padded copy."""
    x, w = torch.randn(1, 2, 4, 5, dtype=torch.float64), torch.randn(3, 2, 3, 3).double()
    dy_step, dx_step = geometry.dilation
    top, _, left, _ = geometry.pads
    out = geometry.output_size(4, 5)
    expected = torch.zeros(1, 3, *out, dtype=torch.float64)
    for oy in range(out[0]):
        for ox in range(out[1]):
            for ky in range(3):
                for kx in range(3):
                    iy = oy * geometry.stride[0] - top + ky * dy_step
                    ix = ox * geometry.stride[1] - left + kx * dx_step
                    if 0 <= iy < 4 and 0 <= ix < 5:
                        expected[0, :, oy, ox] += w[:, :, ky, kx] @ x[0, :, iy, ix]
    for isa in ISAS:
        for form in ("filters", "pixels", "columns"):
            y = torch.full_like(expected, float("nan"))
            plan = _cpu.Plan(DENSE.mask.view(np.uint8).copy(), "float64", isa, form)
            packed = plan.pack(w.data_ptr(), w.stride(), "float64")
            plan.fprop(
                packed, x.data_ptr(), x.stride(), (1, 4, 5), y.data_ptr(), y.stride(), out,
                geometry.stride, (top, left), geometry.dilation,
            )  # fmt: skip
            torch.testing.assert_close(y, expected)


def test_a_stride_with_too_many_residues_is_refused_for_dgrad_only() -> None:
    geometry, engine = make_geometry(DENSE, 65, 30), get_backend("cpu")
    assert engine.unsupported_reasons(offered(geometry, "fprop")) == []
    (reason,) = engine.unsupported_reasons(offered(geometry, "dgrad"))
    assert "multiply to more than 4096" in reason


def test_elements_beyond_32_bits_are_found() -> None:
    """The memory is reserved, not touched: only the rows that the stride meets are read."""
    side = 40_000
    try:
        x = torch.from_numpy(np.zeros((1, 2, side, side), np.float16))  # torch's own zeros touch it
    except MemoryError:
        pytest.skip("this machine does not lend 6 GB of address space")
    assert x.numel() > 2**31
    x[0, 1, -1, -1] = 3.0
    w = torch.tensor([1.0, 2.0], dtype=torch.float16).view(1, 2, 1, 1)
    step = side - 1
    for name in ISAS:
        plan = _cpu.Plan(np.ones((1, 2, 1, 1), np.uint8), "float16", name)
        y = torch.full((1, 1, 2, 2), float("nan"), dtype=torch.float16)
        packed = plan.pack(w.data_ptr(), w.stride(), "float16")
        plan.fprop(
            packed, x.data_ptr(), x.stride(), (1, side, side), y.data_ptr(), y.stride(), (2, 2),
            (step, step), (0, 0), (1, 1),
        )  # fmt: skip
        assert y.flatten().tolist() == [0, 0, 0, 6]


def test_the_engine_itself_refuses_an_image_beyond_its_integers() -> None:
    plan = _cpu.Plan(np.ones((1, 1, 1, 1), np.uint8))
    x, w = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
    packed = plan.pack(w.data_ptr(), w.stride(), "float32")
    with pytest.raises(ArgumentError, match=r"width: received 2147483648 pixels, expected 0 to"):
        plan.fprop(
            packed, x.data_ptr(), x.stride(), (1, 1, 2**31), x.data_ptr(), x.stride(), (1, 1),
            (1, 1), (0, 0), (1, 1),
        )  # fmt: skip


# NaN and infinity --------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_wgrad_does_not_read_a_neighbouring_channel(
    isa: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Taps far right of a narrow image once read on into the next channel's memory."""
    monkeypatch.setattr("hetconv_kernels.backends.cpu_plans._ISA", isa)
    support = hk.Support.dense(4, 8, (3, 7))
    x = torch.randn(1, 4, 6, 4, dtype=getattr(torch, dtype))
    w = torch.randn(*support.shape, dtype=x.dtype, requires_grad=True)
    x[:, 1::2] = float("inf")
    for dilation in (1, 2, 3):
        pads = (0, 2, 0, 6 * dilation)
        y = convolve(x, w, support, padding=pads, dilation=(1, dilation))
        (dw,) = torch.autograd.grad(y, w, torch.ones_like(y))
        assert bool(dw[:, 0::2].isfinite().all())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("form", ["pixels", "columns"])
def test_unmerged_forms_never_show_a_filter_what_it_does_not_read(isa: str, form: str) -> None:
    """A group never sees a channel it does not read."""
    rng = np.random.default_rng(0)
    support = hk.Support.self_grouped(rng.integers(0, 5, 24), rng.random((5, 20)) < 0.3, 3)
    x, w = torch.randn(2, 20, 9, 8), torch.randn(*support.shape)
    w[~torch.tensor(support.mask)] = float("nan")
    x[1, 7, 4, 4] = float("nan")
    reads = torch.tensor(support.mask[:, 7].any(axis=(1, 2)))
    assert 0 < reads.sum() < support.filters
    plan = _cpu.Plan(support.mask.view(np.uint8).copy(), "float32", isa, form)
    assert plan.form == form
    packed = plan.pack(w.data_ptr(), w.stride(), "float32")
    y = torch.empty(2, 24, 9, 8)
    plan.fprop(
        packed, x.data_ptr(), x.stride(), (2, 9, 8), y.data_ptr(), y.stride(), (9, 8), (1, 1),
        (1, 1), (1, 1),
    )  # fmt: skip
    expected = torch.zeros(2, 24, 9, 8, dtype=torch.bool)
    expected[1, :, 3:6, 3:6] = reads[:, None, None]
    assert torch.equal(y.isnan(), expected)


@pytest.mark.parametrize("verb", ["y", "dx"])
def test_dead_weights_may_hold_anything(verb: str) -> None:
    support = hk.Support.het(20, 24, 3, p=5)
    geometry, mask = make_geometry(support, 1, 1), torch.tensor(support.mask)
    x, w = torch.randn(2, 20, 7, 6, requires_grad=True), torch.randn(*support.shape)
    for value in (float("nan"), float("inf"), 3e38):
        dirty = w.masked_fill(~mask, value)
        results = [convolve(x, dirty, support, padding=1), oracle(x, w, geometry)]
        if verb == "dx":
            results = [torch.autograd.grad(y.square().sum(), x)[0] for y in results]
        torch.testing.assert_close(*results, atol=1e-3, rtol=1e-4)
