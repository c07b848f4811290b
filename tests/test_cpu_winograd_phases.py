# SPDX-License-Identifier: Apache-2.0
"""Winograd's F(3x3, 4x4) of an image's four phases: the first layer of a network, and its pooling.

Outputs begin as NaN, so that a pixel that no tile writes is seen; dead weights are NaN, so that one
that is read is seen.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F_
from torch import Tensor
from winograd_calls import (
    ACTS,
    LAYOUTS,
    assert_near_conv2d,
    call,
    chosen_form,
    problem,
    wide_vectors,
)

import hetconv_kernels as hk
from hetconv_kernels.backends import winograd
from hetconv_kernels.pooling import Pool

pytestmark = pytest.mark.skipif(
    "cpu" not in hk.available_backends(), reason="the native engine is not built here"
)
if "cpu" in hk.available_backends():
    from hetconv_kernels import _cpu

ISAS = _cpu.isas() if "cpu" in hk.available_backends() else []
FORM = "winograd 3x3"
# Kernel, stride and padding; the third as VGG's, the last with windows beyond the image.
POOLS = [(3, 2, 1), (3, 1, 0), (2, 2, 0), (3, 3, 1), (5, 4, 2), (4, 1, 2)]


def drawn_support(rng: random.Random) -> hk.Support:
    """All filters read the same: everything, or kernels with dead taps."""
    channels, filters = rng.choice([1, 2, 3, 3, 3, 4]), rng.choice([16, 24, 33, 64, 70])
    kernel = rng.choice([(7, 7), (7, 7), (8, 8), (7, 8), (8, 7)])
    mask = np.ones((channels, *kernel), dtype=bool)
    if rng.random() < 0.3:
        mask = np.random.default_rng(rng.randrange(99)).random(mask.shape) < 0.7
        mask[0, 0, 0] = True
    return hk.Support.from_mask(np.tile(mask, (filters, 1, 1, 1)))


def drawn_case(rng: random.Random) -> dict[str, Any]:
    height, width = rng.choice([(8, 8), (9, 21), (15, 15), (16, 40), (33, 12), (40, 41), (61, 8)])
    return {
        "size": (rng.choice([1, 2, 5]), height, width),
        "padding": rng.choice([(3, 3), (3, 3), (0, 0), (2, 4), (6, 1)]),
        "act": rng.choice(list(ACTS)),
        "scale": rng.random() < 0.3,
        "shift": rng.random() < 0.6,
        "residual": rng.random() < 0.4,
        "layout": rng.choice(list(LAYOUTS)),
        "threads": rng.choice([1, 2, 3]),
    }


def operands(
    support: hk.Support, case: dict[str, Any], seed: int
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """The image, the weight, and what a call is given beside them."""
    g = torch.Generator().manual_seed(seed)
    images, height, width = case["size"]
    x = torch.randn(images, support.channels, height, width, generator=g)
    x = x.contiguous(memory_format=LAYOUTS[case["layout"]])
    w, f = torch.randn(*support.shape, generator=g), support.filters
    padding = case["padding"]
    size = [
        (n + 2 * p - k) // 2 + 1
        for n, p, k in zip((height, width), padding, support.kernel, strict=True)
    ]
    residual = torch.randn(images, f, *size, generator=g) if case["residual"] else None
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    return (
        x,
        w,
        {
            "padding": padding,
            "stride": (2, 2),
            "act": case["act"],
            "threads": case["threads"],
            "scale": torch.randn(f, generator=g) if case["scale"] else None,
            "shift": torch.randn(f, generator=g) if case["shift"] else None,
            "residual": residual,
        },
    )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("seed", range(60))
def test_random_calls_agree_with_conv2d(seed: int, isa: str) -> None:
    rng = random.Random(seed)
    support, case = drawn_support(rng), drawn_case(rng)
    x, w, given = operands(support, case, seed)
    y = call(support, x, w, isa=isa, form=FORM, **given)
    assert_near_conv2d(y, support, x, w, reach=4, times=16, **given)  # 12 x 12 inputs of a tile


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("act", ["none", "relu", "silu"])
def test_what_is_pooled_on_the_way_is_the_largest_bit_for_bit(
    act: str, pool: tuple[int, int, int], threads: int, isa: str
) -> None:
    """Tiles are the same ones in every band, whoever computes it."""
    support = hk.Support.dense(3, 40, 7)
    g = torch.Generator().manual_seed(sum(pool))
    x = torch.randn(3, 3, 131, 37, generator=g).contiguous(memory_format=torch.channels_last)
    w, shift = torch.randn(*support.shape, generator=g), torch.randn(40, generator=g)
    given: dict[str, Any] = {"padding": (3, 3), "stride": (2, 2), "shift": shift, "act": act}
    given |= {"isa": isa, "form": FORM, "threads": threads}
    whole = call(support, x, w, **given)
    assert whole is not None
    want = F_.max_pool2d(whole, *pool)
    y = torch.full(want.shape, float("nan")).contiguous(memory_format=torch.channels_last)
    kernel, stride, padding = ((n, n) for n in pool)
    done = call(support, x, w, out=y, pool=(*kernel, *stride, *padding, *want.shape[2:]), **given)
    assert done is y
    assert torch.equal(y, want)


def test_a_wide_image_is_pooled_too() -> None:
    """A band of whole rows takes more memory than one that need not wait to be pooled."""
    support = hk.Support.dense(3, 64, 7)
    x = torch.randn(1, 3, 30, 1300).contiguous(memory_format=torch.channels_last)
    w = torch.randn(*support.shape)
    given: dict[str, Any] = {"padding": (3, 3), "stride": (2, 2), "form": FORM}
    whole = call(support, x, w, **given)
    assert whole is not None
    want = F_.max_pool2d(whole, 3, 2, 1)
    y = torch.full(want.shape, float("nan")).contiguous(memory_format=torch.channels_last)
    assert call(support, x, w, out=y, pool=(3, 3, 2, 2, 1, 1, *want.shape[2:]), **given) is y
    assert torch.equal(y, want)


def test_one_that_fits_no_memory_is_left_to_the_caller() -> None:
    support = hk.Support.dense(3, 64, 7)
    x = torch.randn(1, 3, 9, 9000).contiguous(memory_format=torch.channels_last)
    y = torch.full((1, 64, 3, 2250), float("nan")).contiguous(memory_format=torch.channels_last)
    done = call(
        support, x, torch.randn(*support.shape), padding=(3, 3), stride=(2, 2), form=FORM,
        out=y, pool=(3, 3, 2, 2, 1, 1, 3, 2250),
    )  # fmt: skip
    assert done is None
    assert bool(y.isnan().all())


@pytest.mark.parametrize(
    ("support", "dtype"),
    [
        (hk.Support.dense(3, 64, 7), "float64"),
        (hk.Support.dense(3, 64, 6), "float32"),
        (hk.Support.dense(3, 64, 9), "float32"),
        (hk.Support.dense(3, 64, (7, 3)), "float32"),
        (hk.Support.dense(3, 2, 7), "float32"),
        (hk.Support.grouped(4, 64, 7, groups=2), "float32"),
    ],
)
def test_layers_it_is_not_for_are_refused_when_the_plan_is_made(
    support: hk.Support, dtype: str
) -> None:
    with pytest.raises(ValueError, match="Winograd's form of tiles of 3x3 outputs"):
        _cpu.Plan(support.mask.view(np.uint8).copy(), dtype, "", FORM)


@pytest.mark.parametrize("steps", [{"stride": (1, 1)}, {"stride": (2, 1)}, {"dilation": (1, 2)}])
def test_other_steps_are_refused(steps: dict[str, tuple[int, int]]) -> None:
    support = hk.Support.dense(3, 16, 7)
    x, w = torch.randn(1, 3, 30, 30), torch.randn(*support.shape)
    with pytest.raises(ValueError, match='"winograd 3x3" is for dilation 1 and stride 2'):
        call(support, x, w, padding=(3, 3), form=FORM, **{"stride": (2, 2), **steps})


def test_the_expected_error_is_the_one_that_is_seen() -> None:
    """Within a third, as for the other forms: the direct one keeps more than one sum."""
    support = hk.Support.dense(3, 64, 7)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, 96, 96, generator=g).contiguous(memory_format=torch.channels_last)
    w = torch.randn(*support.shape, generator=g)
    exact = F_.conv2d(x.double(), w.double(), stride=2, padding=3)
    rms = []
    for form in (FORM, "filters"):
        y = call(support, x, w, padding=(3, 3), stride=(2, 2), form=form)
        assert y is not None
        rms.append(float((y - exact).square().mean().sqrt()))
    expected = winograd.errors(support, 3).expected
    assert rms[0] / rms[1] == pytest.approx(expected, rel=0.35)


FIRST = hk.Support.dense(3, 64, 7)


@wide_vectors
@pytest.mark.parametrize("images", [1, 8])
@pytest.mark.parametrize("pool", [None, Pool((3, 3), (2, 2), (1, 1))], ids=["whole", "pooled"])
def test_the_first_layer_of_a_resnet_is_transformed_by_phases(
    images: int, pool: Pool | None
) -> None:
    made = problem(FIRST, (images, 224, 224), stride=2, pool=pool)
    assert chosen_form(made) in winograd.PHASES


@pytest.mark.parametrize(
    ("support", "changes"),
    [
        (FIRST, {"stride": 1}),
        (FIRST, {"stride": (2, 1)}),
        (FIRST, {"frozen": False}),
        (FIRST, {"dilation": 2}),
        (FIRST, {"dtype": torch.bfloat16}),
        (FIRST, {"layout": torch.contiguous_format}),
        (FIRST, {"strict": True}),
        (hk.Support.dense(5, 64, 7), {}),
        (hk.Support.dense(3, 64, 6), {}),
        (hk.Support.dense(3, 64, (7, 3)), {}),
        (hk.Support.grouped(4, 64, 7, groups=2), {}),
        (hk.Support.dense(3, 2, 7), {}),
    ],
    ids=lambda given: " ".join(given) if isinstance(given, dict) else None,
)
def test_other_first_layers_are_not(
    support: hk.Support, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(winograd, "WINOGRAD_MARGIN", 0.0)  # whatever it costs
    assert chosen_form(problem(FIRST, (2, 30, 30), stride=2)) in winograd.PHASES
    assert (
        chosen_form(problem(support, (2, 30, 30), **{"stride": 2, **changes}))
        not in winograd.PHASES
    )
