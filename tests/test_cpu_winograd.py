# SPDX-License-Identifier: Apache-2.0
"""Winograd's forms in the native engine: exact where they can be, else as near as F.conv2d.

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
from winograd_calls import LAYOUTS, assert_near_conv2d, call, pairs

import hetconv_kernels as hk

pytestmark = pytest.mark.skipif(
    "cpu" not in hk.available_backends(), reason="the native engine is not built here"
)
if "cpu" in hk.available_backends():
    from hetconv_kernels import _cpu

# bfloat16's own instruction set computes float32 as avx512 does.
ISAS = _cpu.isas() if "cpu" in hk.available_backends() else []
FORMS = {"winograd 2x2": 2, "winograd 4x4": 4}
# What is computed: a form, an instruction set and a precision. bfloat16 has one form.
CALLS = [(form, isa, torch.float32) for form in FORMS for isa in ISAS]
CALLS += [pytest.param("winograd 2x2", "", torch.bfloat16, marks=pairs)]


def self_grouped(channels: int, filters: int, groups: int, keep: float, seed: int) -> hk.Support:
    """Filters of a cluster are not neighbours, nor are the channels that they read."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(filters) % groups)
    kept = rng.random((groups, channels)) < keep
    kept[:, rng.integers(channels)] = True
    return hk.Support.self_grouped(labels, kept, 3)


def ragged(channels: int, filters: int, seed: int) -> hk.Support:
    """Whole kernels for some filters of a channel, single taps for others, one filter dead."""
    rng = np.random.default_rng(seed)
    mask = rng.random((filters, channels, 3, 3)) < 0.1
    mask |= (rng.random((filters, channels)) < 0.3)[:, :, None, None]
    mask[:, 1] = True
    mask[3] = False
    return hk.Support.from_mask(mask)


SUPPORTS = {
    "het p=4": hk.Support.het(64, 64, 3, p=4),
    "het p=4 interleaved": hk.Support.het(64, 64, 3, p=4, order="interleaved"),
    "het p=2, sizes no multiples": hk.Support.het(37, 43, 3, p=2),
    "het p=8, more filters": hk.Support.het(48, 80, 3, p=8),
    "grouped by 2": hk.Support.grouped(64, 96, 3, groups=2),
    "grouped by 6": hk.Support.grouped(48, 48, 3, groups=6),
    "dense": hk.Support.dense(33, 40, 3),
    "self-grouped": self_grouped(64, 72, 4, 0.4, seed=1),
    "self-grouped, narrow": self_grouped(40, 50, 9, 0.1, seed=2),
    "ragged": ragged(24, 34, seed=3),
}


def integers(shape: tuple[int, ...], most: int, seed: int) -> Tensor:
    return torch.tensor(np.random.default_rng(seed).integers(-most, most + 1, shape)).float()


@pytest.mark.parametrize(("form", "isa", "dtype"), [c for c in CALLS if "winograd 4x4" not in c])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", SUPPORTS)
def test_small_integers_come_out_exactly(
    name: str, layout: str, form: str, isa: str, dtype: torch.dtype
) -> None:
    """Weights are multiples of 4, so that what G g G^T halves twice is whole."""
    support = SUPPORTS[name]
    w = 4 * integers(support.shape, 3, seed=1)
    for size in [(2, 9, 13), (1, 2, 1), (3, 7, 7), (1, 1, 40), (1, 30, 2)]:
        x = integers((size[0], support.channels, *size[1:]), 5, seed=2)
        x = x.contiguous(memory_format=LAYOUTS[layout])
        live = torch.where(torch.tensor(support.mask), w, 0.0)
        y = call(support, x.to(dtype), w.to(dtype), isa=isa, form=form)
        assert y is not None
        assert torch.equal(y, F_.conv2d(x.double(), live.double(), padding=1).to(dtype)), size


def drawn_case(rng: random.Random) -> tuple[hk.Support, dict[str, Any]]:
    """One random Support with everything else of a call."""
    channels, filters = rng.choice([16, 17, 31, 48, 64]), rng.choice([16, 19, 32, 50, 64])
    kind = rng.randrange(5)
    if kind == 0:
        order = rng.choice(["blocked", "interleaved"])
        support = hk.Support.het(channels, filters, 3, p=rng.choice([2, 3, 4, 8]), order=order)
    elif kind == 1:
        support = hk.Support.grouped(64, 32 * rng.choice([1, 2, 3]), 3, rng.choice([2, 4, 8]))
    elif kind == 2:
        keep = rng.choice([0.1, 0.3, 0.6])
        support = self_grouped(channels, filters, rng.choice([2, 4, 7]), keep, rng.randrange(99))
    elif kind == 3:
        support = hk.Support.dense(channels, filters, 3)
    else:
        support = ragged(channels, filters, rng.randrange(99))
    height, width = rng.choice([(1, 1), (3, 5), (7, 7), (14, 15), (2, 61), (33, 9), (20, 21)])
    padding = rng.choice([(1, 1), (0, 0), (2, 1), (0, 3), (3, 3)])
    height, width = max(height, 3 - 2 * padding[0]), max(width, 3 - 2 * padding[1])
    return support, {
        "size": (rng.choice([1, 2, 5]), height, width),
        "padding": padding,
        "act": rng.choice(["none", "relu", "relu6", "silu", "gelu"]),
        "scale": rng.random() < 0.3,
        "shift": rng.random() < 0.6,
        "residual": rng.random() < 0.4,
        "layout": rng.choice(list(LAYOUTS)),
        "residual layout": rng.choice(list(LAYOUTS)),
        "threads": rng.choice([1, 2, 3]),
    }


@pytest.mark.parametrize(("form", "isa", "dtype"), CALLS)
@pytest.mark.parametrize("seed", range(40))
def test_random_calls_agree_with_conv2d(seed: int, form: str, isa: str, dtype: torch.dtype) -> None:
    """Tiles of four err up to 22 times as much as direct sums, those of two 1.6 (`explain`)."""
    support, case = drawn_case(random.Random(seed))
    images, height, width = case["size"]
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(images, support.channels, height, width, generator=g).to(dtype)
    x = x.contiguous(memory_format=LAYOUTS[case["layout"]])
    w = torch.randn(*support.shape, generator=g).to(dtype)
    f, padding = support.filters, case["padding"]
    out = images, f, height + 2 * padding[0] - 2, width + 2 * padding[1] - 2
    scale = torch.randn(f, generator=g) if case["scale"] else None
    shift = torch.randn(f, generator=g) if case["shift"] else None
    residual = torch.randn(*out, generator=g).to(dtype) if case["residual"] else None
    if residual is not None:
        residual = residual.contiguous(memory_format=LAYOUTS[case["residual layout"]])
    given: dict[str, Any] = {
        "padding": padding, "scale": scale, "shift": shift, "residual": residual,
        "act": case["act"], "threads": case["threads"],
    }  # fmt: skip
    y = call(support, x, w, isa=isa, form=form, **given)
    assert y is not None
    assert y.shape == out
    tile = FORMS[form]
    assert_near_conv2d(y, support, x, w, reach=tile, times={2: 4, 4: 16}[tile], **given)


def test_its_error_is_no_larger_than_a_few_times_the_direct_forms() -> None:
    """Root mean squares over a layer: the bound of `explain` is far above what is seen."""
    support = hk.Support.het(128, 128, 3, p=4)
    x, w = torch.randn(2, 128, 20, 20), torch.randn(*support.shape)
    live = torch.where(torch.tensor(support.mask), w, 0.0).double()
    exact = F_.conv2d(x.double(), live, padding=1)
    rms = {}
    for form in ("filters", *FORMS):
        y = call(support, x, w, form=form)
        assert y is not None
        rms[form] = float((y - exact).square().mean().sqrt())
    assert 0 < rms["winograd 2x2"] < 3 * rms["filters"], rms
    assert rms["winograd 2x2"] < rms["winograd 4x4"] < 5 * rms["filters"], rms


@pytest.mark.parametrize("steps", [{"stride": (2, 2)}, {"stride": (1, 2)}, {"dilation": (2, 1)}])
def test_other_steps_are_refused(steps: dict[str, tuple[int, int]]) -> None:
    support = SUPPORTS["het p=4"]
    x, w = torch.randn(1, 64, 9, 9), torch.randn(*support.shape)
    with pytest.raises(ValueError, match="is for dilation 1 and stride 1"):
        call(support, x, w, **steps)  # type: ignore[arg-type]


@pytest.mark.parametrize(("form", "isa", "dtype"), CALLS)
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("name", SUPPORTS)
def test_windows_that_make_up_tiles_are_pooled_bit_for_bit(
    name: str, seed: int, form: str, isa: str, dtype: torch.dtype
) -> None:
    """With all that an epilogue has; a row or a column without a partner is in no window."""
    rng, support = random.Random(f"{name} {seed}"), SUPPORTS[name]
    torch.manual_seed(seed)
    h, w_ = rng.randint(2, 33), rng.randint(2, 70)
    x = torch.randn(rng.randint(1, 3), support.channels, h, w_, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    w, f = torch.randn(*support.shape, dtype=dtype), support.filters
    more: dict[str, Any] = {
        "act": rng.choice(["none", "relu", "relu6"]), "threads": rng.randint(1, 2), "isa": isa,
        "form": form,
    }  # fmt: skip
    for key in ("scale", "shift"):
        more[key] = torch.randn(f) if rng.random() < 0.5 else None
    if rng.random() < 0.5:
        residual = torch.randn(len(x), f, h, w_, dtype=dtype)
        more["residual"] = residual.contiguous(memory_format=torch.channels_last)
    whole = call(support, x, w, **more)
    assert whole is not None
    want = F_.max_pool2d(whole, 2)
    y = torch.full_like(want, float("nan"))
    assert call(support, x, w, out=y, pool=(2, 2, 2, 2, 0, 0, h // 2, w_ // 2), **more) is y
    assert torch.equal(y, want)


def test_a_nan_wins_in_a_window() -> None:
    support = SUPPORTS["het p=4"]
    x = torch.randn(1, 64, 12, 12).contiguous(memory_format=torch.channels_last)
    x[0, 5, 6, 6] = float("nan")
    w = torch.randn(*support.shape)
    whole = call(support, x, w, act="relu")
    assert whole is not None
    want = F_.max_pool2d(whole, 2)
    y = torch.full_like(want, 0.0)
    assert call(support, x, w, act="relu", out=y, pool=(2, 2, 2, 2, 0, 0, 6, 6)) is y
    assert 0 < int(want.isnan().sum()) < want.numel()
    assert torch.equal(y.isnan(), want.isnan())
    assert torch.equal(y.nan_to_num(), want.nan_to_num())


@pytest.mark.parametrize(
    ("pool", "layout"),
    [
        ((3, 3, 2, 2, 1, 1, 4, 4), "channels_last"),
        ((2, 2, 1, 1, 0, 0, 7, 7), "channels_last"),
        ((2, 2, 2, 2, 1, 1, 5, 5), "channels_last"),
        ((2, 1, 2, 2, 0, 0, 4, 4), "channels_last"),
        ((2, 2, 2, 2, 0, 0, 4, 4), "contiguous"),
    ],
)
def test_it_leaves_other_pooling_to_its_caller_and_writes_nothing(
    pool: tuple[int, ...], layout: str
) -> None:
    support = SUPPORTS["het p=4"]
    x = torch.randn(1, 64, 8, 8).contiguous(memory_format=torch.channels_last)
    y = torch.full((1, 64, *pool[6:]), float("nan")).contiguous(memory_format=LAYOUTS[layout])
    w = torch.randn(*support.shape)
    assert call(support, x, w, out=y, pool=pool) is None
    assert bool(y.isnan().all())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("support", "dtype"),
    [
        (hk.Support.het(64, 64, 5, p=4), "float32"),
        (hk.Support.het(64, 64, (3, 1), p=4), "float32"),
        (hk.Support.dense(64, 64, 1), "float32"),
        (hk.Support.het(64, 64, 3, p=4), "float64"),
        (hk.Support.het(64, 64, 3, p=4), "float16"),
        (hk.Support.dense(64, 3, 3), "float32"),
        (hk.Support.dense(3, 64, 3), "float32"),
        (hk.Support.from_mask(np.tile(np.eye(3, dtype=bool), (64, 64, 1, 1))), "float32"),
    ],
)
def test_layers_it_is_not_for_are_refused_when_the_plan_is_made(
    support: hk.Support, dtype: str, form: str
) -> None:
    with pytest.raises(ValueError, match="Winograd's forms"):
        _cpu.Plan(support.mask.view(np.uint8).copy(), dtype, "", form)


@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa != "avx512bf16"])
def test_bfloat16_is_refused_where_the_processor_does_not_multiply_it(isa: str) -> None:
    mask = SUPPORTS["het p=4"].mask.view(np.uint8).copy()
    with pytest.raises(ValueError, match="that of 2x2 for bfloat16 too where the processor"):
        _cpu.Plan(mask, "bfloat16", isa, "winograd 2x2")


@pairs
def test_tiles_of_four_are_refused_in_bfloat16() -> None:
    with pytest.raises(ValueError, match="that of 2x2 for bfloat16"):
        _cpu.Plan(SUPPORTS["het p=4"].mask.view(np.uint8).copy(), "bfloat16", "", "winograd 4x4")


def gradient(dilation: int) -> tuple[Tensor, Tensor]:
    """Returns dx as the engine computes it in this form, and as PyTorch does."""
    support = SUPPORTS["het p=4"]
    w = torch.where(torch.tensor(support.mask), 4 * integers(support.shape, 2, seed=7), 0.0)
    dy = integers((2, 64, 9, 11), 4, seed=8).contiguous(memory_format=torch.channels_last)
    steps, mask = (dilation, dilation), support.mask.view(np.uint8).copy()
    plan = _cpu.Dgrad(mask, (1, 1), steps, steps, "float32", "", "winograd 2x2")
    packed = plan.pack(w.data_ptr(), w.stride(), "float32")
    dx = torch.full_like(dy, float("nan"))
    plan.dgrad(
        packed, dy.data_ptr(), dy.stride(), (2, 9, 11), dx.data_ptr(), dx.stride(), (9, 11), 2
    )
    return dx, F_.conv_transpose2d(dy, w, padding=dilation, dilation=dilation)


def test_a_gradient_may_have_this_form() -> None:
    assert torch.equal(*gradient(dilation=1))


def test_callers_in_the_engine_itself_are_refused_a_dilation() -> None:
    """The gradient's plans call the engine from C++, past what the bindings check."""
    with pytest.raises(ValueError, match="is for dilation 1 and stride 1"):
        gradient(dilation=2)


def test_an_output_with_gaps_between_its_rows_is_written_in_place() -> None:
    support = SUPPORTS["het p=2, sizes no multiples"]
    x = integers((2, 37, 9, 11), 4, seed=5).contiguous(memory_format=torch.channels_last)
    w = 4 * integers(support.shape, 2, seed=6)
    around = torch.full((2, 43, 12, 14), float("nan")).contiguous(memory_format=torch.channels_last)
    inside = around[:, :, 1:10, 2:13]
    call(support, x, w, out=inside)
    live = torch.where(torch.tensor(support.mask), w, 0.0)
    assert torch.equal(inside, F_.conv2d(x, live, padding=1))
    assert int(around.isnan().sum()) == around.numel() - inside.numel(), "it wrote outside"
