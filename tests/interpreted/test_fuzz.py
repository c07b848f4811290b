# SPDX-License-Identifier: Apache-2.0
"""The fuzz test of `test_properties` on the Triton engine, in Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import test_properties as properties
from hypothesis import HealthCheck, given, seed, settings

# Of all cases; float64, which the engine leaves to others, is one in six.
MAY_REFUSE = 0.2
SHARDS = 2
EXAMPLES = int(os.environ.get("HETCONV_FUZZ", "160")) // SHARDS

_poison = properties._poison


@pytest.mark.parametrize("shard", range(SHARDS))
def test_triton_equals_oracle(shard: int) -> None:
    properties.offered.clear()
    properties.refused.clear()

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize=False,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @seed(shard)
    @given(properties.cases())
    def run(case: properties.Case) -> None:
        properties._check("triton", case)

    run()
    offered = properties.offered["triton"]
    assert offered >= EXAMPLES
    refused = sum(properties.refused.values())
    assert refused <= MAY_REFUSE * offered, properties.refused
