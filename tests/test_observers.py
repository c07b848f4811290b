# SPDX-License-Identifier: Apache-2.0
"""Whatever watches PyTorch sees our operators, and computes what the eager call computes."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from layers import C, build, image
from networks import interleaved, network
from observing import OBSERVERS, Dispatches, Functions, dispatch_mode, function_mode, profiler
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.profiler import profile

import hetconv_kernels as hk
from hetconv_kernels import observers
from hetconv_kernels.functional import support_conv2d

OURS = "hetconv::"
BACKENDS = ["auto", *hk.available_backends("cpu")]


def linear() -> nn.Module:
    support = hk.Support.from_mask(torch.rand(6, C, 1, 1).gt(0.5).numpy())
    return nn.Sequential(
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), hk.nn.SupportLinear(C, 6, support=support)
    )


def optimised() -> nn.Module:
    model = nn.Sequential(
        build("het"), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(1, -1)
    ).eval()
    return hk.optimize(model, image()).model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "layer": lambda: build("het"),
    "frozen": lambda: build("support").freeze(),
    "grouped": lambda: build("grouped"),
    "linear": linear,
    "frequency": lambda: hk.nn.FrequencyConv2d(C, 8, 3),
    "optimised": optimised,
}


@pytest.fixture(params=MODELS, ids=str)
def model(request) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[request.param]().eval()


@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
@pytest.mark.parametrize("observer", OBSERVERS.values(), ids=OBSERVERS.keys())
def test_every_observer_sees_our_operator_and_gets_our_result(model, observer, grad: bool) -> None:
    x = image()
    with torch.no_grad():
        expected = model(x)
    with torch.set_grad_enabled(grad), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seen, y = observer(model, x)
    assert any(name.startswith((OURS, "hetconv.")) for name in seen), seen
    torch.testing.assert_close(y.detach(), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
def test_a_jit_trace_is_right_at_other_sizes_and_after_a_file(backend: str, grad: bool) -> None:
    with hk.use_backend(backend), torch.set_grad_enabled(grad):
        layer = build("het", padding=1)
        traced = torch.jit.trace(layer, image())
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        loaded = torch.jit.load(file)
        # Memory that is not the convolution's would hold these.
        poison = [torch.full((3, 8, 11, 13), float("nan")) for _ in range(4)]
        del poison
        x = image(3, C, 11, 13)
        for twin in (traced, loaded):
            torch.testing.assert_close(twin(x), layer(x))
        x.requires_grad_()
        with torch.enable_grad():
            expected = torch.autograd.grad(layer(x).square().sum(), (x, layer.weight))
            found = torch.autograd.grad(loaded(x).square().sum(), (x, *loaded.parameters()))
    torch.testing.assert_close(found[0], expected[0])
    assert any(f.shape == expected[1].shape and torch.allclose(f, expected[1]) for f in found)


@pytest.mark.parametrize("form", ["converted", "optimised"])
def test_a_jit_trace_of_a_network_computes_what_the_network_computes(form: str) -> None:
    model, x = network("resnet20")
    model = interleaved(model)
    if form == "optimised":
        model = hk.optimize(model, x).model
    with torch.no_grad():
        traced = torch.jit.trace(model, x, check_trace=False)
        assert str(traced.inlined_graph).count("hetconv::fprop") > 5
        y = torch.randn_like(x)
        torch.testing.assert_close(traced(y), model(y))


def test_a_gradient_is_observed_where_it_is_computed() -> None:
    """The forward may run before the observer begins."""
    layer, x = build("het"), image().requires_grad_()
    y = layer(x)
    with Dispatches() as mode:
        y.sum().backward()
    assert {"hetconv::dgrad", "hetconv::wgrad"} <= set(mode.seen)
    expected = x.grad.clone()
    x.grad = None
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, expected)


# functorch's levels ------------------------------------------------------------------------------

AROUND: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda f: f,
    "profiler": lambda f: lambda x: profiler(f, x)[1],
    "dispatch-mode": lambda f: lambda x: dispatch_mode(f, x)[1],
    "function-mode": lambda f: lambda x: function_mode(f, x)[1],
    "make-fx": lambda f: lambda x: make_fx(f)(x)(x),
    "compile": lambda f: torch.compile(f, backend="aot_eager"),
}


def dual(f: Callable[[Tensor], Tensor], x: Tensor, t: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, t))).tangent


TRANSFORMS: dict[str, Callable[[Any], Any]] = {
    "grad": lambda f: torch.func.grad(lambda x: f(x).square().sum()),
    "vmap": lambda f: lambda x: torch.vmap(f)(x[:, None]).squeeze(1),
    "jvp": lambda f: lambda x: torch.func.jvp(f, (x,), (x.sin(),))[1],
    "dual": lambda f: lambda x: dual(f, x, x.sin()),
    "vjp": lambda f: lambda x: torch.func.vjp(f, x)[1](f(x))[0],
    "jvp-of-grad": lambda f: (
        lambda x: torch.func.jvp(torch.func.grad(lambda a: f(a).square().sum()), (x,), (x.sin(),))[
            1
        ]
    ),
}
# Loud, not wrong: the compiler takes no operator's reverse mode through functorch's levels.
REFUSED = {("compile", "grad"), ("compile", "vjp")}
PAIRS = [
    (around, transform)
    for around in AROUND
    for transform in TRANSFORMS
    # Refused too, but torch then forgets to leave the levels that it entered.
    if (around, transform) not in {("compile", "jvp-of-grad"), ("compile", "dual")}
]


@pytest.mark.parametrize(("around", "transform"), PAIRS)
def test_transforms_keep_their_meaning_under_every_observer(around: str, transform: str) -> None:
    torch.compiler.reset()
    layer, twin = build("het"), build("het").to_conv2d()
    layer.load_state_dict(twin.state_dict())
    x = image()
    function = AROUND[around](TRANSFORMS[transform](layer))
    if (around, transform) in REFUSED:
        with pytest.raises(Exception, match=r"setup_context|Dynamo|dynamo"):
            function(x)
        return
    torch.testing.assert_close(function(x), TRANSFORMS[transform](twin)(x))


def test_tangents_go_through_the_raw_operators() -> None:
    """torch.library drops tangents silently: a tangent of zeros where the function has another."""
    layer = build("het")
    geometry, x, w = layer._geometry, image(), layer.weight.detach()
    bits = hk.packing.bits_on(layer.support, x.device)
    ints, ops = geometry.ints(9, 7), torch.ops.hetconv
    scale, shift = torch.linspace(1, 2, 8), torch.linspace(-1, 1, 8)
    residual = torch.randn(2, 8, 7, 5)
    dy = torch.randn(2, 8, 7, 5)

    def plain(x, w, scale, shift, residual):
        y = nn.functional.conv2d(x, w * torch.from_numpy(layer.support.mask))
        y = y * scale[:, None, None] + shift[:, None, None] + residual
        return torch.nn.functional.silu(y)

    def ours(x, w, scale, shift, residual):
        return ops.fprop(x, w, bits, scale, shift, residual, "silu", ints, 0)

    given = (x, w, scale, shift, residual)
    tangents = tuple(torch.randn_like(t) for t in given)
    torch.testing.assert_close(
        torch.func.jvp(ours, given, tangents), torch.func.jvp(plain, given, tangents)
    )
    tx, tw, tdy = tangents[0], tangents[1], torch.randn_like(dy)
    bilinear = {
        "dgrad": (lambda a, b: ops.dgrad(a, b, bits, ints, 0), (dy, w), (tdy, tw)),
        "wgrad": (
            lambda a, b: ops.wgrad(a, b, bits, w.shape, w.dtype, ints, 0),
            (dy, x),
            (tdy, tx),
        ),
    }
    for run, (a, b), (ta, tb) in bilinear.values():
        _, found = torch.func.jvp(run, (a, b), (ta, tb))
        torch.testing.assert_close(found, run(ta, b) + run(a, tb))


# Tensors whose memory is not their value ---------------------------------------------------------


def negated() -> Tensor:
    """An ordinary float tensor to look at, whose memory holds the opposite sign."""
    x = torch.randn(2, C, 9, 7, dtype=torch.cfloat).conj().imag
    assert x.is_neg()
    return x


@pytest.mark.parametrize("transform", ["none", *TRANSFORMS])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_negated_view_counts_with_its_sign(backend: str, transform: str) -> None:
    layer, x = build("het", backend=backend), negated()
    function = TRANSFORMS[transform](layer) if transform != "none" else layer
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(function(x), function(x.resolve_neg().clone()))
    w = torch._neg_view(layer.weight.detach())
    y = support_conv2d(image(), w, layer.support, backend=backend)
    torch.testing.assert_close(y, support_conv2d(image(), -layer.weight, layer.support))


def test_zeros_without_memory_are_zeros() -> None:
    layer = build("het")
    x = torch._efficientzerotensor(2, C, 9, 7)

    def function(a: Tensor) -> Tensor:
        return layer(a) + 0 * layer(torch.zeros_like(a))

    _, tangent = torch.func.jvp(function, (image(),), (x,))
    assert tangent.eq(0).all()


def test_fake_and_meta_tensors_give_shapes_and_no_values() -> None:
    layer = build("het")
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = layer(mode.from_tensor(image()))
    assert type(y).__name__ == "FakeTensor"
    assert y.shape == (2, 8, 7, 5)
    assert build("het").to("meta")(image().to("meta")).is_meta


# The list itself ---------------------------------------------------------------------------------


def test_every_dispatch_key_but_those_listed_is_an_observer() -> None:
    """Also one that PyTorch adds: it is not listed, so it is one."""
    known = {*observers.ORDINARY, *observers.LEVELS}
    plain = torch._C._dispatch_keys(torch.empty(0))
    ordinary = {
        # Bits that an ordinary tensor has anyway, ends of ranges, and aliases that are no keys.
        "Undefined", "Dense", "AutogradFunctionality", "CompositeExplicitAutogradNonFunctional",
        "CompositeExplicitAutograd", "CompositeImplicitAutogradNestedTensor",
        "CompositeImplicitAutograd", "Autograd",
    }  # fmt: skip
    found = []
    for name, key in torch._C.DispatchKey.__members__.items():
        if name in known | ordinary or name.startswith(("StartOf", "EndOf")):
            continue
        try:
            bits = plain.add(key).raw_repr()
        except RuntimeError:
            continue  # an alias
        if bits != plain.raw_repr() and not bits & observers._STRANGE:
            found.append(name)
    assert found == []
    assert all(hasattr(torch._C.DispatchKey, name) for name in known)


def test_pytorch_lists_no_modes_and_levels_but_those_tried_here() -> None:
    assert set(torch._C._TorchDispatchModeKey.__members__) == {"FUNCTIONAL", "PROXY", "FAKE"}
    assert set(torch._C._functorch.TransformType.__members__) == {
        "Torch", "Grad", "Jvp", "Functionalize", "Vmap",
    }  # fmt: skip


def test_an_ordinary_call_takes_the_short_cut(monkeypatch) -> None:
    """In every ordinary state: else it would cost the dispatcher, and nobody would notice."""
    layer, x = build("het"), image()

    def fail(*_: Any) -> None:
        raise AssertionError("an ordinary call went through the operator")

    monkeypatch.setattr(hk.functional, "_operator", fail)
    monkeypatch.setattr(hk.autograd.EagerCall, "through_ops", fail)
    layer(x).sum().backward()
    with torch.no_grad():
        layer(x)
    with torch.inference_mode():
        layer(image())
    with torch.autocast("cpu", torch.bfloat16):
        layer(x)
    with torch.device("cpu"):
        layer(x)
    with torch.autograd.graph.save_on_cpu(), torch.autograd.detect_anomaly(check_nan=False):
        layer(x).sum().backward()
    torch.vmap(layer)(x[None])
    torch.func.grad(lambda a: layer(a).sum())(x)
    torch.func.jvp(layer, (x,), (x,))


@pytest.mark.parametrize(
    "enter",
    [enable_python_dispatcher, FakeTensorMode, Dispatches, Functions, profile],
    ids=["python-dispatcher", "fake-mode", "dispatch-mode", "function-mode", "profiler"],
)
def test_the_predicate_follows_what_is_entered_and_left(enter: Any) -> None:
    x = image()
    assert not observers.observed(x)
    with enter():
        assert observers.observed(x)
    assert not observers.observed(x)
