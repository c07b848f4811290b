# SPDX-License-Identifier: Apache-2.0
"""The closed cycle: gradcheck, gradgradcheck and third order, and no work that nobody asked for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import hetconv_kernels as hk
from hetconv_kernels import ops
from hetconv_kernels.autograd import EagerCall, WeightKind
from hetconv_kernels.problem import make_geometry

SUPPORTS = {
    "het": hk.Support.het(4, 3, 3, p=2),
    "interleaved": hk.Support.het(5, 4, 3, p=3, order="interleaved"),
    "grouped": hk.Support.grouped(4, 4, 3, 2),
    "self": hk.Support.self_grouped([0, 1, 0], [[True, False, True], [False, True, True]], (3, 2)),
}
GEOMETRIES = {
    "plain": {"padding": 1},
    "strided": {"stride": 2, "padding": (1, 0, 2, 1)},
    "dilated": {"dilation": (2, 1), "padding": 2},
}
# Engines that keep float64 in full precision.
BACKENDS = [name for name in hk.available_backends() if name in ("reference", "vendor", "cpu")]


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("form", ["dense", "live"])
def test_first_and_second_derivatives(support: str, geometry: str, form: str, backend: str) -> None:
    s = SUPPORTS[support]
    weight = double(*s.shape) if form == "dense" else double(s.live)

    def run(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return hk.functional.support_conv2d(x, w, s, b, **GEOMETRIES[geometry], backend=backend)

    inputs = (double(2, s.channels, 5, 4), weight, double(s.filters))
    assert gradcheck(run, inputs, fast_mode=True)
    assert gradgradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("verb", ["dgrad", "wgrad"])
def test_dgrad_and_wgrad_differentiate_by_themselves(verb: str, backend: str) -> None:
    s = SUPPORTS["het"]
    geometry = make_geometry(s, 2, 1)
    call = EagerCall(geometry, (5, 4), hk.backends.CODES[backend], False)
    dy = double(2, s.filters, *geometry.output_size(5, 4))
    run: Callable[..., Tensor]
    if verb == "dgrad":
        run, inputs = call.dgrad, (dy, double(*s.shape))
    else:
        kind = WeightKind(s.shape, torch.float64)
        run, inputs = lambda dy, x: call.wgrad(dy, x, kind), (dy, double(2, s.channels, 5, 4))
    assert gradcheck(run, inputs, fast_mode=True)
    assert gradgradcheck(run, inputs, fast_mode=True)


def test_third_derivative_equals_pytorchs() -> None:
    s = SUPPORTS["het"]
    x, w = double(1, s.channels, 4, 4), double(*s.shape)
    mask = torch.tensor(s.mask)

    def third(conv: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        value = conv(x, w).pow(4).sum()
        for _ in range(3):
            (gradient,) = torch.autograd.grad(value, w, create_graph=True)
            value = gradient.square().sum()
        return gradient.detach()

    mine = third(lambda x, w: hk.functional.support_conv2d(x, w, s, padding=1))
    theirs = third(lambda x, w: torch.nn.functional.conv2d(x, w * mask, padding=1))
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(
    ("x_grad", "w_grad", "expected"),
    [(True, False, {"dgrad"}), (False, True, {"wgrad"}), (True, True, {"dgrad", "wgrad"})],
)
def test_only_the_gradients_that_are_needed_run(
    x_grad: bool, w_grad: bool, expected: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    for verb in ("dgrad", "wgrad"):
        original = getattr(ops, f"run_{verb}")

        def spy(*args, _verb=verb, _run=original, **kwargs):  # type: ignore[no-untyped-def]
            ran.append(_verb)
            return _run(*args, **kwargs)

        monkeypatch.setattr(ops, f"run_{verb}", spy)
    s = SUPPORTS["het"]
    x = torch.randn(1, 4, 5, 5, requires_grad=x_grad)
    w = torch.randn(*s.shape, requires_grad=w_grad)
    hk.functional.support_conv2d(x, w, s, padding=1).sum().backward()
    assert sorted(ran) == sorted(expected)


def test_operands_that_no_gradient_needs_are_not_kept() -> None:
    s = SUPPORTS["het"]
    x, w = torch.randn(1, 4, 5, 5, requires_grad=True), torch.randn(*s.shape)
    y = hk.functional.support_conv2d(x, w, s, padding=1)
    kept = [t for t in y.grad_fn.saved_tensors if t is not None]
    assert [t.shape for t in kept] == [w.shape], "x is kept although the weight is fixed"


def test_two_backwards_give_the_same_bits() -> None:
    layer = hk.nn.HetConv2d(16, 24, 3, padding=1, p=4)
    x = torch.randn(3, 16, 9, 9)
    runs = [torch.autograd.grad(layer(x).square().sum(), layer.weight)[0] for _ in range(2)]
    assert torch.equal(*runs)
