# SPDX-License-Identifier: Apache-2.0
"""Frequency pruning by rates: of a layer, by pattern and by band, on numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compressing import run, tiny

from hetconv_kernels.compression import FrequencyPruning
from hetconv_kernels.compression.methods import frequency as search
from hetconv_kernels.errors import ArgumentError
from hetconv_kernels.nn import SupportLinear
from hetconv_kernels.nn.dct import dct

# The magnitudes of the coefficients of one 2×2 kernel.
SIZE = torch.tensor([[5.0, 1], [2, 0]]).reshape(1, 1, 2, 2)


@pytest.mark.parametrize(
    ("rate", "slope", "limits"),
    [
        (0.5, 0.0, [[2, 2], [2, 2]]),  # 1 and 0 lie under it
        (0.75, 0.0, [[5, 5], [5, 5]]),
        (0.0, 0.0, [[0, 0], [0, 0]]),
        # By the slope 5, 1 / 1.5, 2 / 1.5, 0: half lie under 4/3, and 1.5 and 2 times as much.
        (0.5, 1.0, [[4 / 3, 2], [2, 8 / 3]]),
        (0.99, 0.0, [[5, 5], [5, 5]]),  # one stays
    ],
)
def test_golden_limits_of_a_rate(rate: float, slope: float, limits: list) -> None:
    found = search.rate_limits(SIZE, rate, slope)
    torch.testing.assert_close(found, torch.tensor(limits, dtype=torch.float64))
    assert int((found <= SIZE).sum()) == max(round((1 - rate) * 4), 1)


def test_golden_limits_of_the_rates_of_bands() -> None:
    found = search.band_limits(SIZE, (0.0, 0.5))
    # 5 is a band alone; of 1 and 2 half lie under 2; of the last band, 0, one stays.
    torch.testing.assert_close(found, torch.tensor([[5.0, 2], [2, 0]], dtype=torch.float64))


def lives(**settings: object) -> dict[str, np.ndarray]:
    report = run(FrequencyPruning(search_epochs=0, epochs=0, stem=True, **settings))
    found = {}
    for name in ("0", "3"):
        kernels = report.model.get_submodule(name).to_conv2d().weight.detach().double()
        found[name] = (dct(kernels).abs() > 1e-6).flatten(0, 1).numpy()
    return found


def test_a_target_is_met_exactly_in_each_layer() -> None:
    masks = lives(target=0.7)
    assert masks["0"].sum() == round(0.3 * 270)
    assert masks["3"].sum() == round(0.3 * 432)
    trained = run(FrequencyPruning(target=0.7, search_epochs=2, epochs=1, stem=True))
    assert trained.model[3].mix.support.live == round(0.3 * 432)


def test_layers_have_the_rates_that_their_patterns_name() -> None:
    masks = lives(target=0.7, layer_rates={"[3-9]": 0.9})
    assert masks["0"].sum() == round(0.3 * 270)
    assert masks["3"].sum() == round(0.1 * 432)


def test_bands_have_their_rates() -> None:
    masks = lives(band_rates=(0.0, 0.5, 0.9), layer_rates={"0": 0.25})
    assert masks["0"].sum() == round(0.75 * 270)
    band = np.add.outer(np.arange(3), np.arange(3))
    found = [int(masks["3"][:, band == number].sum()) for number in range(5)]
    # Of 48 kernels 1, 2, 3, 2 and 1 frequencies.
    assert found == [48, 48, round(14.4), round(9.6), round(4.8)]


def test_whole_bands_keep_at_least_what_the_target_leaves() -> None:
    masks = lives(target=0.5, bands=True)
    for mask in masks.values():
        assert (mask.all(0) == mask.any(0)).all()
        assert mask[0].sum() == 5  # of 9, at least half


def test_a_pattern_that_fits_no_layer_is_refused() -> None:
    with pytest.raises(ArgumentError, match="pattern that fits one"):
        run(FrequencyPruning(layer_rates={"features.*": 0.5}))


def test_layers_of_one_tap_lose_weights_by_the_same_search() -> None:
    report = run(FrequencyPruning(target=0.5, single=True, search_epochs=1, epochs=1))
    for name, dense in (("8", 192), ("10", 18)):
        layer = report.model.get_submodule(name)
        assert isinstance(layer, SupportLinear)
        assert layer.support.live == dense // 2
    rows = {row.name: row for row in report.layers}
    assert rows["8"].macs == (4 * 192, 4 * 96)


def test_whole_bands_leave_layers_of_one_tap_their_single_weights() -> None:
    report = run(FrequencyPruning(target=0.5, single=True, bands=True, search_epochs=0, epochs=0))
    assert report.model[8].support.live == 96


def test_a_layer_of_one_tap_that_would_lose_all_keeps_the_largest_weight_of_each_filter() -> None:
    model = tiny()
    report = run(FrequencyPruning(c=1e6, single=True, search_epochs=0, epochs=0), model)
    kept = torch.from_numpy(report.model[8].support.mask.reshape(6, 32).copy())
    assert kept.sum(1).tolist() == [1] * 6
    assert torch.equal(kept.int().argmax(1), model[8].weight.abs().argmax(1))
