# SPDX-License-Identifier: Apache-2.0
"""Packed weights: kept by frozen layers whatever their origin, stale never, kept by no others."""

from __future__ import annotations

import copy
import gc
import io
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, prune, vector_to_parameters

import hetconv_kernels as hk
from hetconv_kernels.backends import available_backends
from hetconv_kernels.nn.fused import FusedConv2d, fuse
from hetconv_kernels.packing import frozen_caches, watched_packings

ENGINES = [name for name in available_backends("cpu") if name != "reference"]
CHANNELS, SIZE = 32, 40  # enough work for oneDNN's own layout, see `prepacked`


def image(batch: int = 2) -> Tensor:
    x = torch.randn(batch, CHANNELS, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    return x.to(memory_format=torch.channels_last)


def support(kernel: int = 3) -> hk.Support:
    """Irregular: no engine can take its weights as they are."""
    generator = torch.Generator().manual_seed(2)
    return hk.Support((torch.rand(32, CHANNELS, kernel, kernel, generator=generator) < 0.4).numpy())


def conv(engine: str | None = None) -> hk.nn.SupportConv2d:
    layer = hk.nn.SupportConv2d(CHANNELS, 32, 3, padding=1, support=support(), backend=engine)
    return layer.eval()


def truth(layer: Any, x: Tensor) -> Tensor:
    """What the weights that the layer has now give, with nothing kept."""
    weight = hk.packing.dense_weight(layer.support, layer.weight.detach().clone(), x.dtype)
    bias = layer.shift if isinstance(layer, FusedConv2d) else layer.bias
    return torch.conv2d(x, weight, None if bias is None else bias.detach().to(x.dtype), padding=1)


def packings(model: nn.Module, *inputs: Any) -> list[Any]:
    """Lists what the second call packs; the first one may."""
    model(*inputs)
    with watched_packings() as seen:
        model(*inputs)
    return seen


# Nothing is packed in a steady call --------------------------------------------------------------


def built_in_inference_mode(engine: str | None) -> nn.Module:
    with torch.inference_mode():
        return conv(engine).freeze()


def fused_in_inference_mode(engine: str | None) -> nn.Module:
    with torch.inference_mode():
        return fuse(conv(engine), nn.BatchNorm2d(32).eval(), "relu")


def trained_and_frozen_in_inference_mode(engine: str | None) -> nn.Module:
    layer = conv(engine)
    with torch.inference_mode():
        return layer.freeze()


def copied_in_inference_mode(engine: str | None) -> nn.Module:
    layer = nn.Sequential(conv(engine).freeze(), fuse(conv(engine)))
    layer(image())
    with torch.inference_mode():
        return copy.deepcopy(layer)


def moved_in_inference_mode(engine: str | None) -> nn.Module:
    layer = nn.Sequential(conv(engine).freeze(), fuse(conv(engine)))
    layer(image())
    with torch.inference_mode():
        return layer.double().float()


def assigned_in_inference_mode(engine: str | None) -> nn.Module:
    layer, other = conv(engine).freeze(), conv(engine).freeze()
    with torch.inference_mode():
        state = {key: v.clone() if isinstance(v, Tensor) else v
                 for key, v in other.state_dict().items()}  # fmt: skip
        layer.load_state_dict(state, assign=True)
    return layer


def loaded_in_inference_mode(engine: str | None) -> nn.Module:
    pytest.importorskip("safetensors", reason="the file's format")
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        file = Path(folder) / "network.safetensors"
        hk.save(nn.Sequential(conv(engine).freeze(), fuse(conv(engine))).eval(), file)
        return hk.load(file)


def unpickled_in_inference_mode(engine: str | None) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(nn.Sequential(conv(engine).freeze(), fuse(conv(engine))), buffer)
    buffer.seek(0)
    with torch.inference_mode():
        return torch.load(buffer, weights_only=False)


def optimized_in_inference_mode(engine: str | None) -> nn.Module:
    with torch.inference_mode():
        net = nn.Sequential(conv(engine), nn.BatchNorm2d(32), nn.ReLU(), conv(engine)).eval()
        return hk.optimize(net, image()).model


def views_of_one_vector(engine: str | None) -> nn.Module:
    layers = nn.Sequential(conv(engine).freeze(), conv(engine).freeze())
    flat = parameters_to_vector(layers.parameters()).detach()
    vector_to_parameters(flat, layers.parameters())
    return layers


class Plain(Tensor):
    """A subclass that adds nothing."""


def subclass(engine: str | None) -> nn.Module:
    layer = conv(engine).freeze()
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Plain), requires_grad=False)
    assert type(layer.weight) is Plain
    return layer


def pruned_and_frozen(engine: str | None) -> nn.Module:
    layer = conv(engine)
    prune.l1_unstructured(layer, "weight", 0.5)
    prune.remove(layer, "weight")
    return layer.freeze()


def frequencies(path: str) -> Callable[[str | None], nn.Module]:
    def build(engine: str | None) -> nn.Module:
        mask = np.random.default_rng(0).random((32, CHANNELS, 3, 3)) < 0.4
        layer = hk.nn.FrequencyConv2d(
            CHANNELS, 32, 3, padding=1, coefficients=mask, path=path, backend=engine
        )
        layer.mix.backend = engine
        layer.mix.freeze()
        return layer.eval()

    return build


ORIGINS: dict[str, Callable[[str | None], nn.Module]] = {
    "built": lambda engine: conv(engine).freeze(),
    "fused": lambda engine: fuse(conv(engine)),
    "copied": lambda engine: copy.deepcopy(conv(engine).freeze()),
    "moved": lambda engine: conv(engine).freeze().double().float(),
    "built in inference mode": built_in_inference_mode,
    "fused in inference mode": fused_in_inference_mode,
    "frozen in inference mode": trained_and_frozen_in_inference_mode,
    "copied in inference mode": copied_in_inference_mode,
    "moved in inference mode": moved_in_inference_mode,
    "assigned in inference mode": assigned_in_inference_mode,
    "loaded in inference mode": loaded_in_inference_mode,
    "unpickled in inference mode": unpickled_in_inference_mode,
    "optimized in inference mode": optimized_in_inference_mode,
    "views of one vector": views_of_one_vector,
    "a tensor subclass": subclass,
    "pruned": pruned_and_frozen,
    "frequencies, frequency": frequencies("frequency"),
    "frequencies, spatial": frequencies("spatial"),
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("origin", ORIGINS)
def test_a_frozen_layer_never_packs_in_a_steady_call(origin: str, engine: str, mode: Any) -> None:
    model, x = ORIGINS[origin](engine), image()
    with mode():
        assert packings(model, x) == []
        fresh = model if origin == "a tensor subclass" else hk.export.plain(model)
        expected = truth(model, x) if fresh is model else fresh(x)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_not_frozen_packs_at_each_call(engine: str) -> None:
    """So that the count above can fail."""
    with torch.no_grad():
        assert [p.engine for p in packings(conv(engine), image())] == [engine]
        live = torch.randn(support().live)
        with watched_packings() as seen:
            for _ in range(2):
                hk.functional.support_conv2d(image(), live, support(), padding=1, backend=engine)
        assert [p.engine for p in seen] == [engine] * 2


def test_a_frozen_layer_never_packs_for_the_gradient_of_its_input() -> None:
    layer, x = conv("cpu" if "cpu" in ENGINES else "vendor").freeze(), image().requires_grad_()
    layer(x).sum().backward()
    with watched_packings() as seen:
        layer(x).sum().backward()
    assert not seen


def test_threads_that_share_a_frozen_layer_pack_nothing_once_it_has_run() -> None:
    layer, x = conv().freeze(), image()
    expected = layer(x)
    wrong: list[int] = []

    def work() -> None:
        with torch.inference_mode():
            wrong.extend(1 for _ in range(5) if not torch.equal(layer(x), expected))

    threads = [threading.Thread(target=work) for _ in range(4)]
    with watched_packings() as seen:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not seen
    assert not wrong


@pytest.mark.parametrize("origin", ["built", "fused", "built in inference mode"])
def test_a_compiled_frozen_layer_packs_nothing_in_a_steady_call(origin: str) -> None:
    model = ORIGINS[origin]("cpu" if "cpu" in ENGINES else "vendor")
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        compiled(image())
        assert packings(compiled, image()) == []


def test_an_exported_frozen_layer_packs_nothing_in_a_steady_call() -> None:
    layer = conv().freeze()
    with torch.no_grad():
        program = torch.export.export(layer, (image(),)).module()
        assert packings(program, image()) == []
        torch.testing.assert_close(program(image()), layer(image()))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "columns",
    [support(), support(1), hk.Support.dense(CHANNELS, 32, 3), hk.Support.dense(CHANNELS, 32, 1),
     hk.Support.grouped(CHANNELS, 32, 3, 4), hk.Support.grouped(CHANNELS, 32, 1, 4)],
    ids=["irregular", "irregular 1x1", "dense", "dense 1x1", "grouped", "grouped 1x1"],
)  # fmt: skip
def test_what_is_kept_goes_with_the_layer(columns: hk.Support, engine: str, layout: Any) -> None:
    """Not even by its own packed form is a weight kept alive."""
    layer = hk.nn.SupportConv2d(
        CHANNELS, 32, columns.kernel, support=columns, backend=engine
    ).freeze()
    x = image().contiguous(memory_format=layout)
    layer(x.requires_grad_()).sum().backward()
    storage = weakref.ref(layer.weight.untyped_storage())
    caches = frozen_caches(columns)
    del layer
    gc.collect()
    assert storage() is None
    assert not any(cache._entries for cache in caches)


# Never stale --------------------------------------------------------------------------------------


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
