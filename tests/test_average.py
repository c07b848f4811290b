# SPDX-License-Identifier: Apache-2.0
"""AveragePool: PyTorch's means, by the engine where it pays, and PyTorch's own elsewhere."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F_
from averages import LAST, POOLINGS, STEPS, Step, image
from planning import needs_engine
from torch import Tensor, fx, nn

import hetconv_kernels as hk
from hetconv_kernels import errors
from hetconv_kernels.graph.average import average_of
from hetconv_kernels.nn import AveragePool
from hetconv_kernels.pooling import Pool

pytestmark = needs_engine

OTHERS: dict[str, Any] = {
    "ceil mode": nn.AvgPool2d(4, ceil_mode=True),
    "divisor": lambda x: F_.avg_pool2d(x, 2, divisor_override=3),
    "rows": lambda x: x.mean(2),
    "all": lambda x: x.mean(),
    "in float64": lambda x: x.mean((2, 3), dtype=torch.float64),
    "max": lambda x: F_.max_pool2d(x, 2),
    "by size": lambda x: F_.avg_pool2d(x, x.size()[2:]),
    "by one size": lambda x: F_.adaptive_avg_pool2d(x, (x.size(2), 1)),
    "into another": lambda x: torch.mean(x, (2, 3), out=x.new_empty(2, 4)),
}


def found(step: Callable[..., Any], x: Tensor) -> AveragePool | None:
    traced = fx.symbolic_trace(Step(step))
    last = next(iter(next(n for n in traced.graph.nodes if n.op == "output").all_input_nodes))
    return average_of(last, tuple(x.shape))


def by_torch(pooling: AveragePool, x: Tensor) -> Tensor:
    """What PyTorch's own function gives."""
    if pooling.pool is None and pooling.output_size == (1, 1):
        return x.mean((2, 3), keepdim=pooling.keepdim)
    if pooling.pool is None:
        return F_.adaptive_avg_pool2d(x, pooling.output_size)
    return F_.avg_pool2d(x, *pooling.pool, count_include_pad=not pooling.inside)


# The module -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [1, 5, 64, 130])
@pytest.mark.parametrize("name", STEPS)
def test_it_is_the_mean_that_pytorch_computes(name: str, channels: int, dtype: torch.dtype) -> None:
    x = image(2, channels, 9, 6, dtype=dtype)
    pooling = found(STEPS[name], x)
    assert pooling is not None
    assert pooling.by_engine(x)
    truth = STEPS[name](x.double())
    result = pooling(x)
    assert result.shape == truth.shape
    assert result.dtype == dtype
    assert result.stride() == STEPS[name](x).stride() or 1 in (channels, *result.shape[2:])
    # One rounding an addition, of sums below 54 times the largest number, and that of the result.
    eps = torch.finfo(torch.float32).eps
    bound = 54 * eps * x.double().abs().amax() + torch.finfo(dtype).eps * truth.abs()
    assert ((result.double() - truth).abs() <= bound).all()


@pytest.mark.parametrize("name", OTHERS)
def test_other_steps_are_left_alone(name: str) -> None:
    assert found(OTHERS[name], torch.randn(2, 4, 9, 6)) is None


def test_a_module_that_does_more_is_left_alone() -> None:
    hooked, own = nn.AdaptiveAvgPool2d(1), nn.AdaptiveAvgPool2d(1)
    hooked.register_forward_hook(lambda module, args, output: output + 1)
    own.forward = lambda x: x + 1  # type: ignore[method-assign]
    assert found(hooked, image()) is None
    assert found(own, image()) is None
    assert found(nn.AdaptiveAvgPool2d(1), image(3, 4, 5, 6)[0]) is None  # of one image


@pytest.mark.parametrize("name", POOLINGS)
def test_a_forced_engine_takes_any_format_and_gives_it_back(name: str) -> None:
    pooling, x = POOLINGS[name](backend="cpu"), image()
    rows = x.contiguous()
    assert pooling.by_engine(rows)
    assert not POOLINGS[name]().by_engine(rows)
    for given in (rows, x[:, 1:4], x[::2]):
        result = pooling(given)
        assert torch.equal(result, pooling(given.contiguous(memory_format=LAST)))
        assert result.is_contiguous() == by_torch(pooling, given).is_contiguous()
    for other in ("vendor", "reference"):
        assert not POOLINGS[name](backend=other).by_engine(x)
    with hk.use_backend("cpu"):
        assert torch.equal(POOLINGS[name]()(rows), pooling(rows))


@pytest.mark.parametrize("name", POOLINGS)
@pytest.mark.parametrize(
    "x",
    [
        image().double(),
        image().half(),
        image().contiguous(),
        image()[:0],
        image(2, 5, 10, 6)[:, :, 1:],
        torch.empty(2, 5, 9, 6, device="meta"),
    ],
    ids=["float64", "float16", "contiguous", "empty batch", "part", "meta"],
)
def test_what_the_engine_does_not_take_is_pytorchs(name: str, x: Tensor) -> None:
    pooling = POOLINGS[name]()
    assert not pooling.by_engine(x)
    expected = by_torch(pooling, x)
    result = pooling(x)
    assert (result.shape, result.dtype, result.device, result.stride()) == (
        expected.shape, expected.dtype, expected.device, expected.stride(),
    )  # fmt: skip
    assert x.is_meta or torch.equal(result, expected)


def test_large_images_and_windows_of_several_sizes_are_pytorchs() -> None:
    threads = torch.get_num_threads()
    assert AveragePool().by_engine(image(1, 1, 64, 64))
    assert not AveragePool().by_engine(image(1, 1, 64, 65))  # the sum would err more
    large = torch.empty(threads, 1024, 32, 32).to(memory_format=LAST)
    assert AveragePool().by_engine(large)  # an image for each thread
    halves = AveragePool(Pool((2, 2), (2, 2), (0, 0)))
    assert not halves.by_engine(large)
    assert halves.by_engine(large[:1, :256].contiguous(memory_format=LAST))
    assert AveragePool(backend="cpu").by_engine(image(1, 1, 64, 65))
    uneven, x = AveragePool(output_size=(4, 4)), image()
    assert uneven.windows(9, 6) is None
    assert torch.equal(uneven(x), F_.adaptive_avg_pool2d(x, 4))


@pytest.mark.parametrize("name", POOLINGS)
def test_one_image_alone_is_averaged_too(name: str) -> None:
    pooling, x = POOLINGS[name](), image()
    assert torch.equal(pooling(x[1]), pooling(x[1:])[0])


@pytest.mark.parametrize("special", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", POOLINGS)
def test_what_is_not_finite_arrives(name: str, dtype: torch.dtype, special: float) -> None:
    x = image(dtype=dtype)
    x[0, 1, 4, 2] = special
    x[1, 3, 0, 0] = -special
    x[1, 3, 0, 1] = special
    pooling = POOLINGS[name]()
    assert pooling.by_engine(x)
    result, expected = pooling(x), by_torch(pooling, x)
    assert not result.isfinite().all()
    assert torch.equal(result.isfinite(), expected.isfinite())
    odd = ~expected.isfinite()
    torch.testing.assert_close(result[odd], expected[odd], equal_nan=True)


@pytest.mark.parametrize("name", POOLINGS)
def test_gradients_are_pytorchs(name: str) -> None:
    pooling, x = POOLINGS[name](), image()
    wanted, own = x.clone().requires_grad_(), x.clone().requires_grad_()
    pooling(own).square().sum().backward()
    by_torch(pooling, wanted).square().sum().backward()
    torch.testing.assert_close(own.grad, wanted.grad, rtol=0, atol=0)
    _, along = torch.func.jvp(pooling, (x,), (x * 2,))
    torch.testing.assert_close(along, by_torch(pooling, x * 2))
    many = torch.func.vmap(pooling)(torch.stack((x, -x)))
    torch.testing.assert_close(many, torch.stack((pooling(x), pooling(-x))))
    with torch.no_grad():
        assert not pooling(own).requires_grad


@pytest.mark.parametrize("name", POOLINGS)
def test_tracers_see_pytorchs_operators(name: str) -> None:
    model, x = nn.Sequential(POOLINGS[name]()), image()
    with torch.no_grad():
        expected = model(x)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
        traced = torch.jit.trace(model, (x,))
        for call in (compiled, program.module(), traced):
            torch.testing.assert_close(call(x), expected)
    assert not any("hetconv" in str(n.target) for n in program.graph.nodes)
    (step,) = (n for n in fx.symbolic_trace(model).graph.nodes if n.op.startswith("call"))
    assert step.op == "call_module"


@pytest.mark.parametrize("name", POOLINGS)
def test_copies_are_the_same(name: str) -> None:
    pooling, x = POOLINGS[name](backend="cpu"), image()
    for twin in (copy.deepcopy(pooling), pickle.loads(pickle.dumps(pooling))):
        assert repr(twin) == repr(pooling)
        assert twin.describe() == pooling.describe()
        assert torch.equal(twin(x), pooling(x))


BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "rank": (lambda: AveragePool()(torch.randn(2, 3)), errors.ArgumentError, "input shape"),
    "integers": (
        lambda: AveragePool()(torch.ones(1, 2, 3, 3, dtype=torch.int32)),
        errors.InputTypeError,
        "int32",
    ),
    "layout": (
        lambda: AveragePool()(torch.ones(1, 2, 3, 3).to_sparse()),
        errors.InputTypeError,
        "sparse",
    ),
    "no pixels": (lambda: AveragePool()(torch.randn(1, 2, 0, 3)), errors.ArgumentError, "0x3"),
    "small image": (
        lambda: AveragePool(Pool((4, 4), (1, 1), (0, 0)))(image(1, 2, 3, 3)),
        errors.ArgumentError,
        "size to be pooled",
    ),
    "windows": (
        lambda: AveragePool(Pool((2, 2), (0, 1), (0, 0))),
        errors.ArgumentError,
        "stride of a pool",
    ),
    "output size": (lambda: AveragePool(output_size=(0, 1)), errors.ArgumentError, "output_size"),
    "flag": (lambda: AveragePool(inside=1), errors.ArgumentError, "inside"),  # type: ignore
    "several pixels": (
        lambda: AveragePool(output_size=(2, 2), keepdim=False),
        errors.ArgumentError,
        "without keepdim",
    ),
    "backend": (lambda: AveragePool(backend="none"), errors.BackendError, "none"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_in_words(name: str) -> None:
    call, error, words = BAD[name]
    with pytest.raises(error, match=words):
        call()
