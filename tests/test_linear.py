# SPDX-License-Identifier: Apache-2.0
"""SupportLinear: a pruned ``nn.Linear``, with its argument order, shapes and numbers."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F_
from layers import DTYPES, assert_as_good
from torch import nn

import hetconv_kernels as hk
from hetconv_kernels.errors import ArgumentError, BackendError, InputTypeError, SupportError
from hetconv_kernels.nn import SupportLinear

IN, OUT = 10, 6


def support(density: float = 0.4) -> hk.Support:
    mask = np.random.default_rng(2).random((OUT, IN, 1, 1)) < density
    mask[2], mask[:, 7] = False, False
    return hk.Support.from_mask(mask)


def mask() -> torch.Tensor:
    return torch.tensor(support().mask).view(OUT, IN)


def data(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("shape", [(IN,), (5, IN), (2, 3, IN), (0, IN), (2, 0, IN), (1, IN)])
@pytest.mark.parametrize("backend", [None, *hk.available_backends("cpu")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_linear(dtype: torch.dtype, backend: str | None, shape: tuple[int, ...]) -> None:
    layer = SupportLinear(IN, OUT, dtype=dtype, support=support(), backend=backend)
    with torch.no_grad():
        layer.weight.masked_fill_(~mask(), float("nan"))
    weight = layer.weight.detach().masked_fill(~mask(), 0)
    results = []
    for kind in ("ours", "theirs", "truth"):
        to = torch.float64 if kind == "truth" else dtype
        x = data(*shape, dtype=dtype).to(to).requires_grad_()
        w, b = (t.detach().to(to).clone().requires_grad_() for t in (weight, layer.bias))
        leaves = (x, layer.weight, layer.bias) if kind == "ours" else (x, w, b)
        y = layer(x) if kind == "ours" else F_.linear(x, w, b)
        grads = torch.autograd.grad(y, leaves, data(*y.shape).to(to))
        results.append((y, grads[0], grads[1].masked_fill(~mask(), 0), grads[2]))
        if kind == "ours":
            assert (grads[1][~mask()] == 0).all()
    for name, ours, theirs, truth in zip(("y", "dx", "dw", "db"), *results, strict=True):
        assert_as_good(name, ours, theirs, truth)


def test_non_contiguous_input() -> None:
    layer = SupportLinear(IN, OUT, support=support())
    x = data(IN, 4, 5).transpose(0, 2)
    torch.testing.assert_close(layer(x), layer.to_linear()(x))


def test_signature_begins_as_linear() -> None:
    ours = list(inspect.signature(SupportLinear).parameters.values())
    theirs = list(inspect.signature(nn.Linear).parameters.values())
    assert [(p.name, p.default) for p in ours[: len(theirs)]] == [
        (p.name, p.default) for p in theirs
    ]
    assert {p.kind for p in ours[len(theirs) :]} == {inspect.Parameter.KEYWORD_ONLY}


def test_backend_is_followed() -> None:
    layer = SupportLinear(IN, OUT, support=support())
    expected = layer(data(3, IN))
    layer.backend = "reference"
    assert layer._backend_code() == 1
    torch.testing.assert_close(layer(data(3, IN)), expected)
    with hk.use_backend("vendor"):
        assert layer._backend_code() == 1
        layer.backend = None
        assert layer._backend_code() == 2
    with pytest.raises(BackendError, match="unknown"):
        layer.backend = "hand"


def test_from_and_to_linear() -> None:
    linear = nn.Linear(IN, OUT, bias=False, dtype=torch.bfloat16).eval()
    layer = SupportLinear.from_linear(linear, support())
    assert torch.equal(layer.weight, linear.weight * mask())
    assert not layer.training
    assert layer.bias is None
    with torch.no_grad():
        layer.weight.masked_fill_(~mask(), 3.0)
    for back in (layer.to_linear(), layer.freeze().to_linear()):
        assert torch.equal(back.weight, linear.weight * mask())
        assert (back.in_features, back.out_features, back.bias) == (IN, OUT, None)
        assert repr(back) == repr(linear)


def test_freeze_project_and_train() -> None:
    layer = SupportLinear(IN, OUT, support=support())
    optimizer = torch.optim.SGD(layer.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    layer(data(4, IN)).square().sum().backward()
    optimizer.step()
    assert torch.equal(layer.weight != 0, mask())
    y = layer(data(4, IN)).detach()
    torch.testing.assert_close(layer.freeze()(data(4, IN)), y)
    assert layer.weight.shape == (support().live,)
    assert layer.live_parameters() == support().live + OUT
    layer.thaw()
    assert layer.weight.shape == (OUT, IN)
    narrower = support(0.2) & support()
    optimizer = torch.optim.SGD(layer.parameters(), 0.1, momentum=0.9)
    layer(data(4, IN)).sum().backward()
    optimizer.step()
    layer.set_support(narrower, optimizer)
    assert (layer.weight != 0).sum() == narrower.live
    momentum = optimizer.state[layer.weight]["momentum_buffer"]
    assert (momentum[~torch.tensor(narrower.mask).view(OUT, IN)] == 0).all()


@pytest.mark.parametrize("frozen", [False, True], ids=["dense", "frozen"])
def test_checkpoints_and_copies(frozen: bool) -> None:
    first = SupportLinear(IN, OUT, support=support())
    y = first(data(4, IN))
    first = first.freeze() if frozen else first
    second = SupportLinear(IN, OUT, support=hk.Support.dense(IN, OUT, 1))
    second.load_state_dict(first.state_dict())
    assert second.support == first.support
    for layer in (second, copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
        torch.testing.assert_close(layer(data(4, IN)), y)
    linear = nn.Linear(IN, OUT)
    first.load_state_dict(linear.state_dict())
    torch.testing.assert_close(first.thaw().weight, linear.weight * mask())


def test_meta_device() -> None:
    layer = SupportLinear(IN, OUT, device="meta", support=support())
    assert layer(torch.empty(3, IN, device="meta")).shape == (3, OUT)
    assert layer.freeze().weight.shape == (support().live,)


def test_repr() -> None:
    layer = SupportLinear(IN, OUT, bias=False, support=support(), backend="vendor")
    assert repr(layer.freeze()) == (
        f"SupportLinear(in_features={IN}, out_features={OUT}, bias=False, support=mask, "
        f"density={support().density:.3g}, backend='vendor', frozen)"
    )


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (hk.Support.dense(IN, OUT, 3), SupportError, r"received \(6, 10, 3, 3\)"),
        (hk.Support.dense(OUT, IN, 1), SupportError, r"expected \(6, 10, 1, 1\)"),
        (mask(), InputTypeError, "received Tensor, expected a Support"),
    ],
    ids=["kernel", "transposed", "mask"],
)
def test_refused_supports(given: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SupportLinear(IN, OUT, support=given)
    with pytest.raises(error, match=message):
        SupportLinear.from_linear(nn.Linear(IN, OUT), given)


def test_refused_inputs() -> None:
    layer = SupportLinear(IN, OUT, support=support())
    with pytest.raises(InputTypeError, match="received Conv2d, expected"):
        SupportLinear.from_linear(nn.Conv2d(1, 1, 1), support())  # type: ignore[arg-type]
    for shape in [(), (IN + 1,), (IN, 3)]:
        with pytest.raises(ArgumentError, match=r"input features: received .*expected \[..., 10\]"):
            layer(data(*shape))
    with pytest.raises(InputTypeError, match="float64, expected the weight's"):
        layer(data(3, IN).double())
