# SPDX-License-Identifier: Apache-2.0
"""The operators in 8 bits: opcheck on every schema, the body equals the reference, refusals."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import hetconv_kernels as hk
from hetconv_kernels.errors import ArgumentError, BackendError, InputTypeError
from hetconv_kernels.packing import bits_on, live_weight
from hetconv_kernels.pooling import Pool
from hetconv_kernels.problem import make_geometry
from hetconv_kernels.quantization import engine, ops, reference
from hetconv_kernels.quantization.checks import Output

CPU = torch.device("cpu")
SUPPORT = hk.Support.het(8, 12, 3, p=4)
GEOMETRY = make_geometry(SUPPORT, 2, (1, 0, 2, 1))
POOL = Pool((2, 2), (1, 2), (1, 0))
TAIL = (7, 7.0, 250.0, torch.uint8, 0)


def image(channels: int = 8, dtype: torch.dtype = torch.uint8, size=(7, 9)) -> torch.Tensor:
    low, high = (0, 256) if dtype == torch.uint8 else (-128, 128)
    return torch.randint(low, high, (2, channels, *size), dtype=dtype)


def layer_arguments(dtype: torch.dtype, residual: bool, pool: Pool | None) -> tuple:
    weight = torch.randint(-127, 128, SUPPORT.shape, dtype=torch.int8)
    size = GEOMETRY.output_size(7, 9)
    return (
        image(dtype=dtype), live_weight(SUPPORT, weight), bits_on(SUPPORT, CPU),
        torch.rand(12) * 1e-2, torch.randint(-999, 999, (12,), dtype=torch.int32),
        image(12, dtype, size) if residual else None, GEOMETRY.ints(7, 9), ops.pool_ints(pool),
        5, 0.37, 9, *TAIL,
    )  # fmt: skip


def arguments(op: str) -> tuple:
    return {
        "qfprop": lambda: layer_arguments(torch.uint8, False, None),
        "qfprop-all": lambda: layer_arguments(torch.int8, True, POOL),
        "qadd": lambda: (image(), image(dtype=torch.int8), 0.5, 1.25, 3, -4, *TAIL),
        "requantize": lambda: (image(), 0.3, 100, *TAIL),
        "qmean": lambda: (image(), 1.7, 100, *TAIL),
        "qmax_pool": lambda: (image(dtype=torch.int8), ops.pool_ints(POOL), 0),
        "quantize": lambda: (torch.randn(2, 3, 4, 5), 0.02, -3, torch.int8, 0),
        "dequantize": lambda: (image(), 0.02, 3, 0),
    }[op]()


OPS = (
    "qfprop", "qfprop-all", "qadd", "requantize", "qmean", "qmax_pool", "quantize", "dequantize",
)  # fmt: skip


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_opcheck(op: str, layout: torch.memory_format) -> None:
    overload = getattr(torch.ops.hetconv, op.split("-")[0]).default
    given = tuple(
        a.to(memory_format=layout) if isinstance(a, torch.Tensor) and a.dim() == 4 else a
        for a in arguments(op)
    )
    torch.library.opcheck(overload, given)


@pytest.mark.parametrize("op", OPS)
def test_every_engine_of_this_installation_gives_the_integers_of_the_reference(op: str) -> None:
    overload = getattr(torch.ops.hetconv, op.split("-")[0])
    given = arguments(op)
    results = [overload(*given[:-1], hk.backends.CODES[name]) for name in engine.engine_names()]
    assert engine.engine_names()[-1] == "reference"
    for result in results:
        assert torch.equal(result, results[-1])
        assert result.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float32], ids=str)
def test_an_operator_is_the_reference_with_its_arguments_in_place(dtype: torch.dtype) -> None:
    x, w, _, multiplier, bias, residual, *_ = layer_arguments(torch.uint8, True, POOL)
    y = torch.ops.hetconv.qfprop(
        x, w, bits_on(SUPPORT, CPU), multiplier, bias, residual, GEOMETRY.ints(7, 9),
        ops.pool_ints(POOL), 5, 0.37, 9, 7, 7.0, 100.0, dtype, 0,
    )  # fmt: skip
    truth = reference.fprop(
        x, w, SUPPORT, GEOMETRY, multiplier=multiplier, bias=bias, x_zero_point=5,
        output=Output(7, 7.0, 100.0, dtype), residual=residual, residual_multiplier=0.37,
        residual_zero_point=9, pool=POOL,
    )  # fmt: skip
    assert y.dtype == dtype
    assert torch.equal(y, truth)
    assert len(truth.unique()) > 20, "a saturated output would compare nothing"


def test_a_weight_that_was_written_is_packed_again() -> None:
    given = layer_arguments(torch.uint8, False, None)
    before = torch.ops.hetconv.qfprop(*given)
    given[1].neg_()
    assert not torch.equal(torch.ops.hetconv.qfprop(*given), before)
    given[1].neg_()
    assert torch.equal(torch.ops.hetconv.qfprop(*given), before)


def test_the_flop_counter_counts_live_weights() -> None:
    given = layer_arguments(torch.uint8, False, None)
    with FlopCounterMode(display=False) as counter:
        torch.ops.hetconv.qfprop(*given)
    assert counter.get_total_flops() == 2 * 2 * SUPPORT.macs(*GEOMETRY.output_size(7, 9))


@pytest.mark.parametrize("op", ["qfprop", "qadd", "requantize", "qmean", "qmax_pool", "dequantize"])
def test_float_operands_are_refused_with_the_way_out(op: str) -> None:
    overload = getattr(torch.ops.hetconv, op)
    first, *rest = arguments(op)
    with pytest.raises(InputTypeError, match=r"float32.*uint8 or int8"):
        overload(first.float(), *rest)


def test_a_wrong_rank_is_refused_while_tracing_too() -> None:
    x = image()[0]
    with pytest.raises(ArgumentError, match="N, C, H, W"):
        torch.ops.hetconv.requantize(x, 0.3, 100, *TAIL)
    with (
        torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True),
        pytest.raises(ArgumentError, match="N, C, H, W"),
    ):
        torch.ops.hetconv.requantize(torch.empty(8, 7, 9, dtype=torch.uint8), 0.3, 100, *TAIL)


@pytest.mark.parametrize("pool", [[], [2, 2]])
def test_a_pool_of_other_than_six_integers_is_refused(pool: list[int]) -> None:
    with pytest.raises(ArgumentError, match="six integers"):
        torch.ops.hetconv.qmax_pool(image(), pool, 0)


def test_backends_that_have_no_8_bits_are_refused_when_forced() -> None:
    given = arguments("requantize")
    with pytest.raises(BackendError, match=r"vendor.*8 bits"):
        torch.ops.hetconv.requantize(*given[:-1], hk.backends.CODES["vendor"])
    with hk.use_backend("reference"):
        assert engine.engine_name(CPU) == "reference"
