# SPDX-License-Identifier: Apache-2.0
"""Frozen batch normalisations: known by their buffers, folded, traced as one step."""

from __future__ import annotations

import pytest
import torch
from detecting import FrozenBatchNorm2d, detector
from torch import nn

import hetconv_kernels as hk
from hetconv_kernels.graph.frozen_norm import is_frozen_norm, make_ordinary
from hetconv_kernels.graph.trace import symbolic_graph


def test_only_a_norm_of_buffers_is_one() -> None:
    assert is_frozen_norm(FrozenBatchNorm2d(3))
    assert not is_frozen_norm(nn.BatchNorm2d(3))
    assert not is_frozen_norm(None)
    trained = FrozenBatchNorm2d(3)
    trained.more = nn.Parameter(torch.ones(3))
    assert not is_frozen_norm(trained)


def test_an_ordinary_one_computes_the_same() -> None:
    model = detector(norm=FrozenBatchNorm2d).backbone
    x = torch.randn(2, 3, 6, 6)
    expected = model(x)
    assert make_ordinary(model) == ("1",)
    assert type(model[1]) is nn.BatchNorm2d
    assert not any(p.requires_grad for p in model[1].parameters())
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norms", [True, False])
def test_traced_as_one_step_or_through(norms: bool) -> None:
    graph = symbolic_graph(detector(norm=FrozenBatchNorm2d).backbone, norms)
    called = {node.target for node in graph.nodes if node.op == "call_module"}
    assert ("1" in called) is norms


def test_optimize_folds_it_into_the_convolution() -> None:
    model, x = detector(norm=FrozenBatchNorm2d).backbone, torch.randn(2, 3, 6, 6)
    report = hk.optimize(model, x)
    assert report.settled == ("1",)
    assert not any(
        isinstance(m, FrozenBatchNorm2d | nn.BatchNorm2d) for m in report.model.modules()
    )
    with torch.no_grad():
        torch.testing.assert_close(report.model(x), model(x), rtol=1e-4, atol=1e-5)
