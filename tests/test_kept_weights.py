# SPDX-License-Identifier: Apache-2.0
"""Packed weights are kept by frozen layers whatever their origin, and by no others."""

from __future__ import annotations

import copy
import gc
import io
import tempfile
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packed_layers import CHANNELS, ENGINES, conv, image, support, truth
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, prune, vector_to_parameters

import hetconv_kernels as hk
from hetconv_kernels.nn.fused import fuse
from hetconv_kernels.packing import frozen_caches, watched_packings


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
