# SPDX-License-Identifier: Apache-2.0
"""Layers as data: every known class comes back with all that its constructor was given."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from layers import BUILDERS, C, F, build
from torch import nn

import hetconv_kernels as hk
from hetconv_kernels.errors import FileError
from hetconv_kernels.graph.layer_json import layer_from_json, layer_to_json
from hetconv_kernels.nn import SupportLinear, fuse
from hetconv_kernels.pooling import Pool

MODULES = {
    "conv": lambda: nn.Conv2d(4, 6, (3, 5), 2, (1, 2), 2, 2, False, "reflect", dtype=torch.half),
    "same": lambda: nn.Conv2d(4, 6, 3, padding="same"),
    "conv-1d": lambda: nn.Conv1d(4, 6, 3, 2, 1, 2, 2, False, "circular"),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, (3, 4), 2, 1, (1, 0), 2, False, 2),
    "linear": lambda: nn.Linear(3, 4, bias=False),
    "norm": lambda: nn.BatchNorm2d(3, eps=0.5, momentum=None, affine=False),
    "max-pool": lambda: nn.MaxPool2d(3, 2, 1, ceil_mode=True),
    "avg-pool": lambda: nn.AvgPool2d((2, 1), count_include_pad=False, divisor_override=3),
    "adaptive": lambda: nn.AdaptiveAvgPool2d((None, 2)),
    "average": lambda: hk.nn.AveragePool(output_size=(None, 2), backend="vendor"),
    "average-flat": lambda: hk.nn.AveragePool(keepdim=False),
    "average-windows": lambda: hk.nn.AveragePool(Pool((3, 2), (2, 1), (1, 0)), inside=True),
    "relu": lambda: nn.ReLU(inplace=True),
    "gelu": lambda: nn.GELU("tanh"),
    "hardtanh": lambda: nn.Hardtanh(-2, 3),
    "upsample": lambda: nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
    "flatten": lambda: nn.Flatten(2, 3),
    "layer-norm": lambda: nn.LayerNorm([3, 4], elementwise_affine=False),
    "support-linear": lambda: SupportLinear(4, 6, support=hk.Support.dense(4, 6, 1)),
    **{kind: lambda kind=kind: build(kind, 3, stride=2, padding=1) for kind in BUILDERS},
    "frozen": lambda: build("support", 3, backend="vendor").freeze(),
    "frequency": lambda: hk.nn.FrequencyConv2d(
        4,
        6,
        (3, 5),
        2,
        "valid",
        2,
        bias=False,
        dtype=torch.half,
        path="spatial",
        backend="vendor",
        coefficients=np.arange(15).reshape(3, 5) % 4 == np.zeros((6, 4, 1, 1)),
    ),
    "pooled": lambda: fuse(nn.Conv2d(C, F, 3), None, "relu", Pool((3, 3), (2, 2), (1, 1))),
    "fused": lambda: fuse(build("het", 3, padding="same"), nn.BatchNorm2d(F).eval(), "silu"),
}


@pytest.mark.parametrize("kind", MODULES)
def test_there_and_back(kind: str) -> None:
    module = MODULES[kind]()
    described = json.loads(json.dumps(layer_to_json(module)))
    built = layer_from_json(described)
    assert type(built) is type(module)
    assert repr(built) == repr(module)
    assert json.loads(json.dumps(layer_to_json(built))) == described
    ours = dict(built.named_parameters()) | dict(built.named_buffers())
    theirs = dict(module.named_parameters()) | dict(module.named_buffers())
    assert {k: (v.shape, v.dtype) for k, v in ours.items()} == {
        k: (v.shape, v.dtype) for k, v in theirs.items()
    }
    assert all(v.is_meta for v in ours.values())


def test_unknown_classes_have_no_description() -> None:
    class Mine(nn.Conv2d):
        pass

    assert layer_to_json(Mine(1, 1, 1)) is None
    assert layer_to_json(nn.LSTM(1, 1)) is None
    parametrised = nn.utils.parametrizations.weight_norm(build("het", 3))
    assert layer_to_json(parametrised) is None


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "Module"},
        {"arguments": {"inplace": True, "more": 1}},
        {"arguments": {}},
        {"arguments": 3},
        {"dtype": "float33"},
    ],
)
def test_nonsense_is_refused(change) -> None:
    with pytest.raises(FileError, match="description of a layer"):
        layer_from_json({"kind": "ReLU", "arguments": {"inplace": True}} | change)


@pytest.mark.parametrize(
    "change",
    [
        {"pool": [[0, 1], [1, 1], [0, 0]]},
        {"pool": 3},
        {"output_size": 2},
        {"output_size": ["a", 1]},
        {"output_size": [2, 2]},
        {"inside": "yes"},
        {"backend": "none"},
        {"more": 1},
    ],
)
def test_an_average_of_nonsense_is_refused(change) -> None:
    described = layer_to_json(hk.nn.AveragePool(keepdim=False))
    assert described is not None
    described["arguments"] |= change
    with pytest.raises(FileError, match="description of a layer"):
        layer_from_json(described)
