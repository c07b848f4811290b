# SPDX-License-Identifier: Apache-2.0
"""SelfGroupConv2d: ragged, overlapping groups, from clusters and kept channels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from layers import C, F, assert_equals_conv2d, image, self_grouped
from torch import nn

import hetconv_kernels as hk
from hetconv_kernels.compression import self_group
from hetconv_kernels.errors import InputTypeError, SupportError
from hetconv_kernels.nn import SelfGroupConv2d

LABELS = [0, 1, 0, 0, 1, 2, 0, 0]
KEEP = np.zeros((3, C), bool)
KEEP[0, 2:9], KEEP[1, [0, 4, 7, 11]] = True, True


def test_each_cluster_reads_its_own_channels() -> None:
    conv = nn.Conv2d(C, F, 3, stride=2, padding=1)
    layer = SelfGroupConv2d.from_groups(conv, LABELS, KEEP, backend="vendor")
    assert layer.support == self_grouped()
    assert layer.backend == "vendor"
    assert sorted(len(group.filters) for group in layer.support.groups) == [1, 2, 5]
    with torch.no_grad():
        y, x = layer(image()), image()
        for f, label in enumerate(LABELS):
            read = x * torch.tensor(KEEP[label])[:, None, None]
            torch.testing.assert_close(y[:, f], conv(read)[:, f])
    assert_equals_conv2d(layer, image())


def test_a_later_step_stays_within_the_earlier_one() -> None:
    """Step by step, as the method prunes: distinct rows then outnumber the clusters."""
    first = SelfGroupConv2d.from_groups(nn.Conv2d(C, F, 3, padding=1), LABELS, KEEP)
    keep = np.ones((2, C), bool)
    keep[0, ::2] = False
    second = hk.Support.self_grouped(
        np.arange(F) % 2, keep, first.kernel_size, within=first.support
    )
    assert len(second.groups) > 2
    optimizer = torch.optim.SGD(first.parameters(), 0.1, momentum=0.9)
    first(image()).sum().backward()
    optimizer.step()
    first.set_support(second, optimizer)
    assert (first.weight != 0).sum() == second.live < self_grouped().live
    assert_equals_conv2d(first, image())


def test_clusters_of_the_method() -> None:
    conv = nn.Conv2d(C, F, 3)
    support = self_group(conv.weight.detach(), 60, clusters=3)
    layer = SelfGroupConv2d.from_conv2d(conv, support)
    assert layer.support.density == pytest.approx(0.4, abs=0.05)
    assert_equals_conv2d(layer, image())


@pytest.mark.parametrize(
    ("labels", "keep", "error", "message"),
    [
        ([0, 1, 0, 0, 1, 3, 0, 0], KEEP, SupportError, "labels: received 0…3, expected"),
        ([0, -1, 0, 0, 1, 2, 0, 0], KEEP, SupportError, "labels"),
        (LABELS[:-1], KEEP, SupportError, r"received \(7, 12, 3, 3\), expected \(8, 12, 3, 3\)"),
        (LABELS, KEEP[:, :-1], SupportError, r"received \(8, 11, 3, 3\)"),
        (LABELS, KEEP.astype(float), SupportError, "keep: received float64"),
        (np.array(LABELS) / 2, KEEP, SupportError, "labels: received float64"),
        ([], KEEP, SupportError, "non-empty"),
    ],
    ids=["label-over", "label-under", "filters", "channels", "keep-type", "label-type", "empty"],
)
def test_refusals(labels: Any, keep: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SelfGroupConv2d.from_groups(nn.Conv2d(C, F, 3), labels, keep)


def test_refuses_what_is_no_conv2d() -> None:
    with pytest.raises(InputTypeError, match="received Linear, expected"):
        SelfGroupConv2d.from_groups(nn.Linear(C, F), LABELS, KEEP)  # type: ignore[arg-type]
