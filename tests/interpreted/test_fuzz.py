# SPDX-License-Identifier: Apache-2.0
"""The fuzz test of `properties` on the Triton engine, in Triton's interpreter."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import properties
import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings

from hetconv_kernels import functional
from hetconv_kernels.backends.triton import choice, launch
from hetconv_kernels.problem import make_geometry
from hetconv_kernels.support import Support

# Of all cases; float64, which the engine leaves to others, is one in six.
MAY_REFUSE = 0.2
SHARDS = 2
EXAMPLES = int(os.environ.get("HETCONV_FUZZ", "160")) // SHARDS

poison = properties.poison


def case(support: Support, size: tuple[int, int], *where: Any, **more: Any) -> properties.Case:
    geometry = make_geometry(support, *where)
    usual: dict[str, Any] = {
        "batch": 1,
        "dtype": torch.float16,
        "layout": "channels_last",
        "bias": True,
        "live": False,
        "seed": 7,
    }
    return properties.Case(geometry, height=size[0], width=size[1], **(usual | more))


def unequal(*filters: int) -> Support:
    """Groups of these many filters, each on its own 16 channels."""
    labels = np.repeat(np.arange(len(filters)), filters)
    members = np.arange(16 * len(filters)) // 16 == np.arange(len(filters))[:, None]
    return Support.self_grouped(labels, members, 3)


# What would corrupt results in silence, were it not refused or masked; small, on both kernels.
SEEDS = {
    # Taps measured in pixels would wrap in four or five bits: DeepLab's dilations.
    **{
        f"dilation-{d}": case(Support.dense(16, 16, (3, 1)), (d + 3, 2), 1, (d, 0), (d, 1), batch=1)
        for d in (12, 24, 36)
    },
    # A store of a whole tile would write over the next segment's filters: 40 in tiles of 64.
    "segment-of-40": case(unequal(40, 40), (6, 7), 1, 1),
    # Folded by parity, the tail of the last channel block would read the other parity.
    "parity-tail": case(Support.dense(72, 16, 3), (6, 8), 2, 1),
    # And a row of an odd image the next image's.
    "parity-odd-rows": case(Support.dense(64, 16, 3), (7, 8), 2, 1),
    "parity-odd-columns": case(Support.dense(64, 16, 3), (8, 7), 2, 1),
    # Twelve bytes of channels are no sixteen.
    "channels-of-12": case(Support.dense(12, 20, 3), (6, 7), 1, 1),
    # The interpreter multiplies bit patterns of bfloat16.
    "bfloat16": case(Support.het(32, 32, 3, 4), (6, 7), 1, 1, dtype=torch.bfloat16),
}


@pytest.mark.parametrize("only", ["gather", "tma"])
@pytest.mark.parametrize("name", SEEDS)
def test_silent_corrupters(name: str, only: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "ONLY_LAUNCH", only)
    started = []
    start = launch.Launch.__call__

    def spy(self: launch.Launch, *arguments: Any) -> None:
        started.append(self.kernel.__name__)
        start(self, *arguments)

    monkeypatch.setattr(launch.Launch, "__call__", spy)
    properties.refused.clear()
    functional._geometries.clear()  # it remembers the other kernel's choice
    properties.check("triton", SEEDS[name])
    assert not properties.refused
    # Boxes run all of them but the one whose channels no descriptor can have.
    boxed = any("tma" in kernel for kernel in started)
    assert boxed == (only == "tma" and name != "channels-of-12")


@pytest.mark.parametrize("only", [None, "tma"])
@pytest.mark.parametrize("shard", range(SHARDS))
def test_triton_equals_oracle(
    shard: int, only: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On pointers, and where TMA can fetch the case on boxes."""
    functional._geometries.clear()
    monkeypatch.setattr(choice, "ONLY_LAUNCH", only)
    examples = EXAMPLES if only is None else EXAMPLES // 4
    properties.offered.clear()
    properties.refused.clear()

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=False,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @seed(shard + SHARDS * (only is not None))
    @given(properties.cases())
    def run(case: properties.Case) -> None:
        properties.check("triton", case)

    run()
    offered = properties.offered["triton"]
    assert offered >= examples
    refused = sum(properties.refused.values())
    assert all("float64" in reason for _, reason in properties.refused), properties.refused
    # Of the few cases for boxes more may happen to be float64.
    assert only or refused <= MAY_REFUSE * offered, properties.refused
