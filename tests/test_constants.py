# SPDX-License-Identifier: Apache-2.0
"""constants: what is constant whatever the input, and where zero padding ends it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F_
from networks import live_norms
from torch import nn

from hetconv_kernels.graph.channels import Channels
from hetconv_kernels.graph.constants import constants
from hetconv_kernels.graph.trace import trace


class Net(nn.Module):
    """conv has dead filters 0 (bias 2) and 1 (bias 0); filters 2 and 3 live."""

    def __init__(self, middle) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.conv.weight.data[:2] = 0
        self.conv.bias.data[:2] = torch.tensor([2.0, 0.0])
        self.middle = middle

    def forward(self, x):
        return self.middle(self.conv(x))


def check(model: nn.Module) -> list[float | None]:
    """Compares the found constants of the result with two runs; None stands for one that varies."""
    model.eval()
    torch.manual_seed(1)
    x, other = torch.randn(2, 3, 6, 6), torch.randn(2, 3, 6, 6)
    traced = trace(model, x)
    found = constants(Channels(traced))
    last = next(n for n in reversed(traced.graph.nodes) if n.op == "output").args[0]
    known, value = found[last]
    with torch.no_grad():
        runs = torch.cat([model(x), model(other)])
    flat = runs.transpose(0, 1).flatten(1)
    even = (flat == flat[:, :1]).all(1).numpy()
    assert (known == even).all(), (known, even)
    torch.testing.assert_close(torch.tensor(value[known]).float(), flat[known, 0])
    return [float(v) if k else None for k, v in zip(known, value, strict=True)]


@pytest.mark.parametrize(
    ("middle", "expected"),
    [
        (nn.Identity(), [2, 0, None, None]),
        (nn.ReLU(), [2, 0, None, None]),
        (lambda x: x * 3 - 1, [5, -1, None, None]),
        (nn.MaxPool2d(3, 2, padding=1), [2, 0, None, None]),
        (nn.AvgPool2d(3, 1, padding=1), [None, 0, None, None]),
        (nn.AvgPool2d(3, 1, padding=1, count_include_pad=False), [2, 0, None, None]),
        (nn.AdaptiveAvgPool2d(2), [2, 0, None, None]),
        (lambda x: F_.pad(x, (1, 1, 0, 0)), [None, 0, None, None]),
        (lambda x: x + x, [4, 0, None, None]),
        (lambda x: F_.pad(x, (0, 0, 0, 0, 1, 0)), [0, 2, 0, None, None]),
        (lambda x: torch.cat([x[:, 2:], x[:, :2]], 1), [None, None, 2, 0]),
        (lambda x: x.mean((2, 3)), [2, 0, None, None]),
        (lambda x: x.flatten(1)[:, 30:38], [2] * 6 + [0] * 2),
    ],
    ids=[
        *("none", "relu", "affine", "max-pool", "avg-pool", "avg-pool-inside", "adaptive"),
        *("pad", "sum", "pad-channels", "cat", "mean", "flatten"),
    ],
)
def test_constants_are_followed(middle, expected: list[float | None]) -> None:
    assert check(Net(middle)) == expected


def test_through_normalisation() -> None:
    norm = nn.BatchNorm2d(4)
    live_norms(norm)
    found = check(Net(norm))
    assert found[2:] == [None, None]
    assert found[0] != found[1]


@pytest.mark.parametrize("padding", [0, 1])
def test_through_a_filter_that_reads_only_constants(padding: int) -> None:
    conv = nn.Conv2d(4, 3, 3, padding=padding)
    conv.weight.data[0, 2:] = 0  # reads 2 and 0: constant, but for its border
    conv.weight.data[1, 2:], conv.weight.data[1, 0] = 0, 0  # reads only zeros
    found = check(Net(conv))
    assert (found[0] is None) is bool(padding)
    assert found[1] == pytest.approx(conv.bias[1].item())
    assert found[2] is None


def test_through_groups_and_linear_layers() -> None:
    depthwise = nn.Conv2d(4, 4, 3, groups=4)
    assert [v is None for v in check(Net(depthwise))] == [False, False, True, True]
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    head[2].weight.data[0, 2:] = 0
    assert [v is None for v in check(Net(head))] == [False, True]


def test_not_a_number_is_no_constant_to_fold() -> None:
    model = Net(lambda x: 1 / x)
    traced = trace(model.eval(), torch.randn(1, 3, 4, 4))
    assert constants(Channels(traced))
