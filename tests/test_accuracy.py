# SPDX-License-Identifier: Apache-2.0
"""Which layers run by Winograd's transform, the switch that forbids it, and what is said of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import fresh
import numpy as np
import pytest
import torch
import torch.nn.functional as F_
from planning import optimized
from torch import Tensor, nn
from winograd_calls import chosen_form, pairs, problem, wide_vectors

import hetconv_kernels as hk
from hetconv_kernels import accuracy, packing
from hetconv_kernels.backends import cpu, cpu_plans, get_backend, winograd
from hetconv_kernels.errors import ArgumentError
from hetconv_kernels.pooling import Pool
from hetconv_kernels.problem import Problem

pytestmark = pytest.mark.skipif(
    "cpu" not in hk.available_backends(), reason="the native engine is not built here"
)
LAST = torch.channels_last


@pytest.fixture(autouse=True)
def not_strict() -> Iterator[None]:
    """Whatever the environment says, each test begins with the default and leaves it alone."""
    with hk.strict_accuracy(False):
        yield


HET = hk.Support.het(256, 256, 3, p=4)


@wide_vectors
@pytest.mark.parametrize(
    ("images", "channels", "edge"),
    [(8, 64, 56), (8, 128, 28), (8, 256, 14), (8, 512, 7), (1, 256, 14)],
)
def test_the_layers_of_a_resnet_are_transformed(images: int, channels: int, edge: int) -> None:
    support = hk.Support.het(channels, channels, 3, p=4)
    assert chosen_form(problem(support, (images, edge, edge))) in winograd.TILES


@pairs
@pytest.mark.parametrize(("channels", "edge"), [(64, 56), (128, 28), (256, 14), (512, 7)])
def test_in_bfloat16_the_wider_layers_of_a_resnet_are(channels: int, edge: int) -> None:
    """In tiles of two: products of 64 channels are too few beside the transforms."""
    made = problem(
        hk.Support.het(channels, channels, 3, p=4), (8, edge, edge), dtype=torch.bfloat16
    )
    assert (chosen_form(made) == "winograd 2x2") is (channels > 64)
    strict = replace(made, strict=True)
    assert chosen_form(strict) not in winograd.TILES


@pairs
def test_a_bfloat16_layer_of_a_network_errs_as_it_says() -> None:
    """And keeps to direct sums, whose only rounding is the result's, where it has to."""
    torch.manual_seed(0)
    made = hk.nn.HetConv2d(256, 256, 3, padding=1, p=4, dtype=torch.bfloat16).eval().freeze()
    x = torch.randn(4, 256, 14, 14, dtype=torch.bfloat16).to(memory_format=LAST)
    with torch.no_grad(), hk.use_backend("cpu"):
        y = made(x)
        with hk.strict_accuracy():
            direct = made(x)
        weight = hk.export.plain(made).weight.double()
        exact = F_.conv2d(x.double(), weight, made.bias.double(), padding=1)
    rms = [float((out.double() - exact).square().mean().sqrt()) for out in (y, direct)]
    expected = winograd.errors(made.support, 2, torch.bfloat16).expected
    assert rms[0] / rms[1] == pytest.approx(expected, rel=0.25)
    (note,) = get_backend("cpu").notes(problem(made.support, (4, 14, 14), dtype=torch.bfloat16))
    assert f"expected at {expected:.2f} times" in note


@wide_vectors
@pytest.mark.parametrize(
    ("support", "size"),
    [
        (hk.Support.het(16, 16, 3, p=4), (8, 32, 32)),
        (hk.Support.het(64, 64, 3, p=16), (8, 56, 56)),
        (hk.Support.grouped(64, 64, 3, groups=16), (8, 56, 56)),
        (hk.Support.het(64, 64, 3, p=4), (1, 1, 1)),
        (hk.Support.het(256, 256, 3, p=4), (1, 1, 2)),
        (hk.Support.grouped(64, 64, 3, groups=64), (8, 56, 56)),
    ],
    ids=["16 channels", "p=16", "groups of 4", "a pixel", "two pixels", "depthwise"],
)
def test_layers_it_would_not_pay_for_are_not(
    support: hk.Support, size: tuple[int, int, int]
) -> None:
    assert chosen_form(problem(support, size)) not in winograd.TILES


@pytest.mark.parametrize(
    "changes",
    [
        {"frozen": False},
        {"stride": 2},
        {"dilation": 2},
        {"dtype": torch.float64},
        {"dtype": torch.float16},
        {"layout": torch.contiguous_format},
        {"pool": Pool((3, 3), (2, 2), (1, 1))},
        {"pool": Pool((2, 2), (1, 1), (0, 0))},
        {"strict": True},
        {"verb": "dgrad"},
    ],
    ids=lambda changes: " ".join(changes),
)
def test_calls_it_is_not_for_are_not_even_asked(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(winograd, "WINOGRAD_MARGIN", 0.0)  # whatever it costs
    assert chosen_form(problem(HET, (8, 14, 14))) in winograd.TILES
    assert chosen_form(problem(HET, (8, 14, 14), **changes)) not in winograd.TILES


@pytest.mark.parametrize(
    "support",
    [
        hk.Support.het(64, 64, 5, p=4),
        hk.Support.dense(64, 64, 3),
        hk.Support.dense(64, 64, 1),
        hk.Support.from_mask(np.tile(np.eye(3, dtype=bool), (64, 64, 1, 1))),
        hk.Support.grouped(2, 2, 3, groups=2),
    ],
    ids=["5x5", "dense", "1x1", "no whole kernel", "narrower than a vector"],
)
def test_supports_it_is_not_for_keep_the_direct_form(
    support: hk.Support, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(winograd, "WINOGRAD_MARGIN", 0.0)
    assert chosen_form(problem(support, (8, 16, 16))) not in winograd.TILES


@wide_vectors
@pytest.mark.parametrize("edge", [28, 29])
def test_a_layer_whose_windows_are_tiles_is_transformed(edge: int) -> None:
    """VGG's pooled layers: the network's result is what the layers give one after the other."""
    pool = Pool((2, 2), (2, 2), (0, 0))
    assert chosen_form(problem(HET, (2, edge, edge), pool=pool)) in winograd.TILES
    torch.manual_seed(0)
    conv = hk.nn.HetConv2d(256, 256, 3, padding=1, p=4).eval()
    x = torch.randn(2, 256, edge, edge).to(memory_format=LAST)
    with torch.no_grad():
        fused = hk.nn.fuse(conv, None, "relu", pool).to(memory_format=LAST)
        alone = hk.nn.fuse(conv, None, "relu").to(memory_format=LAST)
        y, want = fused(x), F_.max_pool2d(alone(x), 2)
        with hk.strict_accuracy():
            direct = fused(x)
    assert torch.equal(y, want)
    assert not torch.equal(y, direct), "the switch chose no other form"
    assert torch.allclose(y, direct, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("measured", [True, False])
@pytest.mark.parametrize(
    ("gain", "chosen"), [(1.5, "always"), (1.2, "measured"), (1.09, "never"), (0.5, "never")]
)
def test_a_predicted_gain_of_a_tenth_decides(
    gain: float, chosen: str, measured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The predictions are planted: the direct form takes `gain` seconds, this one a second.

    Where nothing was measured, as without AVX-512, the gain must be 1.3 times that.
    """

    def seconds(_made: Problem, plan: Any) -> float:
        return 1.0 if plan.form in winograd.TILES else gain

    for module in (cpu, cpu_plans):
        monkeypatch.setattr(module, "plan_seconds", seconds)
        monkeypatch.setattr(module, "is_measured", lambda _: measured)
    made = problem(hk.Support.het(48, 48, 3, p=4), (2, 9, 9))
    taken = chosen == "always" or (chosen == "measured" and measured)
    assert (chosen_form(made) in winograd.TILES) is taken
    assert get_backend("cpu").estimate(made) == (1.0 if taken else gain), "auto predicts the same"


@pytest.mark.parametrize("name", winograd.TILES)
def test_tiles_beyond_the_edge_are_counted(name: str) -> None:
    plan = cpu_plans.direct_plan(problem(HET, (8, 7, 7)), name)
    even, odd = (winograd.executed(plan, problem(HET, (8, n, n))) for n in (8, 7))
    assert even == pytest.approx(plan.cost)
    assert odd - even == pytest.approx(plan.winograd_cost * (64 / 49 - 1))


def layer() -> hk.nn.HetConv2d:
    made = hk.nn.HetConv2d(64, 64, 3, padding=1, p=4, backend="cpu").eval()
    return made.to(memory_format=LAST).freeze()


def image(seed: int = 0, size: int = 28) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(4, 64, size, size, generator=g).contiguous(memory_format=LAST)


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """On any machine, every layer that may be transformed is."""
    monkeypatch.setattr(winograd, "WINOGRAD_MARGIN", 0.0)


def truth(made: hk.nn.HetConv2d, x: Tensor) -> Tensor:
    return F_.conv2d(x.double(), made.dense_weight().double(), made.bias.double(), padding=1)


@pytest.mark.usefixtures("always")
def test_the_switch_changes_the_numbers_at_once_and_back() -> None:
    made, x = layer(), image()
    with torch.no_grad():
        fast = made(x)
        with hk.strict_accuracy():
            strict = made(x)
            with hk.strict_accuracy(False):
                assert torch.equal(made(x), fast)
            assert torch.equal(made(x), strict)
        assert torch.equal(made(x), fast)
        trained = hk.nn.HetConv2d(64, 64, 3, padding=1, p=4, backend="cpu").to(memory_format=LAST)
        trained.load_state_dict(made.state_dict())
        assert torch.equal(trained(x), strict), "strict is what a layer in training computes"
    assert not torch.equal(fast, strict)
    assert torch.allclose(fast.double(), truth(made, x), rtol=0, atol=1e-5)


@pytest.mark.usefixtures("always")
def test_weights_are_transformed_once_for_each_setting() -> None:
    made, x = layer(), image()
    with torch.no_grad(), packing.watched_packings() as seen:
        for _ in range(3):
            made(x)
            with hk.strict_accuracy():
                made(x)
    assert len(seen) == 2
    with torch.no_grad(), packing.watched_packings() as seen:
        made.weight.mul_(2)
        twice, again = made(x), made(x)
        with hk.strict_accuracy():
            strict = made(x)
    assert len(seen) == 2, "a changed weight is transformed anew, and once"
    assert torch.equal(twice, again)
    assert torch.allclose(twice, strict, atol=1e-4)


@pytest.mark.usefixtures("always")
def test_a_planned_network_does_not_mix_the_settings_up() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = hk.nn.HetConv2d(64, 64, 3, padding=1, p=4)
            self.b = hk.nn.HetConv2d(64, 64, 3, padding=1, p=4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.b(torch.relu(self.a(x)))) + x

    x = image()
    with hk.use_backend("cpu"), torch.no_grad():
        fast = optimized(Net(), x)
        first = fast(x).clone()
        with hk.strict_accuracy():
            strict = fast(x).clone()
            assert torch.equal(fast(x), strict)
        assert len(fast.__dict__["_memory"]._plans) == 2
        assert torch.equal(fast(x), first)
        with hk.strict_accuracy():
            assert torch.equal(fast(x), strict)
    assert not torch.equal(first, strict)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("row", [10, 11])
@pytest.mark.parametrize("column", [0, 12, 15])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", winograd.TILES)
def test_what_is_not_finite_reaches_no_other_tiles(
    name: str, value: float, row: int, column: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In tiles of two not even other outputs: there rows of A^T and B^T that skip an input are
    those of the taps.
    """
    tile = winograd.TILES[name]
    monkeypatch.setattr(winograd, "TILES", {name: tile})
    made, x = layer(), image()
    x[0, 5, row, column] = value
    with torch.no_grad():
        fast = made(x)
        with hk.strict_accuracy():
            strict = made(x)
    assert not torch.equal(fast.nan_to_num(0, 0, 0), strict.nan_to_num(0, 0, 0))
    reached, seen = ~strict.isfinite(), ~fast.isfinite()
    assert 0 < int(reached.sum()) <= 64 * 9
    if tile == 2:
        assert torch.equal(seen, reached)
        return
    tiles = F_.max_pool2d(reached.float(), 4, ceil_mode=True).bool()
    tiles = tiles.repeat_interleave(4, 2).repeat_interleave(4, 3)
    assert bool((seen | ~reached).all())
    assert bool((tiles | ~seen).all())


@pytest.mark.usefixtures("always")
def test_an_infinity_stays_one_only_under_strict_accuracy() -> None:
    made, x = layer(), image()
    x[0, 5, 10, 10] = float("inf")
    with torch.no_grad():
        assert bool(made(x).isnan().any()), "the difference of two infinities"
        with hk.strict_accuracy():
            strict = made(x)
    assert bool(strict.isinf().any())
    assert not bool(strict.isnan().any())


def test_the_switch_works_as_a_call_and_ends_with_an_exception() -> None:
    hk.strict_accuracy()
    assert accuracy.is_strict()
    assert hk.info()["strict_accuracy"] is True
    hk.strict_accuracy(False)
    with pytest.raises(ZeroDivisionError), hk.strict_accuracy():
        raise ZeroDivisionError
    assert not accuracy.is_strict()


@pytest.mark.parametrize(
    ("value", "answer"), [("0", "strict True"), ("1", "strict False"), ("off", "HETCONV_WINOGRAD:")]
)
def test_the_environment_sets_it(value: str, answer: str) -> None:
    code = "import hetconv_kernels as hk; print('strict', hk.info()['strict_accuracy'])"
    done = fresh.python(code, environment={"HETCONV_WINOGRAD": value})
    assert answer in done.stdout + done.stderr


def test_an_unknown_value_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HETCONV_WINOGRAD", "yes")
    with pytest.raises(ArgumentError, match="HETCONV_WINOGRAD: received 'yes'"):
        accuracy._from_environment()


@pytest.mark.usefixtures("always")
def test_explain_shows_the_form_and_its_error() -> None:
    made, x = layer(), image()
    told = hk.explain(made, x, measure=False)
    (ours,) = (c for c in told.candidates if c.name == "cpu")
    (note,) = ours.notes
    (tile,) = (n for n in winograd.TILES.values() if f"F({n}x{n}, 3x3)" in note)
    expected, bound = winograd.errors(made.support, tile)
    assert f"expected at {expected:.2f} times" in note
    assert f"bounded by {bound:.1f} times" in note
    assert note in str(told)
    with hk.strict_accuracy():
        strict = hk.explain(made, x, measure=False)
    assert "Winograd" not in str(strict)
    (theirs,) = (c for c in strict.candidates if c.name == "cpu")
    assert theirs.predicted_s != ours.predicted_s, "the prediction is of the form that runs"


@pytest.mark.parametrize(
    "support",
    [
        hk.Support.het(64, 64, 3, p=4),
        hk.Support.het(256, 64, 3, p=4),
        hk.Support.het(128, 64, 3, p=2),
        hk.Support.grouped(128, 64, 3, groups=2),
    ],
    ids=["64 by 4", "256 by 4", "128 by 2", "grouped"],
)
@pytest.mark.parametrize("form", winograd.TILES)
def test_the_expected_error_is_the_one_that_is_seen(support: hk.Support, form: str) -> None:
    """Within a third: the direct form keeps more than one sum, which the derivation leaves out."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, support.channels, 24, 24, generator=g).contiguous(memory_format=LAST)
    w = torch.randn(*support.shape, generator=g) * torch.tensor(support.mask)
    exact = F_.conv2d(x.double(), w.double(), padding=1)
    rms = {}
    for name in ("filters", form):
        plan = cpu._cpu.Plan(support.mask.view(np.uint8).copy(), "float32", "", name)
        packed = plan.pack(w.data_ptr(), w.stride(), "float32")
        y = torch.full(exact.shape, float("nan")).contiguous(memory_format=LAST)
        plan.fprop(
            packed, x.data_ptr(), x.stride(), (2, 24, 24), y.data_ptr(), y.stride(), (24, 24),
            (1, 1), (1, 1), (1, 1),
        )  # fmt: skip
        rms[name] = float((y - exact).square().mean().sqrt())
    seen = rms[form] / rms["filters"]
    assert seen == pytest.approx(
        winograd.errors(support, winograd.TILES[form]).expected, rel=0.35
    ), seen
