# SPDX-License-Identifier: Apache-2.0
"""Layers that torchao's eager ``quantize_`` made: left as they are, or refused by a sentence."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hetconv_kernels as hk
from hetconv_kernels.compression import Het
from hetconv_kernels.errors import InputTypeError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    quantization = pytest.importorskip(
        "torchao.quantization", reason="torchao is not installed", exc_type=ImportError
    )

CONFIGS = ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"]
X = torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)
Call = Callable[[nn.Module], Any]


def network(config: str) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8),
    ).eval()  # fmt: skip
    quantization.quantize_(model, getattr(quantization, config)())
    assert type(model[6].weight).__module__.startswith("torchao.")
    return model


REFUSED: dict[str, Call] = {
    "optimize": lambda model: hk.optimize(model, X),
    "quantize": lambda model: hk.quantize(model, [X], measure=False),
    "compress": lambda model: hk.compress(
        model, Het(p=2, epochs=0), example=X, measure=False, progress=False
    ),
    "save": lambda model: hk.save(model, Path("net.safetensors")),
}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("what", REFUSED)
def test_what_would_rewrite_the_weight_refuses_and_names_it(
    what: str, config: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputTypeError, match=r"weight '6\.weight': received torchao's Int8Tensor"):
        REFUSED[what](network(config))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("config", CONFIGS)
def test_what_looks_on_or_changes_other_layers_leaves_them_as_they_are(config: str) -> None:
    model = network(config)
    with torch.no_grad():
        converted = hk.convert(model, hk.rules.het(p=4)).model
        assert isinstance(converted[2], hk.nn.HetConv2d)
        assert type(converted[6].weight) is type(model[6].weight)
        assert torch.equal(converted[4:](converted[:4](X)), model[4:](converted[:4](X)))
        assert torch.equal(hk.compact(model, X).model(X), model(X))
        assert hk.stats.macs(model, (3, 8, 8)) == 64 * (3 * 16 * 9 + 16 * 16 * 9) + 64 * 72
        names = {layer.name for layer in hk.profile(model, X, rounds=5, max_seconds=0.1).layers}
    assert names == {"0", "2", "6", "8"}
