# SPDX-License-Identifier: Apache-2.0
"""The profile: what it counts, times and explains, also under torch.compile."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from profiled import ROOFS, measured, small
from torch import nn

import hetconv_kernels as hk
from hetconv_kernels import ranges
from hetconv_kernels.errors import ArgumentError, InputTypeError
from hetconv_kernels.measure import profiling
from hetconv_kernels.measure.profiling import compiled as compiled_network
from hetconv_kernels.measure.profiling.measure import backends_of, dense_twin, layers_of
from hetconv_kernels.measure.roofline import Roofs

LOW = np.broadcast_to(np.arange(9).reshape(3, 3) < 4, (8, 8, 3, 3))


class Slow(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(self.inner(x))


# What it says ------------------------------------------------------------------------------------


def test_work_and_bytes_by_hand() -> None:
    x = torch.randn(2, 3, 6, 6)
    found = measured(small(), x)
    stem, het, grouped, linear = found.layers
    assert [la.name for la in found.layers] == ["0", "3", "5", "7"]
    assert stem.macs == stem.dense_macs == 2 * 36 * 8 * 27
    live = 8 * (9 * 2 + 6)
    assert (het.macs, het.dense_macs) == (2 * 36 * live, 2 * 36 * 8 * 72)
    assert het.bytes == 4 * (2 * 2 * 8 * 36 + live)
    assert (grouped.macs, grouped.dense_macs) == (2 * 9 * 16 * 18, 2 * 9 * 16 * 72)
    assert linear.macs == 2 * 16 * 9 * 5
    for layer in found.layers:
        floor = max(layer.macs, layer.bytes) / 1e9
        assert layer.percent_of_roof == pytest.approx(100 * floor / layer.seconds)
        assert layer.share == pytest.approx(layer.seconds / found.seconds)
        assert layer.dense_seconds is None
    assert 0 < sum(la.seconds for la in found.layers) <= found.seconds * 1.5


def test_backend_and_reason() -> None:
    stem, het, grouped, linear = measured(small(), torch.randn(2, 3, 6, 6)).layers
    assert (stem.backend, stem.why) == ("torch", "a plain layer of PyTorch")
    assert (het.backend, het.why) == ("reference", "forced")
    assert grouped.backend in hk.available_backends("cpu")
    assert grouped.why.startswith("predicted ")
    assert linear.backend == "torch"
    others = set(hk.available_backends("cpu")) - {grouped.backend, "reference"}
    assert all(name in grouped.why for name in others)


def test_calls_of_a_shared_layer_are_summed() -> None:
    layer = hk.nn.HetConv2d(8, 8, 3, padding=1, p=2)
    x = torch.randn(1, 8, 5, 5)
    once, twice = measured(layer, x).layers[0], measured(Slow(layer), x).layers[0]
    assert (once.calls, twice.calls, twice.name) == (1, 2, "inner")
    assert (twice.macs, twice.bytes) == (2 * once.macs, 2 * once.bytes)
    assert once.share == 1


def test_the_slow_layer_has_the_time() -> None:
    class Wait(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            torch.randn(300, 300) @ torch.randn(300, 300)
            return super().forward(x)

    model = nn.Sequential(nn.Conv2d(3, 3, 1), Wait(3, 3, 1), nn.Conv2d(3, 3, 1))
    found = measured(model, torch.randn(1, 3, 4, 4), rounds=9, max_seconds=5)
    assert max(found.layers, key=lambda la: la.seconds).name == "1"


@pytest.mark.parametrize(
    "layer",
    [
        hk.nn.HetConv2d(8, 8, 3, padding=1, p=4),
        hk.nn.GroupedConv2d(8, 16, 3, padding=1, groups=4),
        hk.nn.fused.fuse(hk.nn.HetConv2d(8, 8, 3, padding=1, p=4), act="relu"),
        hk.nn.FrequencyConv2d.from_conv2d(nn.Conv2d(8, 8, 3, padding=1), LOW, path="spatial"),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_the_dense_twin_computes_the_same_and_is_timed(layer: nn.Module) -> None:
    x = torch.randn(2, 8, 6, 5)
    with torch.no_grad():
        twin = dense_twin(layer)
        torch.testing.assert_close(twin(x), layer(x), rtol=1e-4, atol=1e-4)
    assert all(m.groups == 1 for m in twin.modules() if isinstance(m, nn.Conv2d))
    (row,) = measured(layer.eval(), x, dense=True).layers
    assert row.dense_seconds is not None
    assert row.speedup is not None
    assert row.speedup[1] <= row.speedup[0] <= row.speedup[2]
    spatial = row.backend == "spatial"  # a frequency layer that convolves with the whole kernel
    filters = twin(x).shape[1]
    assert 2 * 30 * filters * 72 == row.dense_macs >= row.macs > 0
    assert spatial or row.dense_macs > row.macs


def test_an_optimised_network_with_sums() -> None:
    torch.manual_seed(0)
    model = hk.convert(hk.models.resnet20().eval(), hk.rules.het(p=4)).model
    x = torch.randn(1, 3, 8, 8)
    found = measured(hk.optimize(model, x).model, x)
    assert {la.kind for la in found.layers} >= {"FusedConv2d"}
    assert sum(la.macs for la in found.layers) == hk.stats.macs(model, x)
    assert all(la.why for la in found.layers)


def test_nothing_of_the_network_changes() -> None:
    model = small().train()
    before = {name: t.clone() for name, t in model.state_dict().items() if torch.is_tensor(t)}
    measured(model, torch.randn(2, 3, 6, 6), dense=True)
    assert model.training
    for name, tensor in model.state_dict().items():
        if torch.is_tensor(tensor):
            assert torch.equal(tensor, before[name]), name
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert model[3].backend == "reference"


def test_the_table_and_the_data_say_the_same() -> None:
    found = measured(small(), torch.randn(2, 3, 6, 6), dense=True)
    text = str(found)
    for word in ("HetConv2d", "reference", "forced", "everything else", "whole", "1/3.00", "all"):
        assert word in text
    data = json.loads(json.dumps(found.to_dict()))
    assert data["format"] == "hetconv_kernels.profile/1"
    assert [la["name"] for la in data["layers"]] == ["0", "3", "5", "7"]
    lost = profiling.LayerProfile("a", "B", 1, 1e-3, 1.0, 9, 9, 9, 1.0, "cpu", "", 1e-4,
                                   (0.1, 0.05, 0.2))  # fmt: skip
    shown = profiling.Profile("M", "x", 1e-3, 0.0, (lost,), {}, 1)
    assert "0.10× [0.05, 0.20] slower" in str(shown)


def test_packing_is_a_row_of_its_own() -> None:
    model = nn.Sequential(
        hk.nn.HetConv2d(8, 8, 3, padding=1, p=4, backend="vendor"),
        hk.nn.HetConv2d(8, 8, 3, padding=1, p=4, backend="vendor").freeze(),
    )
    found = measured(model, torch.randn(2, 8, 6, 6))
    first, second = (layer.packing_seconds for layer in found.layers)
    assert 0 == second < first == found.packing_seconds
    row = next(line for line in str(found).splitlines() if line.startswith("packing"))
    assert f"{first * 1e6:.1f}" in row
    assert "hk.optimize or freeze() ends it" in row
    model[0].freeze()
    found = measured(model, torch.randn(2, 8, 6, 6))
    assert found.packing_seconds == 0
    assert "no weight is packed in a steady call" in str(found)


def test_the_roof_is_measured_when_it_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def fake(device: torch.device, dtype: torch.dtype) -> Roofs:
        asked.append((device.type, dtype))
        return ROOFS["float32"]

    monkeypatch.setattr("hetconv_kernels.measure.roofline.measure_roofs", fake)
    found = measured(small(), torch.randn(2, 3, 6, 6), roofs=None)
    assert asked == [("cpu", torch.float32)]
    assert found.roofs == {"float32": (1e9, 1e9)}


@pytest.mark.parametrize(
    ("model", "example", "more", "error", "said"),
    [
        (3, torch.ones(1), {}, InputTypeError, "a plain nn.Module"),
        (nn.ReLU(), [1], {}, InputTypeError, "received list, expected a tensor"),
        (nn.ReLU(), torch.ones(1), {}, ArgumentError, "layers with weights"),
        (nn.Linear(2, 2), torch.ones(1, 2), {"rounds": 4}, ArgumentError, "at least 5"),
    ],
)
def test_bad_input_is_refused(
    model: Any, example: Any, more: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        measured(model, example, **more)


def test_backends_without_timing() -> None:
    found = backends_of(small(), torch.randn(1, 3, 6, 6))
    assert list(found) == list(layers_of(small()))
    assert found["3"] == "reference"


# Under torch.compile -----------------------------------------------------------------------------


def test_a_compiled_network_is_told_apart_layer_by_layer(tmp_path: Path) -> None:
    model, x = small(), torch.randn(2, 3, 6, 6)
    compiled: Any = torch.compile(model)
    eager, found = measured(model, x), measured(compiled, x)
    assert found.model == "Sequential, compiled"
    ours = {"3": "HetConv2d", "5": "GroupedConv2d"}
    layers = {layer.name: layer for layer in found.layers}
    assert layers.keys() == {layer.name for layer in eager.layers}
    for before in eager.layers:
        layer = layers[before.name]
        assert (layer.macs, layer.dense_macs, layer.bytes) == (
            before.macs, before.dense_macs, before.bytes,
        )  # fmt: skip
        if before.name in ours:
            assert layer.seconds > 0
            assert layer.backend == before.backend
        else:
            assert (layer.seconds > 0) != (layer.backend == "compiled")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    text = profiling.write_timeline(compiled, x, tmp_path / "t.html").read_text()
    assert "fprop reference 2x8x6x6" in text
    trace = json.loads(profiling.write_trace(compiled, x, tmp_path / "t.json").read_text())
    names = [event.get("name", "") for event in trace["traceEvents"]]
    assert sum(name.startswith("hetconv.fprop reference 2x8x6x6") for name in names) == 3


def test_the_kth_event_of_a_kind_is_of_the_kth_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    twins = nn.Sequential(*(hk.nn.HetConv2d(8, 8, 3, padding=1, p=4) for _ in range(3))).eval()
    x = torch.randn(1, 8, 5, 5)
    with torch.no_grad(), ranges.enabled():
        owners = compiled_network._owners(twins, x, layers_of(twins))
        assert list(owners.values()) == [["0", "1", "2"]]
        assert compiled_network._by_layer(twins, x, owners).keys() == {"0", "1", "2"}


def test_a_layer_that_is_not_told_apart_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_network, "_by_layer", lambda *_: {"3": 1e-4})
    found = measured(torch.compile(small()), torch.randn(2, 3, 6, 6))
    layers = {layer.name: layer for layer in found.layers}
    assert layers["3"].seconds == 1e-4
    for name in ("0", "5", "7"):
        assert (layers[name].seconds, layers[name].percent_of_roof) == (0, 0)
        assert layers[name].backend == "compiled"
        assert "everything else" in layers[name].why
    assert "everything else" in str(found)
