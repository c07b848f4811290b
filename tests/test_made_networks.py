# SPDX-License-Identifier: Apache-2.0
"""Networks that the package makes are ordinary ones: saved, copied, transformed, written to."""

from __future__ import annotations

import copy
import io
import os
import pickle
import threading
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from made import MAKERS, image, plain_network
from networks import network
from torch import Tensor, nn
from torch.autograd import forward_ad

import hetconv_kernels as hk
from hetconv_kernels.graph.planned import PlannedNetwork
from hetconv_kernels.nn.base import ForcedBackend, SupportLayer


@cache
def kept(name: str, inference: bool) -> nn.Module:
    """The network that a maker makes, to be copied: a copy takes a tenth of the time."""
    with torch.inference_mode(inference):
        return MAKERS[name](plain_network(), image())


@pytest.fixture(params=MAKERS, ids=str)
def maker(request: pytest.FixtureRequest) -> Callable[[nn.Module, Tensor], nn.Module]:
    return MAKERS[request.param]


# Saving and copying ------------------------------------------------------------------------------


def through_torch_save(model: nn.Module, folder: Path) -> nn.Module:
    torch.save(model, folder / "model.pt")
    loaded: nn.Module = torch.load(folder / "model.pt", weights_only=False)
    return loaded


def through_a_file_and_pickle(model: nn.Module, folder: Path) -> nn.Module:
    pytest.importorskip("safetensors", reason="the safetensors extra is not installed")
    hk.save(model, folder / "model.safetensors")
    return pickle.loads(pickle.dumps(hk.load(folder / "model.safetensors")))


WAYS: dict[str, Callable[[nn.Module, Path], nn.Module]] = {
    "torch.save": through_torch_save,
    "pickle twice": lambda model, _: pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(model)))),
    "deepcopy": lambda model, _: copy.deepcopy(model),
    "file and pickle": through_a_file_and_pickle,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["plain", "lenet5", "branches"])
def test_a_network_survives_every_way_to_keep_it(
    name: str, way: str, maker: Any, tmp_path: Path
) -> None:
    """The package's own networks annotate their forwards, which torch.fx could not pickle."""
    model, x = (plain_network(), image()) if name == "plain" else network(name, 0.0)
    made = maker(model, x)
    with torch.no_grad():
        wanted = made(x), made(x)
        twin = WAYS[way](made, tmp_path)
        assert torch.equal(twin(x), wanted[0])
        assert torch.equal(twin(x), wanted[1])  # by its plan
    parts = [[isinstance(m, PlannedNetwork) for m in one.modules()] for one in (made, twin)]
    assert any(parts[0])
    assert parts[0] == parts[1]


@pytest.mark.parametrize("on", [True, False])
def test_a_pickled_network_plans_its_memory_if_it_did(on: bool) -> None:
    made, x = MAKERS["optimised"](plain_network(), image()), image()
    hk.plan_memory(made, on)
    twin = pickle.loads(pickle.dumps(made))
    with torch.no_grad():
        twin(x), twin(x)
    assert (twin.__dict__["_memory"] is not None) == on
    assert (hk.release_memory(twin) > 0) == on or "cpu" not in hk.available_backends()


def test_threads_and_forked_processes_share_a_network(maker: Any) -> None:
    made, x = maker(plain_network(), image()), image()
    with torch.no_grad():
        wanted = made(x)
        wrong: list[Any] = []

        def call() -> None:
            with torch.no_grad():
                wrong.extend(1 for _ in range(10) if not torch.equal(made(x), wanted))

        threads = [threading.Thread(target=call) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of forks beside threads
        child = os.fork()
    if child == 0:  # pragma: no cover
        torch.set_num_threads(1)
        with torch.no_grad():
            os.write(writer, b"1" if torch.equal(made(x), wanted) else b"0")
        os._exit(0)
    os.close(writer)
    answer = os.read(reader, 1)
    os.waitpid(child, 0)
    assert answer == b"1"


# Observers and transforms ------------------------------------------------------------------------


def unplanned(made: nn.Module) -> nn.Module:
    twin = copy.deepcopy(made)
    hk.plan_memory(twin, False)
    return twin


@pytest.mark.filterwarnings("ignore")
def test_a_planned_network_maps_over_images(maker: Any) -> None:
    made, x = maker(plain_network(), image()), image()
    with torch.no_grad():
        wanted = made(x)
        found = torch.vmap(lambda one: made(one[None])[0])(x)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=2e-2 * float(wanted.abs().max()))


def dual(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor | None:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, x.cos()))).tangent


DERIVATIVES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "dual": lambda f, x: dual(f, x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x.cos(),))[1],
    "grad": lambda f, x: torch.func.grad(lambda a: f(a).square().sum())(x),
    "jacrev": lambda f, x: torch.func.jacrev(lambda a: f(a).sum(0))(x),
    "backward": lambda f, x: torch.autograd.grad(f(z := x.clone().requires_grad_()).sum(), z)[0],
}


@pytest.mark.parametrize("name", DERIVATIVES)
@pytest.mark.parametrize("form", ["optimised", "left plain"])
def test_derivatives_do_not_get_lost_in_a_plan(form: str, name: str) -> None:
    """A program knows no tangents: it gave none, without a word."""
    model, x = plain_network(), image()
    made = MAKERS[form](model, x)
    made.requires_grad_(False)
    model.requires_grad_(False)
    with torch.no_grad():
        made(x), made(x)
    found = DERIVATIVES[name](made, x)
    assert found is not None
    torch.testing.assert_close(found, DERIVATIVES[name](model, x), rtol=1e-3, atol=1e-4)


def test_an_integer_network_has_no_gradient_and_says_so() -> None:
    made = MAKERS["int8"](plain_network(), image())
    with pytest.raises(RuntimeError, match="does not require grad"):
        made(image().requires_grad_()).sum().backward()


@pytest.mark.filterwarnings("ignore")
def test_a_jit_trace_computes_what_the_network_computes(maker: Any) -> None:
    """Sizes are tensors under the tracer, which the lists of operators cannot hold."""
    made, x = maker(plain_network(), image()), image()
    with torch.no_grad():
        traced = torch.jit.trace(made, x)
        other = torch.randn_like(x)
        torch.testing.assert_close(traced(other), made(other), rtol=1e-3, atol=1e-3)
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        assert torch.equal(torch.jit.load(file)(other), traced(other))


@pytest.mark.parametrize("bad", ["sparse", "other channels"])
def test_a_planned_network_refuses_in_the_words_of_its_layers(bad: str) -> None:
    made, x = MAKERS["optimised"](plain_network(), image()), image()
    given = x.to_sparse() if bad == "sparse" else torch.randn(2, 4, 8, 8)
    with torch.no_grad(), pytest.raises(hk.errors.HetconvError, match="input"):
        made(given)


# Writes ------------------------------------------------------------------------------------------


def ones(weight: Tensor, value: float = 1) -> Tensor:
    return torch.full_like(weight, 2 * value if weight.dtype == torch.int8 else 0.02 * value)


def assign_data(layer: Any) -> None:
    layer.weight.data = ones(layer.weight)


def assign_data_twice(layer: Any) -> None:
    layer.weight.data = ones(layer.weight)
    layer.weight.data = ones(layer.weight, 2)


def fill(layer: Any) -> None:
    layer.weight.fill_(1)


def fill_in_inference_mode(layer: Any) -> None:
    with torch.inference_mode():
        layer.weight.fill_(1)


def replace(layer: Any) -> None:
    if "weight" in layer._parameters:
        layer.weight = nn.Parameter(ones(layer.weight), requires_grad=False)
    else:
        layer.weight = ones(layer.weight)


def replace_by_an_inference_tensor(layer: Any) -> None:
    with torch.inference_mode():
        replace(layer)


def swap(layer: Any) -> None:
    other = ones(layer.weight)
    if "weight" in layer._parameters:
        other = nn.Parameter(other, requires_grad=False)
    torch.utils.swap_tensors(layer.weight, other)


def offload_and_bring_another(layer: Any) -> None:
    there = layer.weight.data
    layer.weight.data = torch.empty(0, dtype=there.dtype)
    layer.weight.data = ones(there)


def load(layer: Any) -> None:
    state = layer.state_dict()
    layer.load_state_dict({k: ones(v) if k == "weight" else v for k, v in state.items()})


def bias(layer: Any) -> None:
    name = "shift" if hasattr(layer, "shift") else "bias"
    getattr(layer, name).add_(1000)


def bias_data(layer: Any) -> None:
    name = "shift" if hasattr(layer, "shift") else "bias"
    getattr(layer, name).data = getattr(layer, name).data + 1000


def scale(layer: Any) -> None:
    if hasattr(layer, "weight_scale"):
        layer.weight_scale.mul_(3)
    else:
        fill(layer)


def scale_data(layer: Any) -> None:
    if hasattr(layer, "weight_scale"):
        layer.weight_scale.data = layer.weight_scale * 3
    else:
        assign_data(layer)


WRITES = [
    assign_data, assign_data_twice, fill, fill_in_inference_mode, replace,
    replace_by_an_inference_tensor, swap, offload_and_bring_another, load, bias, bias_data, scale,
    scale_data,
]  # fmt: skip


def of_fresh_layers(made: nn.Module, x: Tensor) -> Tensor:
    """Computes with nothing kept from earlier calls."""
    twin = unplanned(made)
    for layer in twin.modules():
        if isinstance(layer, SupportLayer) and layer.frozen:
            layer.freeze()
    result: Tensor = twin(x)
    return result


@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
@pytest.mark.parametrize("mode", [False, True], ids=["made as usual", "made in inference mode"])
@pytest.mark.parametrize("name", MAKERS)
def test_every_write_to_a_layer_shows_in_the_next_call(mode: bool, write: Any, name: str) -> None:
    x = image()
    for number in range(4):
        made = copy.deepcopy(kept(name, mode))
        layers = [
            m
            for m in made.modules()
            if isinstance(m, ForcedBackend | nn.Conv2d | nn.Linear) and hasattr(m, "weight")
        ]
        assert len(layers) == 4
        with torch.no_grad():
            before = made(x), made(x)
            write(layers[number])
            after, truth = made(x), of_fresh_layers(made, x)
        assert torch.equal(before[0], before[1])
        assert torch.equal(after, truth), type(layers[number]).__name__


def test_a_network_made_in_inference_mode_has_no_inference_tensors(maker: Any) -> None:
    """They cannot be written to outside, and keep no packed form (`packing.owned`)."""
    with torch.inference_mode():
        model, x = plain_network(), image()
        made = maker(model, x)
        inside = made(x).clone()
    tensors = [*made.parameters(), *made.buffers()]
    assert tensors
    assert not any(t.is_inference() for t in tensors)
    with torch.no_grad():
        assert torch.equal(made(image()), inside)
