# SPDX-License-Identifier: Apache-2.0
"""The wide CUDA kernel without a GPU: when it is chosen, and its calls with it on the CPU.

`test_cuda_wide` has its tables.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import cuda_host
import numpy as np
import pretending
import pytest
import torch

import hetconv_kernels as hk
from hetconv_kernels import backends, ops
from hetconv_kernels.backends import common
from hetconv_kernels.backends import cuda as package
from hetconv_kernels.backends.cuda import Cuda, choice, wide_tiles
from hetconv_kernels.backends.gpu import capture, devices, parts
from hetconv_kernels.backends.vendor import Vendor
from hetconv_kernels.errors import BackendError
from hetconv_kernels.problem import Geometry, Problem, make_geometry
from hetconv_kernels.testing import error_bound, oracle

LAST = torch.channels_last
DENSE = hk.Support.dense(256, 256, 3)
HET8 = hk.Support.het(64, 64, 3, p=8)


# Choice ------------------------------------------------------------------------------------------


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Lets problems claim to be on a GPU, with a build for some architectures."""

    def clear() -> None:
        devices.gpu_reasons.cache_clear()
        package._build_reasons.cache_clear()

    def pretend(capability: tuple[int, int] = (9, 0), built: str = "80_90a_100_120") -> None:
        clear()
        fake = SimpleNamespace(architectures=lambda: built, versions=lambda: (13000, 13000))
        fake.tma_unsupported = lambda: ""
        monkeypatch.setitem(sys.modules, "hetconv_kernels._cuda", fake)
        monkeypatch.setattr(hk, "_cuda", fake, raising=False)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(choice, "spec_of", lambda *_: devices.GPU_SPECS[9, 0])

    yield pretend
    clear()


def described(verb: str, support: hk.Support, batch: int = 128, **changes: Any) -> Problem:
    # A Support of its own: choices are kept with it, and here the GPU is not always the same.
    support.derived.clear()
    problem = pretending.described(verb, support, batch=batch, **changes)
    return dataclasses.replace(problem, device=pretending.CUDA)


@pytest.mark.parametrize("verb", ["fprop", "dgrad"])
def test_wide_groups_run_on_hopper(on_gpu, verb: str) -> None:
    on_gpu()
    problem = described(verb, DENSE)
    engine = Cuda()
    assert engine.unsupported_reasons(problem) == []
    assert isinstance(choice.best_cuda_gather(problem), choice.WideChoice)
    (note,) = engine.notes(problem)
    assert note.startswith("It runs the kernel for wide groups: tiles of 208 pixels of flattened")
    assert 0.8 < engine.efficiency(problem) <= 1
    assert not engine.measured(problem)
    roof = problem.macs / (devices.GPU_SPECS[9, 0].rate * 132 * devices.GPU_SPECS[9, 0].clock)
    assert roof < engine.estimate(problem) < 4 * roof


@pytest.mark.parametrize(
    ("capability", "built", "words"),
    [
        ((8, 0), "80_90a", "compute capability 9.0 alone (wgmma, sm_90a), and this is 8.0"),
        ((10, 0), "100", "compute capability 9.0 alone (wgmma, sm_90a), and this is 10.0"),
        ((12, 0), "80_120", "and this is 12.0"),
        ((9, 0), "90", "built for 90, without 90a"),
    ],
    ids=str,
)
def test_other_gpus_are_told_why_not(
    on_gpu, capability: tuple[int, int], built: str, words: str
) -> None:
    on_gpu(capability, built)
    (reason,) = Cuda().unsupported_reasons(described("fprop", DENSE))
    assert words in reason
    assert "narrow groups: there are 589824 live weights" in reason
    # Few weights run there all the same.
    assert Cuda().unsupported_reasons(described("fprop", HET8)) == []


def test_narrow_groups_stay_with_their_kernel(on_gpu) -> None:
    on_gpu()
    problem = described("fprop", HET8)
    assert isinstance(choice.best_cuda_gather(problem), choice.NarrowChoice)
    assert "kernel for narrow groups: tiles of" in Cuda().notes(problem)[0]


def test_the_faster_predicted_kernel_is_taken(on_gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu()
    for support in (HET8, hk.Support.het(128, 128, 3, p=2), hk.Support.grouped(64, 64, 3, 2)):
        problem = described("fprop", support)
        found = choice.best(problem)
        seconds = {}
        for only in ("narrow", "wide"):
            monkeypatch.setattr(choice, "ONLY_KERNEL", only)
            seconds[only] = choice.best_cuda_gather(problem).seconds
        monkeypatch.setattr(choice, "ONLY_KERNEL", None)
        assert found.seconds == min(seconds.values())


def test_wgrad_of_wide_groups_runs_on_hopper(on_gpu) -> None:
    on_gpu()
    problem = described("wgrad", DENSE)
    assert Cuda().unsupported_reasons(problem) == []
    assert isinstance(choice.best_cuda_wgrad(problem), choice.WideWgradChoice)
    assert (
        Cuda().notes(problem)[0].startswith("It runs the kernel for wide groups: tiles of 28 x 8")
    )
    assert 0.7 < Cuda().efficiency(problem) <= 1
    on_gpu((8, 0), "80_90a")
    (reason,) = Cuda().unsupported_reasons(described("wgrad", DENSE))
    assert "589824 live weights" in reason
    assert "compute capability 9.0 alone (wgmma, sm_90a), and this is 8.0" in reason
    assert Cuda().unsupported_reasons(described("wgrad", HET8)) == []
    assert "kernel for narrow groups: tiles of" in Cuda().notes(described("wgrad", HET8))[0]


def test_filters_that_are_no_multiple_of_eight_are_refused(on_gpu) -> None:
    on_gpu()
    (reason,) = Cuda().unsupported_reasons(described("fprop", hk.Support.dense(256, 252, 3)))
    assert "wide groups: filters: received 252, expected a multiple of 8" in reason


def test_tables_and_packed_weights_serve_all_batches(on_gpu) -> None:
    on_gpu()
    many = choice.best_cuda_gather(described("fprop", DENSE))
    problem = pretending.described("fprop", DENSE, batch=1)
    few = choice.best_cuda_gather(dataclasses.replace(problem, device=pretending.CUDA))
    assert few.how.tables is many.how.tables
    assert few.how.classes.tolist() != many.how.classes.tolist()


def test_unmeasured_it_has_to_be_predicted_to_win_by_a_margin(
    on_gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`auto` treats it as every engine that no GPU has measured."""
    on_gpu()
    problem = described("fprop", hk.Support.het(256, 256, 3, p=2))
    engine, vendor = Cuda(), Vendor()
    monkeypatch.setattr(backends, "_engines", lambda: {"vendor": vendor, "cuda": engine})
    monkeypatch.setattr(Cuda, "fprop", lambda *_: None)
    monkeypatch.setattr(Vendor, "fprop", lambda *_: None)
    for share, name in ((1.2, "vendor"), (1.4, "cuda")):
        monkeypatch.setattr(Cuda, "estimate", lambda _, p, s=share: vendor.estimate(p) / s)
        assert backends.choose(problem, 0).backend.name == name


# Calls, with the kernel on the CPU ---------------------------------------------------------------


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return cuda_host.install(monkeypatch, "wide")


def self_grouped() -> hk.Support:
    keep = np.random.default_rng(0).random((3, 24)) < 0.4
    return hk.Support.self_grouped(np.repeat(np.arange(3), (24, 8, 40)), keep, 3)


# Name: the layer, the size of its images, and how many.
LAYERS: dict[str, tuple[Geometry, tuple[int, int], int]] = {
    "het2": (make_geometry(hk.Support.het(128, 128, 3, p=2), 1, 1), (6, 9), 2),
    "stacked": (make_geometry(hk.Support.het(64, 72, 3, p=4), 1, 1), (7, 7), 5),
    "ragged": (make_geometry(self_grouped(), 1, 1), (9, 10), 2),
    "stride": (make_geometry(hk.Support.dense(16, 16, 3), 2, 1), (13, 12), 3),
    "pointwise": (make_geometry(hk.Support.dense(72, 24, 1), 2), (11, 17), 2),
    "dilated": (make_geometry(hk.Support.dense(16, 8, 3), 1, 2, 2), (10, 8), 1),
}


def operands(name: str, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    geometry, size, n = LAYERS[name]
    s = geometry.support
    shapes = (n, s.channels, *size), s.shape, (n, s.filters, *geometry.output_size(*size))
    x, w, dy = (torch.randn(*shape).to(dtype) for shape in shapes)
    return x.to(memory_format=LAST), w, dy.to(memory_format=LAST)


def prepared(verb: str, geometry: Geometry, first: Any, w: Any, size: Any, **how: Any) -> Any:
    """Prepares fprop or dgrad on the host's kernel, past the refusal of CPU tensors."""
    problem = ops.describe(verb, geometry, first, first, w, size, **how)
    assert isinstance(choice.best_cuda_gather(problem), choice.WideChoice)
    engine = Cuda()
    return {"fprop": engine.fprop, "dgrad": engine.dgrad}[verb](problem)


def near(found: torch.Tensor, exact: Any, sizes: Any, depth: int, dtype: torch.dtype) -> None:
    assert not found.isnan().any()
    assert ((found.double() - exact).abs() <= error_bound(sizes, depth, dtype)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_primitives_equal_the_oracle(host, name: str, dtype: torch.dtype) -> None:
    geometry, size, _ = LAYERS[name]
    x, w, dy = operands(name, dtype)
    mask = torch.tensor(geometry.support.mask)
    values = [t.double().requires_grad_() for t in (x, w)]
    y = oracle(*values, geometry)
    (dx,) = torch.autograd.grad(y, values[:1], dy.double())
    magnitudes = [t.double().abs().requires_grad_() for t in (x, w)]
    most = oracle(*magnitudes, geometry)
    (dx_most,) = torch.autograd.grad(most, magnitudes[:1], dy.double().abs())
    given = torch.where(mask, w, float("nan"))  # dead entries are never read
    depths = mask[0].numel(), mask[:, 0].numel()
    found = prepared("fprop", geometry, x, given, size)(x, given, None, None, None)
    near(found, y.detach(), most.detach(), depths[0], dtype)
    near(prepared("dgrad", geometry, dy, given, size)(dy, given), dx, dx_most, depths[1], dtype)
    assert sum(capture.CONVERSIONS.values()) == 0


@pytest.mark.parametrize("form", ["channels_last", "live"])
@pytest.mark.parametrize("name", ["het2", "ragged", "pointwise"])
def test_wgrad_equals_the_oracle(host, name: str, form: str) -> None:
    geometry, size, n = LAYERS[name]
    x, w, dy = operands(name, torch.bfloat16)
    mask = torch.tensor(geometry.support.mask)
    found = []
    for values in ((x, dy), (x.abs(), dy.abs())):
        leaf = torch.zeros(w.shape, dtype=torch.float64, requires_grad=True)
        y = oracle(values[0].double(), leaf, geometry)
        found += torch.autograd.grad(y, leaf, values[1].double())
    given = w[mask].float() if form == "live" else w.float().to(memory_format=LAST)
    problem = ops.describe("wgrad", geometry, dy, x, given, size)
    assert isinstance(choice.best_cuda_wgrad(problem), choice.WideWgradChoice)
    run = Cuda().wgrad(problem)
    dw, exact, most = run(dy, x), *found
    if form == "live":
        exact, most = exact[mask], most[mask]
    else:
        assert dw.is_contiguous(memory_format=LAST)
        assert not dw[~mask].any()
        exact = torch.where(mask, exact, 0.0)
    near(dw, exact, most, n * size[0] * size[1], torch.float32)
    assert torch.equal(run(dy, x), dw)
    assert not capture.CONVERSIONS


@pytest.mark.parametrize("form", ["channels_last", "live", "wide"])
def test_every_form_of_weight_is_packed_alike(host, form: str) -> None:
    geometry, size, _ = LAYERS["ragged"]
    x, w, _ = operands("ragged", torch.bfloat16)
    expected = prepared("fprop", geometry, x, w, size)(x, w, None, None, None)
    given = {
        "channels_last": w.to(memory_format=LAST),
        "live": w[torch.tensor(geometry.support.mask)],
        "wide": w.float(),
    }[form]
    run = prepared("fprop", geometry, x, given, size)
    assert torch.equal(run(x, given, None, None, None), expected)


@pytest.mark.parametrize("act", ["none", "relu", "gelu"])
def test_the_epilogue_is_fused(host, act: str) -> None:
    geometry, size, _ = LAYERS["stacked"]
    x, w, residual = operands("stacked", torch.bfloat16)
    scale, shift = torch.randn(72, dtype=torch.bfloat16), torch.randn(72)
    extras = {"scale": scale, "shift": shift, "residual": residual}
    run = prepared("fprop", geometry, x, w, size, extras=extras, act=act)
    found = run(x, w, scale, shift, residual)
    plain = oracle(x.double(), w.double(), geometry)
    exact = common.epilogue(plain, scale.double(), shift.double(), residual.double(), act)
    torch.testing.assert_close(found.double(), exact, rtol=2e-2, atol=0.1)
    assert found.is_contiguous(memory_format=LAST)


def test_what_a_problem_cannot_know_is_copied_and_counted(host) -> None:
    geometry, size, _ = LAYERS["het2"]
    x, w, residual = operands("het2", torch.bfloat16)
    extras = {"residual": residual}
    run = prepared("fprop", geometry, x, w, size, extras=extras)
    expected = run(x, w, None, None, residual)
    assert not capture.CONVERSIONS

    def unaligned(t: torch.Tensor) -> torch.Tensor:
        storage = torch.empty(t.numel() + 1, dtype=t.dtype)
        return torch.as_strided(storage, t.shape, t.stride(), 1).copy_(t)

    assert torch.equal(run(unaligned(x), w, None, None, unaligned(residual)), expected)
    assert torch.equal(run(x, w, None, None, residual.contiguous()), expected)
    assert capture.CONVERSIONS == {
        "operand brought to an aligned address": 1,
        "residual brought to an aligned address": 1,
        "residual brought to the format of y": 1,
    }


@pytest.mark.parametrize("pixels", wide_tiles.FLAT_PIXELS)
def test_integers_are_exact_where_rows_are_flattened(
    host, monkeypatch: pytest.MonkeyPatch, pixels: int
) -> None:
    """No rounding can hide a product that is missing, or of another row's end or another image."""
    monkeypatch.setattr(wide_tiles, "TILE_PIXELS", ())
    monkeypatch.setattr(wide_tiles, "FLAT_PIXELS", (pixels,))
    generator = torch.Generator().manual_seed(0)
    for support, size, n in (
        (hk.Support.het(128, 64, 3, p=2), (9, 14), 4),
        (hk.Support.dense(64, 72, 1), (4, 9), 7),
    ):
        geometry = make_geometry(support, 1, support.kernel[0] // 2)
        shapes = (n, support.channels, *size), support.shape, (n, support.filters, *size)
        x, w, dy = (torch.randint(-1, 2, shape, generator=generator).bfloat16() for shape in shapes)
        x, dy = (t.to(memory_format=LAST) for t in (x, dy))
        leaf = x.double().requires_grad_()
        y = oracle(leaf, w.double(), geometry)
        (dx,) = torch.autograd.grad(y, leaf, dy.double())
        assert max(float(y.detach().abs().max()), float(dx.abs().max())) <= 256  # exact in bf16
        for verb, first, exact in (("fprop", x, y.detach()), ("dgrad", dy, dx)):
            more = (None, None, None) if verb == "fprop" else ()
            run = prepared(verb, geometry, first, w, size)
            assert torch.equal(run(first, w, *more).double(), exact)


def test_an_empty_batch_and_two_runs(host) -> None:
    geometry, size, _ = LAYERS["stacked"]
    x, w, _ = operands("stacked", torch.bfloat16)
    empty = x[:0]
    problem = ops.describe("fprop", geometry, empty, empty, w, size)
    assert Cuda().fprop(problem)(empty, w, None, None, None).shape == (0, 72, 7, 7)
    run = prepared("fprop", geometry, x, w, size)
    assert torch.equal(*(run(x, w, None, None, None) for _ in range(2)))


def test_operands_with_room_between_their_pixels(host) -> None:
    """Channels, rows and images of a larger tensor are read where they are."""
    geometry, size, n = LAYERS["het2"]
    x, w, _ = operands("het2", torch.bfloat16)
    expected = prepared("fprop", geometry, x, w, size)(x, w, None, None, None)
    whole = torch.full((n, size[0] + 1, size[1] + 2, 144), float("nan"), dtype=x.dtype)
    part = whole[:, : size[0], : size[1], 8:136].permute(0, 3, 1, 2).copy_(x)
    assert torch.equal(
        prepared("fprop", geometry, part, w, size)(part, w, None, None, None), expected
    )
    assert not capture.CONVERSIONS


def test_nothing_is_made_ready_during_a_capture(on_gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu()
    problem = described("fprop", DENSE)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(BackendError, match=r"while a CUDA graph is captured.*warmup\(model"):
        Cuda().fprop(problem)


@pytest.mark.parametrize(
    ("part", "field", "with_it", "without"),
    [("cuda-cluster", "cluster", 2, 1), ("cuda-flat", "flat_pitch", 29, 0)],
    ids=["cluster", "flat"],
)
def test_a_form_that_is_left_out_is_not_chosen(
    on_gpu: Any, monkeypatch: pytest.MonkeyPatch, part: str, field: str, with_it: int, without: int
) -> None:
    on_gpu()
    for left_out, expected in (set(), with_it), ({part}, without):
        monkeypatch.setattr(parts, "WITHOUT", frozenset(left_out))
        shape = choice.best_cuda_gather(described("fprop", DENSE)).how.shape
        assert getattr(shape, field) == expected


@pytest.mark.parametrize("name", ["cuda-wide", "cuda-narrow", "cuda-tf32", "cuda-wgrad"])
def test_a_kernel_that_is_left_out_is_refused_with_its_name(
    on_gpu: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    on_gpu()
    verb = "wgrad" if name == "cuda-wgrad" else "fprop"
    dtype = torch.float32 if name == "cuda-tf32" else torch.bfloat16
    problem = described(verb, DENSE if name == "cuda-wide" else HET8, dtype=dtype)
    assert Cuda().unsupported_reasons(problem) == []
    others = {"cuda-narrow": {"cuda-wide"}, "cuda-wgrad": {"cuda-wide-wgrad"}}.get(name, set())
    monkeypatch.setattr(parts, "WITHOUT", frozenset({name, *others}))
    (reason,) = Cuda().unsupported_reasons(problem)
    assert f"({name}) are left out by HETCONV_WITHOUT" in reason
