# SPDX-License-Identifier: Apache-2.0
"""Self-grouping convolution: the filters of a layer choose their own groups and channels.

Filters with alike importance vectors are clustered, and each cluster keeps the input channels
that matter to it, so the groups are uneven, overlap, and depend on the trained weights. The four
steps are four functions here; `self_group` runs them in order for one layer.

Source: Guo, Wu, Kittler, Feng, "Self-grouping convolutional neural networks", Neural Networks
132, 2020, arXiv 2009.13803.
"""

from __future__ import annotations

import warnings

import numpy as np
import numpy.typing as npt
import torch

from .errors import ArgumentError, HetconvError, SupportError, mismatch
from .integers import as_count
from .masks import BoolArray, FloatArray, IntArray
from .support import Support


def self_group(
    weight: torch.Tensor | npt.ArrayLike,
    percent: float,
    clusters: int = 16,
    support: Support | None = None,
    seed: int = 0,
    *,
    granularity: int = 1,
    tile: int = 0,
    adjacent: int = 1,
    fill: int = 1,
) -> Support:
    """Chooses the self-grouping Support of one layer from its weights.

    ``percent`` is cumulative: entries that ``support`` has already dropped count towards it. The
    paper calls this with 10, 20, … up to the target, each time with the Support of the step
    before, and fine-tunes at the end or after every step. Several steps leave more distinct mask
    rows than clusters.

    The arithmetic is the paper's and guards nothing: a cluster whose centroid is small everywhere
    loses all its channels, and its filters are then empty, their output being the bias alone.
    ``percent=0`` keeps ``support`` as it is (the strict comparison of the paper would still drop
    the smallest entry).

    Source: Guo, Wu, Kittler, Feng, Neural Networks 132, 2020, arXiv 2009.13803. The authors' code
    also drops from a whole cluster the channels that its *first* filter had lost in an earlier
    step, which makes the result depend on the order of the filters; the paper does not, nor
    does this function.

    Args:
        weight: the weights, dense; entries outside ``support`` are ignored.  # [F, C, KH, KW] or
            [F, C] for a fully-connected layer, which gives a 1×1 Support
        percent: how much of the (filter, channel) pairs to have dropped, 0 ≤ percent < 100.
        clusters: the number of clusters; fewer when there are fewer filters (with a warning) or
            fewer distinct importance vectors.
        support: the Support of the step before; None is dense.
        seed: seeds k-means; equal seeds give equal Supports.
        granularity: channels are kept or dropped in runs of this many, see `group_channels`.
        tile: 0 clusters as the paper does; otherwise clusters have a multiple of this many
            filters, see `balanced_clusters`, and the groups that ``support`` has stay together.
        adjacent: with a tile, filters a·i … a·i + a - 1 are in the same cluster, as kernels want
            them that write several filters at a time; it divides ``tile``.
        fill: the channels that a cluster keeps fill blocks of this many, see `group_channels`.

    Returns:
        A Support of whole kernels, inside ``support``.

    Raises:
        ArgumentError: a bad shape, non-finite weights, ``percent`` or ``clusters`` out of range.
        SupportError: ``support`` has another shape, or no weight of the layer would survive.
        HetconvError: scikit-learn is not installed.
    """
    check_percent(percent)
    if isinstance(clusters, bool) or not isinstance(clusters, int | np.integer) or clusters < 1:
        raise ArgumentError(mismatch("clusters", repr(clusters), "a positive integer"))
    array = _as_array(weight)
    f, c, kh, kw = array.shape
    before = Support.dense(c, f, (kh, kw)) if support is None else support
    importance = importance_vectors(array, before)
    if percent == 0:
        return before
    labels = cluster_filters(importance, int(clusters), seed) if tile == 0 else None
    if labels is None:
        grouped = len(before.groups) > 1
        labels = (
            _group_labels(before)
            if grouped
            else balanced_clusters(importance, int(clusters), tile, seed, adjacent)
        )
    alive = before.mask.any(axis=(2, 3))
    keep = group_channels(importance, percent, labels, alive, granularity, fill)
    after = Support.self_grouped(labels, keep, (kh, kw), within=before)
    if after.live == 0:
        raise SupportError(
            f"percent={percent} would drop every weight of a layer [{f}, {c}, {kh}, {kw}]: its"
            " importance values tie, or are too few to rank. Use a smaller percent or leave this"
            " layer out."
        )
    return after


def importance_vectors(weight: npt.ArrayLike, support: Support) -> FloatArray:
    """Sums the absolute live weights of each kernel: step 1.  # [F, C, KH, KW] -> [F, C]

    Raises:
        SupportError: ``support`` has another shape than the weight.
    """
    array = np.asarray(weight, np.float64)
    if support.shape != array.shape:
        raise SupportError(mismatch("shape of the support", support.shape, array.shape))
    result: FloatArray = np.where(support.mask, np.abs(array), 0.0).sum(axis=(2, 3))
    return result


def cluster_filters(importance: npt.ArrayLike, clusters: int = 16, seed: int = 0) -> IntArray:
    """Clusters the filters by Euclidean k-means: step 2.  # [F, C] -> int [F]

    Ten random starts of at most 300 iterations, as in the authors' code. Cluster numbers follow
    the order of each cluster's first filter. With fewer filters than ``clusters`` every filter
    may become its own cluster, and a warning says so.

    Raises:
        HetconvError: scikit-learn is not installed.
    """
    vectors = np.asarray(importance, np.float64)
    filters = len(vectors)
    if filters < clusters:
        warnings.warn(
            f"{clusters} clusters were asked for a layer of {filters} filters; using {filters}.",
            stacklevel=3,
        )
    # k-means cannot make more clusters than there are distinct points.
    count = min(clusters, len(np.unique(vectors, axis=0)))
    try:
        from sklearn.cluster import KMeans
    except ImportError as error:
        raise HetconvError(
            "Self-grouping clusters filters with scikit-learn, which is not installed: "
            "pip install 'hetconv-kernels[demo]', or pip install scikit-learn."
        ) from error
    state = seed % 2**32  # scikit-learn takes no more
    means = KMeans(n_clusters=count, init="random", n_init=10, max_iter=300, random_state=state)
    return _in_order(means.fit(vectors).labels_)


def balanced_clusters(
    importance: npt.ArrayLike, clusters: int, tile: int, seed: int = 0, adjacent: int = 1
) -> IntArray:
    """Clusters the filters so that each cluster fills whole tiles.  # [F, C] -> int [F]

    Ours, not the paper's. The size of a cluster is F / ``clusters``, rounded up to a multiple of
    ``tile``; the smallest one has what is left. k-means gives the centres; the filters are then
    assigned to them at the least total squared distance that these sizes allow.

    Example: the first three filters are alike, and a cluster holds two; the third is nearer to
    the fourth than the first two are, and goes there:

        >>> balanced_clusters([[0.0], [0.0], [1.0], [9.0]], 2, 2).tolist()
        [0, 0, 1, 1]

    With ``adjacent`` filters that follow each other are one thing, by the mean of their vectors:

        >>> balanced_clusters([[0.0], [8.0], [4.0], [4.0], [9.0], [9.0]], 2, 4, adjacent=2).tolist()
        [0, 0, 0, 0, 1, 1]

    Raises:
        ArgumentError: ``adjacent`` does not divide ``tile``.
        HetconvError: scikit-learn is not installed.
    """
    vectors = np.asarray(importance, np.float64)
    if adjacent > 1:
        if tile % adjacent:
            received = f"adjacent={adjacent} with tile={tile}"
            raise ArgumentError(mismatch("clusters", received, "a tile that is a multiple of it"))
        begins = np.arange(0, len(vectors), adjacent)
        sizes = np.diff(np.append(begins, len(vectors)))
        means = np.add.reduceat(vectors, begins) / sizes[:, None]
        own = balanced_clusters(means, clusters, tile // adjacent, seed)
        return np.repeat(own, sizes)
    filters = len(vectors)
    size = -(-filters // (min(clusters, filters) * tile)) * tile
    count = -(-filters // size)
    labels = cluster_filters(vectors, count, seed)
    centre = centroids(vectors, labels)
    # Clusters that k-means found empty (equal filters) begin at the mean.
    missing = count - len(centre)
    centre = np.concatenate([centre, np.repeat(vectors.mean(0)[None], missing, 0)])
    from scipy.optimize import linear_sum_assignment  # comes with scikit-learn

    sizes = np.full(count, size)
    # What does not fill a cluster is where k-means found the fewest.
    sizes[np.argmin(np.bincount(labels, minlength=count))] = filters - size * (count - 1)
    slots = np.repeat(np.arange(count), sizes)
    distance = ((vectors[:, None] - centre[None]) ** 2).sum(2)
    rows, columns = linear_sum_assignment(distance[:, slots])
    chosen = np.empty(filters, np.int64)
    chosen[rows] = slots[columns]
    return _in_order(chosen)


def _group_labels(support: Support) -> IntArray:
    labels = np.empty(support.filters, np.int64)
    for number, group in enumerate(support.groups):
        labels[group.filters] = number
    return labels


def _in_order(raw: npt.ArrayLike) -> IntArray:
    """Numbers clusters by their first filter."""
    _, first, inverse = np.unique(raw, return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first))
    labels: IntArray = rank[inverse].astype(np.int64)
    return labels


def centroids(importance: npt.ArrayLike, labels: npt.ArrayLike) -> FloatArray:
    """Averages the importance vectors of each cluster.  # [F, C], int [F] -> [G, C]

    They are taken from the labels and not from k-means, whose own centres carry rounding errors
    where the exact mean is zero. A cluster number without filters has the centroid zero.
    """
    vectors, label = np.asarray(importance, np.float64), np.asarray(labels)
    sums = np.zeros((int(label.max()) + 1, vectors.shape[1]))
    np.add.at(sums, label, vectors)
    sizes = np.bincount(label, minlength=len(sums))
    result: FloatArray = sums / np.maximum(sizes, 1)[:, None]
    return result


def group_channels(
    importance: npt.ArrayLike,
    percent: float,
    labels: npt.ArrayLike,
    alive: npt.ArrayLike | None = None,
    granularity: int = 1,
    fill: int = 1,
) -> BoolArray:
    """Chooses the channels that each cluster keeps: step 3.

    The threshold is the ``percent``-th percentile (linear interpolation) over all filters f and
    channels c of the centroid of f's cluster at c, or 0 where (f, c) is dropped already: so a
    centroid weighs by the size of its cluster. A channel stays when its centroid is strictly
    greater.

    Example: two clusters, of one and of three filters, on two channels. The multiset is
    {5, 1} and three times {4, 2}; its median is 3, so each cluster keeps its first channel:

        >>> group_channels([[5, 1], [4, 2], [4, 2], [4, 2]], 50, [0, 1, 1, 1]).astype(int).tolist()
        [[1, 0], [1, 0]]

    Args:
        importance: the importance vectors.  # [F, C]
        percent: 0 ≤ percent < 100, cumulative over steps.
        labels: the cluster of each filter.  # int [F]
        alive: which pairs were not dropped before; None is all.  # bool [F, C]
        granularity: channels g·i … g·i + g - 1 are kept or dropped together, by the mean of the
            centroid over them (ours; 1 is the paper). The last run may be shorter.
        fill: the number of channels that a cluster keeps is brought to the nearest multiple of
            this, by the channels nearest to the threshold, where that changes it by a quarter at
            most (ours; 1 is the paper). So the share that is dropped may differ from ``percent``.

    Returns:
        The channels that each cluster keeps; still to be intersected with ``alive``.  # bool [G, C]

    Raises:
        ArgumentError: shapes that do not match, a negative label, percent out of range.
    """
    check_percent(percent)
    vectors, label = np.asarray(importance, np.float64), np.asarray(labels)
    if vectors.ndim != 2 or vectors.size == 0:
        raise ArgumentError(mismatch("importance", f"shape {vectors.shape}", "a 2-D array [F, C]"))
    if label.shape != vectors.shape[:1] or not np.issubdtype(label.dtype, np.integer):
        raise ArgumentError(
            mismatch("labels", f"{label.dtype} {label.shape}", f"{len(vectors)} integers")
        )
    if label.min() < 0:
        raise ArgumentError(mismatch("labels", f"a label {label.min()}", "labels from 0 upwards"))
    live = np.ones(vectors.shape, bool) if alive is None else np.asarray(alive)
    if live.shape != vectors.shape or live.dtype != np.bool_:
        raise ArgumentError(
            mismatch("alive", f"{live.dtype} {live.shape}", f"bool {vectors.shape}")
        )
    as_count("granularity", granularity)
    centre = centroids(vectors, label)
    if granularity > 1:
        starts = np.arange(0, vectors.shape[1], granularity)
        lengths = np.diff([*starts, vectors.shape[1]])
        centre = np.repeat(np.add.reduceat(centre, starts, axis=1) / lengths, lengths, axis=1)
    threshold = np.percentile(np.where(live, centre[label], 0.0), percent)
    keep: BoolArray = centre > threshold
    as_count("fill", fill)
    if fill > 1:
        for own in range(len(keep)):
            _fill(keep[own], centre[own], live[label == own].any(axis=0), fill)
    return keep


def _fill(keep: BoolArray, centre: FloatArray, live: BoolArray, fill: int) -> None:
    """Brings the channels that one cluster keeps to a multiple of `fill`, if a near one is there.

    Channels of one run have one centroid and stand together in a stable order.
    """
    kept = int((keep & live).sum())
    wanted = (kept + fill // 2) // fill * fill
    if not wanted or abs(wanted - kept) > kept / 4 or wanted > int(live.sum()):
        return
    order = np.argsort(-np.where(live, centre, -np.inf), kind="stable")
    keep[:] = False
    keep[order[:wanted]] = True


def check_percent(percent: float) -> None:
    """Refuses a share of pairs that is not 0 ≤ percent < 100."""
    if isinstance(percent, bool) or not isinstance(percent, int | float | np.number):
        raise ArgumentError(mismatch("percent", repr(percent), "a number, 0 <= percent < 100"))
    if not 0 <= percent < 100:
        raise ArgumentError(mismatch("percent", percent, "0 <= percent < 100"))


def _as_array(weight: torch.Tensor | npt.ArrayLike) -> FloatArray:
    """Copies a weight to float64 numpy, 4-D.  # [F, C] or [F, C, KH, KW] -> [F, C, KH, KW]"""
    if isinstance(weight, torch.Tensor):
        # numpy has no bfloat16, and cannot read a tensor that is on a device or needs a gradient.
        weight = weight.detach().cpu().double().numpy()
    array = np.asarray(weight, np.float64)
    if array.ndim == 2:
        array = array[:, :, None, None]
    if array.ndim != 4 or array.size == 0:
        raise ArgumentError(
            mismatch("weight", f"shape {array.shape}", "non-empty [F, C, KH, KW] or [F, C]")
        )
    if not np.isfinite(array).all():
        raise ArgumentError(mismatch("weight", "NaN or infinite entries", "finite weights"))
    return array
