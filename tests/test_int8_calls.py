# SPDX-License-Identifier: Apache-2.0
"""The face of the engine in 8 bits: layouts, handles, errors, and what stands between layers."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

import hetconv_kernels as hk
from hetconv_kernels.backends import cpu_int8 as engine
from hetconv_kernels.errors import ArgumentError, InputTypeError
from hetconv_kernels.pooling import Pool
from hetconv_kernels.problem import make_geometry
from hetconv_kernels.quantization import reference
from tests import int8_cases as cases

pytestmark = pytest.mark.skipif(not engine.is_built(), reason="the extension is not built")
SUPPORT = hk.Support.het(12, 20, 3, p=4)
GEOMETRY = make_geometry(SUPPORT, 1, 1)
BYTES = (torch.uint8, torch.int8)
SIZES = [(1, 1, 1, 1), (2, 3, 5, 7), (3, 70, 9, 4), (0, 4, 3, 3), (2, 64, 40, 40)]


@pytest.fixture(params=engine.isas())
def isa(request, monkeypatch):
    monkeypatch.setattr(engine, "_ISA", request.param)
    return request.param


def call(**changes):
    """Returns fprop's arguments, with some changed."""
    rng = np.random.default_rng(0)
    arguments = {
        "x": cases.draw_bytes(rng, (2, 12, 6, 7), torch.uint8),
        "weight": torch.from_numpy(rng.integers(-127, 128, SUPPORT.shape).astype("i1")),
        "support": SUPPORT,
        "geometry": GEOMETRY,
        "multiplier": torch.full((20,), 0.01),
        "bias": torch.arange(20, dtype=torch.int32),
        "x_zero_point": 7,
        "y_zero_point": 30,
        "low": 30,
        "high": 250,
        "out_dtype": torch.uint8,
    }
    return cases.gathered(arguments | changes)


def both(name, *args, **kwargs):
    """Returns what the engine and the reference make of a call, which must be the same."""
    named = cases.gathered(kwargs)
    ours, theirs = (getattr(module, name)(*args, **named) for module in (engine, reference))
    assert ours.dtype == theirs.dtype
    assert ours.stride() == theirs.stride()
    assert torch.equal(ours, theirs)
    return ours


# Handles and layouts ----------------------------------------------------------------------------


def test_a_packed_weight_does_not_follow_later_writes(isa):
    arguments = call()
    packed = engine.pack(arguments["weight"], SUPPORT)
    before = engine.fprop(**arguments)
    arguments["weight"].zero_()
    assert packed.bytes >= SUPPORT.live
    assert torch.equal(engine.fprop(**call(weight=packed)), before)


@pytest.mark.parametrize("form", ["dense", "live", "turned"])
def test_every_form_of_the_weight_gives_the_same(isa, form):
    weight = call()["weight"]
    forms = {
        "dense": weight,
        "live": weight[torch.from_numpy(np.array(SUPPORT.mask))],
        "turned": weight.contiguous(memory_format=torch.channels_last),
    }
    assert torch.equal(engine.fprop(**call(weight=forms[form])), reference.fprop(**call()))


def test_dead_entries_are_ignored(isa):
    weight = call()["weight"]
    other = torch.where(torch.from_numpy(np.array(SUPPORT.mask)), weight, -128)
    assert torch.equal(engine.fprop(**call(weight=other)), engine.fprop(**call()))


@pytest.mark.parametrize("layout", ["contiguous", "sliced", "expanded", "turned"])
def test_other_layouts_are_copied_and_give_the_same(isa, layout):
    x = call()["x"]
    views = {
        "contiguous": x.contiguous(),
        "sliced": torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last)[:, :12],
        "expanded": x[:1, :1].expand(2, 12, 6, 7),
        "turned": x.transpose(2, 3),
    }
    both("fprop", **call(x=views[layout]))
    residual = torch.zeros(2, 20, 6, 7, dtype=torch.int8)
    both("fprop", **call(residual=residual, residual_multiplier=0.5, residual_zero_point=-9))


def test_an_empty_batch_gives_an_empty_result(isa):
    y = both("fprop", **call(x=call()["x"][:0]))
    assert y.shape == (0, 20, 6, 7)


@pytest.mark.parametrize("shape", [(20, 12), (20, 12, 1, 1)])
def test_linear_layers_are_convolutions_of_one_pixel(isa, shape):
    support = hk.Support.dense(12, 20, 1)
    weight = torch.arange(240, dtype=torch.int16).sub(120).to(torch.int8).view(shape)
    x = cases.draw_bytes(np.random.default_rng(2), (5, 12, 1, 1), torch.int8)
    geometry = make_geometry(support)
    both("fprop", **call(x=x, weight=weight, support=support, geometry=geometry))


def test_a_grouped_weight_in_the_shape_of_conv2d_is_taken(isa):
    support = hk.Support.grouped(8, 12, 3, 4)
    weight = torch.arange(12 * 2 * 9, dtype=torch.int16).sub(100).to(torch.int8)
    arguments = call(
        x=call()["x"][:, :8],
        weight=weight.view(12, 2, 3, 3),
        support=support,
        geometry=make_geometry(support, 2, 1),
        multiplier=torch.full((12,), 0.02),
        bias=torch.zeros(12, dtype=torch.int32),
    )
    both("fprop", **arguments)


@pytest.mark.parametrize("out", [torch.uint8, torch.float32])
def test_a_row_too_long_for_the_workspace_is_pooled_afterwards(isa, out):
    support = hk.Support.dense(2, 512, 1)
    x = cases.draw_bytes(np.random.default_rng(4), (1, 2, 2, 5000), torch.uint8)
    arguments = call(
        x=x,
        weight=torch.full((512, 2), 3, dtype=torch.int8),
        support=support,
        geometry=make_geometry(support),
        multiplier=torch.full((512,), 0.1),
        bias=torch.zeros(512, dtype=torch.int32),
        out_dtype=out,
        pool=Pool((2, 2), (2, 2), (0, 0)),
    )
    both("fprop", **arguments)


def test_supports_that_are_equal_share_one_lowering(isa):
    same = hk.Support.het(12, 20, 3, p=4)
    assert engine.plan_of(same) is engine.plan_of(SUPPORT)
    assert engine.plan_of(copy.deepcopy(same)).live == SUPPORT.live


def test_the_instruction_set_can_be_forced_by_the_environment(monkeypatch):
    monkeypatch.setenv("HETCONV_ISA", "generic")
    assert engine.isas() == ["generic"]
    if "avx2" in cases_of_machine(monkeypatch):
        monkeypatch.setenv("HETCONV_ISA", "avx2")
        assert engine.isas() == ["avx2"]


def cases_of_machine(monkeypatch):
    """Lists the instruction sets where none is forced."""
    monkeypatch.delenv("HETCONV_ISA")
    return engine.isas()


# Errors -----------------------------------------------------------------------------------------

BAD_CALLS = {
    "x dtype": ({"x": torch.zeros(1, 12, 6, 7)}, InputTypeError, "input dtype"),
    "x rank": ({"x": torch.zeros(12, 6, 7, dtype=torch.uint8)}, ArgumentError, "input shape"),
    "channels": (
        {"x": torch.zeros(1, 11, 6, 7, dtype=torch.uint8)},
        ArgumentError,
        "input channels: received 11, expected 12",
    ),
    "device": (
        {"x": torch.zeros(1, 12, 6, 7, dtype=torch.uint8, device="meta")},
        ArgumentError,
        "input device: received meta, expected cpu",
    ),
    "image": (
        {"geometry": make_geometry(SUPPORT), "x": torch.zeros(1, 12, 2, 7, dtype=torch.uint8)},
        ArgumentError,
        "input size",
    ),
    "x zero point": ({"x_zero_point": -1}, ArgumentError, "x_zero_point: received -1"),
    "x zero point of a float": ({"x_zero_point": 3.0}, ArgumentError, "x_zero_point"),
    "y zero point": ({"y_zero_point": 256}, ArgumentError, "y_zero_point: received 256"),
    "bounds": ({"low": 9, "high": 8}, ArgumentError, "low and high"),
    "bounds beyond": ({"low": 0, "high": 256}, ArgumentError, "low and high"),
    "fraction": ({"low": 0.5}, ArgumentError, "low and high"),
    "nan": ({"low": float("nan"), "out_dtype": torch.float32}, ArgumentError, "low and high"),
    "out dtype": ({"out_dtype": torch.int32}, InputTypeError, "int32"),
    "weight dtype": ({"weight": torch.zeros(SUPPORT.shape)}, InputTypeError, "weight dtype"),
    "weight shape": (
        {"weight": torch.zeros(20, 12, 3, 2, dtype=torch.int8)},
        ArgumentError,
        "weight shape",
    ),
    "multiplier dtype": ({"multiplier": torch.ones(20).double()}, InputTypeError, "multiplier"),
    "multiplier shape": ({"multiplier": torch.ones(19)}, ArgumentError, "multiplier shape"),
    "multiplier nan": (
        {"multiplier": torch.full((20,), float("nan"))},
        ArgumentError,
        "multiplier of filter 0: received NaN or Inf",
    ),
    "bias dtype": ({"bias": torch.zeros(20)}, InputTypeError, "bias dtype"),
    "bias shape": ({"bias": torch.zeros(21, dtype=torch.int32)}, ArgumentError, "bias shape"),
    "residual dtype": ({"residual": torch.zeros(2, 20, 6, 7)}, InputTypeError, "residual"),
    "residual shape": (
        {"residual": torch.zeros(2, 20, 6, 6, dtype=torch.uint8)},
        ArgumentError,
        "residual shape",
    ),
    "residual scale": (
        {"residual": torch.zeros(2, 20, 6, 7, dtype=torch.uint8), "residual_multiplier": 0.0},
        ArgumentError,
        "residual_multiplier: received 0.0",
    ),
    "pool": ({"pool": Pool((9, 9), (1, 1), (0, 0))}, ArgumentError, "pooled"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_a_bad_call_is_refused_before_anything_is_written(name, monkeypatch):
    changes, error, words = BAD_CALLS[name]
    with pytest.raises(error, match=words.replace("(", r"\(")) as caught:
        engine.fprop(**call(**changes))
    assert "expected" in str(caught.value)


@pytest.mark.parametrize(
    ("bias", "fits"), [(2**31 - 1 - 255 * 508, True), (2**31 - 255 * 508, False)]
)
@pytest.mark.parametrize("sign", [1, -1])
def test_a_sum_that_could_leave_int32_is_refused_and_no_smaller_one(isa, bias, fits, sign):
    support = hk.Support.dense(4, 1, 1)
    arguments = call(
        x=torch.full((1, 4, 2, 2), 255, dtype=torch.uint8),
        weight=torch.full((1, 4, 1, 1), 127 * sign, dtype=torch.int8),
        support=support,
        geometry=make_geometry(support),
        multiplier=torch.ones(1),
        bias=torch.tensor([bias * sign], dtype=torch.int32),
        x_zero_point=0,
        low=-float("inf"),
        high=float("inf"),
        out_dtype=torch.float32,
    )
    if fits:
        assert engine.fprop(**arguments).eq(float(np.float32(sign * (2**31 - 1)))).all()
        return
    with pytest.raises(ArgumentError, match="filter 0: received 2147483648, expected less than"):
        engine.fprop(**arguments)


@pytest.mark.parametrize(
    ("name", "changes", "error"),
    [
        ("add", {"b": torch.zeros(1, 2, 3, 5, dtype=torch.uint8)}, ArgumentError),
        ("add", {"a_multiplier": 0.0}, ArgumentError),
        ("add", {"b_multiplier": float("nan")}, ArgumentError),
        ("add", {"b_zero_point": 400}, ArgumentError),
        ("add", {"a": torch.zeros(1, 2, 3, 4)}, InputTypeError),
        ("requantize", {"multiplier": -1.0}, ArgumentError),
        ("requantize", {"out_dtype": torch.float64}, InputTypeError),
        ("mean", {"multiplier": float("inf")}, ArgumentError),
        ("mean", {"x": torch.zeros(1, 2, 0, 4, dtype=torch.uint8)}, ArgumentError),
        ("mean", {"high": 300}, ArgumentError),
        ("max_pool", {"x": torch.zeros(1, 2, 3, 4)}, InputTypeError),
        ("max_pool", {"pool": Pool((7, 7), (1, 1), (0, 0))}, ArgumentError),
        ("quantize_tensor", {"x": torch.zeros(1, 2, 3, 4, dtype=torch.float64)}, InputTypeError),
        ("quantize_tensor", {"scale": 0.0}, ArgumentError),
        ("quantize_tensor", {"dtype": torch.int32}, InputTypeError),
        ("quantize_tensor", {"x": torch.zeros(2, 3)}, ArgumentError),
        ("dequantize", {"scale": float("nan")}, ArgumentError),
        ("dequantize", {"zero_point": -3}, ArgumentError),
    ],
)
def test_bad_operands_of_the_other_operations_are_refused(name, changes, error):
    x = torch.zeros(1, 2, 3, 4, dtype=torch.uint8)
    finish = {"y_zero_point": 0, "low": 0, "high": 255, "out_dtype": torch.uint8}
    good = {
        "add": {"a": x, "b": x, "a_multiplier": 1.0, "b_multiplier": 1.0}
        | {"a_zero_point": 0, "b_zero_point": 0, **finish},
        "requantize": {"x": x, "multiplier": 1.0, "x_zero_point": 0, **finish},
        "mean": {"x": x, "multiplier": 1.0, "x_zero_point": 0, **finish},
        "max_pool": {"x": x, "pool": Pool((2, 2), (1, 1), (0, 0))},
        "quantize_tensor": {"x": x.float(), "scale": 1.0, "zero_point": 0, "dtype": torch.uint8},
        "dequantize": {"x": x, "scale": 1.0, "zero_point": 0},
    }[name]
    getattr(engine, name)(**cases.gathered(good))
    with pytest.raises(error, match="expected"):
        getattr(engine, name)(**cases.gathered(good | changes))


# Other operations -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("out", [*BYTES, torch.float32])
def test_sums_and_other_scales_equal_the_reference(isa, size, out):
    rng = np.random.default_rng(sum(size))
    least, greatest = cases.LIMITS.get(out, (-90, 90))
    for number in range(8):
        one, two = (BYTES[k] for k in rng.integers(0, 2, 2))
        a, b = cases.draw_bytes(rng, size, one), cases.draw_bytes(rng, size, two)
        ma, mb = (float(m) for m in rng.random(2) * 2 + 0.01)
        if number == 0:
            ma = mb = 0.5  # half of the results lie between two integers
        za, zb = (int(rng.integers(*cases.LIMITS[dtype])) for dtype in (one, two))
        low, high = sorted(rng.integers(least, greatest + 1, 2).tolist())
        finish = {"y_zero_point": int(rng.integers(least, greatest)), "out_dtype": out}
        finish |= {"low": low, "high": high} if number % 2 else {"low": least, "high": greatest}
        scales = {"a_multiplier": ma, "b_multiplier": mb, "a_zero_point": za, "b_zero_point": zb}
        both("add", a, b, **scales, **finish)
        both("requantize", a, multiplier=ma, x_zero_point=za, **finish)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("out", [*BYTES, torch.float32])
def test_means_equal_the_reference(isa, size, out):
    rng = np.random.default_rng(sum(size))
    for dtype in BYTES:
        least, greatest = cases.LIMITS.get(out, (-90, 90))
        both(
            "mean",
            cases.draw_bytes(rng, size, dtype),
            multiplier=float(rng.random() + 0.3),
            x_zero_point=int(rng.integers(*cases.LIMITS[dtype])),
            y_zero_point=int(rng.integers(least, greatest)),
            low=least,
            high=greatest,
            out_dtype=out,
        )


@pytest.mark.parametrize("dtype", BYTES)
@pytest.mark.parametrize("pool", cases.POOLS)
@pytest.mark.parametrize("size", [(2, 3, 9, 8), (1, 65, 7, 12), (3, 16, 5, 5), (1, 128, 6, 6)])
def test_max_pooling_equals_the_reference(isa, size, pool, dtype):
    both("max_pool", cases.draw_bytes(np.random.default_rng(1), size, dtype), pool)


@pytest.mark.parametrize("dtype", BYTES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_quantising_equals_the_reference_at_ties_and_ends(isa, dtype, layout):
    special = [0.0, -0.0, 0.5, 1.5, 2.5, -0.5, -1.5, 1e9, -1e9, 3e38, -3e38, 1e-45]
    special += [float("inf"), -float("inf"), float("nan"), 127.5, 128.5, -128.5, 255.5]
    x = torch.randn(2, 19, 5, 7) * 40
    x.view(-1)[: len(special)] = torch.tensor(special)
    x = x.contiguous(memory_format=layout)
    for scale, zero in ((1.0, 0), (0.1, 100), (3.7, 5), (1e-30, 127)):
        y = both("quantize_tensor", x, scale, zero, dtype)
        both("dequantize", y, scale, zero)


def test_every_byte_and_zero_point_comes_back(isa):
    for dtype in BYTES:
        least, greatest = cases.LIMITS[dtype]
        x = torch.arange(least, greatest + 1).to(dtype).view(1, 256, 1, 1)
        for zero in (least, least + 1, 0, greatest):
            numbers = engine.dequantize(x, 0.05, zero)
            assert torch.equal(engine.quantize_tensor(numbers, 0.05, zero, dtype), x)
