# SPDX-License-Identifier: Apache-2.0
"""A layer on the move: frozen and thawed, copied, cast, shared, parametrised."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from layers import (
    BUILDERS,
    DTYPES,
    C,
    F,
    assert_equals_conv2d,
    build,
    dead,
    fill_dead,
    image,
    twin,
)
from torch.nn.utils import parametrize, prune
from torch.nn.utils.parametrizations import weight_norm

import hetconv_kernels as hk
from hetconv_kernels.errors import SupportError
from hetconv_kernels.nn import HetConv2d, SupportConv2d

# Freezing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", BUILDERS)
def test_freeze_and_thaw_change_nothing_but_the_form(kind: str, dtype: torch.dtype) -> None:
    layer = build(kind, dtype=dtype)
    x = image(dtype=dtype).requires_grad_()
    before, missing = layer.weight.detach().clone(), dead(layer)
    y = layer(x)
    (dx,) = torch.autograd.grad(y.sum(), x)
    fill_dead(layer, float("nan"))

    assert layer.freeze() is layer.freeze() is layer
    assert layer.frozen
    assert layer.weight.shape == (layer.support.live,)
    assert torch.equal(layer.weight, before[~missing])
    assert (layer.weight.dtype, layer.weight.requires_grad) == (dtype, False)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), y)
        torch.testing.assert_close(layer(x), y)
    frozen_y = layer(x)
    torch.testing.assert_close(frozen_y, y)
    torch.testing.assert_close(torch.autograd.grad(frozen_y.sum(), x)[0], dx)

    assert layer.thaw() is layer.thaw() is layer
    assert not layer.frozen
    assert layer.weight.requires_grad
    assert torch.equal(layer.weight, before)
    torch.testing.assert_close(layer(x), y)
    layer(x).sum().backward()
    assert layer.weight.grad is not None


@pytest.mark.parametrize("backend", hk.available_backends("cpu"))
@pytest.mark.parametrize("kind", BUILDERS)
def test_frozen_layers_run_on_every_backend(kind: str, backend: str) -> None:
    layer = build(kind, backend=backend, stride=2)
    expected = twin(layer)(image())
    torch.testing.assert_close(layer.freeze()(image()), expected)


@pytest.mark.parametrize("kind", BUILDERS)
def test_thaw_restores_the_flag_and_the_memory_format(kind: str) -> None:
    layer = build(kind).to(memory_format=torch.channels_last)
    layer.weight.requires_grad_(False)
    before = layer.weight.detach().clone()
    layer.freeze().thaw()
    assert not layer.weight.requires_grad
    assert layer.weight.stride() == before.stride()
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("kind", BUILDERS)
def test_a_frozen_weight_that_changes_in_place_takes_effect(kind: str) -> None:
    layer = build(kind, bias=False).freeze()
    with torch.no_grad():
        y = layer(image())
        layer.weight.mul_(2)
        torch.testing.assert_close(layer(image()), 2 * y)


def test_freezing_without_any_weight() -> None:
    nothing = hk.Support.from_mask(np.zeros((F, C, 3, 3), bool))
    layer = SupportConv2d(C, F, 3, support=nothing)
    assert layer.live_parameters() == F
    assert_equals_conv2d(layer, image())
    y = layer.freeze()(image())
    assert layer.weight.shape == (0,)
    torch.testing.assert_close(y, layer.bias.detach().view(-1, 1, 1).expand_as(y))
    layer.thaw()
    assert_equals_conv2d(layer, image())


@pytest.mark.parametrize("kind", BUILDERS)
def test_freezing_on_the_meta_device(kind: str) -> None:
    layer = build(kind, device="meta").freeze()
    assert layer.weight.shape == (layer.support.live,)
    y = layer(torch.empty(2, C, 9, 7, device="meta"))
    assert y.shape == (2, F, 7, 5)
    assert layer.thaw().weight.shape == build(kind).weight.shape
    assert layer.weight.is_meta


# Moving, copying, sharing -------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True], ids=["dense", "frozen"])
@pytest.mark.parametrize("kind", BUILDERS)
def test_copies_are_whole_and_apart(kind: str, frozen: bool) -> None:
    layer = build(kind, bias=False)
    layer = layer.freeze() if frozen else layer
    y = layer(image())
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(other) is type(layer)
        assert other.support == layer.support
        assert repr(other) == repr(layer)
        assert torch.equal(other(image()), y)
        with torch.no_grad():
            other.weight.mul_(3)
            torch.testing.assert_close(other(image()), 3 * y)
        assert torch.equal(layer(image()), y)
        if frozen:
            assert other.thaw().weight.requires_grad


@pytest.mark.parametrize("frozen", [False, True], ids=["dense", "frozen"])
@pytest.mark.parametrize("kind", BUILDERS)
def test_moving_to_dtypes_and_formats(kind: str, frozen: bool) -> None:
    layer = build(kind)
    plain = twin(layer)
    layer = layer.freeze() if frozen else layer
    for change in (
        lambda m: m.half(),
        lambda m: m.to(torch.float64),
        lambda m: m.to(memory_format=torch.channels_last),
        lambda m: m.bfloat16(),
        lambda m: m.float(),
    ):
        layer, plain = change(layer), change(plain)
        x = image(dtype=layer.weight.dtype)
        y, expected = layer(x), plain(x)
        torch.testing.assert_close(y, expected)
        if not frozen:
            assert y.stride() == expected.stride()
    assert layer.frozen == frozen


@pytest.mark.parametrize("kind", BUILDERS)
def test_inference_mode_leaves_training_alone(kind: str) -> None:
    with torch.inference_mode():
        born = build(kind)
        layer = copy.deepcopy(born)
        torch.testing.assert_close(born(image()), layer.freeze()(image()))
    trained = build(kind)
    with torch.inference_mode():
        y = trained(image())
    torch.testing.assert_close(trained(image()), y)
    assert_equals_conv2d(trained, image())


def test_shared_parameters_serve_two_supports() -> None:
    first = build("support")
    second = HetConv2d(C, F, 3)
    second.weight = first.weight
    fill_dead(first, 0.5)
    for _ in range(2):
        torch.testing.assert_close(first(image()), twin(first)(image()))
        torch.testing.assert_close(second(image()), twin(second)(image()))
    (first(image()) + second(image())).sum().backward()
    neither = dead(first) & dead(second)
    assert neither.any()
    assert first.weight.grad is not None
    assert (first.weight.grad[neither] == 0).all()
    assert (first.weight.grad[~neither] != 0).all()


@pytest.mark.parametrize("kind", BUILDERS)
def test_functional_call(kind: str) -> None:
    layer = build(kind)
    weight = torch.randn_like(layer.weight).requires_grad_()
    y = torch.func.functional_call(layer, {"weight": weight}, image())
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.weight.copy_(weight)
    torch.testing.assert_close(y, twin(other)(image()))
    (grad,) = torch.autograd.grad(y.sum(), weight)
    assert (grad[dead(layer)] == 0).all()
    torch.testing.assert_close(layer(image()), twin(layer)(image()))


@pytest.mark.parametrize("kind", BUILDERS)
def test_weight_norm_trains_and_comes_off(kind: str) -> None:
    layer = build(kind)
    expected = twin(layer)(image())
    weight_norm(layer)
    # A filter without a weight has no direction to normalise.
    reads = torch.tensor(layer.support.mask.any((1, 2, 3)))
    torch.testing.assert_close(layer(image())[:, reads], expected[:, reads])
    layer(image())[:, reads].square().mean().backward()
    direction = layer.parametrizations.weight.original1
    assert (direction.grad[reads][dead(layer)[reads]] == 0).all()
    assert layer.project_() is layer
    with pytest.raises(SupportError, match="remove_parametrizations"):
        layer.freeze()
    parametrize.remove_parametrizations(layer, "weight")
    frozen = layer.freeze()(image())
    torch.testing.assert_close(frozen[:, reads], expected[:, reads])


def test_pruning_hooks_are_respected() -> None:
    layer = build("support")
    prune.l1_unstructured(layer, "weight", amount=0.9)
    torch.testing.assert_close(layer(image()), twin(layer)(image()))
    assert layer.project_() is layer
    with pytest.raises(SupportError, match=r"prune\.remove"):
        layer.freeze()
    prune.remove(layer, "weight")
    assert_equals_conv2d(layer.freeze().thaw(), image())
