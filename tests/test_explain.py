# SPDX-License-Identifier: Apache-2.0
"""`explain` tells which backend runs and why; `warmup` leaves no trace."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from layers import BUILDERS, C, F, image
from torch import Tensor, nn

import hetconv_kernels as hk
from hetconv_kernels.errors import ArgumentError, BackendError, InputTypeError
from hetconv_kernels.nn import FusedConv2d, HetConv2d, SupportLinear, fuse

ALL, BACKENDS = hk.available_backends(), hk.available_backends("cpu")


@pytest.mark.parametrize("measure", [False, True], ids=["predicted", "measured"])
@pytest.mark.parametrize("kind", BUILDERS)
def test_every_backend_is_listed_with_its_numbers(kind: str, measure: bool) -> None:
    layer = BUILDERS[kind](3, stride=2, padding=1)
    told = hk.explain(layer, image(), measure=measure)
    assert told.layer == repr(layer)
    assert told.input == "(2, 12, 9, 7), torch.float32, cpu, contiguous"
    assert (told.density, told.group_count) == (layer.support.density, len(layer.support.groups))
    assert told.macs == 2 * layer.support.live * 5 * 4
    assert told.dense_macs == 2 * C * F * 9 * 5 * 4
    assert [c.name for c in told.candidates] == list(ALL)
    assert told.chosen in BACKENDS
    assert told.forced is False
    for candidate in told.candidates:
        runs = not candidate.reasons
        assert (candidate.predicted_s is not None) == runs
        assert (candidate.efficiency is not None) == runs
        assert (candidate.measured_s is not None) == (runs and measure)
        if runs:
            assert candidate.predicted_s > 0
            assert 0 < candidate.efficiency <= 1
    assert (told.faster_than_dense is None) == (not measure)
    assert layer.backend is None
    assert json.loads(json.dumps(told.to_dict()))["candidates"][0]["name"] == BACKENDS[0]


def test_the_table_says_it_in_words() -> None:
    layer = HetConv2d(C, F, 3, padding=1)
    text = str(hk.explain(layer, image(), measure=False))
    assert text.startswith(repr(layer))
    live, dense = 2 * 63 * layer.support.live, 2 * 63 * C * F * 9
    assert "groups   4: 2 filters x 12 channels, 2 filters x 12 channels" in text
    assert f"{live / 1e6:.3f} M MACs of {dense / 1e6:.3f} M dense ({dense / live:.2f}x" in text
    assert "\n* vendor " in text or "chosen: vendor" not in text
    assert text.count(" us") == len(BACKENDS)
    measured = hk.explain(layer, image())
    table = str(measured).partition("backend ")[2]
    assert table.count(" us") == 2 * len(BACKENDS)


def test_packing_is_a_row_of_its_own() -> None:
    layer = HetConv2d(C, F, 3, padding=1, backend="vendor")
    told = hk.explain(layer, image())
    assert told.packing_s > 0
    assert f"packing  {told.packing_s * 1e6:.1f} us of each call of vendor; layer.freeze()" in str(
        told
    )
    assert json.loads(json.dumps(told.to_dict()))["candidates"][0]["packing_s"] > 0
    told = hk.explain(layer, image(), measure=False)
    assert told.packing_s is None
    assert "packing  at each call, if the backend needs it: the layer is not frozen" in str(told)
    told = hk.explain(layer.freeze(), image())
    assert told.packing_s == 0
    assert "packing  none in a steady call: the layer is frozen" in str(told)
    layer.weight.requires_grad_()
    told = hk.explain(layer, image())
    assert "the weight of this frozen layer is computed or trained" in str(told)
    grouped = hk.nn.GroupedConv2d(C, F, 3, padding=1, groups=4, backend="vendor")
    assert "packing  none: the weight is read as it is" in str(hk.explain(grouped, image()))


def test_vendor_is_called_what_it_is() -> None:
    layer = HetConv2d(C, F, 3, backend="vendor")
    text = str(hk.explain(layer, image(), measure=False))
    assert "forced: vendor, PyTorch's dense convolution" in text
    assert "as fast as dense and no faster" in text


@pytest.mark.parametrize("backend", BACKENDS)
def test_forced_and_chosen(backend: str) -> None:
    layer = BUILDERS["support"](3)
    by_layer = BUILDERS["support"](3, backend=backend)
    with hk.use_backend(backend):
        outer = hk.explain(layer, image(), measure=False)
    inner = hk.explain(by_layer, image(), measure=False)
    for told in (outer, inner):
        assert (told.chosen, told.forced) == (backend, True)
        assert f"forced: {backend}" in str(told)
    with hk.use_backend(backend):
        layer.backend = "auto"
        assert hk.explain(layer, image(), measure=False).forced is False


def test_a_measurement_decides_what_the_verdict_says() -> None:
    told = hk.explain(BUILDERS["support"](3, backend="reference"), image())
    times = {c.name: c.measured_s for c in told.candidates}
    assert told.faster_than_dense == (times["reference"] < times["vendor"])
    assert ("measured slower" in str(told)) == (not told.faster_than_dense)


@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_inputs_as_the_layer_takes_them(mode: str) -> None:
    layer = BUILDERS["support"](3, padding=1, padding_mode=mode)
    batched = hk.explain(layer, image(1, C, 9, 7), measure=False)
    single = hk.explain(layer, image(C, 9, 7), measure=False)
    assert single == batched
    assert batched.macs == layer.support.live * 63
    empty = hk.explain(layer, image(0, C, 9, 7))
    assert (empty.macs, empty.candidates[0].measured_s) == (0, None)
    x = image().to(memory_format=torch.channels_last)
    assert hk.explain(layer, x, measure=False).input.endswith("channels_last")


def test_autocast_is_explained_as_it_runs() -> None:
    layer = BUILDERS["support"](3)
    with torch.autocast("cpu", torch.bfloat16):
        told = hk.explain(layer, image(), measure=False)
        assert "torch.float32 autocast to torch.bfloat16" in told.input


def test_frozen_and_meta_layers() -> None:
    layer = BUILDERS["support"](3).freeze()
    assert "frozen" in hk.explain(layer, image(), measure=False).layer
    meta = BUILDERS["support"](3, device="meta")
    told = hk.explain(meta, image().to("meta"))
    assert "meta" in told.input
    assert all(c.measured_s is None for c in told.candidates)


@pytest.mark.parametrize(
    "module",
    [nn.Conv2d(C, F, 3), nn.Linear(C, F), nn.Sequential(), "layer"],
    ids=lambda module: type(module).__name__,
)
def test_foreign_modules_are_refused(module: Any) -> None:
    with pytest.raises(InputTypeError, match="expected a layer of hetconv_kernels"):
        hk.explain(module, image())


def test_linear_and_fused_layers_are_explained_too() -> None:
    linear = SupportLinear(C, F, support=hk.Support.het(C, F, 1, p=4))
    told = hk.explain(linear, torch.randn(5, C))
    assert told.macs == 5 * linear.support.live
    assert told.input.startswith(f"(5, {C})")
    fused = fuse(BUILDERS["het"](3), None, "relu")
    told = hk.explain(fused, image())
    assert told.macs == hk.explain(BUILDERS["het"](3), image(), measure=False).macs
    assert told.frozen
    assert "the layer is frozen" in str(told)
    assert {c.name for c in told.candidates if c.measured_s} >= {"vendor", "reference"}
    assert fused.backend is None


def test_bad_inputs_are_refused_as_by_the_layer() -> None:
    layer = BUILDERS["support"](3)
    with pytest.raises(ArgumentError, match="input channels"):
        hk.explain(layer, image(2, C + 1, 9, 7))
    with pytest.raises(InputTypeError, match="float64"):
        hk.explain(layer, image().double())
    with pytest.raises(ArgumentError, match="input size"):
        hk.explain(layer, image(2, C, 2, 2))
    layer._code = 99  # as an unpickled layer whose engine is not in this installation
    with pytest.raises(BackendError, match="backend code: received 99"):
        hk.explain(layer, image())


def test_measuring_leaves_the_layer_alone() -> None:
    layer = BUILDERS["support"](3, backend="reference")
    calls = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    x = image().requires_grad_()
    hk.explain(layer, x)
    assert not calls
    assert layer.backend == "reference"
    assert layer.weight.grad is None
    assert x.grad is None


# warmup -------------------------------------------------------------------------------------------


def model() -> nn.Module:
    return nn.Sequential(
        HetConv2d(C, F, 3), nn.BatchNorm2d(F), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(F, 2, 1)
    )


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_warmup_leaves_no_trace(training: bool, backward: bool) -> None:
    net = model().train(training)
    before = {name: t.clone() for name, t in net.state_dict().items() if isinstance(t, Tensor)}
    random = torch.get_rng_state()
    x = image().requires_grad_()
    hk.warmup(net, x, backward=backward)
    after = net.state_dict()
    assert all(torch.equal(after[name], t) for name, t in before.items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in net.parameters())
    assert x.grad is None
    assert net.training == training
    assert torch.is_grad_enabled()


def test_warmup_is_a_call_that_engines_remember() -> None:
    """Preparing is all that it is for: afterwards neither choice nor packing is left to do."""
    fused = fuse(HetConv2d(C, F, 3, padding=1), act="relu")
    hk.warmup(fused, image())
    assert len(fused._geometry.choices) == 1
    version = fused.weight._version
    hk.warmup(fused, image())
    assert fused.weight._version == version  # a write would make engines pack it again
    with torch.no_grad():
        fused(image())
    assert len(fused._geometry.choices) == 1
    layer = HetConv2d(C, F, 3)
    hk.warmup(layer, image(), backward=True)
    prepared = set(layer._geometry.choices)
    y = layer(image())
    y.backward(torch.randn_like(y))  # as a loss does: not expanded, as the gradient of a sum is
    assert set(layer._geometry.choices) == prepared


class Odd(nn.Module):
    """Replaces a buffer, changes another, and may fail half way."""

    def __init__(self, fail: bool) -> None:
        super().__init__()
        self.fail = fail
        self.register_buffer("replaced", torch.zeros(1))
        self.register_buffer("changed", torch.zeros(1))
        self.register_buffer("absent", None)

    def forward(self, x: Tensor) -> Tensor:
        self.replaced = self.replaced + 1
        self.changed += 1
        if self.fail:
            raise ZeroDivisionError
        return x + torch.rand(1)


@pytest.mark.parametrize("fail", [False, True])
def test_warmup_restores_whatever_happens(fail: bool) -> None:
    odd, random = Odd(fail), torch.get_rng_state()
    if fail:
        with pytest.raises(ZeroDivisionError):
            hk.warmup(odd, image())
    else:
        hk.warmup(odd, image())
    assert (odd.replaced.item(), odd.changed.item()) == (0, 0)
    assert torch.equal(torch.get_rng_state(), random)


def test_warmup_takes_several_inputs_and_outputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = HetConv2d(C, F, 3)

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, str]:
            return self.layer(x), self.layer(y), "text"

    hk.warmup(Two(), image(), image(1, C, 5, 5), backward=True)
    with pytest.raises(ArgumentError, match="no output of the model needs a gradient"):
        hk.warmup(model().requires_grad_(False), image(), backward=True)
    assert isinstance(fuse(nn.Conv2d(C, F, 3)), FusedConv2d)
