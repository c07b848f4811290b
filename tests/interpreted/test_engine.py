# SPDX-License-Identifier: Apache-2.0
"""The engine as a user meets it: epilogues, formats, capture, and silent corrupters."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from kernel_calls import TILE, gather_call, problem, wgrad_call

import hetconv_kernels as hk
from hetconv_kernels import ops
from hetconv_kernels.backends import CODES, choose, get_backend
from hetconv_kernels.backends.common import epilogue
from hetconv_kernels.backends.gpu import capture
from hetconv_kernels.backends.triton import choice, device_words, launch, words
from hetconv_kernels.backends.triton.tiles import Box, Tile
from hetconv_kernels.backends.triton.words import MAX_BLOCKS, MAX_TAPS
from hetconv_kernels.errors import BackendError
from hetconv_kernels.problem import make_geometry
from hetconv_kernels.testing import oracle

CODE = CODES["triton"]
S = hk.Support.het(24, 20, 3, p=2)
GEOMETRY = make_geometry(S, 1, 1)


def operands(dtype: torch.dtype = torch.float32, layout: Any = torch.channels_last) -> Any:
    x = torch.randn(2, 24, 5, 6).to(dtype).contiguous(memory_format=layout)
    return x, torch.randn(S.shape).to(dtype)


@triton.jit
def product_kernel_canary(a, b, c, N: tl.constexpr):
    i = tl.arange(0, N)
    cell = i[:, None] * N + i[None, :]
    tl.store(c + cell, tl.dot(tl.load(a + cell), tl.load(b + cell)))


def test_the_interpreter_still_multiplies_bfloat16_wrongly() -> None:
    """When this fails the fault is mended, and `multiply` need not widen in the interpreter."""
    a, b = (torch.randn(16, 16).bfloat16() for _ in range(2))
    c = torch.empty(16, 16)
    product_kernel_canary[(1,)](a, b, c, 16)
    error = (c - a.float() @ b.float()).abs().max()
    assert not error < 1.0
    product_kernel_canary[(1,)](a.half(), b.half(), c, 16)
    torch.testing.assert_close(c, a.float() @ b.float(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("box", "dtype"),
    [
        *((None, dtype) for dtype in (torch.float16, torch.bfloat16, torch.float32)),
        *((Box(2, 4, 4), dtype) for dtype in (torch.float16, torch.bfloat16)),
    ],
    ids=str,
)
def test_integers_are_exact(box: Box | None, dtype: torch.dtype) -> None:
    """No rounding hides a product that is wrong, missing or added twice."""
    support = hk.Support.het(32, 48, 3, p=2)
    geometry, size = make_geometry(support, 1, 1), (4, 8)
    mask = torch.tensor(support.mask)
    x, w, dy = (
        torch.randint(-2, 3, shape).to(dtype).contiguous(memory_format=torch.channels_last)
        for shape in ((4, 32, *size), support.shape, (4, 48, *size))
    )
    leaves = [t.double().requires_grad_() for t in (x, torch.where(mask, w, 0))]
    y = oracle(*leaves, geometry)
    dx, dw = torch.autograd.grad(y, leaves, dy.double())
    assert max(y.abs().max(), dx.abs().max()) <= 256, "not exact in bfloat16"
    for verb, first, truth in (("fprop", x, y), ("dgrad", dy, dx)):
        p = problem(verb, geometry, first, first, w, size)
        assert torch.equal(gather_call(p, TILE, box=box).run(first, w).double(), truth)
    p = problem("wgrad", geometry, dy, x, w, size)
    found = wgrad_call(p, (Tile(32, 16, 16, 4),) * 2, box=box).run(dy, x)
    assert found.dtype == dtype
    assert torch.equal(found.double(), torch.where(mask, dw, 0).to(dtype).double())


@pytest.mark.parametrize("act", ["none", "relu", "relu6", "silu", "gelu"])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
def test_the_epilogue_is_fused(act: str, layout: torch.memory_format) -> None:
    x, w = operands(torch.float16, layout)
    scale, shift = torch.randn(20), torch.randn(20).half()
    residual = torch.randn(2, 20, 5, 6).half().contiguous(memory_format=layout)
    y = ops.run_fprop(x, w, GEOMETRY, shift, CODE, True, scale, residual, act)
    exact = oracle(x.double(), w.double(), GEOMETRY)
    exact = epilogue(exact, scale.double(), shift.double(), residual.double(), act)
    torch.testing.assert_close(y.double(), exact, rtol=2e-3, atol=1e-2)
    assert y.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("box", [None, Box(1, 4, 8), Box(2, 4, 4)], ids=str)
@pytest.mark.parametrize("full", [False, True], ids=["ragged-tiles", "whole-tiles"])
def test_epilogue_of_both_kernels(box: Box | None, full: bool) -> None:
    s = hk.Support.het(16, 32 if full else 24, 3, p=2)
    geometry = make_geometry(s, 1, 1)
    last = {"memory_format": torch.channels_last}
    x = torch.randn(2, 16, 5, 6).half().contiguous(**last)
    w, shift = torch.randn(s.shape).half(), torch.randn(s.filters)
    residual = torch.randn(2, s.filters, 5, 6).half().contiguous(**last)
    call = gather_call(problem("fprop", geometry, x, x, w, (5, 6)), TILE, True, box)
    y = call.run(x, w, None, shift, None)
    exact = oracle(x.double(), w.double(), geometry, shift.double())
    torch.testing.assert_close(y.double(), exact, rtol=2e-3, atol=2e-3)
    y = call.run(x, w, None, shift, residual)
    torch.testing.assert_close(y.double(), exact + residual.double(), rtol=2e-3, atol=4e-3)


def test_a_residual_of_another_format_is_counted() -> None:
    x, w = operands()
    residual = torch.randn(2, 20, 5, 6)
    capture.CONVERSIONS.clear()
    y = ops.run_fprop(x, w, GEOMETRY, None, CODE, True, None, residual, "none")
    plain = ops.run_fprop(x, w, GEOMETRY, None, CODE)
    torch.testing.assert_close(y, plain + residual)
    assert sum(capture.CONVERSIONS.values()) == 1


def test_a_gather_of_channels_is_counted() -> None:
    geometry = make_geometry(hk.Support.het(32, 24, 3, p=4, order="interleaved"), 1, 1)
    x, w = torch.randn(1, 32, 5, 6), torch.randn(24, 32, 3, 3)
    p = problem("fprop", geometry, x, x, w, (5, 6))
    for reorder, copies in ((False, 0), (True, 1)):
        capture.CONVERSIONS.clear()
        gather_call(p, TILE, reorder).run(x, w)
        assert sum(capture.CONVERSIONS.values()) == copies


def test_a_frozen_weight_is_packed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = operands()
    live = w[torch.tensor(S.mask)]
    packed = []
    original = launch.Launch.__call__

    def spy(self, *arguments):  # type: ignore[no-untyped-def]
        packed.append(self.kernel.__name__)
        original(self, *arguments)

    monkeypatch.setattr(launch.Launch, "__call__", spy)
    frozen = make_geometry(S, 1, 1, frozen=True)
    first = ops.run_fprop(x, live, frozen, None, CODE)
    again = ops.run_fprop(x, live, frozen, None, CODE)
    assert torch.equal(first, again)
    assert packed.count("pack_kernel_gather") == 1
    live.mul_(2)
    torch.testing.assert_close(ops.run_fprop(x, live, frozen, None, CODE), 2 * first)


def test_explain_says_how_the_engine_would_run_a_layer() -> None:
    layer = hk.nn.HetConv2d(32, 32, 3, padding=1, p=2)
    layer.backend = "triton"
    x = torch.randn(2, 32, 5, 5).contiguous(memory_format=torch.channels_last)
    found = hk.explain(layer, x, measure=False)
    (mine,) = [c for c in found.candidates if c.name == "triton"]
    assert mine.notes
    assert mine.notes[0] in str(found)
    assert 0 < mine.efficiency <= 1


def test_training_a_layer_reaches_every_primitive() -> None:
    layer = hk.nn.HetConv2d(16, 16, 3, padding=1, p=2)
    x = torch.randn(2, 16, 5, 5, requires_grad=True)
    results = {}
    for name in ("triton", "reference"):
        with hk.use_backend(name):
            y = layer(x)
            results[name] = [y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])]
    for mine, truth in zip(results["triton"], results["reference"], strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-3, atol=1e-3)


# Silent corrupters ------------------------------------------------------------------------------


@pytest.mark.parametrize("dilation", [12, 24, 36])
@pytest.mark.parametrize("box", [None, Box(1, 4, 8)], ids=str)
def test_large_dilations_do_not_wrap(dilation: int, box: Box | None) -> None:
    geometry = make_geometry(hk.Support.dense(16, 16, 3), 1, dilation, dilation)
    x = torch.randn(1, 16, dilation + 2, 3).half().contiguous(memory_format=torch.channels_last)
    w = torch.randn(16, 16, 3, 3).half()
    size = tuple(x.shape[2:])
    y = gather_call(problem("fprop", geometry, x, x, w, size), TILE, True, box).run(x, w)
    exact = oracle(x.double(), w.double(), geometry)
    torch.testing.assert_close(y.double(), exact, rtol=2e-3, atol=2e-2)


def test_a_box_that_its_segment_does_not_fill_leaves_the_next_filters_alone() -> None:
    # 24 filters in tiles of 16: the last tile has 8 lanes that belong to nobody.
    geometry = make_geometry(hk.Support.grouped(32, 40, 1, 2))
    x = torch.randn(1, 32, 4, 8).half().contiguous(memory_format=torch.channels_last)
    w = torch.randn(40, 32, 1, 1).half()
    call = gather_call(problem("fprop", geometry, x, x, w, (4, 8)), TILE, True, Box(1, 4, 8))
    sizes = np.diff(call.lowering.plan.segments)
    assert set(sizes.tolist()) != {16}
    y = call.run(x, w)
    exact = oracle(x.double(), w.double(), geometry)
    torch.testing.assert_close(y.double(), exact, rtol=2e-3, atol=1e-2)


@pytest.mark.parametrize(
    ("channels", "size", "stride", "legal"),
    [(32, (6, 8), 2, True), (24, (6, 8), 2, False), (32, (5, 8), 2, False), (32, (6, 8), 3, False)],
    ids=["legal", "channel-tail", "odd-image", "stride-3"],
)
def test_the_fold_is_refused_where_it_would_read_the_other_parity(
    channels: int, size: tuple[int, int], stride: int, legal: bool
) -> None:
    geometry = make_geometry(hk.Support.dense(channels, 16, 3), stride, 1)
    x = torch.randn(1, channels, *size).half().contiguous(memory_format=torch.channels_last)
    w = torch.randn(16, channels, 3, 3).half()
    p = problem("fprop", geometry, x, x, w, size)
    assert choice.folds(p, TILE, x.stride()) == legal
    boxes = choice.boxes_of(p, TILE)
    assert boxes
    assert legal or boxes == [Box(32, 1, 1)]
    y = gather_call(p, TILE, True, boxes[0]).run(x, w)
    exact = oracle(x.double(), w.double(), geometry)
    torch.testing.assert_close(y.double(), exact, rtol=2e-3, atol=2e-2)


@pytest.mark.parametrize(
    ("channels", "dtype", "layout", "words"),
    [
        (36, torch.float16, torch.channels_last, "multiple of 16 bytes"),
        (32, torch.float32, torch.channels_last, "not a 16-bit type"),
        (32, torch.float16, torch.contiguous_format, "not channels_last"),
    ],
    ids=["alignment", "float32", "format"],
)
def test_boxes_say_why_they_cannot(channels: int, dtype: Any, layout: Any, words: str) -> None:
    geometry = make_geometry(hk.Support.dense(channels, 16, 3), 1, 1)
    x = torch.randn(1, channels, 5, 6).to(dtype).contiguous(memory_format=layout)
    w = torch.randn(16, channels, 3, 3).to(dtype)
    p = problem("fprop", geometry, x, x, w, (5, 6))
    assert any(words in reason for reason in choice.tma_reasons(p))
    assert choice.boxes_of(p, TILE) == []
    assert get_backend("triton").unsupported_reasons(p) == []  # the pointer kernel runs it


def test_an_unaligned_operand_takes_the_pointer_kernel() -> None:
    geometry = make_geometry(hk.Support.dense(16, 16, 3), 1, 1)
    storage = torch.randn(1 * 16 * 30 + 1).half()
    x = storage[1:].view(1, 5, 6, 16).permute(0, 3, 1, 2)
    w = torch.randn(16, 16, 3, 3).half()
    call = gather_call(problem("fprop", geometry, x, x, w, (5, 6)), TILE, True, Box(1, 4, 8))
    y = call.run(x, w)
    exact = oracle(x.double(), w.double(), geometry)
    torch.testing.assert_close(y.double(), exact, rtol=2e-3, atol=2e-2)
    assert [key[2] for key in call._bound] == [False]


@triton.jit
def _fields(words, out):
    word = tl.load(words + tl.program_id(0))
    found = out + tl.program_id(0) * 4
    tl.store(found, device_words.channel_block(word))
    tl.store(found + 1, device_words.tap_row(word))
    tl.store(found + 2, device_words.tap_col(word))
    if word.dtype == tl.int64:
        tl.store(found + 3, device_words.slab(word))


def test_kernels_read_the_words_that_the_host_packs() -> None:
    fields = np.array([[0, 0, 0, 0], [MAX_BLOCKS - 1, 1, 31, 7], [5, 31, 2, 2**31 - 1]])
    packed = words.step_words(*fields[:, :3].T)
    for each, width in ((packed, 3), (words.box_words(packed, fields[:, 3]), 4)):
        out = torch.full((3, 4), -1, dtype=torch.int32)
        _fields[3,](torch.from_numpy(each), out)
        np.testing.assert_array_equal(out[:, :width], fields[:, :width])


def test_kernels_beyond_a_step_word_are_refused() -> None:
    edge = MAX_TAPS + 1
    geometry = make_geometry(hk.Support.dense(1, 1, (edge, 1)))
    x, w = torch.randn(1, 1, edge, 1), torch.randn(1, 1, edge, 1)
    with pytest.raises(BackendError, match="more than 32 taps"):
        choose(problem("fprop", geometry, x, x, w, (edge, 1)), CODE)


def test_non_finite_values_stay_in_their_receptive_field_and_image() -> None:
    x, w = operands()
    x[0, 3, 2, 2] = float("inf")
    y = ops.run_fprop(x, w, GEOMETRY, None, CODE)
    touched = ~y.isfinite()
    assert touched[0, :, 2, 2].any()
    touched[0, :, 1:4, 1:4] = False
    assert not touched.any()
