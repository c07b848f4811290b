# SPDX-License-Identifier: Apache-2.0
"""Self-grouping of a whole network: its schedules, and the variants that hardware reads well."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from compressing import check_kills, run, tiny
from torch import nn

from hetconv_kernels import self_grouping as sg
from hetconv_kernels.backends import available_backends, get_backend
from hetconv_kernels.compression import SelfGrouping
from hetconv_kernels.errors import ArgumentError, BackendError
from hetconv_kernels.support import Support

pytest.importorskip("sklearn", reason="k-means comes from scikit-learn")


def rounds(report) -> list[str]:
    return [entry["what"].removesuffix(", epoch 1/1") for entry in report.history[1:]]


def test_schedule_g_trains_once_at_the_end() -> None:
    method = SelfGrouping(target=0.3, clusters=2, epochs=1, local_epochs=1)
    assert rounds(run(method)) == ["group 10 %", "group 20 %", "group 30 %", "global"]


def test_schedule_lg_trains_after_each_step_too() -> None:
    method = SelfGrouping(target=0.2, clusters=2, epochs=1, local_epochs=1, schedule="LG")
    assert rounds(run(method)) == [
        "group 10 %", "local after 10 %", "group 20 %", "local after 20 %", "global",
    ]  # fmt: skip


def test_each_step_starts_from_the_one_before() -> None:
    model = tiny()
    support: Support | None = None
    for percent in (10, 20, 30, 40):
        support = sg.self_group(model[3].weight, percent, 3, support)
    report = run(SelfGrouping(target=0.4, clusters=3, epochs=0), model)
    assert report.model[3].support == support
    assert torch.equal(
        report.model[3].weight.detach(), model[3].weight.detach() * torch.tensor(support.mask)
    )


def test_fully_connected_layers_stop_at_their_own_target() -> None:
    model = tiny()
    support: Support | None = None
    for percent in (20, 30):
        support = sg.self_group(model[8].weight, percent, 2, support)
    report = run(SelfGrouping(target=0.8, fc_target=0.3, step=0.2, clusters=2, epochs=0), model)
    assert report.model[8].support == support


def test_the_stem_stays_dense() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    report = run(
        SelfGrouping(target=0.5, clusters=2, epochs=0), model, example=torch.randn(1, 3, 8, 8),
        eval_data=None,
    )  # fmt: skip
    assert type(report.model[0]) is nn.Conv2d
    assert report.layers[0].note == "left out: it reads an image"


def test_a_layer_that_would_lose_everything_stays_and_is_named() -> None:
    model = tiny()
    with torch.no_grad():
        model[3].weight.fill_(1.0)
    report = run(SelfGrouping(target=0.2, clusters=2, epochs=0), model)
    assert type(report.model[3]) is nn.Conv2d
    assert "3 would lose every weight at 10 %" in report.notes[0]


# Hardware -------------------------------------------------------------------------------------

# Centroids of clusters {0} and {1, 2} over four channels in runs of two: means 5, 1 / 3, 2.
IMPORTANCE = [[6.0, 4, 2, 0], [5, 1, 1, 3], [5, 1, 1, 3]]


@pytest.mark.parametrize(
    ("percent", "keep"),
    [
        # Of the runs {5, 1, 3, 3, 2, 2}, each twice, the median is 2.5; single channels would be
        # dropped at the median of {6 4 2 0 5 1 1 3 5 1 1 3}, 2.5 too, and keep channel 3 of 1, 2.
        (50, [[1, 1, 0, 0], [1, 1, 0, 0]]),
        (20, [[1, 1, 0, 0], [1, 1, 0, 0]]),
        (10, [[1, 1, 0, 0], [1, 1, 1, 1]]),
        (90, [[1, 1, 0, 0], [0, 0, 0, 0]]),
    ],
)
def test_golden_granularity(percent: int, keep: list[list[int]]) -> None:
    found = sg.group_channels(IMPORTANCE, percent, [0, 1, 1], granularity=2)
    assert found.astype(int).tolist() == keep
    if percent == 50:
        single = sg.group_channels(IMPORTANCE, percent, [0, 1, 1])
        assert single.astype(int).tolist() == [[1, 1, 0, 0], [1, 0, 0, 1]]


def test_granularity_with_a_shorter_last_run() -> None:
    keep = sg.group_channels([[1.0, 1, 9], [1, 1, 9]], 50, [0, 0], granularity=2)
    assert keep.tolist() == [[False, False, True]]


def test_golden_balance() -> None:
    # k-means finds {0, 1, 2, 3} and {4, 5}; with three filters each, the nearest to 9 must move.
    importance = np.array([[0.0], [0.1], [0.2], [2.0], [9.0], [9.1]])
    assert sg.cluster_filters(importance, 2).tolist() == [0, 0, 0, 0, 1, 1]
    assert sg.balanced_clusters(importance, 2, 3).tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    ("filters", "clusters", "tile", "sizes"),
    [(32, 4, 8, [8, 8, 8, 8]), (40, 4, 8, [16, 16, 8]), (30, 3, 8, [16, 14]), (6, 16, 8, [6])],
)
def test_clusters_fill_tiles(filters: int, clusters: int, tile: int, sizes: list[int]) -> None:
    importance = np.random.default_rng(0).random((filters, 5))
    labels = sg.balanced_clusters(importance, clusters, tile)
    assert sorted(np.bincount(labels).tolist(), reverse=True) == sizes


def test_equal_filters_still_fill_tiles() -> None:
    labels = sg.balanced_clusters(np.ones((16, 3)), 2, 8)
    assert np.bincount(labels).tolist() == [8, 8]


def test_tiles_stay_together_from_step_to_step() -> None:
    model = nn.Sequential(nn.Conv2d(16, 32, 3), nn.ReLU())
    method = SelfGrouping(target=0.6, clusters=4, granularity=4, tile=8, epochs=0)
    report = run(method, model, example=torch.randn(1, 16, 5, 5), eval_data=None)
    groups = report.model[0].support.groups
    assert sum(len(group.filters) for group in groups) == 32
    assert all(len(group.filters) % 8 == 0 for group in groups)
    for group in groups:
        channels = group.mask.any((1, 2)).reshape(4, 4)
        assert (channels.all(1) == channels.any(1)).all()


@pytest.mark.parametrize("backend", available_backends())
def test_groups_match_the_tiles_of_a_backend(backend: str) -> None:
    grain = getattr(get_backend(backend), "grain", None)
    if grain is None:
        with pytest.raises(ArgumentError, match="expected one with tiles"):
            SelfGrouping.matched(backend)
        return
    method = SelfGrouping.matched(backend, target=0.5, clusters=2, epochs=0)
    tile, run_length, *more = grain
    assert (method.tile, method.granularity, method.target) == (tile, run_length, 0.5)
    assert [method.adjacent, method.fill][: len(more)] == more
    assert SelfGrouping.matched(backend, tile=5).tile == 5
    model = nn.Sequential(nn.Conv2d(4 * run_length, 2 * tile, 3), nn.ReLU())
    report = run(method, model, example=torch.randn(1, 4 * run_length, 5, 5), eval_data=None)
    for group in report.model[0].support.groups:
        assert len(group.filters) % tile == 0
        channels = group.mask.any((1, 2)).reshape(4, run_length)
        assert (channels.all(1) == channels.any(1)).all()


def test_no_tiles_of_an_unknown_backend() -> None:
    with pytest.raises(BackendError, match="'tpu' is unknown"):
        SelfGrouping.matched("tpu")


@pytest.mark.parametrize(
    "settings",
    [{"target": 1.0}, {"fc_target": -0.1}, {"step": 0.0}, {"clusters": 0}, {"schedule": "X"},
     {"granularity": 0}, {"tile": -1}, {"epochs": -1}],
    ids=str,
)  # fmt: skip
def test_bad_settings(settings: dict) -> None:
    with pytest.raises(ArgumentError):
        SelfGrouping(**settings)


@pytest.mark.parametrize("tile", [0, 2])
def test_killed_and_resumed(tile: int, tmp_path: Path) -> None:
    method = SelfGrouping(
        target=0.3, clusters=2, schedule="LG", local_epochs=1, epochs=2, tile=tile
    )
    check_kills(method, tmp_path, seed=8 + tile)


@pytest.mark.parametrize("name", ["adjacent", "fill"])
def test_forms_for_kernels_are_counts(name: str) -> None:
    for value in (0, -1, 1.5):
        with pytest.raises(ArgumentError):
            SelfGrouping(**{name: value})
