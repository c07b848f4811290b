# SPDX-License-Identifier: Apache-2.0
"""Ranges: named while on, absent while off, and one test of an attribute on the way."""

from __future__ import annotations

import dis
from types import SimpleNamespace
from typing import Any

import fresh
import pytest
import torch

import hetconv_kernels as hk
from hetconv_kernels import nn, ops, ranges
from hetconv_kernels.errors import HetconvError
from hetconv_kernels.pooling import Pool
from hetconv_kernels.quantization import Scale, engine


def step(backend: str = "reference") -> None:
    layer = hk.nn.HetConv2d(8, 16, 3, padding=1, p=4, backend=backend)
    layer(torch.randn(2, 8, 5, 6, requires_grad=True)).sum().backward()


def names(profiler: torch.profiler.profile) -> set[str]:
    return {event.name for event in profiler.events() if event.name.startswith("hetconv.")}


@pytest.mark.parametrize("backend", ["reference", "vendor"])
def test_every_primitive_of_a_step_has_its_range(backend: str) -> None:
    with torch.profiler.profile() as profiler, ranges.enabled():
        step(backend)
    shape = "2x8x5x6 -> 16 k3x3 het(p=4, blocked)"
    expected = {f"hetconv.{verb} {backend} {shape}" for verb in ("fprop", "dgrad", "wgrad")}
    assert names(profiler) == expected


def test_off_there_is_none_and_on_is_undone() -> None:
    with pytest.raises(ZeroDivisionError), ranges.enabled():
        print(1 / (not ranges.active))
    assert not ranges.active
    with torch.profiler.profile() as profiler:
        step()
    assert names(profiler) == set()


@pytest.mark.parametrize("function", [ops.run_fprop, ops.run_dgrad, ops.run_wgrad])
def test_off_a_call_pays_for_one_attribute(function: Any) -> None:
    loads = [i for i in dis.get_instructions(function) if i.argval in ("ranges", "active")]
    assert [i.argval for i in loads].count("active") == 1
    before = [i.argval for i in dis.get_instructions(function) if i.offset < loads[0].offset]
    assert "choices" in before  # it stands after the look-up, where the result is computed


def test_nvtx_wraps_the_call_and_is_refused_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(HetconvError, match="NVTX ranges need a CUDA device"):
            ranges.enabled(nvtx=True).__enter__()
        assert not ranges.active
    pushed: list[str] = []
    fake = SimpleNamespace(range_push=pushed.append, range_pop=lambda: pushed.append("pop"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "nvtx", fake)
    with torch.no_grad(), ranges.enabled(nvtx=True):
        hk.nn.HetConv2d(8, 8, 1, p=2, backend="vendor")(torch.randn(1, 8, 2, 2))
    assert len(pushed) == 2
    assert pushed[0].startswith("hetconv.fprop vendor 1x8x2x2 -> 8 k1x1")
    assert pushed[1] == "pop"


class Integers(torch.nn.Module):
    """Every operation in 8 bits once."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        x, y = Scale(0.03, 120), Scale(0.05, 100)
        conv = hk.nn.HetConv2d(8, 8, 3, padding=1, p=4)
        pool = Pool((2, 2), (2, 2), (0, 0))
        self.steps = torch.nn.ModuleList(
            [
                nn.Quantize(x), nn.QuantizedConv2d.from_float(conv, x, y), nn.Requantize(y, x),
                nn.QuantizedMaxPool2d(pool), nn.QuantizedAvgPool2d(x, y), nn.Dequantize(y),
            ]
        )  # fmt: skip
        self.add = nn.QuantizedAdd(x, x, x)
        for step in (*self.steps, self.add):
            step.backend = backend

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for step in self.steps:
            x = step(x)
            if isinstance(step, nn.Requantize):
                x = self.add(x, x)
        return x


VERBS_OF_8_BITS = (
    "quantize 2x8x6x6", "qfprop 2x8x6x6 -> 8 k3x3 het(p=4, blocked)", "requantize 2x8x6x6",
    "qadd 2x8x6x6", "qmax_pool 2x8x6x6", "qmean 2x8x3x3", "dequantize 2x8x1x1",
)  # fmt: skip


def in_8_bits(backend: str) -> list[str]:
    return [f"hetconv.{v.replace(' ', f' {backend} ', 1)}" for v in VERBS_OF_8_BITS]


@pytest.mark.parametrize("backend", engine.engine_names())
def test_every_operation_in_8_bits_has_its_range(backend: str) -> None:
    net, x = Integers(backend), torch.randn(2, 8, 6, 6)
    expected = net(x)
    with torch.profiler.profile() as profiler, ranges.enabled():
        assert torch.equal(net(x), expected)
    assert names(profiler) == set(in_8_bits(backend))
    with torch.profiler.profile() as profiler:
        net(x)
    assert names(profiler) == set()


@pytest.mark.parametrize("backend", engine.engine_names())
def test_calls_that_no_dispatcher_sees_have_nvtx_ranges_in_8_bits(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed: list[str] = []
    fake = SimpleNamespace(range_push=pushed.append, range_pop=lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "nvtx", fake)
    net, x = Integers(backend), torch.randn(2, 8, 6, 6)
    net(x)  # packs
    with ranges.enabled(nvtx=True):
        net(x)
    assert pushed == in_8_bits(backend)
    net(x)
    assert len(pushed) == len(VERBS_OF_8_BITS), "ranges are kept when they are off"


def test_a_narrowed_network_has_ranges_like_any_other() -> None:
    model = torch.nn.Sequential(hk.nn.HetConv2d(8, 8, 3, padding=1, p=4), torch.nn.ReLU()).eval()
    x = torch.randn(2, 8, 6, 6)
    narrow = hk.optimize(model, x, dtype=torch.bfloat16).model
    with torch.no_grad(), torch.profiler.profile() as profiler, ranges.enabled():
        narrow(x)
    (one,) = names(profiler)
    assert one.startswith("hetconv.fprop ")
    assert one.endswith("2x8x6x6 -> 8 k3x3 het(p=4, blocked)")


@pytest.mark.parametrize(
    ("value", "code", "said"),
    [("profiler", 0, "True"), ("", 0, "False"), ("loud", 1, "received 'loud', expected profiler")],
)
def test_the_environment_turns_them_on(value: str, code: int, said: str) -> None:
    done = fresh.python(
        "from hetconv_kernels import ranges; print(ranges.active)",
        environment={"HETCONV_RANGES": value},
    )
    assert done.returncode == code
    assert said in done.stdout + done.stderr
