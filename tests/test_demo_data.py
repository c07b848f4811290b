# SPDX-License-Identifier: Apache-2.0
"""Noise, quality and the stream of training patches of the demo."""

from __future__ import annotations

import pytest
import torch

from hetconv_kernels.demo_data import HELD_OUT, TRAINED_ON, Patches, add_noise, photograph, psnr
from hetconv_kernels.errors import ArgumentError


@pytest.mark.parametrize("name", [TRAINED_ON, HELD_OUT])
def test_photographs_are_luminance_from_0_to_1(name: str) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("PIL")
    photo = photograph(name)
    assert (photo.shape, photo.dtype) == ((1, 427, 640), torch.float32)
    assert 0 <= photo.min() < 0.1
    assert 0.85 < photo.max() <= 1


def test_noise_has_the_given_deviation_and_seed() -> None:
    flat = torch.full((1, 200, 200), 0.5)
    noise = add_noise(flat, seed=3, sigma=0.1) - flat
    assert abs(noise.std().item() - 0.1) < 0.002
    assert torch.equal(add_noise(flat, seed=3), add_noise(flat, seed=3))
    assert not torch.equal(add_noise(flat, seed=3), add_noise(flat, seed=4))


def test_psnr_of_a_known_error() -> None:
    truth = torch.full((1, 8, 8), 0.5)
    assert psnr(truth + 0.1, truth) == pytest.approx(20, abs=1e-4)
    # Values outside of 0…1 cannot be shown, so they count as the nearest that can.
    assert psnr(torch.full_like(truth, 7.0), truth) == pytest.approx(6.0206, abs=1e-4)


def ramp(height: int = 12, width: int = 16) -> torch.Tensor:
    return torch.arange(1.0, height * width + 1).reshape(1, height, width)


def test_patches_are_cut_from_the_photograph_in_all_eight_ways() -> None:
    photo = ramp()
    patches = Patches(photo, 3, 64, sigma=0.0)
    # Which way a patch was turned shows in its differences to the right and downwards.
    ways, darkened = set(), 0
    for _ in range(10):
        noisy, noise = patches.next()
        assert not noise.any()
        for patch in noisy[:, 0]:
            right, down = (patch[0, 1] - patch[0, 0]), (patch[1, 0] - patch[0, 0])
            factor = max(abs(right), abs(down)).item() / 16
            darkened += factor < 0.999
            assert factor <= 1 + 1e-4
            ways.add((round(right.item() / factor), round(down.item() / factor)))
            source = (patch / factor).round()
            top, left = divmod(int(source.min()) - 1, 16)
            expected = photo[0, top : top + 3, left : left + 3]
            assert torch.equal(source.flatten().sort().values, expected.flatten().sort().values)
    assert ways == {(a, b) for a in (1, -1) for b in (16, -16)} | {
        (a, b) for a in (16, -16) for b in (1, -1)
    }
    assert 0.4 < darkened / 640 < 0.6


def test_patches_return_the_noise_that_they_added() -> None:
    noisy, noise = Patches(torch.zeros(1, 50, 50), 40, 8, sigma=0.2).next()
    assert noisy.shape == noise.shape == (8, 1, 40, 40)
    assert torch.equal(noisy, noise)
    assert abs(noise.std().item() - 0.2) < 0.01


def test_patches_follow_their_seed() -> None:
    def stream(seed: int) -> list[torch.Tensor]:
        patches = Patches(ramp(), 5, 2, seed=seed)
        return [patches.next()[0] for _ in range(3)]

    assert all(map(torch.equal, stream(1), stream(1)))
    assert not torch.equal(stream(1)[0], stream(2)[0])
    assert not torch.equal(stream(1)[0], stream(1)[1])


def test_patch_larger_than_the_photograph_is_refused() -> None:
    with pytest.raises(ArgumentError, match="received 13, expected at most 12"):
        Patches(ramp(), 13, 1)
    assert Patches(ramp(), 12, 1).next()[0].shape == (1, 1, 12, 12)
