# SPDX-License-Identifier: Apache-2.0
"""What a call costs beyond the convolution: whole layers at 1×8×2×2, dominated by call overhead.

Then every class of layer beside the plain layer that it replaced, at sizes dominated by call
overhead and at sizes where it is nothing: `auto` promises never to be slower than that.

The only benchmark that asserts a speed. A layer that is not frozen keeps nothing of its weight: at
each call it writes a masked copy, which the convolution then finds where the copy left it. Its
target has that measured beside it, the plain layer after a copy of its weight, and counts what more
a mask takes at least: 4 µs for the call, and a byte for each weight, which is read at the rate at
which this machine copies 64 MiB. Rows of features, up to `masking.MOST_ROWS`, are multiplied as
they are masked: no copy, and 1/8 byte for each weight, its bit. Beyond that, in microseconds: 1.5
for the question who observes PyTorch, 1.5 for the key of the prepared call, 2 for Python around
both; with grad 10 more for a ``torch.autograd.Function``. Without that floor a small layer used
directly cannot be as fast as ``nn.Conv2d``; `compress` and `optimize` leave it plain.

A row fails when its whole interval lies above twice the target: a slower processor, or a machine
that does other work at the same time, must not fail here; the table shows every microsecond.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import hetconv_kernels as hk
from benchmarks import record
from hetconv_kernels import masking
from hetconv_kernels.measure import timing

TARGETS_US = {"frozen": 5.0, "without grad": 9.0, "with grad": 21.0}
DISPATCH_MARGIN = 2.0
# What a frozen layer may take more than the plain one: microseconds, or a share of its time.
CLASS_US, CLASS_SHARE = 6.0, 0.03
# What one that is not frozen takes for its mask on top: microseconds, and bytes for each weight.
MASK_US, MASK_BYTES, BIT_BYTES = 4.0, 1, 1 / 8


def _irregular(f: int, c: int, k: int, per_cent: int) -> hk.Support:
    return hk.Support.from_mask(np.random.default_rng(0).random((f, c, k, k)) < per_cent / 100)


def _linear(c: int, f: int, per_cent: int) -> nn.Module:
    return hk.nn.SupportLinear(c, f, support=_irregular(f, c, 1, per_cent)).freeze()


def _conv(c: int, f: int, k: int, per_cent: int) -> nn.Module:
    support = _irregular(f, c, k, per_cent)
    return hk.nn.SupportConv2d(c, f, k, padding=k // 2, support=support).freeze()


def _self_grouped(c: int, k: int) -> nn.Module:
    drawn = np.random.default_rng(0)
    support = hk.Support.self_grouped(drawn.integers(0, 4, c), drawn.random((4, c)) < 0.3, k)
    return hk.nn.SelfGroupConv2d(c, c, k, padding=k // 2, support=support).freeze()


def _frequency(c: int, per_cent: int) -> nn.Module:
    kept = np.random.default_rng(0).random((c, c, 3, 3)) < per_cent / 100
    layer = hk.nn.FrequencyConv2d(c, c, 3, padding=1, coefficients=kept)
    layer.mix.freeze()
    return layer


def _trained(layer: nn.Module) -> nn.Module:
    """Not frozen, as `compress` and `convert` return layers."""
    holder = getattr(layer, "mix", layer)
    holder.thaw()
    return layer


# By name: what makes the layer, and the shape of its input.
CLASSES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "SupportLinear 1x8": (lambda: _linear(8, 8, 50), (1, 8)),
    "SupportLinear 1x256": (lambda: _linear(256, 256, 20), (1, 256)),
    "SupportLinear 64x84 to 10": (lambda: _linear(84, 10, 50), (64, 84)),
    "SupportLinear 32x512 to 1000": (lambda: _linear(512, 1000, 10), (32, 512)),
    "SupportLinear 128x1024": (lambda: _linear(1024, 1024, 50), (128, 1024)),
    "SupportConv2d 1x4x8^2": (lambda: _conv(4, 4, 3, 30), (1, 4, 8, 8)),
    "SupportConv2d 1x64x28^2": (lambda: _conv(64, 64, 3, 30), (1, 64, 28, 28)),
    "SupportConv2d 1x64x14^2 k1": (lambda: _conv(64, 128, 1, 30), (1, 64, 14, 14)),
    "HetConv2d 1x16x8^2": (lambda: hk.nn.HetConv2d(16, 16, 3, padding=1, p=4).freeze(),
                           (1, 16, 8, 8)),
    "HetConv2d 8x64x28^2": (lambda: hk.nn.HetConv2d(64, 64, 3, padding=1, p=4).freeze(),
                            (8, 64, 28, 28)),
    "SelfGroupConv2d 1x16x8^2": (lambda: _self_grouped(16, 3), (1, 16, 8, 8)),
    "SelfGroupConv2d 8x64x28^2": (lambda: _self_grouped(64, 3), (8, 64, 28, 28)),
    "GroupedConv2d 1x16x8^2": (
        lambda: hk.nn.GroupedConv2d(16, 16, 3, padding=1, groups=4).freeze(), (1, 16, 8, 8)),
    "GroupedConv2d depthwise 8x128x14^2": (
        lambda: hk.nn.GroupedConv2d(128, 128, 3, padding=1, groups=128).freeze(),
        (8, 128, 14, 14)),
    "FrequencyConv2d 1x4x8^2": (lambda: _frequency(4, 30), (1, 4, 8, 8)),
    "FrequencyConv2d 8x64x28^2": (lambda: _frequency(64, 30), (8, 64, 28, 28)),
}  # fmt: skip
NOT_FROZEN: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "SupportLinear 1x256, not frozen": (lambda: _linear(256, 256, 20), (1, 256)),
    "SupportLinear 32x512 to 1000, not frozen": (lambda: _linear(512, 1000, 10), (32, 512)),
    "SupportLinear 1x2048, not frozen": (lambda: _linear(2048, 2048, 50), (1, 2048)),
    "SupportConv2d 1x4x8^2, not frozen": (lambda: _conv(4, 4, 3, 30), (1, 4, 8, 8)),
    "SupportConv2d 1x64x14^2, not frozen": (lambda: _conv(64, 64, 3, 50), (1, 64, 14, 14)),
    "SupportConv2d 1x512x7^2, not frozen": (lambda: _conv(512, 512, 3, 50), (1, 512, 7, 7)),
    "HetConv2d 8x64x28^2, not frozen": (
        lambda: hk.nn.HetConv2d(64, 64, 3, padding=1, p=4), (8, 64, 28, 28)),
    "GroupedConv2d depthwise 8x128x14^2, not frozen": (
        lambda: hk.nn.GroupedConv2d(128, 128, 3, padding=1, groups=128), (8, 128, 14, 14)),
    "FrequencyConv2d 8x64x28^2, not frozen": (lambda: _frequency(64, 30), (8, 64, 28, 28)),
}  # fmt: skip
CLASSES |= {name: (lambda make=make: _trained(make()), shape)  # type: ignore[misc]
            for name, (make, shape) in NOT_FROZEN.items()}  # fmt: skip


@cache
def _bytes_a_microsecond() -> float:
    """Measures the rate at which memory is read and written: bytes of both a microsecond."""
    source = torch.ones(2**24)
    target = torch.empty_like(source)
    took = []
    for _ in range(15):
        began = time.perf_counter()
        target.copy_(source)
        took.append(time.perf_counter() - began)
    return 2 * source.nbytes / statistics.median(took) / 1e6


def _multiplies_masked(layer: Any, x: torch.Tensor) -> bool:
    return isinstance(layer, hk.nn.SupportLinear) and len(x) <= masking.MOST_ROWS


def _mask_us(layer: Any, x: torch.Tensor) -> float:
    """Counts what masking takes beyond a copy, in microseconds."""
    each = BIT_BYTES if _multiplies_masked(layer, x) else MASK_BYTES
    return MASK_US + each * layer.weight.numel() / _bytes_a_microsecond()


def _copying(plain: Any, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    """The plain layer after a copy of its weight, as every layer needs it that keeps nothing."""
    other = copy.deepcopy(plain)

    def run() -> torch.Tensor:
        other.weight.copy_(plain.weight)
        result: torch.Tensor = other(x)
        return result

    return run


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    forced, full = (metafunc.config.getoption(name) for name in ("--backend", "--full"))
    classes = "name" in metafunc.fixturenames
    engines = ["auto", "vendor"] if full or not classes else ["auto"]
    metafunc.parametrize("engine", forced or engines)
    if classes:  # rows of features have one layout; the quick subset takes one of images
        forms = {2: ["nchw"], 4: ["nchw", "nhwc"] if full else ["nhwc"]}
        rows = [
            pytest.param(name, form, id=f"{name.replace(' ', '-')}-{form}")
            for name, (_, shape) in CLASSES.items()
            for form in forms[len(shape)]
        ]
        metafunc.parametrize(("name", "form"), rows)


@pytest.mark.parametrize("mode", TARGETS_US, ids=lambda mode: mode.replace(" ", "-"))
def test_dispatch(mode: str, engine: str, benchmark: Any, session: Any) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, 3, padding=1)
    layer = hk.nn.HetConv2d(8, 8, 3, padding=1, p=2, backend=engine)
    if mode == "frozen":
        layer.freeze()
    x = torch.randn(1, 8, 2, 2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a dispatch has nothing to share, and threads would add their noise
    if not session.measures(benchmark):
        torch.testing.assert_close(layer(x).shape, conv(x).shape)
        benchmark.pedantic(lambda: layer(x))
        torch.set_num_threads(threads)
        return
    with torch.set_grad_enabled(mode == "with grad"):
        timings = timing.interleaved(
            {"dense": lambda: conv(x), "ours": lambda: layer(x)},
            baseline="dense",
            rounds=300,
            min_time=3e-4,  # short enough to fall between interruptions
            max_seconds=session.seconds,
            benchmark=benchmark,
        )
    torch.set_num_threads(threads)
    row = record.dispatch_row(mode, engine, TARGETS_US[mode], timings)
    session.extra_info(benchmark, "dispatch", row)
    session.record("dispatch").add(row)
    # The reference is several operators a call, and never chosen for speed.
    if "disturbed" not in row and engine != "reference":
        assert row["low_us"] <= DISPATCH_MARGIN * TARGETS_US[mode]


def test_class(name: str, form: str, engine: str, benchmark: Any, session: Any) -> None:
    make, shape = CLASSES[name]
    torch.manual_seed(0)
    layer: Any = make().eval()
    layout = torch.channels_last if form == "nhwc" else torch.contiguous_format
    x = torch.randn(shape)
    if engine != "auto":
        layer.backend = engine
    plain = layer.to_linear() if isinstance(layer, hk.nn.SupportLinear) else layer.to_conv2d()
    if x.dim() == 4:
        x, plain = x.to(memory_format=layout), plain.to(memory_format=layout)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), plain(x), rtol=1e-3, atol=1e-4)
        if not session.measures(benchmark):
            benchmark.pedantic(lambda: layer(x))
            return
        runs: dict[str, Callable[[], Any]] = {"dense": lambda: plain(x), "ours": lambda: layer(x)}
        if name in NOT_FROZEN and not _multiplies_masked(layer, x):
            runs["copied"] = _copying(plain, x)
        timings = timing.interleaved(
            runs,
            baseline="dense",
            rounds=50,
            min_time=3e-4,
            max_seconds=session.seconds,
            benchmark=benchmark,
        )
    target = max(CLASS_US, CLASS_SHARE * timings.median("dense") * 1e6)
    if name in NOT_FROZEN:
        target += _mask_us(layer, x)
    if "copied" in runs:
        target += max(0.0, timings.median("copied") - timings.median("dense")) * 1e6
    target = round(target, 1)
    row = record.dispatch_row(f"{name} {form}", engine, target, timings)
    session.extra_info(benchmark, "dispatch", row)
    session.record("dispatch").add(row)
    if "disturbed" not in row and engine == "auto":
        assert row["low_us"] <= DISPATCH_MARGIN * target
