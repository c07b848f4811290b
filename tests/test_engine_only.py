# SPDX-License-Identifier: Apache-2.0
"""engine_only: every step the engine's, the same numbers, and the original left as it was."""

from __future__ import annotations

import pytest
import torch
from networks import NETWORKS, assert_same, network
from planning import needs_engine
from torch import nn

import hetconv_kernels as hk
from hetconv_kernels.graph.engine_only import engine_only
from hetconv_kernels.nn import AveragePool, FrequencyConv2d, FusedConv2d, SupportLinear
from hetconv_kernels.nn.base import ForcedBackend

pytestmark = needs_engine


@pytest.mark.parametrize("name", NETWORKS)
def test_it_changes_no_number_beyond_rounding(name: str) -> None:
    model, x = network(name, share=0.0)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    made = engine_only(model, (x,)).network
    assert_same(model, made, x)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    layers = [m for m in made.modules() if isinstance(m, ForcedBackend)]
    assert layers
    assert all(m.backend == "cpu" for m in layers)
    assert not any(type(m) in (nn.Conv2d, nn.Linear) for m in made.modules())


def test_an_optimised_network_is_copied_and_keeps_its_engines() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )
    x = torch.randn(2, 3, 8, 8)
    fast = hk.optimize(model.eval(), x).model
    made = engine_only(fast, (x,))
    assert made.network is not fast
    assert all(m.backend is None for m in fast.modules() if isinstance(m, ForcedBackend))
    kinds = {type(m) for m in made.network.modules()}
    assert {FusedConv2d, AveragePool, SupportLinear} <= kinds
    assert any("average pooling" in what for what in made.changed)
    assert any("channels_last" in what for what in made.changed)


def test_a_layer_of_frequencies_becomes_one_of_weights() -> None:
    layer = FrequencyConv2d(4, 8, 3, padding=1).eval()
    x = torch.randn(2, 4, 8, 8)
    made = engine_only(layer, (x,)).network
    assert not any(isinstance(m, FrequencyConv2d) for m in made.modules())
    assert_same(layer, made, x)
