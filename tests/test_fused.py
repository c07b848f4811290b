# SPDX-License-Identifier: Apache-2.0
"""Fusing: ``act(bn(conv(x)) + residual)`` as one module, equal to the parts in evaluation mode."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F_
from layers import BUILDERS, DTYPES, C, F, assert_as_good, image
from torch import Tensor, nn

import hetconv_kernels as hk
from hetconv_kernels.errors import ArgumentError, InputTypeError, SupportError
from hetconv_kernels.nn import FusedConv2d, HetConv2d, SupportLinear, fuse

ACTS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "relu": F_.relu,
    "relu6": F_.relu6,
    "silu": F_.silu,
    "gelu": F_.gelu,
}
SOURCES: dict[str, Callable[..., Any]] = {
    "conv2d": lambda **kw: nn.Conv2d(C, F, 3, **kw),
    "conv2d-grouped": lambda **kw: nn.Conv2d(C, F, 3, groups=4, **kw),
    **{kind: lambda b=build, **kw: b(3, **kw) for kind, build in BUILDERS.items()},
}


def norm(dtype: torch.dtype = torch.float32, **kw: Any) -> nn.BatchNorm2d:
    """Builds a batch normalisation whose every number matters."""
    bn = nn.BatchNorm2d(F, eps=1e-3, **kw)
    with torch.no_grad():
        if bn.running_mean is not None and bn.running_var is not None:
            bn.running_mean.uniform_(-1, 1)
            bn.running_var.uniform_(0.5, 2)
        if bn.affine:
            bn.weight.uniform_(-2, 2)
            bn.bias.uniform_(-3, 3)
    return bn.to(dtype).eval()


def apart(conv: Any, bn: Any, act: str, x: Tensor, residual: Tensor | None) -> Tensor:
    y = conv(x) if bn is None else bn(conv(x))
    return ACTS[act](y if residual is None else y + residual)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("kind", SOURCES)
def test_equals_the_parts(kind: str, act: str) -> None:
    conv, bn = SOURCES[kind](stride=2, padding=1), norm()
    x, residual = image(), torch.randn(2, F, 5, 4)
    before = [p.detach().clone() for p in (*conv.parameters(), *bn.parameters())]
    for parts in (conv, bn), (conv, None):
        fused = fuse(*parts, act=act)
        for extra in (residual, None):
            expected = apart(*parts, act, x, extra)
            torch.testing.assert_close(fused(x, extra), expected)
            with torch.no_grad():
                torch.testing.assert_close(fused(x, extra), expected)
    after = [*conv.parameters(), *bn.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("backend", hk.available_backends("cpu"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["conv2d", "support", "grouped"])
def test_as_accurate_as_the_parts_in_every_dtype(
    kind: str, dtype: torch.dtype, backend: str
) -> None:
    conv, bn = SOURCES[kind](padding=1, dtype=dtype), norm(dtype)
    x, residual = image(dtype=dtype), torch.randn(2, F, 9, 7).to(dtype)
    fused = fuse(conv, bn, "silu")
    with torch.no_grad(), hk.use_backend(backend):
        y = fused(x, residual)
        theirs = apart(conv, bn, "silu", x, residual)
        exact = [copy.deepcopy(m).double() for m in (conv, bn)]
        truth = apart(*exact, "silu", x.double(), residual.double())
    assert y.dtype == dtype
    assert_as_good("y", y, theirs, truth)


@pytest.mark.parametrize(
    ("conv_kw", "bn_kw"),
    [
        ({"bias": False}, {}),
        ({}, {"affine": False}),
        ({"padding": "same"}, {}),
        ({"padding": (0, 2), "dilation": (1, 2)}, {}),
    ],
    ids=["no-bias", "no-affine", "same", "geometry"],
)
@pytest.mark.parametrize("kind", SOURCES)
def test_forms_of_the_parts(kind: str, conv_kw: dict[str, Any], bn_kw: dict[str, Any]) -> None:
    conv, bn = SOURCES[kind](**conv_kw), norm(**bn_kw)
    torch.testing.assert_close(fuse(conv, bn, "relu")(image()), bn(conv(image())).relu())


@pytest.mark.parametrize("kind", BUILDERS)
def test_dead_entries_and_frozen_layers(kind: str) -> None:
    conv = SOURCES[kind]()
    expected = fuse(conv, norm())
    torch.manual_seed(9)
    bn = norm()
    y = bn(conv(image()))
    if kind != "grouped":
        with torch.no_grad():
            conv.weight.masked_fill_(torch.tensor(~conv.support.mask), float("nan"))
    fused = fuse(conv, bn)
    assert fused.weight.shape == expected.weight.shape == (conv.support.live,)
    assert not list(fused.parameters())
    torch.testing.assert_close(fused(image()), y)
    torch.testing.assert_close(fuse(conv.freeze(), bn)(image()), y)


def test_a_filter_without_weights_keeps_its_shift() -> None:
    conv, bn = SOURCES["support"](bias=False), norm()
    y = fuse(conv, bn)(image())
    assert conv.support.mask[3].sum() == 0
    assert bn.running_mean is not None
    shift = bn(torch.zeros(1, F, 1, 1))[0, 3]
    torch.testing.assert_close(y[:, 3], shift.expand_as(y[:, 3]))


def test_layout_follows_the_input() -> None:
    fused = fuse(SOURCES["support"](padding=1), norm(), "relu")
    x = image().to(memory_format=torch.channels_last)
    residual = torch.randn(2, F, 9, 7)
    for extra in (None, residual):
        assert fused(x, extra).is_contiguous(memory_format=torch.channels_last)
        assert fused(image(), extra).is_contiguous()
    assert fused(image(0, C, 9, 7)).shape == (0, F, 9, 7)


@pytest.mark.parametrize("act", ACTS)
def test_gradients_by_input_and_residual(act: str) -> None:
    conv, bn = SOURCES["support"](dtype=torch.float64), norm(torch.float64)
    fused = fuse(conv, bn, act)
    x = image(1, C, 4, 4).double().requires_grad_()
    residual = torch.randn(1, F, 2, 2, dtype=torch.float64, requires_grad=True)
    ours = torch.autograd.grad(fused(x, residual).square().sum(), (x, residual))
    theirs = torch.autograd.grad(apart(conv, bn, act, x, residual).square().sum(), (x, residual))
    torch.testing.assert_close(ours, theirs)


def test_autocast() -> None:
    conv = SOURCES["het"](padding=1)
    fused = fuse(conv, act="relu")
    residual = torch.randn(2, F, 9, 7)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = fused(image(), residual)
        expected = (conv(image()) + residual.bfloat16()).relu()
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=2**-7, atol=2**-6)


def test_backend_repr_and_copies() -> None:
    fused = fuse(SOURCES["het"](backend="reference", stride=2), norm(), "relu6")
    assert fused.backend == "reference"
    fused.backend = "vendor"
    assert fused._backend_code() == 2
    assert "kernel_size=(3, 3), stride=(2, 2), act=relu6, support=het(p=4, blocked)" in repr(fused)
    y = fused(image())
    assert torch.equal(copy.deepcopy(fused)(image()), y)
    torch.testing.assert_close(fused.double()(image().double()).float(), y)


def test_state_restores_and_refuses_another_support() -> None:
    def fused(order: str) -> FusedConv2d:
        return fuse(HetConv2d(C, F, 3, order=order), norm(), "relu")

    first, second = fused("blocked"), fused("blocked")
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    second.load_state_dict(state)
    assert torch.equal(second(image()), first(image()))
    other = fused("interleaved")
    assert other.weight.shape == first.weight.shape  # nothing else would tell them apart
    with pytest.raises(SupportError, match=r"blocked.*expected Support\(het\(p=4, interleaved"):
        other.load_state_dict(state)


def test_later_training_of_the_originals_leaves_it_alone() -> None:
    conv = SOURCES["support"]()
    fused = fuse(conv)
    y = fused(image())
    with torch.no_grad():
        conv.weight.mul_(2)
    assert torch.equal(fused(image()), y)


@pytest.mark.parametrize(
    ("parts", "act", "error", "message"),
    [
        ((nn.Conv2d(C, F, 3),), "tanh", ArgumentError, "'tanh', expected one of none, relu, relu6"),
        ((nn.Linear(C, F),), "none", InputTypeError, "received Linear, expected an nn.Conv2d or"),
        (
            (SupportLinear(C, F, support=hk.Support.dense(C, F, 1)),),
            "none",
            InputTypeError,
            "received SupportLinear",
        ),
        (
            (nn.Conv2d(C, F, 3, padding=1, padding_mode="reflect"),),
            "none",
            ArgumentError,
            "received reflect, expected 'zeros'. Leave this layer unfused",
        ),
        (
            (HetConv2d(C, F, 3, padding=1, padding_mode="circular"),),
            "none",
            ArgumentError,
            "received circular",
        ),
        (
            (nn.Conv2d(C, F, 3), nn.BatchNorm2d(F + 1)),
            "none",
            ArgumentError,
            "features of bn: received 9, expected 8",
        ),
        (
            (nn.Conv2d(C, F, 3), nn.BatchNorm2d(F, track_running_stats=False)),
            "none",
            ArgumentError,
            "no running statistics",
        ),
        (
            (nn.Conv2d(C, F, 3), nn.GroupNorm(2, F)),
            "none",
            InputTypeError,
            "bn: received GroupNorm, expected an nn.BatchNorm2d",
        ),
    ],
    ids=[
        *("act", "linear", "support-linear", "padding-mode", "layer-padding-mode"),
        *("features", "statistics", "group-norm"),
    ],
)
def test_refusals(parts: Any, act: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fuse(*parts, act=act)


@pytest.mark.parametrize(
    ("residual", "message"),
    [
        (torch.zeros(2, F, 7, 6), r"residual: received \(2, 8, 7, 6\).*output's \(2, 8, 7, 5\)"),
        (torch.zeros(F, 1, 1), "residual"),
        (torch.zeros(2, F, 7, 5, dtype=torch.float64), "residual: .*float64.*, expected"),
    ],
    ids=["size", "broadcast", "dtype"],
)
def test_refused_residuals(residual: Tensor, message: str) -> None:
    fused = fuse(SOURCES["support"]())
    fused(image(), torch.zeros(2, F, 7, 5))
    with pytest.raises(ArgumentError, match=message):
        fused(image(), residual)
