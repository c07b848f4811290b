# SPDX-License-Identifier: Apache-2.0
"""Self-grouping: the four steps on numbers worked out by hand, and what holds for any weights."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hetconv_kernels import self_grouping as sg
from hetconv_kernels.errors import ArgumentError, HetconvError, SupportError
from hetconv_kernels.support import Support

# Six filters, four channels, kernels of 1×2 taps. Filters 0 and 3 look alike (cluster 0), and so
# do 1, 2, 4 and 5 (cluster 1). The pair (filter 0, channel 1) was dropped by an earlier step; the
# weights still stored there are large, and would put filter 0 in a cluster of its own.
WEIGHT = np.array(
    [
        [(7, -3), (50, 50), (-6, 0), (2, 3)],
        [(1, 0), (-4, 5), (1, -1), (2, 2)],
        [(0, 1), (6, -5), (2, 2), (-1, 1)],
        [(-6, 6), (4, 4), (4, -4), (7, 0)],
        [(2, -1), (9, 0), (-3, 1), (1, 1)],
        [(3, 0), (1, 10), (2, 0), (2, -2)],
    ],
    dtype=np.float32,
)[:, :, None, :]
BEFORE = np.ones((6, 4, 1, 2), bool)
BEFORE[0, 1] = False
IMPORTANCE = [
    [10, 0, 6, 5],
    [1, 9, 2, 4],
    [1, 11, 4, 2],
    [12, 8, 8, 7],
    [3, 9, 4, 2],
    [3, 11, 2, 4],
]
LABELS = [0, 1, 1, 0, 1, 1]
CENTROIDS = [[11, 4, 7, 6], [2, 10, 3, 3]]
# Sorted multiset of 24: 0, 2 (4 times), 3 (8 times), 4, 6, 6, 7, 7, 10 (4 times), 11, 11.
#   50 %: rank 11.5, threshold 3. Cluster 1 loses its two 3s only because the comparison is
#         strict. Unweighted, the median of {2, 3, 3, 4, 6, 7, 10, 11} is 5: cluster 0 loses the 4.
#   56 %: rank 12.88, threshold 3.88. Were the dropped pair counted as 4, it would be 4.
#   70 %: rank 16.1, threshold 7, which the third centroid of cluster 0 equals and so loses.
KEEP = {
    50: [[True, True, True, True], [False, True, False, False]],
    56: [[True, True, True, True], [False, True, False, False]],
    70: [[True, False, False, False], [False, True, False, False]],
}


@pytest.fixture
def kmeans() -> None:
    pytest.importorskip("sklearn", reason="k-means comes from scikit-learn")


def test_step_1_importance_sums_absolute_live_taps() -> None:
    support = Support.from_mask(BEFORE)
    np.testing.assert_array_equal(sg.importance_vectors(WEIGHT, support), IMPORTANCE)


@pytest.mark.usefixtures("kmeans")
@pytest.mark.parametrize("seed", range(4))
def test_step_2_clusters_by_masked_importance(seed: int) -> None:
    assert sg.cluster_filters(IMPORTANCE, 2, seed).tolist() == LABELS


def test_step_2_centroids_are_means() -> None:
    np.testing.assert_array_equal(sg.centroids(IMPORTANCE, LABELS), CENTROIDS)


@pytest.mark.parametrize("percent", KEEP)
def test_step_3_keeps_channels_above_the_weighted_percentile(percent: int) -> None:
    keep = sg.group_channels(IMPORTANCE, percent, LABELS, BEFORE.any(axis=(2, 3)))
    assert keep.tolist() == KEEP[percent]


@pytest.mark.usefixtures("kmeans")
@pytest.mark.parametrize("percent", KEEP)
@pytest.mark.parametrize("kind", ["numpy", "tensor", "bfloat16 parameter"])
def test_all_steps_on_the_worked_example(percent: int, kind: str) -> None:
    weight: object = WEIGHT
    if kind != "numpy":
        weight = torch.from_numpy(WEIGHT)
    if kind == "bfloat16 parameter":
        weight = torch.nn.Parameter(torch.from_numpy(WEIGHT).bfloat16())
    result = sg.self_group(weight, percent, clusters=2, support=Support.from_mask(BEFORE))
    expected = np.array(KEEP[percent])[LABELS][:, :, None, None] & BEFORE
    np.testing.assert_array_equal(result.mask, expected)
    if percent < 70:
        # The pair dropped earlier stays dropped, so cluster 0 has two distinct mask rows.
        assert [g.filters.tolist() for g in result.groups] == [[0], [1, 2, 4, 5], [3]]


@pytest.mark.usefixtures("kmeans")
def test_percent_is_cumulative_over_the_schedule() -> None:
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((48, 40, 3, 3))
    support: Support | None = None
    for percent in range(10, 100, 10):
        before = Support.dense(40, 48, 3) if support is None else support
        support = sg.self_group(weight, percent, clusters=8, support=support)
        # Training moves the weights between two steps, and filters change their cluster.
        weight += rng.standard_normal(weight.shape)
        assert not (support.mask & ~before.mask).any()
        kernels = support.mask.any(axis=(2, 3))
        assert np.array_equal(support.mask.all(axis=(2, 3)), kernels)
        # A centroid's entries tie across its cluster, so at most one cluster too many goes.
        dropped = 100 * (1 - kernels.mean())
        assert percent - 0.1 <= dropped <= percent + 100 * 48 / kernels.size


@st.composite
def layers(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    f, c = draw(st.integers(1, 9)), draw(st.integers(1, 7))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    # Small integers, so that ties and exact zeros are common.
    importance = rng.integers(0, 6, (f, c)).astype(float)
    alive = rng.random((f, c)) < 0.8
    return importance * alive, rng.integers(0, draw(st.integers(1, 4)), f), alive


@given(layer=layers(), percent=st.integers(0, 99))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_step_3_equals_its_definition_read_literally(layer, percent: int) -> None:
    importance, labels, alive = layer
    mean = {g: importance[labels == g].mean(axis=0) for g in set(labels.tolist())}
    multiset = sorted(
        mean[labels[f]][c] if alive[f, c] else 0.0
        for f in range(len(importance))
        for c in range(importance.shape[1])
    )
    rank = percent / 100 * (len(multiset) - 1)
    low = multiset[int(rank)]
    threshold = low + (multiset[min(int(rank) + 1, len(multiset) - 1)] - low) * (rank - int(rank))
    keep = sg.group_channels(importance, percent, labels, alive)
    for g, centre in mean.items():
        clear = np.abs(centre - threshold) > 1e-9
        np.testing.assert_array_equal(keep[g][clear], (centre > threshold)[clear])


@given(layer=layers(), percent=st.integers(1, 99), seed=st.integers(0, 99))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_step_3_does_not_depend_on_the_order_of_filters(layer, percent: int, seed: int) -> None:
    importance, labels, alive = layer
    order = np.random.default_rng(seed).permutation(len(labels))
    straight = sg.group_channels(importance, percent, labels, alive)
    shuffled = sg.group_channels(importance[order], percent, labels[order], alive[order])
    np.testing.assert_array_equal(straight, shuffled)


@pytest.mark.usefixtures("kmeans")
def test_same_seed_same_support() -> None:
    weight = torch.randn(64, 32, 3, 3, generator=torch.Generator().manual_seed(0))
    first = sg.self_group(weight, 50, seed=3)
    assert first == sg.self_group(weight, 50, seed=3)
    assert first != sg.self_group(weight, 50, seed=4)


@pytest.mark.usefixtures("kmeans")
def test_a_kernel_with_fewer_taps_is_ranked_by_those_and_dropped_whole() -> None:
    weight = np.random.default_rng(0).standard_normal((16, 16, 3, 3))
    het = Support.het(16, 16, 3, p=4)
    support = sg.self_group(weight, 50, clusters=4, support=het)
    assert not (support.mask & ~het.mask).any()
    kernels = support.mask.any(axis=(2, 3))
    assert np.array_equal(support.mask, het.mask & kernels[:, :, None, None])
    # Nine taps weigh more than one, so the full kernels are the last to go.
    full = het.mask.all(axis=(2, 3))
    assert kernels[full].mean() > 0.9 > kernels[~full].mean()


@pytest.mark.usefixtures("kmeans")
def test_a_weak_cluster_is_left_empty() -> None:
    weight = np.ones((4, 4, 1, 1)) + np.arange(4)[None, :, None, None]
    weight[2:] *= 0.01
    support = sg.self_group(weight, 50, clusters=2)
    assert support.mask.sum(axis=(1, 2, 3)).tolist() == [4, 4, 0, 0]


@pytest.mark.usefixtures("kmeans")
def test_percent_zero_changes_nothing() -> None:
    before = Support.from_mask(BEFORE)
    assert sg.self_group(WEIGHT, 0, clusters=2, support=before) == before
    assert sg.self_group(WEIGHT, 0, clusters=2).is_dense


@pytest.mark.usefixtures("kmeans")
def test_fully_connected_weight_gives_a_1x1_support() -> None:
    weight = np.random.default_rng(0).standard_normal((20, 10))
    support = sg.self_group(weight, 60, clusters=4)
    assert support.shape == (20, 10, 1, 1)
    assert support == sg.self_group(weight[:, :, None, None], 60, clusters=4)


@pytest.mark.usefixtures("kmeans")
def test_fewer_filters_than_clusters_warns_and_works() -> None:
    weight = np.random.default_rng(0).standard_normal((3, 8, 3, 3))
    with pytest.warns(UserWarning, match="16 clusters were asked for a layer of 3 filters"):
        support = sg.self_group(weight, 50)
    assert len(support.groups) == 3


@pytest.mark.usefixtures("kmeans")
def test_equal_filters_share_one_cluster() -> None:
    weight = np.repeat(np.arange(1.0, 9.0)[None, :, None, None], 20, axis=0)
    assert sg.cluster_filters(weight[:, :, 0, 0], 16).tolist() == [0] * 20
    assert sg.self_group(weight, 50).mask.sum(axis=(1, 2, 3)).tolist() == [4] * 20


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"percent": 100}, ArgumentError, "0 <= percent < 100"),
        ({"percent": -1}, ArgumentError, "0 <= percent < 100"),
        ({"percent": float("nan")}, ArgumentError, "0 <= percent < 100"),
        ({"percent": "70"}, ArgumentError, "a number"),
        ({"clusters": 0}, ArgumentError, "clusters"),
        ({"clusters": 2.5}, ArgumentError, "clusters"),
        ({"weight": np.ones((4, 4, 3))}, ArgumentError, "weight"),
        ({"weight": np.ones((0, 4, 3, 3))}, ArgumentError, "weight"),
        ({"weight": np.full((2, 2, 1, 1), np.nan)}, ArgumentError, "NaN"),
        ({"support": Support.dense(4, 6, 3)}, SupportError, "shape of the support"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_bad_arguments(change: dict, error: type[Exception], message: str) -> None:
    arguments = {"weight": WEIGHT, "percent": 50, "clusters": 2} | change
    with pytest.raises(error, match=message):
        sg.self_group(**arguments)


@pytest.mark.usefixtures("kmeans")
def test_a_layer_that_would_lose_everything_is_refused() -> None:
    with pytest.raises(SupportError, match="every weight"):
        sg.self_group(np.ones((8, 8, 3, 3)), 10, clusters=4)


@pytest.mark.parametrize(
    "change",
    [
        {"labels": [0, 1]},
        {"labels": [0.0] * 6},
        {"labels": [-1] * 6},
        {"alive": np.ones((6, 4))},
        {"importance": [1.0, 2.0]},
        {"percent": 101},
    ],
    ids=str,
)
def test_group_channels_refuses(change: dict) -> None:
    arguments = {"importance": IMPORTANCE, "percent": 50, "labels": LABELS} | change
    with pytest.raises(ArgumentError):
        sg.group_channels(**arguments)


def test_missing_scikit_learn_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(HetconvError, match=r"pip install 'hetconv-kernels\[demo\]'"):
        sg.self_group(WEIGHT, 50, clusters=2)


# Groups that kernels read well -------------------------------------------------------------------


def matched(channels: int, **changed: int) -> Support:
    """Runs self-grouping in steps to 70 %, with what the kernels for wide groups want."""
    how = {"granularity": 8, "tile": 64, "adjacent": 8, "fill": 64} | changed
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(channels, channels, 3, 3, generator=generator)
    support = Support.dense(channels, channels, 3)
    for percent in range(10, 71, 10):
        support = sg.self_group(weight, percent, 16, support, **how)
    return support


def test_filters_that_follow_each_other_are_in_one_cluster() -> None:
    vectors = np.random.default_rng(0).random((40, 5))
    labels = sg.balanced_clusters(vectors, 2, 16, adjacent=8)
    assert (labels.reshape(5, 8) == labels[::8, None]).all()
    assert sorted(np.bincount(labels)) == [8, 32]  # 20 each, in tiles of 16
    with pytest.raises(ArgumentError, match="adjacent=8 with tile=12"):
        sg.balanced_clusters(vectors, 2, 12, adjacent=8)


@pytest.mark.parametrize("fill", [1, 2, 4, 5, 6])
def test_channels_fill_blocks_where_that_changes_little(fill: int) -> None:
    """Five channels become four or six; three stay, as four would be a third more."""
    centre = np.array(
        [[9, 8, 7, 6, 5, 2, 1, 0], [9, 8, 7, 2, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0, 0, 0]]
    )
    keep = sg.group_channels(centre, 50, [0, 1, 2], fill=fill)
    threshold = sg.group_channels(centre, 50, [0, 1, 2])
    assert threshold.sum(1).tolist() != [0, 0, 0]
    for row, count in zip(keep, threshold.sum(1), strict=True):
        near = (int(count) + fill // 2) // fill * fill
        wanted = near if near and abs(near - count) <= count / 4 else count
        assert row.sum() == wanted
        assert row[: int(wanted)].all()  # the most important ones


def test_channels_that_were_dropped_fill_nothing() -> None:
    centre = np.arange(8.0, 0, -1)[None]
    alive = np.array([[True] * 5 + [False] * 3])
    keep = sg.group_channels(centre, 20, [0], alive, fill=6)
    # Six would be nearer to a block, but only five are left: as without it.
    assert np.array_equal(keep, sg.group_channels(centre, 20, [0], alive))
    assert (keep & alive).sum() == 5


@pytest.mark.parametrize("channels", [256, 512])
def test_matched_groups_run_at_three_quarters_of_a_plan_at_70_percent(channels: int) -> None:
    """Of the products of a plan of fprop; as the paper forms them less than a third are useful."""
    from hetconv_kernels.backends.cuda.wide_lowering import lower_wide, wide_windows
    from hetconv_kernels.problem import make_geometry

    def efficiency(support: Support) -> float:
        classes, _ = wide_windows(make_geometry(support, 1, 1), (14, 14), False)
        return support.live / lower_wide(support, classes).size

    support = matched(channels)
    assert 0.25 <= support.density <= 0.35
    assert efficiency(support) >= 0.75
    assert efficiency(matched(channels, tile=0, granularity=1, adjacent=1, fill=1)) < 0.35
