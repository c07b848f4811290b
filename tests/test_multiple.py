# SPDX-License-Identifier: Apache-2.0
"""Methods that remove whole filters reach their target also where widths have to be multiples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compressing import assert_same_network, run
from torch import nn

import hetconv_kernels as hk

COMMON: dict[str, Any] = {"tolerance": 1.0, "target": 0.85, "epochs": 0, "multiple": 8}
METHODS = {
    "correlation": hk.methods.FilterCorrelation(
        **COMMON, pair_epochs=1, tune_epochs=0, least_correlation=0.0, episodes=40
    ),
    "stability": hk.methods.Stability(**COMMON, probe_epochs=1, tune_epochs=0, steps=40),
    "play and prune": hk.methods.PlayAndPrune(
        **COMMON, penalty=0.5, threshold=0.2, prune_epochs=1, recover_epochs=0, rounds=60
    ),
}


def network() -> nn.Sequential:
    """Widths that a tenth of, rounded to eight, never removes anything from."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 24, 1), nn.ReLU(),
        nn.Conv2d(24, 72, 1), nn.ReLU(), nn.Conv2d(72, 4, 1),
    )  # fmt: skip


def compressed(name: str, **more: Any) -> Any:
    arguments = {
        "example": torch.randn(1, 3, 2, 2),
        "evaluate": lambda model: 1.0,
        "data": range(2),
        "train_step": lambda model, batch: 1e-3 * sum(p.abs().sum() for p in model.parameters()),
        "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=1e-2),
    }
    torch.manual_seed(0)
    return run(METHODS[name], network(), **(arguments | more))


@pytest.mark.parametrize("name", METHODS)
def test_widths_of_eight_reach_the_target(name: str) -> None:
    report = compressed(name)
    assert report.macs_saved >= 0.85, report.notes
    widths = [m.out_channels for m in report.model if hasattr(m, "out_channels")]
    assert all(width % 8 == 0 for width in widths[:-1]), widths


@pytest.mark.parametrize("name", METHODS)
def test_every_step_of_removal_removes_something_or_is_the_last(name: str) -> None:
    report = compressed(name)
    drops = [e["result"]["removed"] for e in report.history if e["what"].startswith("drop")]
    if name != "play and prune":  # its rounds press until something falls under the threshold
        assert all(sum(removed.values()) for removed in drops[:-1])
    assert all(count % 8 == 0 for removed in drops for count in removed.values())


@pytest.mark.parametrize("name", METHODS)
def test_what_is_owed_is_remembered_over_a_kill(name: str, tmp_path: Path) -> None:
    whole = compressed(name)
    state = tmp_path / "state.pt"
    calls = 0

    class Stop(BaseException):
        pass

    def dying(model: nn.Module, batch: int) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 5:  # in the third step, which knows what the second left over
            raise Stop
        return 1e-3 * sum(p.abs().sum() for p in model.parameters())

    with pytest.raises(Stop):
        compressed(name, state=state, train_step=dying)
    resumed = compressed(name, state=state)
    assert resumed.history == whole.history
    assert_same_network(resumed.model, whole.model)
