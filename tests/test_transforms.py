# SPDX-License-Identifier: Apache-2.0
"""torch.func on the layers: grad, vmap, jvp and their compositions, and forward-mode AD."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

import hetconv_kernels as hk

LAYERS = {
    "het": lambda: hk.nn.HetConv2d(4, 6, 3, padding=1, stride=2, p=2, dtype=torch.float64),
    "grouped": lambda: hk.nn.GroupedConv2d(4, 6, 3, groups=2, dtype=torch.float64),
    "no bias": lambda: hk.nn.HetConv2d(4, 6, 3, p=4, bias=False, dtype=torch.float64),
}


@pytest.fixture(params=LAYERS)
def layer(request: pytest.FixtureRequest) -> hk.nn.SupportConv2d:
    torch.manual_seed(0)
    return LAYERS[request.param]()


def images(n: int = 3) -> torch.Tensor:
    return torch.randn(n, 4, 6, 5, dtype=torch.float64)


def test_grad_equals_backward(layer: hk.nn.SupportConv2d) -> None:
    x, parameters = images(), dict(layer.named_parameters())
    found = grad(lambda p: functional_call(layer, p, (x,)).square().sum())(parameters)
    layer(x).square().sum().backward()
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad)


def test_per_sample_gradients(layer: hk.nn.SupportConv2d) -> None:
    x, parameters = images(), {n: p.detach() for n, p in layer.named_parameters()}

    def loss(p: dict[str, torch.Tensor], image: torch.Tensor) -> torch.Tensor:
        return functional_call(layer, p, (image,)).square().sum()

    together = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for i in range(len(x)):
        alone = grad(loss)(parameters, x[i])
        for name, value in alone.items():
            torch.testing.assert_close(together[name][i], value)


@pytest.mark.parametrize("dim", [0, 2])
def test_vmap_over_images(layer: hk.nn.SupportConv2d, dim: int) -> None:
    x = torch.stack([images(2), images(2)])
    batched = vmap(layer, in_dims=dim)(x.movedim(0, dim))
    torch.testing.assert_close(batched, torch.stack([layer(x[0]), layer(x[1])]))


def test_vmap_over_an_ensemble_of_weights(layer: hk.nn.SupportConv2d) -> None:
    x, ensemble = images(), {n: torch.stack([p, 2 * p]) for n, p in layer.named_parameters()}
    batched = vmap(lambda p: functional_call(layer, p, (x,)))(ensemble)
    for i in range(2):
        alone = functional_call(layer, {n: v[i] for n, v in ensemble.items()}, (x,))
        torch.testing.assert_close(batched[i], alone)


def test_jvp_equals_the_directional_difference(layer: hk.nn.SupportConv2d) -> None:
    x, t = images(), images()
    p = {n: v.detach() for n, v in layer.named_parameters()}
    tp = {n: torch.randn_like(v) for n, v in p.items()}
    value, tangent = jvp(lambda x, p: functional_call(layer, p, (x,)), (x, p), (t, tp))
    torch.testing.assert_close(value, layer(x))

    def at(e: float) -> torch.Tensor:
        return functional_call(layer, {n: v + e * tp[n] for n, v in p.items()}, (x + e * t,))

    torch.testing.assert_close(tangent, (at(1e-5) - at(-1e-5)) / 2e-5, atol=1e-8, rtol=1e-6)


def test_jvp_of_the_bias_alone() -> None:
    layer, x = LAYERS["het"](), images()
    tangent = jvp(
        lambda b: functional_call(layer, {"weight": layer.weight.detach(), "bias": b}, (x,)),
        (layer.bias.detach(),),
        (torch.arange(6.0, dtype=torch.float64),),
    )[1]
    expected = torch.arange(6.0, dtype=torch.float64)[:, None, None].expand_as(tangent[0])
    torch.testing.assert_close(tangent[0], expected)


def test_jacobians_and_hessian_agree_with_each_other(layer: hk.nn.SupportConv2d) -> None:
    x = images(1)
    rest = {n: p.detach() for n, p in layer.named_parameters() if n != "weight"}

    def output(w: torch.Tensor) -> torch.Tensor:
        return functional_call(layer, {"weight": w, **rest}, (x,))

    w = layer.weight.detach()
    torch.testing.assert_close(jacfwd(output)(w), jacrev(output)(w))
    full = hessian(lambda w: output(w).pow(3).sum())(w).reshape(w.numel(), -1)
    torch.testing.assert_close(full, full.T)
    assert full.abs().sum() > 0


def test_forward_mode_outside_functorch(layer: hk.nn.SupportConv2d) -> None:
    x, t = images(), images()
    with forward_ad.dual_level():
        y = layer(forward_ad.make_dual(x, t))
        tangent = forward_ad.unpack_dual(y).tangent
    bias = 0 if layer.bias is None else layer.bias[:, None, None]
    torch.testing.assert_close(tangent, layer(t) - bias)
