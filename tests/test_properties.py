# SPDX-License-Identifier: Apache-2.0
"""One oracle, one fuzz test: every backend on random Support × geometry × dtype × layout.

Values and gradients are compared with ``F.conv2d(x, w * mask)`` in float64, within a bound derived
from the depth of accumulation. Memory that a backend leaves unwritten reads NaN.
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from properties import (
    Case,
    cases,
    check,
    offered,
    refused,
)

import hetconv_kernels as hk

# The native engine has its own kernels for all of this; the others hand it to PyTorch's.
EXAMPLES = {"cpu": 500, "reference": 200, "vendor": 200}
# Cases that a backend may refuse, of all that it is offered.
MAY_REFUSE = {"reference": 0.0, "vendor": 0.10, "cpu": 0.05}


def _engines() -> list[tuple[str, str]]:
    """Lists every backend, and the native engine once for each instruction set of this machine."""
    engines = [(name, "") for name in hk.available_backends("cpu") if name != "cpu"]
    if "cpu" in hk.available_backends("cpu"):
        from hetconv_kernels import _cpu

        engines += [("cpu", isa) for isa in _cpu.isas()]
    return engines


@pytest.mark.parametrize(("backend", "isa"), _engines())
def test_backend_equals_oracle(backend: str, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    offered.clear()
    refused.clear()
    if isa:
        monkeypatch.setattr("hetconv_kernels.backends.cpu_plans._ISA", isa)

    @settings(
        max_examples=EXAMPLES[backend],
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(cases())
    def run(case: Case) -> None:
        check(backend, case)

    run()
    assert offered[backend] >= EXAMPLES[backend]
    reasons = {reason: n for (name, reason), n in refused.items() if name == backend}
    share = sum(reasons.values()) / offered[backend]
    assert share <= MAY_REFUSE[backend], f"{backend} refused {share:.0%}: {reasons}"
