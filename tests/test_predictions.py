# SPDX-License-Identifier: Apache-2.0
"""What the documentation's tables of predictions are made of; `test_docs` makes all of them."""

from __future__ import annotations

import pytest

from benchmarks import predictions
from hetconv_kernels.backends.cuda import choice


def test_a_kernel_that_cannot_run_a_layer_has_no_time() -> None:
    problem = predictions.problem_of("fprop", 256, 14, predictions.het_layer(256, 1))
    assert predictions.seconds("narrow", problem) is None
    assert predictions.us(None) == "–"
    assert predictions.us(12.34e-6) == "12.3"
    assert choice.ONLY_KERNEL is None


@pytest.mark.parametrize(("channels", "size"), predictions.LAYERS)
def test_the_kinds_of_tiles_are_those_that_the_engine_chooses_from(
    channels: int, size: int
) -> None:
    problem = predictions.problem_of("fprop", channels, size, predictions.het_layer(channels, 4))
    eights, flat = predictions.wide_seconds(problem)
    assert predictions.seconds("wide", problem) == min(eights, flat)
    assert (flat < eights) == (size in (28, 14))
    assert predictions.fastest(problem) <= min(eights, flat)
    shares = predictions.pixels_of_tiles(problem)
    assert all(0.7 < share <= 1 for share in shares)
    assert predictions.floor(problem) < min(eights, flat)


@pytest.mark.parametrize("channels", [256, 512])
def test_both_forms_of_self_grouping_run_at_three_quarters_of_a_plan(channels: int) -> None:
    """Formed for the kernel, and as the paper forms them, at 70 %; fprop of 14² and 7²."""
    size = dict(predictions.LAYERS)[channels]
    matched = predictions.problem_of("fprop", channels, size, predictions.matched_support(channels))
    assert predictions.useful_share(matched) >= 0.75
    paper = predictions.self_grouped(70, channels, channels, 3, seed=0)
    problem = predictions.problem_of("fprop", channels, size, paper)
    found = choice.best_cuda_gather(problem)
    assert isinstance(found, choice.ScatteredChoice)
    assert found.how.tables.useful(paper) >= 0.75
    # The one that is chosen is predicted to be faster than what the groups cost before.
    before = predictions._BEFORE_GROUPED[channels] * 1e-6
    assert predictions.fastest(matched) < 0.6 * before
    assert predictions.fastest(problem) < 0.85 * before
