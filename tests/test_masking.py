# SPDX-License-Identifier: Apache-2.0
"""Native masking: the engine's copies of weights, and where PyTorch's operators are used."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import fresh
import numpy as np
import pytest
import torch
from strategies import random_mask
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import hetconv_kernels as hk
from hetconv_kernels import Support, masking
from hetconv_kernels.packing import dense_weight, mask_, masked

needs_engine = pytest.mark.skipif(
    masking.native_engine() is None, reason="the CPU part is not built"
)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
# Filters, channels, kernel: less than a vector, with tails, and more than a thread's piece.
SHAPES = [(3, 5, 1, 1), (6, 4, 3, 3), (7, 33, 3, 2), (40, 200, 3, 3), (129, 1, 5, 5)]


@pytest.fixture(params=["native", "PyTorch"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The engine's masking, and PyTorch's own where there is no engine."""
    if request.param == "PyTorch":
        monkeypatch.setattr(masking, "native_engine", lambda: None)
    elif masking.native_engine() is None:
        pytest.skip("the CPU part is not built")
    return request.param


def made(shape: tuple[int, ...], dtype: torch.dtype, layout: Any) -> tuple[Support, Tensor, Tensor]:
    """A Support, a weight with NaN and Inf in dead and live places, and what it has to become."""
    support = Support.from_mask(random_mask(sum(shape), shape))
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(shape, generator=generator).to(dtype)
    odd = torch.rand(shape, generator=generator)
    w[odd < 0.1] = float("nan")
    w[(odd >= 0.1) & (odd < 0.2)] = float("-inf")
    w = w.contiguous(memory_format=layout)
    return support, w, torch.where(torch.tensor(support.mask), w, torch.zeros((), dtype=dtype))


def same(found: Tensor, expected: Tensor) -> bool:
    return torch.equal(found.nan_to_num(nan=7.0), expected.nan_to_num(nan=7.0)) and torch.equal(
        found.isnan(), expected.isnan()
    )


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("brief", [False, True], ids=["kept", "brief"])
def test_dead_entries_are_zero_whatever_they_hold_and_live_ones_are_kept(
    either: str, shape: tuple[int, ...], dtype: torch.dtype, layout: Any, brief: bool
) -> None:
    support, w, expected = made(shape, dtype, layout)
    before = w.clone()
    found = masked(support, w, brief)
    assert same(found, expected)
    assert found.is_contiguous(memory_format=layout)
    assert same(w, before), "the weight itself was changed"


@needs_engine
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_copy_can_be_in_the_layout_of_the_convolution(shape: Any, dtype: torch.dtype) -> None:
    support, w, expected = made(shape, dtype, torch.contiguous_format)
    found = masked(support, w, True, torch.channels_last)
    assert same(found, expected)
    assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gradient_is_masked_in_place(either: str, dtype: torch.dtype, layout: Any) -> None:
    support, w, expected = made(SHAPES[3], dtype, layout)
    address = w.data_ptr()
    found = mask_(support, w)
    assert same(found, expected)
    assert found.data_ptr() == address


@needs_engine
@pytest.mark.parametrize("isa", ["avx512", "avx2", "generic"])
def test_every_instruction_set_masks_and_multiplies(isa: str) -> None:
    from hetconv_kernels import _cpu

    if isa not in _cpu.isas():
        pytest.skip("this machine does not have it")
    here = Path(__file__)
    ran = fresh.python(
        "", "-q", "-p", "no:cacheprovider", here.name, "-k",
        "(native and float16) or layout_of_the_convolution or masks_as_it_reads",
        module="pytest", environment={"HETCONV_ISA": isa}, cwd=here.parent,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]
    assert " passed" in ran.stdout
    assert "skipped" not in ran.stdout


@needs_engine
def test_a_brief_copy_reuses_the_threads_memory_and_a_kept_one_does_not() -> None:
    support, w, _ = made(SHAPES[3], torch.float32, torch.contiguous_format)
    first, again = masked(support, w, True), masked(support, w, True)
    assert first.data_ptr() == again.data_ptr()
    kept = masked(support, w)
    assert kept.data_ptr() != first.data_ptr()
    others: list[int] = []
    worker = threading.Thread(target=lambda: others.append(masked(support, w, True).data_ptr()))
    worker.start()
    worker.join()
    assert others != [first.data_ptr()]


@needs_engine
def test_a_larger_weight_does_not_spoil_the_views_of_a_smaller_one() -> None:
    small, large = (
        made(SHAPES[1], torch.float32, LAYOUTS[0]),
        made((64, 300, 3, 3), torch.float32, LAYOUTS[0]),
    )
    for support, w, expected in (small, large, small, large):
        assert same(masked(support, w, True), expected)


# Who has to see it -------------------------------------------------------------------------------


class Seen(TorchDispatchMode):
    """Lists the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("shape", SHAPES[1:4], ids=str)
def test_an_observer_sees_operators(shape: tuple[int, ...]) -> None:
    support, w, expected = made(shape, torch.float32, torch.contiguous_format)
    masked(support, w)
    with Seen() as seen:
        found = dense_weight(support, w, torch.float32)
    assert seen.names
    assert same(found, expected)


@pytest.mark.parametrize("shape", SHAPES[1:4], ids=str)
def test_derivatives_go_through_a_mask(either: str, shape: tuple[int, ...]) -> None:
    support, _, _ = made(shape, torch.float64, torch.contiguous_format)
    mask = torch.tensor(support.mask)
    w = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    t = torch.randn(shape, dtype=torch.float64)
    dense_weight(support, w, w.dtype).backward(t)
    assert torch.equal(w.grad, t * mask)  # type: ignore[arg-type]
    plain = w.detach()
    with torch.no_grad():
        _, tangent = torch.func.jvp(lambda v: dense_weight(support, v, v.dtype), (plain,), (t,))
        assert torch.equal(tangent, t * mask)
        batch = torch.func.vmap(lambda v: dense_weight(support, v, v.dtype))(
            torch.stack([plain, t])
        )
        assert torch.equal(batch, torch.stack([plain, t]) * mask)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(plain, t)
        tangent = forward_ad.unpack_dual(dense_weight(support, dual, plain.dtype)).tangent
        assert tangent is not None
        assert torch.equal(tangent, t * mask)


# Products ---------------------------------------------------------------------------------------


@needs_engine
@pytest.mark.parametrize("features", [(1, 1), (7, 3), (64, 33), (200, 129), (1030, 65)], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("bias", [False, True])
def test_a_product_masks_as_it_reads(features: tuple[int, int], rows: int, bias: bool) -> None:
    """Small integers, whose sums are exact in any order."""
    c, f = features
    support = Support.from_mask(random_mask(c, (f, c, 1, 1)))
    drawn = np.random.default_rng(0)
    layer = hk.nn.SupportLinear(c, f, bias, support=support, backend="vendor")
    exists = torch.tensor(support.mask[:, :, 0, 0])
    with torch.no_grad():
        whole = torch.tensor(drawn.integers(-8, 8, (f, c)), dtype=torch.float32)
        layer.weight.copy_(torch.where(exists, whole, float("nan")))
        if bias:
            layer.bias.copy_(torch.tensor(drawn.integers(-8, 8, f)))
        x = torch.tensor(drawn.integers(-8, 8, (rows, c)), dtype=torch.float32)
        expected = x @ (whole * exists).T + (layer.bias if bias else 0)
        assert torch.equal(layer(x), expected)
        assert torch.equal(layer(x[:, None]), expected[:, None])
        for changed in (x.double(), x.bfloat16()):
            other = layer.to(changed.dtype)
            assert torch.allclose(other(changed).float(), expected, rtol=2e-2)
            layer.float()


@needs_engine
def test_a_product_sees_every_write_to_the_weight() -> None:
    support = Support.from_mask(random_mask(0, (9, 40, 1, 1)))
    layer, x = hk.nn.SupportLinear(40, 9, support=support), torch.randn(1, 40)
    with torch.no_grad():
        for _ in range(3):
            layer.weight.data.mul_(1.5)
            torch.testing.assert_close(layer(x), layer.to_linear()(x))
            layer.weight = torch.nn.Parameter(layer.weight.t().contiguous().t())  # other strides
            torch.testing.assert_close(layer(x), layer.to_linear()(x))


@needs_engine
@pytest.mark.parametrize("features", [(1, 1), (3, 5), (17, 16), (40, 500)], ids=str)
@pytest.mark.parametrize(
    ("count", "kernel"),
    [(1, (1, 1)), (3, (3, 3)), (9, (3, 3)), (25, (5, 5)), (5, (2, 8)), (40, (7, 7))],
)
@pytest.mark.parametrize("last", [False, True])
def test_images_are_summed_by_the_coefficients_that_exist(
    features: tuple[int, int], count: int, kernel: tuple[int, int], last: bool
) -> None:
    """Small integers, whose sums are exact in any order; the rest of the memory stays as it is."""
    f, c = features
    drawn = np.random.default_rng(f + count)
    whole = torch.tensor(drawn.integers(-8, 8, (f, c, count)), dtype=torch.float32)
    mask = torch.tensor(drawn.random((f, c, count)) < 0.4)
    images = torch.tensor(drawn.integers(-8, 8, (count, *kernel)), dtype=torch.float32)
    w = torch.where(mask, whole, float("nan"))
    turned = mask.transpose(1, 2).contiguous()
    expected = torch.einsum("fcu,uij->fcij", torch.where(mask, whole, 0.0), images)
    for brief in (False, True):
        found = masking.ImageSums(turned, images, last)(w, brief)
        layout = torch.channels_last if last else torch.contiguous_format
        assert found.is_contiguous(memory_format=layout)
        assert torch.equal(found, expected)


@needs_engine
def test_images_of_too_many_taps_are_refused() -> None:
    w, mask = torch.ones(2, 3, 1), torch.ones(2, 1, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="1 to 1024 taps"):
        masking.ImageSums(mask, torch.ones(1, 33, 32), last=False)(w)


@pytest.mark.parametrize("kernel", [1, 3, (1, 7), 5, (2, 3)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_trained_layer_of_frequencies_ignores_dead_coefficients(
    either: str, kernel: Any, dtype: torch.dtype
) -> None:
    size = (kernel, kernel) if isinstance(kernel, int) else kernel
    chosen = random_mask(3, (6, 5, *size))
    layer = hk.nn.FrequencyConv2d(5, 6, kernel, padding="same", coefficients=chosen, path="spatial")
    layer, x = layer.to(dtype).eval(), torch.randn(2, 5, 9, 9).to(dtype)
    with torch.no_grad():
        dead = ~torch.tensor(layer.mix.support.mask)
        layer.mix.weight[dead] = float("nan")
        expected = layer.to_conv2d().double()(x.double())
        bound = 2.0 ** (-8 if dtype is torch.bfloat16 else -10) if dtype.itemsize == 2 else 1e-5
        for _ in range(2):
            error = (layer(x).double() - expected).abs().max() / expected.abs().max()
            assert error < 4 * bound
            layer.mix.weight.data.mul_(-0.5)  # seen, though it leaves no version
            expected = layer.to_conv2d().double()(x.double())
    grads = layer(x.requires_grad_()).float().square().sum()
    grads.backward()
    assert not layer.mix.weight.grad.isnan().any()
    assert not layer.mix.weight.grad[dead].any()


@needs_engine
def test_a_gradient_of_the_input_keeps_the_kernels_that_it_was_computed_with() -> None:
    """Of two layers that transform at each call; a brief result would be the second one's."""
    layers = [hk.nn.FrequencyConv2d(4, 4, 3, path="spatial").requires_grad_(False) for _ in "ab"]
    x = torch.randn(1, 4, 6, 6, requires_grad=True)
    ys = [layer(x) for layer in layers]
    with torch.no_grad():
        layers[1](x)
    found = torch.autograd.grad(ys[0].sum(), x)[0]
    plain = layers[0].to_conv2d()
    torch.testing.assert_close(found, torch.autograd.grad(plain(x).sum(), x)[0])
