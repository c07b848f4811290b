# SPDX-License-Identifier: Apache-2.0
"""No public function that takes a network changes it, unless it is asked to."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hetconv_kernels as hk
from hetconv_kernels import pruning
from hetconv_kernels.graph.convert import HOOKS
from hetconv_kernels.measure import profiling

X = (2, 4, 6, 6)

# What is done with a network; the names are those of the public functions.
CALLS: dict[str, Callable[[nn.Module, Tensor, Path], Any]] = {
    "compact": lambda m, x, _: hk.compact(m, x),
    "compress": lambda m, x, _: hk.compress(
        m, hk.methods.Het(p=2, epochs=0, stem=True), example=x, measure=False, progress=False
    ),
    "convert": lambda m, x, _: hk.convert(m, hk.rules.het(p=2)),
    "explain": lambda m, x, _: hk.explain(m[0], x, measure=False),
    "export.plain": lambda m, x, _: hk.export.plain(m),
    "export.support_layers": lambda m, x, _: hk.export.support_layers(m),
    "optimize": lambda m, x, _: hk.optimize(m, x),
    "plan_memory": lambda m, x, _: hk.plan_memory(m),
    "profile": lambda m, x, _: hk.profile(m, x, rounds=5, max_seconds=0.1),
    "profiling.write_trace": lambda m, x, folder: profiling.write_trace(m, x, folder / "t"),
    "quantization.convert": lambda m, x, _: hk.quantization.convert(m),
    "quantization.prepare": lambda m, x, _: hk.quantization.prepare(m, [x]),
    "quantization.to_onnx": lambda m, x, folder: hk.quantization.to_onnx(m, x, folder / "m.onnx"),
    "quantization.to_qdq": lambda m, x, _: hk.quantization.to_qdq(m),
    "quantize": lambda m, x, _: hk.quantize(m, [x], measure=False),
    "release_memory": lambda m, x, _: hk.release_memory(m),
    "save": lambda m, x, folder: hk.save(m, folder / "m.safetensors"),
    "stats.layer_macs": lambda m, x, _: hk.stats.layer_macs(m, x),
    "stats.live_parameters": lambda m, x, _: hk.stats.live_parameters(m),
    "stats.live_weights": lambda m, x, _: hk.stats.live_weights(m),
    "stats.macs": lambda m, x, _: hk.stats.macs(m, x),
    "stats.weight_bytes": lambda m, x, _: hk.stats.weight_bytes(m),
    "warmup": lambda m, x, _: hk.warmup(m, x),
}
# What is done with another network than `network`.
MADE: dict[str, Callable[[nn.Module, Tensor], nn.Module]] = {
    "quantization.convert": lambda m, x: hk.quantization.prepare(m, [x]).eval(),
    "quantization.to_onnx": lambda m, x: hk.quantize(m, [x], measure=False).model,
    "quantization.to_qdq": lambda m, x: hk.quantize(m, [x], measure=False).model,
}
# Public functions of networks that are not called here, each with the reason.
ELSEWHERE = {
    "export.to_onnx": "tests/test_export.py; it works on what export.plain returns",
    "pruning.live_only": "tests/test_pruning.py; it is meant to change the layer that it is given",
    "export.program": "tests/test_program_file.py; it saves a copy on the engine",
    "profiling.write_timeline": "tests/test_profiling.py; it profiles the network, as profile",
    "profiling.write_proton": "needs a GPU; it only calls the network",
}


def network() -> nn.Module:
    torch.manual_seed(0)
    support = hk.Support.het(4, 8, 3, p=2)
    layers = (
        hk.nn.SupportConv2d(4, 8, 3, padding=1, support=support),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    )
    return nn.Sequential(*layers).eval()


def described(model: nn.Module) -> list[Any]:
    """Lists what a user could find changed: objects, modes, hooks, weights and their places."""
    found: list[Any] = []
    for name, module in model.named_modules():
        hooks = [len(getattr(module, kind, None) or ()) for kind in HOOKS]
        frozen = getattr(module, "frozen", None)
        found.append((name, id(module), type(module), module.training, hooks, frozen))
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        found.append((name, id(tensor), tensor.data_ptr(), tensor.requires_grad, tensor.tolist()))
        found.append((name, tensor.stride(), tensor.dtype, tensor.grad is None))
    return found


@pytest.mark.parametrize("name", CALLS)
def test_the_given_network_is_the_same_afterwards(name: str, tmp_path: Path) -> None:
    x = torch.randn(X)
    model = MADE[name](network(), x) if name in MADE else network()
    before = described(model)
    CALLS[name](model, x, tmp_path)
    assert described(model) == before


def test_the_comparison_notices_a_conversion_in_place() -> None:
    model = network()
    before = described(model)
    hk.convert(model, hk.rules.het(p=2), inplace=True)
    assert described(model) != before


def functions_of_networks() -> Iterator[str]:
    """Lists the public functions whose first argument is a network or a layer."""
    public = {name: getattr(hk, name) for name in hk.__all__}
    for name, value in {**public, "profiling": profiling, "pruning": pruning}.items():
        inside = {name: value}
        if isinstance(value, types.ModuleType):
            inside = {
                f"{name}.{key}": item
                for key, item in vars(value).items()
                if getattr(item, "__module__", "").startswith(value.__name__)
            }
        for full, item in inside.items():
            if not inspect.isfunction(item) or full.split(".")[-1].startswith("_"):
                continue
            first = next(iter(inspect.signature(item).parameters.values()), None)
            if first is not None and first.annotation in ("nn.Module", "SupportLayer"):
                yield full


def test_every_public_function_of_a_network_is_tried() -> None:
    found = set(functions_of_networks())
    assert found >= {"convert", "optimize", "compact", "compress", "profile"}
    missing = found - {"profiling.profile"} - set(CALLS) - set(ELSEWHERE)
    assert not missing, "call them in CALLS, or say in ELSEWHERE why not"
