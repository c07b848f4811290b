# SPDX-License-Identifier: Apache-2.0
"""Group normalisations with a forward of their own are modules of a graph, with their groups."""

from __future__ import annotations

import pytest
import torch
from networks import assert_same
from torch import nn

import hetconv_kernels as hk
from hetconv_kernels.graph.trace import trace


class GroupNormAct(nn.GroupNorm):
    """timm's: the function in its own forward, an activation after it."""

    def __init__(self, groups: int, channels: int) -> None:
        super().__init__(groups, channels)
        self.drop, self.act = nn.Identity(), nn.ReLU(inplace=True)

    def forward(self, x):
        x = nn.functional.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        return self.act(self.drop(x))


def test_whole_groups_leave_a_group_normalisation_with_an_activation() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 1), GroupNormAct(3, 6), nn.Conv2d(6, 3, 3, padding=1)
    ).eval()
    with torch.no_grad():
        nn.init.normal_(model[1].weight)
        nn.init.normal_(model[1].bias)
        for dead in (2, 3, 4):
            model[0].weight[dead] = 0
            model[2].weight[:, dead] = 0
    x = torch.randn(2, 2, 5, 5)
    report = hk.compact(model, x)
    assert_same(model, report.model, x)
    # The group of 2 and 3 goes; that of 4 and 5 stays for 5.
    assert type(report.model[1]) is GroupNormAct
    assert (report.model[1].num_groups, report.model[1].num_channels) == (2, 4)
    assert model[1].num_channels == 6
    again = hk.compact(report.model, x)
    assert_same(model, again.model, x)
    optimized = hk.optimize(model, x).model
    assert_same(model, optimized, x)
    assert optimized.get_submodule("1").num_channels == 4


def steps(model: nn.Module) -> list[str]:
    traced = trace(model.eval(), torch.randn(2, 6, 5, 5))
    return [str(n.target) for n in traced.graph.nodes if n.op in ("call_module", "get_attr")]


def test_its_function_is_a_module_and_what_it_calls_keeps_its_name() -> None:
    assert steps(nn.Sequential(GroupNormAct(3, 6))) == ["0", "0.drop", "0.act"]


class OtherEps(GroupNormAct):
    def forward(self, x):
        return nn.functional.group_norm(x, self.num_groups, self.weight, self.bias, 1e-3)


class OtherGroups(GroupNormAct):
    def forward(self, x):
        return nn.functional.group_norm(x, 2, self.weight, self.bias, self.eps)


class NoBias(GroupNormAct):
    def forward(self, x):
        return nn.functional.group_norm(x, self.num_groups, self.weight, eps=self.eps)


@pytest.mark.parametrize("kind", [OtherEps, OtherGroups, NoBias])
def test_a_function_that_is_not_the_modules_stays_one(kind: type[GroupNormAct]) -> None:
    assert "0" not in steps(nn.Sequential(kind(3, 6)))
