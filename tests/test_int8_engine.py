# SPDX-License-Identifier: Apache-2.0
"""The engine in 8 bits against whole numbers, bit by bit, with every instruction set."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import hetconv_kernels as hk
from hetconv_kernels.backends import cpu_int8 as engine
from hetconv_kernels.problem import make_geometry
from hetconv_kernels.quantization import reference
from hetconv_kernels.quantization.checks import Output
from tests import int8_cases as cases

pytestmark = pytest.mark.skipif(not engine.is_built(), reason="the extension is not built")
ISAS = engine.isas()
# Instruction set and form: what is in its vectors.
WAYS = [(isa, "filters") for isa in ISAS] + [(isa, "pixels") for isa in ISAS if isa == "avx512vnni"]
LAYERS, CALLS = 70, 8  # of each kind of Support; of each layer
GUARD = 96  # bytes on either side of an output


def take(monkeypatch, isa, form):
    monkeypatch.setattr(engine, "_ISA", isa)
    monkeypatch.setattr(engine, "_FORM", form)


@pytest.fixture(params=WAYS, ids="-".join)
def isa(request, monkeypatch):
    take(monkeypatch, *request.param)
    return request.param[0]


class Guarded:
    """Allocates outputs full of a byte, between guards of it, and tells whether guards changed."""

    def __init__(self, fill: int) -> None:
        self.fill, self.buffers = fill, []

    def empty(self, shape, dtype):
        n, f, h, w = shape
        size = n * f * h * w * dtype.itemsize
        # An aligned beginning is not promised for bytes: an odd one, where the dtype allows it.
        start = GUARD + (1 if dtype.itemsize == 1 else 0)
        buffer = torch.full((size + 2 * GUARD + 8,), self.fill, dtype=torch.uint8)
        self.buffers.append((buffer, start, size))
        return buffer[start : start + size].view(dtype).view(n, h, w, f).permute(0, 3, 1, 2)

    def untouched(self) -> bool:
        return all(
            bool(
                (buffer[:start] == self.fill).all() and (buffer[start + size :] == self.fill).all()
            )
            for buffer, start, size in self.buffers
        )


@pytest.fixture
def threads():
    """Sets the number of threads, and sets it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("kind", cases.KINDS)
def test_every_call_equals_whole_numbers_bit_by_bit(kind, monkeypatch, threads):
    rng = np.random.default_rng(cases.KINDS.index(kind))
    compared = 0
    for number in range(LAYERS):
        layer = cases.draw_layer(rng, kind)
        threads(1 if number % 4 else 3)
        packed = {}
        for way in WAYS:
            take(monkeypatch, *way)
            packed[way] = engine.pack(layer.weight(live=number % 2 == 0), layer.support)
            assert engine.plan_of(layer.support).form == way[1]
        for _ in range(CALLS):
            arguments, expected = cases.draw_call(rng, layer)
            for way in WAYS:
                take(monkeypatch, *way)
                memory = Guarded(int(rng.integers(256)))
                monkeypatch.setattr(
                    engine, "_empty", lambda _, *what, memory=memory: memory.empty(*what)
                )
                x = arguments["x"]
                others = {name: value for name, value in arguments.items() if name != "x"}
                y = engine.fprop(x, packed[way], layer.support, layer.geometry, **others)
                right = y.dtype == expected.dtype and torch.equal(y, expected)
                if not (right and memory.untouched()):
                    told = f"{layer.support} {layer.geometry} {arguments}"
                    pytest.fail(f"{way}, layer {number}, right: {right}: {told}")
                compared += 1
    assert compared == LAYERS * CALLS * len(WAYS)


def test_there_are_ten_thousand_cases_where_there_are_three_instruction_sets():
    assert len(cases.KINDS) * LAYERS * CALLS * 3 >= 10_000


@pytest.mark.parametrize("kind", cases.KINDS)
def test_reference_engine_and_whole_numbers_agree(isa, kind):
    rng = np.random.default_rng(100 + cases.KINDS.index(kind))
    for _ in range(5):
        layer = cases.draw_layer(rng, kind)
        arguments, expected = cases.draw_call(rng, layer)
        x = arguments.pop("x")
        call = (x, layer.weight(live=False), layer.support, layer.geometry)
        ours, theirs = engine.fprop(*call, **arguments), reference.fprop(*call, **arguments)
        assert torch.equal(ours, expected)
        assert torch.equal(theirs, expected)
        assert ours.stride() == theirs.stride()


@pytest.mark.parametrize(("channels", "kernel"), [(64, 3), (5, 7), (512, 1), (3, 3)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
@pytest.mark.parametrize("sign", [1, -1, 0], ids=["127", "-127", "mixed"])
def test_extremes_neither_saturate_between_nor_wrap(isa, channels, kernel, dtype, sign):
    support = hk.Support.dense(channels, 40, kernel)
    geometry = make_geometry(support, 1, kernel // 2)
    rng = np.random.default_rng(1)
    w = np.full(support.shape, 127 * sign) if sign else rng.choice([-127, 127], support.shape)
    least, greatest = cases.LIMITS[dtype]
    for byte in (0, 255):
        layer = cases.convolved(geometry, np.full((2, channels, 6, 15), byte), w.astype("i1"))
        for zero in (least, greatest):
            acc = layer.sums(dtype, zero)
            y = engine.fprop(
                layer.image(dtype),
                layer.weight(live=False),
                support,
                geometry,
                multiplier=torch.ones(40),
                bias=torch.zeros(40, dtype=torch.int32),
                x_zero_point=zero,
                output=Output(0, -np.inf, np.inf, torch.float32),
            )
            assert np.array_equal(y.numpy(), acc.astype("f4"))


@pytest.mark.parametrize("filters", [8, 16, 24, 32, 40, 3, 19])
@pytest.mark.parametrize("out", [torch.uint8, torch.int8])
def test_sums_far_beyond_the_range_saturate_at_both_ends(isa, filters, out):
    support = hk.Support.dense(4, filters, 1)
    least, greatest = cases.LIMITS[out]
    big = 2**31 - 1 - 255 * 508
    for sign, multiplier in ((1, 1.0), (-1, 1.0), (1, 3e38), (-1, 3e38), (1, 1e-3), (-1, 1e-3)):
        for zero in (least, 0, greatest):
            y = engine.fprop(
                torch.full((1, 4, 3, 9), 255, dtype=torch.uint8),
                torch.full((filters, 4, 1, 1), 127 * sign, dtype=torch.int8),
                support,
                make_geometry(support),
                multiplier=torch.full((filters,), multiplier),
                bias=torch.full((filters,), big * sign, dtype=torch.int32),
                x_zero_point=0,
                output=Output(zero, least, greatest, out),
            )
            assert bool((y == (greatest if sign > 0 else least)).all())


@pytest.mark.parametrize("filters", [8, 16, 24, 32, 3])
@pytest.mark.parametrize("out", [torch.uint8, torch.int8])
@pytest.mark.parametrize("factor", [1e-3, 1.0, 1e7, 1e9, 3e38])
def test_residuals_far_beyond_the_range_saturate_at_both_ends(isa, filters, out, factor):
    support = hk.Support.dense(4, filters, 1)
    least, greatest = cases.LIMITS[out]
    for byte, zero_point in ((255, 0), (0, 255), (7, 7)):
        y = engine.fprop(
            torch.full((1, 4, 3, 9), 1, dtype=torch.uint8),
            torch.ones((filters, 4, 1, 1), dtype=torch.int8),
            support,
            make_geometry(support),
            multiplier=torch.ones(filters),
            bias=torch.full((filters,), -4, dtype=torch.int32),
            x_zero_point=0,
            output=Output(0, least, greatest, out),
            residual=torch.full((1, filters, 3, 9), byte, dtype=torch.uint8),
            residual_multiplier=factor,
            residual_zero_point=zero_point,
        )
        exact = (byte - zero_point) * factor
        assert bool((y == round(min(max(exact, least), greatest))).all())


@pytest.mark.parametrize("filters", [8, 16, 24, 32, 5])
@pytest.mark.parametrize("zero", [0, 1, 100, 255])
def test_halves_are_rounded_to_even_before_the_zero_point(isa, filters, zero):
    support = hk.Support.dense(4, filters, 1)
    bias = torch.arange(-41, -41 + 3 * filters, 3, dtype=torch.int32)
    x = torch.arange(4 * 30, dtype=torch.uint8).view(1, 30, 1, 4).permute(0, 3, 1, 2)
    w = torch.ones(filters, 4, 1, 1, dtype=torch.int8)
    y = engine.fprop(
        x,
        w,
        support,
        make_geometry(support),
        multiplier=torch.full((filters,), 0.5),
        bias=bias,
        x_zero_point=60,
        output=Output(zero, 0, 255, torch.uint8),
    )
    halves = (x.to(torch.int64) - 60).sum(1, keepdim=True) + bias[:, None, None]
    exact = torch.from_numpy(np.rint(halves.numpy() / 2)).to(torch.int64) + zero
    assert int((halves % 2).sum()) > 10
    assert torch.equal(y.to(torch.int64), exact.clamp(0, 255))


def test_a_product_and_its_residual_are_rounded_apart(isa):
    """One rounding, as of a fused multiply-add, would give another float32."""
    support = hk.Support.dense(4, 16, 1)
    rng = np.random.default_rng(3)
    x = cases.draw_bytes(rng, (1, 4, 8, 16), torch.uint8)
    residual = cases.draw_bytes(rng, (1, 16, 8, 16), torch.uint8)
    w = torch.from_numpy(rng.integers(-127, 128, support.shape).astype("i1"))
    scale, other = np.float32(0.1), np.float32(0.3)
    y = engine.fprop(
        x,
        w,
        support,
        make_geometry(support),
        multiplier=torch.full((16,), float(scale)),
        bias=torch.zeros(16, dtype=torch.int32),
        x_zero_point=0,
        output=Output(0, -np.inf, np.inf, torch.float32),
        residual=residual,
        residual_multiplier=float(other),
    )
    acc = np.einsum("nchw,fc->nfhw", x.numpy().astype("i8"), w.numpy()[:, :, 0, 0].astype("i8"))
    product, added = acc.astype("f4") * scale, residual.numpy().astype("f4") * other
    assert np.array_equal(y.numpy(), product + added)
    fused = (acc * np.float64(scale) + np.float64(added)).astype("f4")
    assert not np.array_equal(y.numpy(), fused)


@pytest.mark.parametrize(
    "size", [(1, 64, 70, 120), (40, 96, 9, 9), (3, 1100, 5, 6), (2, 3, 90, 90)]
)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_bands_strips_and_shares_of_any_number_of_threads_agree(isa, size, count, threads):
    c = size[1]
    rng = np.random.default_rng(sum(size))
    support = hk.Support.het(c, 48, 3, p=min(4, c))
    geometry = make_geometry(support, 1, 1)
    layer = cases.convolved(
        geometry,
        rng.integers(0, 256, size),
        rng.integers(-127, 128, support.shape).astype("i1"),
    )
    threads(count)
    for _ in range(3):
        arguments, expected = cases.draw_call(rng, layer)
        x = arguments.pop("x")
        y = engine.fprop(x, layer.weight(live=False), support, geometry, **arguments)
        assert torch.equal(y, expected)


@pytest.mark.parametrize("filters", [40, 64, 100, 136, 256])
def test_scattered_filters_and_their_residual_come_to_their_places(isa, filters, monkeypatch):
    """Group f mod 4, as HetConv was published: filters of a block are no neighbours in y."""
    rng = np.random.default_rng(filters)
    mask = np.zeros((filters, 32, 3, 3), dtype=bool)
    mask[:, :, 1, 1] = True
    for f in range(filters):
        mask[f, f % 4 :: 4] = True
    support = hk.Support.from_mask(mask)
    geometry = make_geometry(support, 1, 1)
    plan = engine.plan_of(support)
    if plan.form == "filters":
        assert not all(block.contiguous for block in plan.blocks)
        assert any(block.spreads for block in plan.blocks) == (isa == "avx512vnni" and _has_vbmi())
    shape = (2, filters, 7, 9)
    for out, kind in ((torch.uint8, torch.int8), (torch.int8, torch.uint8)):
        low, high = cases.LIMITS[out]
        arguments = {
            "multiplier": torch.rand(filters) * 0.01,
            "bias": torch.randint(-500, 500, (filters,), dtype=torch.int32),
            "x_zero_point": 7, "output": Output(3, low, high, out),
            "residual": cases.draw_bytes(rng, shape, kind), "residual_multiplier": 0.4,
            "residual_zero_point": 5,
        }  # fmt: skip
        x = cases.draw_bytes(rng, (2, 32, 7, 9), torch.uint8)
        w = torch.as_tensor(rng.integers(-127, 128, support.shape).astype("i1"))
        guarded = Guarded(0xA5)
        monkeypatch.setattr(engine, "_empty", lambda _, s, d, g=guarded: g.empty(s, d))
        y = engine.fprop(x, w, support, geometry, **arguments)
        assert torch.equal(y, reference.fprop(x, w, support, geometry, **arguments))
        assert guarded.untouched()


def _has_vbmi() -> bool:
    with open("/proc/cpuinfo") as file:
        return "avx512vbmi" in file.read().split()


@pytest.mark.parametrize("isa", ISAS)
def test_the_lowering_uses_every_kind_of_step(isa, monkeypatch):
    """Or the fuzz would not see some of them: quads across taps, shuffles, gathered channels."""
    take(monkeypatch, isa, "filters")
    rng = np.random.default_rng(5)
    depthwise = engine.plan_of(hk.Support.grouped(32, 32, 3, 32)).blocks
    assert any(block.shuffles > 0 for block in depthwise)
    stem = engine.plan_of(hk.Support.dense(3, 16, 7)).blocks
    assert all(block.quads == 7 * 6 for block in stem)  # 21 bytes of a row in six quads
    keep = rng.random((4, 128)) < 0.3
    clusters = hk.Support.self_grouped(np.arange(64) // 16, keep, 3)
    assert any(block.order > 0 for block in engine.plan_of(clusters).blocks)


@pytest.mark.parametrize("isa", ISAS)
def test_pixels_are_in_vectors_where_groups_are_of_few_filters(isa, monkeypatch):
    take(monkeypatch, isa, "auto")
    keep = np.random.default_rng(5).random((16, 64)) < 0.3
    ragged = engine.plan_of(hk.Support.self_grouped(np.arange(64) % 16, keep, 3))
    assert ragged.form == ("pixels" if isa == "avx512vnni" else "filters")
    assert ragged.cost < 2 * ragged.useful or isa != "avx512vnni"
    for support in (hk.Support.dense(64, 64, 3), hk.Support.het(64, 64, 3, p=4)):
        assert engine.plan_of(support).form == "filters"


@pytest.mark.skipif("avx512vnni" not in ISAS, reason="needs AVX-512 VNNI")
@pytest.mark.parametrize("seed", range(3))
def test_the_page_on_low_precision_counts_as_the_lowering_does(seed):
    read = np.random.default_rng(seed).random((16, 64)) < 0.3
    mask = hk.Support.self_grouped(np.arange(64) // 4, read, 3).mask.astype(np.uint8)
    filters, pixels = (engine._cpu.Int8Plan(mask, "avx512vnni", f) for f in ("filters", "pixels"))
    assert 2.0 < filters.cost / filters.useful < 2.4
    assert 1.65 < pixels.cost / pixels.useful < 1.75


@pytest.mark.skipif("avx512vnni" not in ISAS, reason="needs AVX-512 VNNI")
def test_what_several_groups_read_is_gathered_for_each_and_dead_filters_are_bias(monkeypatch):
    take(monkeypatch, "avx512vnni", "pixels")
    mask = np.zeros((21, 9, 3, 3), bool)
    mask[:9, ::2] = True
    mask[9:20, 1::2, 1, 1] = True
    support = hk.Support.from_mask(mask)  # filter 20 is dead
    geometry = make_geometry(support, 1, 1)
    rng = np.random.default_rng(3)
    x = cases.draw_bytes(rng, (2, 9, 5, 33), torch.uint8)
    w = torch.as_tensor(rng.integers(-127, 128, support.shape).astype("i1"))
    arguments = {
        "multiplier": torch.full((21,), 0.003), "bias": torch.full((21,), 4000, dtype=torch.int32),
        "x_zero_point": 7, "output": Output(3, 0, 255, torch.uint8),
    }  # fmt: skip
    y = engine.fprop(x, w, support, geometry, **arguments)
    assert torch.equal(y, reference.fprop(x, w, support, geometry, **arguments))
    assert (y[:, 20] == 15).all()
