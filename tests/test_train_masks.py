# SPDX-License-Identifier: Apache-2.0
"""The masks of a network that was trained here: the committed file, and what made it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from benchmarks import supports, train_masks
from benchmarks.cases import CPU_CASES

CASES = [case for case in CPU_CASES if case.support.kind == "trained_group"]


def test_every_trained_layer_has_a_case_and_every_case_a_mask() -> None:
    shapes = {(case.support.value, case.c) for case in CASES}
    assert shapes == {(p, w) for p in train_masks.KEPT for w in train_masks.WIDTHS}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_committed_masks(case) -> None:
    support = case.build_support()  # raises when the digest is not that of the file
    assert support.density == pytest.approx(1 - case.support.value / 100, abs=0.01)
    assert len(support.groups) >= 15
    assert len({len(group.filters) for group in support.groups}) > 4, "groups are uneven"
    gaussian = supports.self_grouped(case.support.value, case.c, case.f, case.k, 0)
    assert support.digest != gaussian.digest


def test_the_second_mask_lies_within_the_first() -> None:
    for width in train_masks.WIDTHS:
        before, after = (supports.trained(percent, width, width) for percent in (70, 90))
        assert (before & after) == after


def test_the_network_still_worked_when_its_masks_were_taken() -> None:
    recorded = json.loads(supports.TRAINED_PATH.read_text())[
        "held-out accuracy by per cent dropped"
    ]
    assert {"0", *map(str, train_masks.KEPT)} <= set(recorded)
    assert min(recorded.values()) > 0.9


def test_a_damaged_or_missing_mask_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    name = supports.trained_key(70, 64, 64)
    entry = supports._committed_trained()[name]
    wrong = {name: {**entry, "labels": entry["labels"][::-1]}}
    monkeypatch.setattr(supports, "_committed_trained", lambda: wrong)
    with pytest.raises(ValueError, match=r"trained_masks\.json: trained70-64x64-k3 has another"):
        supports.trained(70, 64, 64)
    with pytest.raises(ValueError, match="has no trained90-64x64-k3"):
        supports.trained(90, 64, 64)


def test_the_command_trains_and_prunes_step_by_step() -> None:
    pytest.importorskip("sklearn", reason="the digits and k-means come from scikit-learn")
    torch.manual_seed(0)
    digits, network = train_masks.HeldOutDigits.load(), train_masks.MaskNetwork((16, 32))
    assert (len(digits.labels), len(digits.test_labels)) == (1437, 360)
    densities = []
    for percent in train_masks.run_stages(network, digits, first_epochs=2, seed=0):
        densities.append([layer.support.density for layer in network.grouped.values()])
        if percent == 20:
            break
    assert np.allclose(densities, [[1, 1], [0.9, 0.9], [0.8, 0.8]], atol=0.01)
    assert train_masks.held_out_accuracy(network, digits) > 0.8  # a guess is right one time in ten
    for layer in network.grouped.values():
        dead = torch.as_tensor(~layer.support.mask)
        assert bool((layer.weight.detach()[dead] == 0).all())
