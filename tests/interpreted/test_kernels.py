# SPDX-License-Identifier: Apache-2.0
"""Every kernel's logic against the oracle and the literal Plan executor, tile by tile.

The tiles are smaller than the shipped ones, so that a small problem has several blocks of pixels,
filters and channels, and ends of each.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from kernel_calls import TILE, gather_call, near, problem, wgrad_call
from switches import convolutions_in

import hetconv_kernels as hk
from hetconv_kernels.backends.gpu import capture
from hetconv_kernels.backends.triton import choice, wgrad_choice
from hetconv_kernels.backends.triton.calls import GatherCall
from hetconv_kernels.backends.triton.choice import GatherChoice
from hetconv_kernels.backends.triton.lowering import Lowering
from hetconv_kernels.backends.triton.picking import pick_choice
from hetconv_kernels.backends.triton.tiles import Box, Tile
from hetconv_kernels.backends.triton.wgrad_calls import WgradCall
from hetconv_kernels.backends.triton.wgrad_tma import seen_from, seen_until
from hetconv_kernels.problem import Geometry, make_geometry
from hetconv_kernels.testing import execute_fprop, execute_wgrad, oracle, pack_slabs

SUPPORTS = {
    "dense": hk.Support.dense(24, 32, 3),
    "het": hk.Support.het(32, 40, 3, p=2),
    "interleaved": hk.Support.het(32, 24, 3, p=4, order="interleaved"),
    "uneven": hk.Support.het(21, 27, 3, p=5),
    "ragged": hk.Support.self_grouped(
        torch.arange(40) % 5,
        (torch.rand(5, 24, generator=torch.Generator().manual_seed(0)) < 0.3).numpy(),
        3,
    ),
    "depthwise": hk.Support.grouped(24, 24, 3, 24),
    "pointwise": hk.Support.dense(48, 40, 1),
    "empty": hk.Support.from_mask(torch.zeros(20, 16, 3, 3, dtype=torch.bool).numpy()),
    "wide": hk.Support.dense(16, 16, (1, 5)),
}
GEOMETRIES = {
    "same": (1, 1, 1),
    "stride2": (2, 1, 1),
    "uneven": ((3, 1), (0, 2, 1, 3), (1, 2)),
    "bare": (1, 0, 1),
}
SIZE = (5, 6)


@pytest.fixture(autouse=True)
def _poison():  # type: ignore[no-untyped-def]
    """Fills every fresh allocation with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def tensors(geometry: Geometry, dtype: torch.dtype, size: tuple[int, int] = SIZE) -> Any:
    s = geometry.support
    x = torch.randn(2, s.channels, *size, dtype=torch.float64).to(dtype)
    w = torch.randn(s.shape, dtype=torch.float64).to(dtype)
    dy = torch.randn(2, s.filters, *geometry.output_size(*size), dtype=torch.float64).to(dtype)
    last = torch.channels_last
    poisoned = torch.where(torch.tensor(s.mask), w, float("nan"))
    return x.contiguous(memory_format=last), w, poisoned, dy.contiguous(memory_format=last)


@pytest.mark.parametrize("where", GEOMETRIES)
@pytest.mark.parametrize("support", SUPPORTS)
def test_all_verbs_equal_the_oracle(support: str, where: str) -> None:
    s = SUPPORTS[support]
    # Each dtype meets every Support and every geometry, if not every pair.
    even = (list(SUPPORTS).index(support) + list(GEOMETRIES).index(where)) % 2
    dtype = torch.float16 if even else torch.float32
    geometry = make_geometry(s, *GEOMETRIES[where])
    x, w, poisoned, dy = tensors(geometry, dtype)

    def truth(*values: torch.Tensor) -> Any:
        tx, tw, tdy = (v.double().requires_grad_() for v in values)
        y = oracle(tx, tw, geometry)
        dx, dw = torch.autograd.grad(y, (tx, tw), tdy)
        return y.detach(), dx, torch.where(torch.tensor(s.mask), dw, 0.0)

    exact, size = truth(x, w, dy), truth(x.abs(), w.abs(), dy.abs())
    taps = s.kernel[0] * s.kernel[1]
    y = gather_call(problem("fprop", geometry, x, x, w, SIZE), TILE).run(x, poisoned)
    near(y, exact[0], size[0], s.channels * taps)
    dx = gather_call(problem("dgrad", geometry, dy, dy, w, SIZE), TILE).run(dy, poisoned)
    near(dx, exact[1], size[1], s.filters * taps)
    p = problem("wgrad", geometry, dy, x, w, SIZE)
    dw = wgrad_call(p, (Tile(32, 16, 16, 4), Tile(32, 16, 32, 4)), bool(even)).run(dy, x)
    near(dw, exact[2], size[2], dy[:, 0].numel())


@pytest.mark.parametrize("reorder", [False, True])
@pytest.mark.parametrize("support", ["dense", "interleaved", "ragged"])
def test_fprop_equals_its_plan_run_literally(support: str, reorder: bool) -> None:
    geometry = make_geometry(SUPPORTS[support], 2, 1)
    x, w, poisoned, _ = tensors(geometry, torch.float32)
    p = problem("fprop", geometry, x, x, w, SIZE)
    call = gather_call(p, TILE, reorder)
    plan = call.lowering.plan
    y = call.run(x, poisoned)
    literal = execute_fprop(plan, geometry, x, pack_slabs(plan, poisoned))
    torch.testing.assert_close(y, literal, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("support", ["dense", "het", "ragged"])
def test_dgrad_equals_the_plan_of_the_transposed_support(support: str) -> None:
    geometry = make_geometry(SUPPORTS[support], 1, 1)
    _, w, poisoned, dy = tensors(geometry, torch.float32)
    call = gather_call(problem("dgrad", geometry, dy, dy, w, SIZE), TILE)
    plan = call.lowering.plan
    back = poisoned.permute(1, 0, 2, 3).flip(2, 3)
    literal = execute_fprop(plan, make_geometry(plan.support, 1, 1), dy, pack_slabs(plan, back))
    torch.testing.assert_close(call.run(dy, poisoned), literal, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("support", ["dense", "het", "interleaved"])
def test_wgrad_equals_its_plans_run_literally(support: str) -> None:
    geometry = make_geometry(SUPPORTS[support], 1, 1)
    x, w, _, dy = tensors(geometry, torch.float32)
    call = wgrad_call(problem("wgrad", geometry, dy, x, w, SIZE))
    dw = call.run(dy, x)
    for part in call.choice.lowering.parts:
        slabs = execute_wgrad(part.plan, geometry, dy, x)
        source = torch.as_tensor(part.plan.slab_source)
        mine = torch.zeros_like(slabs)
        mine[source >= 0] = dw.contiguous().view(-1)[source[source >= 0]]
        expected = torch.where(source >= 0, slabs, 0.0)
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("support", ["ragged", "depthwise"])
def test_a_coarse_lowering_is_the_same_function(support: str) -> None:
    geometry = make_geometry(SUPPORTS[support], 1, 1)
    x, w, poisoned, dy = tensors(geometry, torch.float32)
    for verb, first in (("fprop", x), ("dgrad", dy)):
        p = problem(verb, geometry, first, first, w, SIZE)
        fine = gather_call(p, TILE).run(first, poisoned)
        lowering = choice.lowering_of(p, 16, 16, False, True)
        assert lowering.gather is lowering.rows is None
        coarse = GatherCall(p, GatherChoice(TILE, None, lowering, 0.0, 1.0))
        torch.testing.assert_close(coarse.run(first, poisoned), fine, rtol=1e-4, atol=1e-4)
    p = problem("wgrad", geometry, dy, x, w, SIZE)
    fine, coarse = (wgrad_call(p, coarse=flag).run(dy, x) for flag in (False, True))
    torch.testing.assert_close(coarse, fine, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("splits", [1, 3])
def test_any_number_of_splits_gives_the_same_gradient(
    splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hetconv_kernels.backends.triton import wgrad_calls

    geometry = make_geometry(SUPPORTS["het"], 1, 1)
    x, w, _, dy = tensors(geometry, torch.float32)
    monkeypatch.setattr(wgrad_calls, "splits", lambda *_: splits)
    p = problem("wgrad", geometry, dy, x, w, SIZE)
    dw, again = (wgrad_call(p).run(dy, x) for _ in range(2))
    assert torch.equal(dw, again)
    w = w.double().requires_grad_()
    (exact,) = torch.autograd.grad(oracle(x.double(), w, geometry), w, dy.double())
    near(dw, torch.where(torch.tensor(SUPPORTS["het"].mask), exact, 0.0), exact.abs() + 50, 200)


def test_wgrad_of_split_numbers_takes_tiles_that_do_not_spill(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As the switch says at the call; those of one tap and of small tiles fit as they are."""
    geometry = make_geometry(hk.Support.het(128, 128, 3, p=2), 1, 1)
    x, w, _, dy = tensors(geometry, torch.float32)
    p = problem("wgrad", geometry, dy, x, w, SIZE)
    started = []
    launch = WgradCall.launch

    def watch(self: WgradCall, kernel: Any, jobs: Any, tile: Tile, constants: Any, tables: Any):  # type: ignore[no-untyped-def]
        started.append((jobs.taps, tile[:3], constants[0], constants[9]))
        return launch(self, kernel, jobs, tile, constants, tables)

    monkeypatch.setattr(WgradCall, "launch", watch)
    found = {}
    for edge in (64, 32):
        call = wgrad_call(p, (Tile(32, edge, edge, 4),) * 2)
        for switch in ("tf32", "ieee"):
            started.clear()
            with convolutions_in(switch):
                dw = call.run(dy, x)
            found[edge, switch] = sorted(started)
            w64 = w.double().requires_grad_()
            (exact,) = torch.autograd.grad(oracle(x.double(), w64, geometry), w64, dy.double())
            exact = torch.where(torch.tensor(geometry.support.mask), exact, 0.0)
            near(dw, exact, exact.abs() + 50, 200)
    one, three = (1, (32, 64, 64), 32), (3, (32, 64, 64), 32)
    assert found[64, "tf32"] == [(*one, "tf32"), (*three, "tf32")]
    assert found[64, "ieee"] == [(*one, "tf32x3"), (3, (16, 64, 64), 16, "tf32x3")]
    small = [(1, (32, 32, 32), 32), (3, (32, 32, 32), 32)]
    assert found[32, "tf32"] == [(*one, "tf32") for one in small]
    assert found[32, "ieee"] == [(*one, "tf32x3") for one in small]


@pytest.mark.parametrize(("support", "gathers"), [("interleaved", 2), ("ragged", 2), ("het", 0)])
def test_wgrad_brings_scattered_groups_together(support: str, gathers: int) -> None:
    geometry = make_geometry(SUPPORTS[support], 1, 1)
    x, w, _, dy = tensors(geometry, torch.float32)
    p = problem("wgrad", geometry, dy, x, w, SIZE)
    own = wgrad_call(p)
    together = wgrad_call(p, reorder=True)
    lowering = together.choice.lowering
    assert all(part.rows is None for part in lowering.parts)
    assert any(part.rows is not None for part in own.choice.lowering.parts) == bool(gathers)
    capture.CONVERSIONS.clear()
    found = together.run(dy, x)
    assert sum(capture.CONVERSIONS.values()) == gathers
    torch.testing.assert_close(found, own.run(dy, x), rtol=1e-4, atol=1e-4)
    if support == "interleaved":  # three taps of own channels, and the centre tap of the others
        assert [part.taps for part in lowering.parts] == [3, 1]
        assert lowering.size < 0.6 * own.choice.lowering.size


# Boxes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("support", "box", "where"),
    [
        ("dense", Box(1, 4, 8), "same"),
        ("het", Box(2, 4, 4), "same"),
        ("interleaved", Box(32, 1, 1), "same"),
        ("ragged", Box(2, 4, 4), "bare"),
        ("het", Box(32, 1, 1), "bare"),
    ],
    ids=str,
)
def test_boxes_equal_the_oracle(support: str, box: Box, where: str) -> None:
    geometry = make_geometry(SUPPORTS[support], *GEOMETRIES[where])
    x, w, poisoned, dy = tensors(geometry, torch.float16)
    for verb, first in (("fprop", x), ("dgrad", dy)):
        p = problem(verb, geometry, first, first, w, SIZE)
        pointers = gather_call(p, TILE).run(first, poisoned)
        boxed = gather_call(p, TILE, True, box).run(first, poisoned)
        torch.testing.assert_close(boxed, pointers, rtol=2e-3, atol=2e-3)


# A box of filters begins at a multiple of eight.
ALIGNED = SUPPORTS | {
    "aligned": hk.Support.het(32, 48, 3, p=3),
    "interleaved": hk.Support.het(32, 32, 3, p=4, order="interleaved"),
}


@pytest.mark.parametrize(
    ("support", "box", "where", "reorder"),
    [
        ("dense", Box(2, 4, 4), "stride1", False),
        ("aligned", Box(4, 4, 2), "uneven", False),
        ("interleaved", Box(8, 2, 2), "stride1", True),
        ("aligned", Box(32, 1, 1), "stride2", False),
        ("pointwise", Box(1, 8, 4), "stride1", False),
    ],
    ids=str,
)
def test_wgrad_by_boxes_equals_the_oracle(
    support: str, box: Box, where: str, reorder: bool
) -> None:
    s = ALIGNED[support]
    pads, dilation = (1, 1) if where != "uneven" else ((0, 2, 3, 1), (1, 2))
    geometry = make_geometry(
        s, 2 if where == "stride2" else 1, pads if s.kernel[0] > 1 else 0, dilation
    )
    size = (8, 4)
    x, w, _, dy = tensors(geometry, torch.float16, size)
    p = problem("wgrad", geometry, dy, x, w, size)
    call = wgrad_call(p, reorder=reorder, box=box)
    capture.CONVERSIONS.clear()
    boxed = call.run(dy, x)
    assert [key[3] for key in call._bound] == [True]
    assert all(part.adjacent(8) for part in call.choice.lowering.parts)
    w = w.double().requires_grad_()
    (exact,) = torch.autograd.grad(oracle(x.double(), w, geometry), w, dy.double())
    (whole,) = torch.autograd.grad(oracle(x.double().abs(), w, geometry), w, dy.double().abs())
    near(boxed, torch.where(torch.tensor(s.mask), exact, 0.0), whole, dy[:, 0].numel())


@pytest.mark.parametrize(
    ("where", "taps"),
    [((1, 1, 1), 3), ((1, 4, 3), 3), ((2, 3, 2), (5, 3)), ((3, 2, 1), 5)],
    ids=str,
)
@pytest.mark.parametrize("box", [Box(16, 1, 1), Box(4, 2, 2)], ids=str)
def test_wgrad_by_boxes_visits_what_its_taps_see(box: Box, where: Any, taps: Any) -> None:
    """Small images with far taps: some jobs see a part of y, some nothing."""
    s = hk.Support.dense(16, 16, taps)
    geometry = make_geometry(s, *where)
    oh, ow = geometry.output_size(*SIZE)
    if where[0] > 1 or oh % box.rows or ow % box.cols:
        box = Box(16, 1, 1)
    x, w, _, dy = tensors(geometry, torch.float16)
    boxed = wgrad_call(problem("wgrad", geometry, dy, x, w, SIZE), box=box).run(dy, x)
    w = w.double().requires_grad_()
    (exact,) = torch.autograd.grad(oracle(x.double(), w, geometry), w, dy.double())
    (whole,) = torch.autograd.grad(oracle(x.double().abs(), w, geometry), w, dy.double().abs())
    near(boxed, exact, whole, dy[:, 0].numel())


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("shift", range(-9, 10, 3))
def test_the_tiles_that_a_tap_reaches_from(shift: int, stride: int) -> None:
    found = torch.empty(2, dtype=torch.int32)
    for edge in (1, 2, 4) if stride == 1 else (1,):
        for image in (1, 2, 5, 8):
            bounds_kernel_probe[(1,)](found, shift, image, edge, stride)
            seen = [
                t
                for t in range(32)
                if any(0 <= (t * edge + i) * stride + shift < image for i in range(edge))
            ]
            until = int(found[1])
            assert seen == list(range(int(found[0]), until)) or (not seen and stride > 1), seen


@triton.jit
def bounds_kernel_probe(found, shift, image, EDGE: tl.constexpr, stride):
    tl.store(found, seen_from(shift, EDGE, stride))
    tl.store(found + 1, seen_until(shift, EDGE, stride, image))


def test_wgrad_by_boxes_keeps_infinity_in_its_place() -> None:
    """A box that reached beyond y would multiply its zeros with what x holds there."""
    geometry = make_geometry(SUPPORTS["dense"], 1, 1)
    x, w, _, dy = tensors(geometry, torch.float16, (6, 4))
    x[0, 3, 5, 3] = float("inf")
    p = problem("wgrad", geometry, dy, x, w, (6, 4))
    found = wgrad_choice.best_box((2, 6, 4), 32, True, exact=True)
    assert found is not None
    assert 6 % found.rows == 4 % found.cols == 0
    boxed = wgrad_call(p, box=found).run(dy, x)
    pointers = wgrad_call(p).run(dy, x)
    assert torch.equal(boxed.isfinite(), pointers.isfinite())
    assert boxed.isfinite().any(dim=0)[3].any()


@pytest.mark.parametrize(
    ("support", "dilation", "pads"),
    [("fills", 1, 1), ("does-not-fill", 2, (0, 3, 2, 1)), ("fills", 3, 2)],
    ids=str,
)
def test_the_parity_fold_equals_the_oracle(support: str, dilation: int, pads: Any) -> None:
    s = hk.Support.het(16, 32 if support == "fills" else 24, 3, p=2)
    geometry = make_geometry(s, 2, pads, dilation)
    x, w, poisoned, _ = tensors(geometry, torch.float16, (6, 8))
    p = problem("fprop", geometry, x, x, w, (6, 8))
    assert choice.folds(p, TILE, x.stride())
    boxed = gather_call(p, TILE, True, Box(1, 4, 8)).run(x, poisoned)
    exact = oracle(x.double(), w.double(), geometry)
    near(boxed, exact, oracle(x.double().abs(), w.double().abs(), geometry), 300)


def test_dgrad_by_boxes_at_stride_2_writes_every_class() -> None:
    geometry = make_geometry(SUPPORTS["het"], 2, 1)
    _, w, poisoned, dy = tensors(geometry, torch.float16, (5, 6))
    p = problem("dgrad", geometry, dy, dy, w, (5, 6))
    boxed = gather_call(p, TILE, True, Box(2, 4, 4)).run(dy, poisoned)
    pointers = gather_call(p, TILE).run(dy, poisoned)
    torch.testing.assert_close(boxed, pointers, rtol=2e-3, atol=2e-3)


def test_the_choice_of_boxes_runs_end_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "ONLY_LAUNCH", "tma")
    s = hk.Support.het(64, 64, 3, p=2)
    x = torch.randn(2, 64, 6, 6).half().contiguous(memory_format=torch.channels_last)
    w = torch.randn(s.shape).half()
    y = hk.functional.support_conv2d(x, w, s, None, 1, 1, backend="triton")
    geometry = make_geometry(s, 1, 1)
    assert pick_choice(problem("fprop", geometry, x, x, w, (6, 6))).box is not None
    exact = oracle(x.double(), w.double(), geometry)
    near(y, exact, oracle(x.double().abs(), w.double().abs(), geometry), 600)


def test_lowerings_of_several_tiles_are_one_function() -> None:
    geometry = make_geometry(SUPPORTS["ragged"], 1, 1)
    x, w, poisoned, _ = tensors(geometry, torch.float32)
    p = problem("fprop", geometry, x, x, w, SIZE)
    results = [
        gather_call(p, tile).run(x, poisoned)
        for tile in (Tile(16, 16, 16, 4), Tile(64, 32, 16, 4), Tile(128, 64, 32, 4))
    ]
    for found in results[1:]:
        torch.testing.assert_close(found, results[0], rtol=1e-4, atol=1e-4)
    assert isinstance(gather_call(p, TILE).lowering, Lowering)
