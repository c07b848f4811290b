# SPDX-License-Identifier: Apache-2.0
"""What depth-first execution could gain: pieces cover the input, and their times are added up."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import depth_first
from benchmarks.cases import SupportSpec
from benchmarks.networks import NetworkCase

IMAGES = NetworkCase("images", "resnet20", SupportSpec("het", 4), n=4, size=32)
PHOTO = NetworkCase("photo", "dncnn", SupportSpec("het", 4), n=1, size=64, width=96, channels=1)


@pytest.mark.parametrize(
    ("case", "sizes"),
    [(IMAGES, [(4, 32), (2, 32), (1, 32)]), (PHOTO, [(1, 64), (1, 32), (1, 16)])],
    ids=["images", "photo"],
)
def test_pieces_are_halves_of_the_batch_or_of_the_only_image(
    case: NetworkCase, sizes: list[tuple[int, int]]
) -> None:
    assert depth_first.piece_sizes(case) == sizes


@pytest.mark.parametrize("case", [IMAGES, PHOTO], ids=["images", "photo"])
def test_what_takes_a_second_a_pixel_takes_as_long_in_pieces(
    case: NetworkCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, shapes = [0.0], []

    def network_of(piece: NetworkCase, x: torch.Tensor) -> tuple[Any, torch.Tensor]:
        def network(x: torch.Tensor) -> None:
            now[0] += x.numel()
            shapes.append(tuple(x.shape))

        return network, x

    monkeypatch.setattr(depth_first.low_precision, "our_network", network_of)
    monkeypatch.setattr(depth_first.time, "thread_time", lambda: now[0])
    found = depth_first.times_by_piece(case, rounds=3)
    n, channels, height, width = case.shape
    assert [(p.images, p.rows) for p in found] == depth_first.piece_sizes(case)
    assert {p.seconds for p in found} == {n * channels * height * width}
    assert shapes == [(p.images, channels, p.rows, width) for p in found for _ in range(5)]


def test_a_network_of_ours_is_timed() -> None:
    (whole, half) = depth_first.times_by_piece(
        NetworkCase("small", "resnet20", SupportSpec("het", 4), n=2, size=16), rounds=1
    )
    assert (whole.images, half.images) == (2, 1)
    assert min(whole.seconds, half.seconds) > 0
