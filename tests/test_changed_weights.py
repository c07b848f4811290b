# SPDX-License-Identifier: Apache-2.0
"""No kept weight is stale: whatever changes the weights of a layer, its next call sees it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from packed_layers import CHANNELS, ENGINES, conv, image, support, truth
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import hetconv_kernels as hk
from hetconv_kernels.nn.fused import fuse

# A frozen layer ---------------------------------------------------------------------------------


def through_half(layer: nn.Module, x: Tensor) -> None:
    layer.to(torch.bfloat16)
    layer.to(torch.float32)


def data_twice(layer: Any, x: Tensor) -> None:
    for scale in (2, 3):  # the second may get the memory of the first, or the layer's own
        layer.weight.data = layer.weight.data * scale


def offloaded(layer: Any, x: Tensor) -> None:
    elsewhere = layer.weight.data * 2
    layer.weight.data = torch.empty(0)
    gc.collect()
    layer.weight.data = elsewhere.clone()


def vector_twice(layer: nn.Module, x: Tensor) -> None:
    for scale in (2, 3):
        vector = parameters_to_vector(layer.parameters()).detach() * scale
        vector_to_parameters(vector, layer.parameters())


def in_place(layer: Any, x: Tensor) -> None:
    with torch.no_grad():
        layer.weight.mul_(2)


def in_place_in_inference_mode(layer: Any, x: Tensor) -> None:
    with torch.inference_mode():
        layer(x)
        layer.weight.mul_(2)


def in_place_after_a_move_in_inference_mode(layer: Any, x: Tensor) -> None:
    with torch.inference_mode():
        layer.double().float()
        layer(x)
        layer.weight.mul_(2)


def replaced_by_an_alias(layer: Any, x: Tensor) -> None:
    with torch.no_grad():
        layer.weight.mul_(2)
        layer.weight = nn.Parameter(layer.weight.data, requires_grad=False)


def loaded(layer: Any, x: Tensor) -> None:
    state = layer.state_dict()
    layer.load_state_dict({**state, "weight": state["weight"] * 2})


def loaded_and_assigned(layer: Any, x: Tensor) -> None:
    state = layer.state_dict()
    layer.load_state_dict({**state, "weight": state["weight"] * 2}, assign=True)


def loaded_inside_inference_mode(layer: Any, x: Tensor) -> None:
    with torch.inference_mode():
        layer(x)
        loaded(layer, x)


def swapped(layer: nn.Module, x: Tensor) -> None:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        layer.to(torch.bfloat16)
        layer.to(torch.float32)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def swapped_with_another(layer: Any, x: Tensor) -> None:
    other = nn.Parameter(layer.weight.detach() * 2, requires_grad=False)
    torch.utils.swap_tensors(layer.weight, other)


def data_then_freeze(layer: Any, x: Tensor) -> None:
    layer.weight.data.mul_(2)  # unseen, as freeze says
    layer.freeze()


def numpy_then_freeze(layer: Any, x: Tensor) -> None:
    layer.weight.detach().numpy()[:] *= 2
    layer.freeze()


CHANGES = [
    through_half, data_twice, offloaded, vector_twice, in_place, in_place_in_inference_mode,
    in_place_after_a_move_in_inference_mode, replaced_by_an_alias, loaded, loaded_and_assigned,
    loaded_inside_inference_mode, swapped, swapped_with_another, data_then_freeze,
    numpy_then_freeze,
]  # fmt: skip


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_frozen_layer_sees_a_change_of_its_weights(change: Any, engine: str) -> None:
    x = image(1)
    for _ in range(10):  # the allocator gives an old address back at some of them
        layer = conv(engine).freeze()
        layer(x)
        change(layer, x)
        torch.testing.assert_close(layer(x), truth(layer, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "change",
    [through_half, in_place_after_a_move_in_inference_mode, loaded, loaded_and_assigned,
     loaded_inside_inference_mode, data_then_freeze],
    ids=lambda change: change.__name__,
)  # fmt: skip
def test_a_fused_layer_sees_a_change_of_its_weights(change: Any, engine: str) -> None:
    x = image(1)
    for _ in range(10):
        layer = fuse(conv(engine))
        layer(x)
        change(layer, x)
        torch.testing.assert_close(layer(x), truth(layer, x), rtol=1e-4, atol=1e-4)


def test_rounded_weights_are_used_after_a_way_there_and_back() -> None:
    """The case that was found: 33 of 50 still computed with the weights as they were."""
    layer, x = conv().freeze(), image(1)
    before = layer(x)
    through_half(layer, x)
    assert not torch.equal(layer(x), before)


# Nothing is kept of what is not frozen -----------------------------------------------------------


def frequency_layer(path: str) -> hk.nn.FrequencyConv2d:
    return hk.nn.FrequencyConv2d(CHANNELS, 32, 3, padding=1, path=path).eval()


def linear() -> hk.nn.SupportLinear:
    mask = (torch.rand(24, CHANNELS) < 0.4)[:, :, None, None].numpy()
    return hk.nn.SupportLinear(CHANNELS, 24, support=hk.Support(mask)).eval()


UNFROZEN = {
    "conv": (conv, image),
    "conv, vendor": (lambda: conv("vendor"), image),
    "grouped": (lambda: hk.nn.GroupedConv2d(CHANNELS, 32, 3, groups=4), image),
    "linear": (linear, lambda: torch.randn(3, CHANNELS)),
    "frequencies, spatial": (lambda: frequency_layer("spatial"), image),
    "frequencies, frequency": (lambda: frequency_layer("frequency"), image),
}


def writes(layer: nn.Module) -> Iterator[Callable[[], Any]]:
    weight: Tensor = layer.weight
    yield lambda: weight.data.mul_(2)
    yield lambda: weight.detach().numpy().__imul__(2)
    yield lambda: setattr(weight, "data", weight.data * 2)
    yield lambda: vector_to_parameters(
        parameters_to_vector(layer.parameters()).detach() * 2, layer.parameters()
    )


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("name", UNFROZEN)
def test_a_layer_that_is_not_frozen_sees_every_write(name: str, mode: Any) -> None:
    build, make = UNFROZEN[name]
    layer, x = build(), make()
    layer.bias.data.zero_()
    with mode():
        y = layer(x).clone()
        for write in writes(layer):
            write()
            y = 2 * y
            torch.testing.assert_close(layer(x), y, rtol=1e-4, atol=1e-4)


def test_a_vector_that_is_no_frozen_layers_is_read_at_every_call() -> None:
    own, x = np.random.default_rng(0).random(support().live, dtype=np.float32), image()
    live = torch.from_numpy(own)
    for engine in ENGINES:
        with torch.no_grad():
            before = hk.functional.support_conv2d(x, live, support(), backend=engine)
            own *= 2
            after = hk.functional.support_conv2d(x, live, support(), backend=engine)
        torch.testing.assert_close(after, 2 * before)


# Swapped parameters ------------------------------------------------------------------------------


@pytest.fixture
def _swapping() -> Iterator[None]:
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.usefixtures("_swapping")
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", UNFROZEN)
def test_a_layer_that_has_run_can_be_moved_by_swapping_its_parameters(
    name: str, frozen: bool
) -> None:
    build, make = UNFROZEN[name]
    layer, x = build(), make()
    part = getattr(layer, "mix", layer)
    if frozen:
        part.freeze()
    with torch.no_grad():
        expected = layer(x)
        layer(x)
        same = part.weight
        layer.to(torch.float64)
        assert part.weight is same, "not swapped"
        torch.testing.assert_close(layer(x.double()).float(), expected, rtol=1e-4, atol=1e-4)
        layer.to(torch.float32)
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
