# SPDX-License-Identifier: Apache-2.0
"""Calls of the CUDA engine with its kernels on the CPU: operands that are far apart, or odd."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import cuda_host
import pytest
import torch
from cuda_host import operands, run

import hetconv_kernels as hk
from hetconv_kernels import ops
from hetconv_kernels.backends.cuda import Cuda, calls, wgrad_calls
from hetconv_kernels.backends.cuda.narrow_tma import tma_readable
from hetconv_kernels.backends.gpu import capture
from hetconv_kernels.problem import make_geometry

GEOMETRY = make_geometry(hk.Support.het(16, 24, 3, p=2), 1, 1)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return cuda_host.install(monkeypatch)


@pytest.mark.parametrize("verb", ["fprop", "dgrad", "wgrad"])
def test_images_are_addressed_in_64_bits(
    host, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, verb: str
) -> None:
    """Images 2**31 elements apart, in files of which only the images exist."""
    x, w, dy = operands(GEOMETRY, torch.bfloat16, 3)
    first, second = (x, x) if verb == "fprop" else (dy, x)
    expected = run(verb, GEOMETRY, first, second, w, *[None, None, dy][: 3 * (verb == "fprop")])

    def far_apart(shape: tuple[int, ...], *_: Any) -> torch.Tensor:
        (n, c, h, width), step = shape, 2**31 + 64
        path = tmp_path / str(len(list(tmp_path.iterdir())))
        size = (n - 1) * step + c * h * width
        memory = torch.from_file(str(path), shared=True, size=size, dtype=torch.bfloat16)
        return memory.as_strided(shape, (step, 1, width * c, c))

    monkeypatch.setattr(calls, "empty", far_apart)  # for the results of fprop and dgrad
    far = {id(t): far_apart(t.shape).copy_(t) for t in (x, dy)}
    more = (None, None, far[id(dy)]) if verb == "fprop" else ()
    found = run(verb, GEOMETRY, far[id(first)], far[id(second)], w, *more)
    assert torch.equal(found, expected)
    assert verb == "wgrad" or found.stride(0) > 2**31
    assert not capture.CONVERSIONS


def test_an_operand_that_spans_too_much_is_brought_together(
    host, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, w, _ = operands(GEOMETRY, torch.bfloat16)
    expected = run("fprop", GEOMETRY, x, x, w, None, None, None)
    wide = (
        torch.zeros(2, 16, 6, 90, dtype=x.dtype)
        .to(memory_format=torch.channels_last)[..., ::10]
        .copy_(x)
    )
    assert calls.element_span(wide.shape, wide.stride()) == 16 * 90 * 5 + 160 * 8 + 16
    for limit, copies in ((10**4, 0), (10**3, 1)):
        monkeypatch.setattr(calls, "MAX_SPAN", limit)
        assert torch.equal(run("fprop", GEOMETRY, wide, wide, w, None, None, None), expected)
        assert sum(capture.CONVERSIONS.values()) == copies


@pytest.mark.parametrize(("heads", "blocks"), [(1, 3), (2, 1), (3, 1), (4, 1)])
def test_blocks_of_all_heads_are_held_at_once(host, heads: int, blocks: int) -> None:
    """More would wait for the others to end, with as much work; three are held on the CPU."""
    narrow, wgrad = host.Narrow(), host.NarrowWgrad()
    for call in (narrow, wgrad):
        call.parts, call.buffers = heads, 1
    narrow.class_count, narrow.warps_m, narrow.warps_n, wgrad.warps = 1, 1, 1, 1
    assert [call.max_resident_blocks("bfloat16") for call in (narrow, wgrad)] == [blocks, blocks]


@pytest.mark.parametrize(("verb", "tables"), [("fprop", 8), ("dgrad", 8), ("wgrad", 6)])
def test_every_stream_that_reads_what_is_kept_is_told_to_the_allocator(
    host, monkeypatch: pytest.MonkeyPatch, verb: str, tables: int
) -> None:
    """Once a stream: the tables, and the slabs of a frozen weight with where they come from."""
    geometry = make_geometry(hk.Support.het(16, 24, 3, p=2), 1, 1, frozen=True)
    x, w, dy = operands(geometry, torch.bfloat16)
    frozen = w[torch.tensor(geometry.support.mask)]
    first, second = (x, x) if verb == "fprop" else (dy, x)
    stream = SimpleNamespace(cuda_stream=1)
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(capture, "_lent_to", lambda _: stream.cuda_stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda t, s: told.append((s.cuda_stream, t.data_ptr()))
    )
    engine = Cuda()
    problem = ops.describe(verb, geometry, first, second, frozen, (6, 9))
    call = {"fprop": engine.fprop, "dgrad": engine.dgrad, "wgrad": engine.wgrad}[verb](problem)
    more = (None, None, None) if verb == "fprop" else ()
    kept = tables + 2 * (verb != "wgrad")
    for number in (1, 1, 2, 1):
        stream.cuda_stream = number
        call(first, second if verb == "wgrad" else frozen, *more)
    # Where slabs come from is read by the stream that packs them only.
    assert [sum(s == n for s, _ in told) for n in (1, 2)] == [kept, kept - (verb != "wgrad")]
    assert {p for s, p in told if s == 2} <= {p for s, p in told if s == 1}


def test_what_is_made_for_one_call_is_told_to_nobody(host, monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, _ = operands(GEOMETRY, torch.bfloat16)
    found = run("fprop", GEOMETRY, x, x, w, None, None, None)
    assert capture._lent_to(x.device) is None
    told: list[torch.Tensor] = []
    monkeypatch.setattr(capture, "_lent_to", lambda _: 1)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: None)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda t, _: told.append(t))
    assert torch.equal(run("fprop", GEOMETRY, x, x, w, None, None, None), found)
    assert len(told) == 9  # the tables
    assert not {t.dtype for t in told} - {torch.int32}


def test_boxes_are_cut_out_of_axes_that_hold_each_other() -> None:
    def laid(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
        return tma_readable(torch.empty_strided(shape, strides, device="meta"))

    assert laid((2, 16, 6, 9), (864, 1, 144, 16))
    assert laid((2, 16, 6, 9), (2000, 1, 216, 24))
    assert laid((1, 16, 6, 9), (0, 1, 144, 16))
    assert laid((2, 16, 6, 1), (96, 1, 16, 0))
    assert not laid((2, 16, 6, 9), (0, 1, 144, 16))  # one image, expanded
    assert not laid((2, 16, 6, 9), (864, 1, 16, 96))  # rows and columns exchanged
    assert not laid((2, 16, 6, 9), (864, 1, 144, 8))
    assert not laid((2, 16, 6, 9), (2**39, 1, 144, 16))


@pytest.mark.parametrize("verb", ["fprop", "dgrad", "wgrad"])
def test_what_is_no_box_comes_by_cp_async(host, monkeypatch: pytest.MonkeyPatch, verb: str) -> None:
    x, w, dy = operands(GEOMETRY, torch.bfloat16)
    found, ways = [], []
    for allowed in (True, False):

        def told(tensor: torch.Tensor, allowed: bool = allowed) -> bool:
            ways.append(tma_readable(tensor))
            return allowed and ways[-1]

        monkeypatch.setattr(calls, "tma_readable", told)
        monkeypatch.setattr(wgrad_calls, "tma_readable", told)
        first, second = (x, x) if verb == "fprop" else (dy, x)
        found.append(run(verb, GEOMETRY, first, second, w, *[None] * 3 * (verb == "fprop")))
    assert ways
    assert all(ways)
    assert torch.equal(*found)


def test_an_image_for_all_of_a_batch_is_no_box(host) -> None:
    x, w, dy = operands(GEOMETRY, torch.bfloat16)
    one = x[:1].expand(2, -1, -1, -1)
    copied = one.clone(memory_format=torch.channels_last)
    assert [tma_readable(t) for t in (one, copied)] == [False, True]
    found = [run("wgrad", GEOMETRY, dy, t, w) for t in (one, copied)]
    assert torch.equal(*found)
    assert not capture.CONVERSIONS
