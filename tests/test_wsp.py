# SPDX-License-Identifier: Apache-2.0
"""WSP on numbers worked out by hand, and what its removal leaves behind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressing import check_kills, run, tiny
from torch import nn

from hetconv_kernels.compression import WeakSubnetwork
from hetconv_kernels.compression.methods.wsp import by_units, fit_width, weak_channels
from hetconv_kernels.errors import ArgumentError
from hetconv_kernels.models.resnet import BasicBlock

# Four channels between two 1×1 convolutions. Outgoing scores (rows of FIRST): 1, 2, 3, 4.
# Incoming scores (columns of SECOND): 2, 3, 1, 4.
FIRST = [[1.0, 0], [-1, 1], [2, -1], [2, 2]]
SECOND = [[1.0, -1, 0, 2], [1, 1, -1, 1], [0, 1, 0, 1]]
X = torch.tensor([1.0, 2.0]).reshape(1, 2, 1, 1)


def network() -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(2, 4, 1, bias=False), nn.ReLU(), nn.Conv2d(4, 3, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor(FIRST)[:, :, None, None])
        model[2].weight.copy_(torch.tensor(SECOND)[:, :, None, None])
    return model


@pytest.mark.parametrize(
    ("percentile", "weak"),
    [
        # Medians 2.5 and 2.5: below the first are 0 and 1, below the second 0 and 2.
        (0.5, [0]),
        # Rank 2.1 of (1, 2, 3, 4) is 3.1: all but the last, on both sides.
        (0.7, [0, 1, 2]),
        # Rank 1.0 is exactly 2; "below" is strict, so the first has {0} and the second has {2}.
        (1 / 3, []),
        (0.0, []),
    ],
)
def test_golden_trace(percentile: float, weak: list[int]) -> None:
    report = run(
        WeakSubnetwork(percentile, epochs=0), network(), example=X, eval_data=None, compact=False
    )
    assert report.history[1]["result"]["removed"] == {"0": len(weak)}
    alive = [i not in weak for i in range(4)]
    if weak:
        for layer, axis in ((report.model[0], (1, 2, 3)), (report.model[2], (0, 2, 3))):
            assert layer.support.mask.any(axis=axis).tolist() == alive
    # y = SECOND[:, alive] · relu(FIRST[alive] · (1, 2)), relu(FIRST · (1, 2)) = (1, 1, 0, 6).
    hidden = np.array([1.0, 1, 0, 6]) * alive
    torch.testing.assert_close(
        report.model(X).flatten().detach().double(), torch.tensor(np.array(SECOND) @ hidden)
    )


def test_weak_needs_both_sides() -> None:
    out, into = np.array([1.0, 1, 9, 9]), np.array([1.0, 9, 1, 9])
    assert weak_channels(out, into, 0.6).tolist() == [True, False, False, False]


def test_a_flattened_channel_is_all_its_inputs() -> None:
    model = tiny()
    with torch.no_grad():
        model[3].weight.fill_(1)
        model[3].weight[2].fill_(0.1)
        model[8].weight.fill_(1)
        model[8].weight[:, 8:12].fill_(0.1)  # the 2×2 pixels of channel 2
    report = run(WeakSubnetwork(0.5, epochs=0), model, skip=["8", "0"], compact=False)
    assert report.history[1]["result"]["removed"] == {"3": 1}
    mask = report.model[8].support.mask[:, :, 0, 0]
    assert np.flatnonzero(~mask.any(axis=0)).tolist() == [8, 9, 10, 11]


def test_all_scores_are_taken_before_any_removal() -> None:
    """Removing channels of one interface must not weaken the next one."""
    model = nn.Sequential(*(nn.Conv2d(2, 2, 1, bias=False) for _ in range(3)))
    with torch.no_grad():
        # 0 -> 1: channel 0 is weak. 1 -> 2: outgoing (5 + 1, 0 + 4), channel 1 is not weak
        # though it is once the first interface has lost channel 0: (1, 4), channel 0 below.
        model[0].weight.copy_(torch.tensor([[1.0, 0], [3, 0]])[:, :, None, None])
        model[1].weight.copy_(torch.tensor([[5.0, 1], [0, 9]])[:, :, None, None])
        model[2].weight.copy_(torch.tensor([[1.0, 2], [0, 0]])[:, :, None, None])
    report = run(WeakSubnetwork(0.5, epochs=0), model, example=X, eval_data=None, compact=False)
    assert report.history[1]["result"]["removed"] == {"0": 1, "1": 1}
    assert report.model[1].support.mask[:, :, 0, 0].tolist() == [[False, False], [False, True]]


def test_widths_are_rounded_up_to_a_multiple() -> None:
    scores, alive = np.arange(8.0), np.ones(8, bool)
    remove = np.array([True, True, True, False, True, False, False, False])
    # 4 remain; a multiple of 3 is 6, so only the two weakest go.
    assert np.flatnonzero(fit_width(remove, scores, alive, 3, 1)).tolist() == [0, 1]
    assert np.flatnonzero(fit_width(remove, scores, alive, 4, 1)).tolist() == [0, 1, 2, 4]
    assert np.flatnonzero(fit_width(remove, scores, alive, 1, 6)).tolist() == [0, 1]


def test_a_layer_keeps_its_strongest_channel() -> None:
    model = network()
    report = run(WeakSubnetwork(0.99, epochs=0), model, example=X, eval_data=None, compact=False)
    assert report.model[0].support.mask.any(axis=(1, 2, 3)).sum() == 1


def residual() -> nn.Sequential:
    """A stem and two blocks whose sums have eight channels, and a classifier."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Conv2d(5, 4, 3, padding=1), nn.ReLU(),
            BasicBlock(4, 8, downsample=nn.Conv2d(4, 8, 1, bias=False)), BasicBlock(8, 8),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
        )  # fmt: skip


def live(report: Any, name: str, axis: tuple[int, ...]) -> list[bool]:
    """Says which filters (axis 1, 2, 3) or channels (axis 0, 2, 3) of a layer are live."""
    layer = report.model.get_submodule(name)
    if not hasattr(layer, "support"):
        return [True] * layer.weight.shape[1 - axis[0]]
    return layer.support.mask.any(axis=axis).tolist()


FILTERS, CHANNELS = (1, 2, 3), (0, 2, 3)


def test_without_residual_interfaces_sums_keep_their_width_and_the_report_says_so() -> None:
    model = nn.Sequential(nn.Conv2d(5, 8, 3, padding=1), BasicBlock(8, 8))
    report = run(WeakSubnetwork(0.7, epochs=0, residual=False), model, eval_data=None)
    assert list(report.history[1]["result"]["removed"]) == ["1.conv1"]
    notes = {row.name: row.note for row in report.layers}
    assert "residual sum" in notes["0"]


def test_behind_a_residual_sum_rows_and_columns_die_and_the_sum_keeps_its_width() -> None:
    method, model = WeakSubnetwork(0.7, epochs=0), residual()
    report = run(method, model, skip=["*.downsample"], eval_data=None, compact=False)
    removed = report.history[1]["result"]["removed"]
    assert set(removed) == {"0", "2.conv1", "3.conv1", "2.conv2", "3.conv2"}
    first, second = live(report, "2.conv2", FILTERS), live(report, "3.conv2", FILTERS)
    assert first.count(False) == removed["2.conv2"] > 0
    assert second.count(False) == removed["3.conv2"] > 0
    assert live(report, "3.conv1", CHANNELS) == first
    assert live(report, "6", CHANNELS) == second
    assert all(live(report, "2.downsample", FILTERS))
    inside = run(replace(method, residual=False), model, skip=["*.downsample"], eval_data=None)
    assert report.macs[1] < inside.macs[1]


def test_of_a_sum_only_channels_that_nobody_reads_are_taken_out() -> None:
    method, model = WeakSubnetwork(0.7, epochs=0), residual()
    masked = run(method, model, skip=["*.downsample"], eval_data=None, compact=False)
    small = run(method, model, skip=["*.downsample"], eval_data=None)
    read = np.array([live(masked, name, CHANNELS) for name in ("3.conv1", "6")]).any(0)
    assert 0 < (~read).sum() < 8
    assert small.compacted
    assert small.model[3].conv2.out_channels == read.sum()
    x = torch.randn(2, 5, 6, 6)
    torch.testing.assert_close(small.model.eval()(x), masked.model.eval()(x))


def test_the_scores_behind_a_residual_sum_are_those_of_the_layer_that_reads_it_next() -> None:
    model = residual()
    with torch.no_grad():
        model[2].conv2.weight.fill_(1)
        model[2].conv2.weight[5].fill_(0.1)
        model[3].conv1.weight.fill_(1)
        model[3].conv1.weight[:, 5].fill_(0.1)
        model[6].weight[:, 5].fill_(9)  # reads the sum behind the next block
    report = run(WeakSubnetwork(0.5, epochs=0), model, eval_data=None, compact=False)
    assert [i for i, on in enumerate(live(report, "3.conv1", CHANNELS)) if not on] == [5]


def test_a_network_whose_only_interfaces_are_behind_sums_is_taken() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(5, 5, 1), nn.Conv2d(5, 5, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x) + x)

    torch.manual_seed(0)
    report = run(WeakSubnetwork(0.7, epochs=0), Sum(), eval_data=None)
    assert list(report.history[1]["result"]["removed"]) == ["a"]
    with pytest.raises(ArgumentError, match="no layer whose width can change"):
        run(WeakSubnetwork(epochs=0, residual=False), Sum())


def test_masked_network_equals_the_one_with_its_filters_removed_by_hand() -> None:
    torch.manual_seed(3)
    model = tiny().eval()
    report = run(WeakSubnetwork(0.6, epochs=0), model, compact=False)
    conv, reader = report.model[0], report.model[3]
    alive = np.flatnonzero(conv.support.mask.any(axis=(1, 2, 3)))
    assert 0 < len(alive) < 6
    inner = np.flatnonzero(reader.support.mask.any(axis=(1, 2, 3)))
    x = torch.randn(2, 5, 6, 6)
    y = nn.functional.conv2d(x, model[0].weight[alive], model[0].bias[alive], padding=1)
    norm = model[1]
    y = nn.functional.batch_norm(
        y, norm.running_mean[alive], norm.running_var[alive], norm.weight[alive], norm.bias[alive]
    ).relu()
    y = nn.functional.conv2d(y, model[3].weight[inner][:, alive], padding=1)
    torch.testing.assert_close(report.model[3](report.model[:3](x))[:, inner], y)


class Branches(nn.Module):
    """Two branches, joined end to end or summed."""

    def __init__(self, joined: bool) -> None:
        super().__init__()
        self.joined = joined
        self.one, self.two = nn.Conv2d(2, 4, 1, bias=False), nn.Conv2d(2, 4, 1, bias=False)
        self.last = nn.Conv2d(8 if joined else 4, 3, 1, bias=False)
        with torch.no_grad():
            self.one.weight.copy_(torch.tensor(FIRST)[:, :, None, None])
            self.two.weight.copy_(torch.tensor(FIRST).flip(0)[:, :, None, None])
            second = torch.tensor(SECOND)
            second = torch.cat([second, second.flip(1)], 1) if joined else second
            self.last.weight.copy_(second[:, :, None, None])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one, two = self.one(x), self.two(x)
        return self.last(torch.cat([one, two], 1).relu() if self.joined else (one + two).relu())


def test_of_a_concatenation_each_layer_is_paired_with_its_own_columns() -> None:
    method = WeakSubnetwork(0.7, epochs=0)
    report = run(method, Branches(True), example=X, eval_data=None, compact=False)
    # As in the golden trace: of the first all but the last, of the second, mirrored, but the first.
    assert report.history[1]["result"]["removed"] == {"one": 3, "two": 3}
    assert live(report, "one", FILTERS) == [False, False, False, True]
    assert live(report, "two", FILTERS) == [True, False, False, False]
    assert live(report, "last", CHANNELS) == [False] * 3 + [True] * 2 + [False] * 3


def test_what_a_group_normalisation_binds_goes_by_whole_groups() -> None:
    first, _, last = network()
    with torch.no_grad():
        last.weight[:, 3] = torch.tensor([3.0, 2, 1])[:, None, None]
    # Outgoing scores 1, 2, 3, 4, by groups 1.5 and 3.5; incoming 2, 3, 1, 6, by groups 2.5 and 3.5.
    model = nn.Sequential(first, nn.GroupNorm(2, 4), nn.ReLU(), last)
    report = run(WeakSubnetwork(0.7, epochs=0), model, example=X, eval_data=None)
    assert report.history[1]["result"]["removed"] == {"0": 2}
    small = report.model
    assert (small[0].out_channels, small[1].num_groups, small[3].in_channels) == (2, 1, 2)
    torch.testing.assert_close(small[0].weight, first.weight[2:])


def test_golden_scores_by_units() -> None:
    found = by_units(np.array([1.0, 5, 3, 2]), np.array([7, 2, 7, 2]))
    assert found.tolist() == [2.0, 3.5, 2.0, 3.5]


def test_parallel_branches_are_one_layer() -> None:
    method = WeakSubnetwork(0.5, epochs=0)
    report = run(method, Branches(False), example=X, eval_data=None, compact=False)
    # Outgoing 1 + 4, 2 + 3, 3 + 2, 4 + 1: none is below the median, though each layer has some.
    assert report.history[1]["result"]["removed"] == {"one": 0, "two": 0}
    model = Branches(False)
    with torch.no_grad():
        model.two.weight.copy_(model.one.weight)
    report = run(method, model, example=X, eval_data=None, compact=False)
    for name in ("one", "two"):
        assert live(report, name, FILTERS) == [False, True, True, True]
    assert live(report, "last", CHANNELS) == [False, True, True, True]


@pytest.mark.parametrize(
    "settings",
    [{"percentile": 1.0}, {"percentile": -0.1}, {"epochs": -1}, {"multiple": 0}, {"least": 0}],
    ids=str,
)
def test_bad_settings(settings: dict) -> None:
    with pytest.raises(ArgumentError):
        WeakSubnetwork(**settings)


def test_a_network_without_a_free_width_is_refused() -> None:
    with pytest.raises(ArgumentError, match="no layer whose width can change"):
        run(WeakSubnetwork(epochs=0), nn.Sequential(nn.Conv2d(5, 3, 1)))


def test_killed_and_resumed(tmp_path: Path) -> None:
    check_kills(WeakSubnetwork(0.6, epochs=3), tmp_path, seed=1)


@pytest.mark.parametrize(
    ("settings", "layers"),
    [
        ({"percentile": 0.7, "fc_percentile": 0.0, "conv_fc_percentile": 0.0}, {"0"}),
        ({"percentile": 0.0, "conv_fc_percentile": 0.7}, {"3"}),
        ({"percentile": 0.0, "fc_percentile": 0.9}, {"8"}),
        ({"percentile": 0.0}, set()),
        ({"percentile": 0.9}, {"0", "3", "8"}),
    ],
    ids=["conv", "conv-fc", "fc", "none", "one for all"],
)
def test_each_kind_of_interface_has_its_percentile(settings: dict, layers: set[str]) -> None:
    report = run(WeakSubnetwork(epochs=0, **settings), compact=False)
    removed = report.history[1]["result"]["removed"]
    assert {name for name, count in removed.items() if count} == layers
    assert set(removed) == {"0", "3", "8"}


@pytest.mark.parametrize("name", ["percentile", "fc_percentile", "conv_fc_percentile"])
def test_a_percentile_is_a_fraction(name: str) -> None:
    with pytest.raises(ArgumentError, match=name):
        WeakSubnetwork(**{name: 1.0})
    with pytest.raises(ArgumentError, match="percentile"):
        WeakSubnetwork(percentile=None)
