# SPDX-License-Identifier: Apache-2.0
"""bfloat16 in the native engine: exact where sums are, rounded once, and nothing leaks in pairs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import hetconv_kernels as hk
from hetconv_kernels import ops
from hetconv_kernels.nn import fuse
from hetconv_kernels.pooling import Pool
from hetconv_kernels.problem import make_geometry
from hetconv_kernels.testing import error_bound, oracle

_cpu = pytest.importorskip("hetconv_kernels._cpu", reason="the native engine is not built here")

ISAS = _cpu.isas()
PAIRS = pytest.mark.skipif("avx512bf16" not in ISAS, reason="needs AVX-512 BF16")
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
RNG = np.random.default_rng(5)
SUPPORTS = {
    "dense": hk.Support.dense(20, 18, 3),
    "one channel": hk.Support.dense(1, 5, 3),
    "odd": hk.Support.dense(33, 40, 3),
    "stem": hk.Support.dense(3, 20, (3, 7)),
    "few, irregular": hk.Support.from_mask(RNG.random((19, 5, 3, 3)) < 0.5),
    "het": hk.Support.het(64, 64, 3, p=4),
    "het-interleaved": hk.Support.het(36, 40, 3, p=4, order="interleaved"),
    "depthwise-like": hk.Support.het(70, 70, 3, p=70),
    "uneven": hk.Support.het(50, 45, 3, p=7),
    "grouped": hk.Support.grouped(24, 48, 3, 4),
    "self-grouped": hk.Support.self_grouped(np.arange(90) % 5, RNG.random((5, 75)) < 0.3, 3),
    "ragged": hk.Support.self_grouped(np.arange(64) // 9, RNG.random((8, 40)) < 0.4, 3),
    "irregular": hk.Support.from_mask(RNG.random((9, 11, 3, 3)) < 0.3),
}
GEOMETRIES: dict[str, dict[str, Any]] = {
    "same": {"padding": 1},
    "strided": {"stride": 2, "padding": 1},
    "dilated": {"dilation": (2, 1), "padding": (3, 0)},
    "dilated along rows": {"dilation": (1, 2), "padding": (0, 3)},
    "far": {"stride": (3, 8), "padding": (1, 3)},
}


def integers(*shape: int, most: int = 3, seed: int = 0) -> torch.Tensor:
    """Draws bfloat16 integers: products and sums of them are exact in float32."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-most, most + 1, shape, generator=generator).to(torch.bfloat16)


def engine(
    x: torch.Tensor,
    w: torch.Tensor,
    support: hk.Support,
    isa: str,
    form: str = "filters",
    threads: int = 2,
    **geometry: Any,
) -> torch.Tensor:
    """Runs one form of one instruction set into an output that is NaN before."""
    described = make_geometry(support, **geometry)
    size = described.output_size(*x.shape[2:])
    plan = _cpu.Plan(np.ascontiguousarray(support.mask).view(np.uint8), "bfloat16", isa, form)
    packed = plan.pack(w.data_ptr(), w.stride(), str(w.dtype).removeprefix("torch."))
    y = torch.full((x.shape[0], support.filters, *size), float("nan"), dtype=torch.bfloat16)
    y = y.to(memory_format=torch.channels_last)
    top, _, left, _ = described.pads
    plan.fprop(
        packed, x.data_ptr(), x.stride(), (x.shape[0], *x.shape[2:]), y.data_ptr(), y.stride(),
        size, described.stride, (top, left), described.dilation, threads=threads,
    )  # fmt: skip
    return y


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("name", SUPPORTS)
def test_sums_of_integers_are_exact(name: str, geometry: str, layout: str, isa: str) -> None:
    support, options = SUPPORTS[name], GEOMETRIES[geometry]
    x = integers(3, support.channels, 11, 19).contiguous(memory_format=LAYOUTS[layout])
    w = integers(*support.shape, seed=1)
    exact = oracle(x.float(), w.float(), make_geometry(support, **options)).to(torch.bfloat16)
    for form in ("filters", "pixels", "pixel pairs"):
        assert torch.equal(engine(x, w, support, isa, form, **options), exact), form


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("channels", [1, 2, 3, 17, 32, 33, 64, 100])
def test_pointwise_layers_are_exact_where_they_read_in_place(channels: int, isa: str) -> None:
    support = hk.Support.dense(channels, 35, 1)
    x = integers(2, channels, 7, 9).contiguous(memory_format=torch.channels_last)
    w = integers(*support.shape, seed=1)
    for stride in (1, 2):
        exact = torch.nn.functional.conv2d(x.float(), w.float(), stride=stride)
        assert torch.equal(engine(x, w, support, isa, stride=stride), exact.to(torch.bfloat16))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", SUPPORTS)
def test_random_numbers_err_by_their_depth_of_accumulation(name: str, isa: str) -> None:
    support = SUPPORTS[name]
    x = torch.randn(2, support.channels, 9, 15).to(torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last)
    w, geometry = torch.randn(support.shape).to(torch.bfloat16), make_geometry(support, 1, 1)
    exact = oracle(x.double(), w.double(), geometry)
    size = oracle(x.double().abs(), w.double().abs(), geometry)
    depth = int(support.mask.reshape(support.filters, -1).sum(1).max())
    bound = error_bound(size, depth, torch.bfloat16)
    assert bool(((engine(x, w, support, isa, padding=1).double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("isa", ISAS)
def test_a_sum_is_rounded_once_to_the_nearest_even(isa: str) -> None:
    """1 + k/256 is half way between two bfloat16 numbers where k is odd."""
    support = hk.Support.dense(2, 16, 1)
    x = torch.ones(1, 2, 1, 64, dtype=torch.bfloat16)
    x[0, 1, 0] = torch.arange(64).to(torch.bfloat16) / 256
    x = x.contiguous(memory_format=torch.channels_last)
    w = torch.ones(support.shape, dtype=torch.bfloat16)
    expected = (1 + torch.arange(64) / 256).to(torch.bfloat16)
    assert torch.equal(engine(x, w, support, isa)[0, :, 0], expected.expand(16, 64))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("act", ["none", "relu", "silu"])
@pytest.mark.parametrize("extras", ["shift", "shift residual", "scale shift residual"])
@pytest.mark.parametrize(
    "support",
    [
        hk.Support.het(32, 48, 3, p=4),  # whole vectors of filters, and less than one
        hk.Support.self_grouped(np.arange(48) % 16, RNG.random((16, 32)) < 0.3, 3),  # pixel pairs
    ],
    ids=["filters", "pixel pairs"],
)
def test_the_epilogue_is_that_of_float32_rounded_once(
    support: hk.Support, extras: str, act: str, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hetconv_kernels.backends.cpu_plans._ISA", isa)
    x, w = integers(2, 32, 8, 9), integers(*support.shape, most=1, seed=1)
    x = x.contiguous(memory_format=torch.channels_last)
    residual = integers(2, 48, 8, 9, most=40, seed=2).contiguous(memory_format=torch.channels_last)
    given = {
        "scale": 2.0 ** torch.randint(-1, 2, (48,)) if "scale" in extras else None,
        "shift": torch.randint(-8, 9, (48,)) / 4,
        "residual": residual if "residual" in extras else None,
    }
    geometry, code = make_geometry(support, 1, 1), hk.backends.CODES["cpu"]
    y = ops.run_fprop(
        x, w, geometry, given["shift"], code, False, given["scale"], given["residual"], act
    )
    exact = oracle(x.float(), w.float(), geometry)
    if given["scale"] is not None:
        exact = exact * given["scale"][:, None, None]
    exact = exact + given["shift"][:, None, None]
    if given["residual"] is not None:
        exact = exact + residual.float()
    functions = {"none": lambda t: t, "relu": torch.relu, "silu": torch.nn.functional.silu}
    exact = functions[act](exact)
    if act == "silu":
        torch.testing.assert_close(y.float(), exact, rtol=2**-8, atol=1e-6)
    else:
        assert torch.equal(y, exact.to(torch.bfloat16))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("act", ["none", "relu"])
def test_what_is_not_finite_stays_in_its_receptive_field(
    act: str, value: float, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Odd channels and groups: every last channel is read with a neighbour of weight zero."""
    monkeypatch.setattr("hetconv_kernels.backends.cpu_plans._ISA", isa)
    for name, k in (("odd", 3), ("uneven", 3), ("ragged", 3), ("pointwise", 1)):
        support = SUPPORTS[name] if k == 3 else hk.Support.dense(33, 40, 1)
        geometry = make_geometry(support, 1, k // 2)
        for channel in (0, support.channels - 1):
            x = integers(3, support.channels, 9, 8).contiguous(memory_format=torch.channels_last)
            w = integers(*support.shape, seed=1) + 5  # none is zero
            clean = oracle(x.float(), w.float(), geometry)
            x[1, channel, 4, 4] = value
            code, shift = hk.backends.CODES["cpu"], torch.zeros(support.filters)
            y = ops.run_fprop(x, w, geometry, shift, code, False, None, None, act)
            window = torch.zeros(3, 1, 9, 8, dtype=torch.bool)
            window[1, :, 4 - k // 2 : 5 + k // 2, 4 - k // 2 : 5 + k // 2] = True
            expected = torch.relu(clean) if act == "relu" else clean
            outside = ~window.expand_as(y)
            assert torch.equal(y[outside], expected.to(torch.bfloat16)[outside])
            reads = torch.tensor(support.mask[:, channel].all(axis=(1, 2)))
            inside = y[1, reads, 4, 4]
            if value != float("-inf") or act == "none":
                assert not inside.isfinite().any()
            assert inside.isnan().all() == (value != value)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ["het", "uneven", "self-grouped", "depthwise-like"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_dgrad_of_integers_is_exact(
    geometry: str, name: str, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hetconv_kernels.backends.cpu_plans._ISA", isa)
    support, described = SUPPORTS[name], make_geometry(SUPPORTS[name], **GEOMETRIES[geometry])
    x = integers(2, support.channels, 9, 12).contiguous(memory_format=torch.channels_last)
    w = integers(*support.shape, most=2, seed=1)
    leaf = x.float().requires_grad_()
    y = oracle(leaf, w.float(), described)
    dy = integers(*y.shape, seed=2).contiguous(memory_format=torch.channels_last)
    (exact,) = torch.autograd.grad(y, leaf, dy.float())
    dx = ops.run_dgrad(dy, w, described, x.shape[2:], hk.backends.CODES["cpu"])
    assert torch.equal(dx, exact.to(torch.bfloat16))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("name", ["het", "uneven", "self-grouped", "depthwise-like"])
def test_wgrad_of_integers_is_exact_for_any_number_of_images(
    name: str, n: int, layout: str, isa: str
) -> None:
    support = SUPPORTS[name]
    x, dy = integers(n, support.channels, 8, 7), integers(n, support.filters, 8, 7, seed=1)
    x, dy = (t.contiguous(memory_format=LAYOUTS[layout]) for t in (x, dy))
    mask = np.ascontiguousarray(support.mask).view(np.uint8)
    plan = _cpu.Wgrad(mask, "bfloat16", isa, "channels")
    exact = torch.nn.grad.conv2d_weight(x.float(), support.shape, dy.float(), padding=1)
    exact = (exact * torch.tensor(support.mask)).to(torch.bfloat16)
    for threads in (1, 2, 3):
        dw = torch.zeros(support.shape, dtype=torch.bfloat16)
        plan.wgrad(
            x.data_ptr(), x.stride(), (n, 8, 7), dy.data_ptr(), dy.stride(), (8, 7), dw.data_ptr(),
            dw.stride(), (1, 1), (1, 1), (1, 1), threads=threads,
        )  # fmt: skip
        assert torch.equal(dw, exact), threads


@pytest.mark.parametrize("isa", ISAS)
def test_wgrad_keeps_nan_with_the_weights_that_read_it(isa: str) -> None:
    support = SUPPORTS["het"]
    x, dy = integers(3, 64, 8, 7), integers(3, 64, 8, 7, seed=1)
    x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
    x[2, 5, 4, 4], dy[0, 2, 3, 3] = float("nan"), float("inf")
    plan = _cpu.Wgrad(support.mask.view(np.uint8).copy(), "bfloat16", isa, "channels")
    dw = torch.zeros(support.shape, dtype=torch.bfloat16)
    plan.wgrad(
        x.data_ptr(), x.stride(), (3, 8, 7), dy.data_ptr(), dy.stride(), (8, 7), dw.data_ptr(),
        dw.stride(), (1, 1), (1, 1), (1, 1), threads=2,
    )  # fmt: skip
    live, touched = torch.tensor(support.mask), torch.zeros(support.shape, dtype=torch.bool)
    touched[:, 5] = touched[2] = True
    assert bool(dw[live & ~touched].isfinite().all())
    assert bool(dw[:, 5][live[:, 5]].isnan().all())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ["het", "self-grouped"])
def test_thread_counts_agree_bit_by_bit(name: str, isa: str) -> None:
    support = SUPPORTS[name]
    x = torch.randn(3, support.channels, 20, 21).to(torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last)
    w = torch.randn(support.shape).to(torch.bfloat16)
    for form in ("filters", "pixels", "pixel pairs"):
        results = [engine(x, w, support, isa, form, t, padding=1) for t in (1, 2, 3)]
        assert all(torch.equal(other, results[0]) for other in results[1:]), form


def lowered(support: hk.Support, dtype: str, isa: str) -> Any:
    mask = np.ascontiguousarray(support.mask).view(np.uint8)
    return _cpu.Plan(mask, dtype, isa, "filters")


@PAIRS
@pytest.mark.parametrize("name", ["dense", "odd", "het", "depthwise-like", "grouped"])
def test_two_products_go_into_one_instruction(name: str) -> None:
    pairs = lowered(SUPPORTS[name], "bfloat16", "avx512bf16")
    singles = lowered(SUPPORTS[name], "bfloat16", "avx512")
    assert pairs.cost < 0.65 * singles.cost
    weight = torch.zeros(SUPPORTS[name].shape)
    bytes_of = [
        p.pack(weight.data_ptr(), weight.stride(), "float32").bytes for p in (pairs, singles)
    ]
    assert bytes_of[0] < 0.65 * bytes_of[1]


@PAIRS
def test_scattered_channels_of_a_wide_group_find_partners() -> None:
    """Every third channel of 96: no two are neighbours, and still each lane holds two."""
    keep = np.zeros((2, 96), bool)
    keep[0, 0::3], keep[1, 1::3] = True, True
    plan = lowered(hk.Support.self_grouped(np.arange(64) // 32, keep, 3), "bfloat16", "avx512bf16")
    assert plan.packed_elements == 64 * 9 * 32 // 2


@PAIRS
def test_pixels_are_in_vectors_where_groups_are_of_few_filters() -> None:
    keep = np.random.default_rng(5).random((16, 64)) < 0.3
    ragged = hk.Support.self_grouped(np.arange(64) % 16, keep, 3)
    for support, form in ((ragged, "pixel pairs"), (hk.Support.het(64, 64, 3, p=4), "filters")):
        mask = np.ascontiguousarray(support.mask).view(np.uint8)
        plan = _cpu.Plan(mask, "bfloat16", "avx512bf16", "auto", True)
        assert plan.form == form
        assert plan.cost < 2 * support.live / 32


@PAIRS
@pytest.mark.parametrize("pool", [((2, 2), (2, 2), (0, 0)), ((3, 3), (2, 2), (1, 1))])
def test_ragged_groups_are_pooled_as_they_are_computed(pool: Any) -> None:
    keep = np.random.default_rng(5).random((16, 32)) < 0.3
    support = hk.Support.self_grouped(np.arange(48) % 16, keep, 3)
    x = integers(2, 32, 23, 40).contiguous(memory_format=torch.channels_last)
    w = integers(*support.shape, seed=1)
    exact = oracle(x.float(), w.float(), make_geometry(support, 1, 1)).to(torch.bfloat16)
    conv = hk.nn.SupportConv2d(32, 48, 3, padding=1, bias=False, support=support).bfloat16()
    conv.weight.data.copy_(w)
    layer = fuse(conv, None, "none", Pool(*pool)).eval().freeze()
    with torch.no_grad(), hk.use_backend("cpu"):
        assert torch.equal(layer(x), torch.nn.functional.max_pool2d(exact, *pool))


@PAIRS
def test_a_pair_of_few_channels_goes_on_into_the_next_pixel() -> None:
    plan = lowered(hk.Support.dense(3, 64, 7), "bfloat16", "avx512bf16")
    assert plan.packed_elements == 64 * 7 * 11  # 21 channels of a row in 11 pairs


@PAIRS
def test_other_types_do_not_change_with_the_instructions_of_bfloat16() -> None:
    x, w = torch.randn(1, 64, 9, 9), torch.randn(64, 64, 3, 3)
    results = []
    for isa in ("avx512bf16", "avx512"):
        plan, y = lowered(SUPPORTS["het"], "float32", isa), torch.empty(1, 64, 9, 9)
        packed = plan.pack(w.data_ptr(), w.stride(), "float32")
        plan.fprop(
            packed, x.data_ptr(), x.stride(), (1, 9, 9), y.data_ptr(), y.stride(), (9, 9), (1, 1),
            (1, 1), (1, 1),
        )  # fmt: skip
        results.append(y)
    assert torch.equal(*results)


@PAIRS
def test_auto_takes_the_engine_for_bfloat16() -> None:
    from hetconv_kernels.backends import choose

    for channels, size in ((64, 56), (256, 14)):
        support = hk.Support.het(channels, channels, 3, p=4)
        geometry = make_geometry(support, 1, 1)
        x = torch.empty(8, channels, size, size, dtype=torch.bfloat16)
        x = x.contiguous(memory_format=torch.channels_last)
        w = torch.empty(support.live, dtype=torch.bfloat16)
        problem = ops.describe("fprop", geometry, x, x, w, (size, size))
        assert choose(problem, 0).backend.name == "cpu"
