# SPDX-License-Identifier: Apache-2.0
"""The CUDA engine without a GPU: absence, refusals, choice, and its calls with kernels on the CPU.

`test_cuda_host` has the kernels themselves, `test_cuda_code` their machine code.
"""

from __future__ import annotations

import contextlib
import re
import sys
from types import SimpleNamespace
from typing import Any

import cuda_host
import pytest
import torch
from cuda_host import operands, run

import hetconv_kernels as hk
from hetconv_kernels import backends, ops
from hetconv_kernels.backends import common, get_backend
from hetconv_kernels.backends import cuda as package
from hetconv_kernels.backends.cuda import Cuda, calls, choice
from hetconv_kernels.backends.gpu import capture, devices
from hetconv_kernels.errors import BackendError
from hetconv_kernels.problem import Problem, make_geometry
from hetconv_kernels.testing import error_bound, oracle

LAST = torch.channels_last
HET = hk.Support.het(16, 24, 3, p=2)
LONG = hk.Support.dense(16, 16, (1, 33))
GEOMETRY = make_geometry(HET, 1, 1)
CUDA = torch.device("cuda", 0)


def described(verb: str = "fprop", geometry: Any = GEOMETRY, **changes: Any) -> Problem:
    s = geometry.support
    x = torch.empty(2, s.channels, 6, 9, dtype=torch.bfloat16, device="meta").to(memory_format=LAST)
    w = torch.empty(s.shape, dtype=x.dtype, device="meta")
    dy = torch.empty(2, s.filters, *geometry.output_size(6, 9), dtype=x.dtype, device="meta")
    first = x if verb == "fprop" else dy.to(memory_format=LAST)
    made = ops.describe(verb, geometry, first, x, w, (6, 9))
    values = {name: getattr(made, name) for name in made.__dataclass_fields__}
    return Problem(**{**values, "device": CUDA, **changes})


# Refusals -----------------------------------------------------------------------------------------


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Lets problems claim to be on a GPU, with a build for some architectures and a driver."""

    def clear() -> None:
        devices.gpu_reasons.cache_clear()
        package._build_reasons.cache_clear()

    def pretend(
        capability: tuple[int, int] = (9, 0),
        built: str = "80_90a_120",
        driver: int = 13000,
        boxes: str = "",
    ) -> None:
        clear()
        fake = SimpleNamespace(architectures=lambda: built, versions=lambda: (13000, driver))
        fake.tma_unsupported = lambda: boxes
        monkeypatch.setitem(sys.modules, "hetconv_kernels._cuda", fake)
        monkeypatch.setattr(hk, "_cuda", fake, raising=False)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(choice, "spec_of", lambda *_: devices.GPU_SPECS[9, 0])

    yield pretend
    clear()


@pytest.mark.parametrize("verb", ["fprop", "dgrad", "wgrad"])
def test_what_it_is_for_is_not_refused(on_gpu, verb: str) -> None:
    on_gpu()
    engine, problem = Cuda(), described(verb)
    assert engine.unsupported_reasons(problem) == []
    assert 0 < engine.estimate(problem) < 1e-3
    assert 0 < engine.efficiency(problem) <= 1
    assert not engine.measured(problem)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"device": torch.device("cpu")}, "on cpu, not on an NVIDIA GPU"),
        ({"dtype": torch.float64}, "float64 is not bfloat16, float16 or float32"),
        (
            {"dtype": torch.float32, "geometry": make_geometry(hk.Support.dense(18, 16, 3))},
            "18 channels, which is no multiple of 4",
        ),
        (
            {"dtype": torch.float32, "geometry": make_geometry(hk.Support.dense(96, 96, 3))},
            "82944 live weights, and shared memory holds at most 65536",
        ),
        ({"weight_dtype": torch.float64}, "weight is float64"),
        ({"channels_last": False}, "not channels_last"),
        ({"strides": (864, 54, 9, 1)}, "not channels_last"),
        ({"strides": (1080, 1, 180, 20)}, r"elements apart, not multiples of 8"),
        ({"strides": (2**40, 1, 2**33, 16)}, r"span more than 2\*\*30 places"),
        ({"batch": 2**27}, r"The batch has more than 2\*\*30"),
        ({"height": 2**14, "width": 2**14}, r"One image has more than 2\*\*30"),
        ({"geometry": make_geometry(hk.Support.dense(12, 16, 3))}, "12 channels, which is no"),
        ({"geometry": make_geometry(LONG, 1, (0, 16))}, "more than 32 taps"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:30],
)
def test_problems_beyond_the_engine_are_refused(on_gpu, changes: Any, words: str) -> None:
    on_gpu()
    reasons = Cuda().unsupported_reasons(described(**changes))
    assert any(re.search(words, reason) for reason in reasons), reasons


def test_a_refusal_does_not_last(on_gpu) -> None:
    on_gpu()
    assert Cuda().unsupported_reasons(described(dtype=torch.float64))
    (reason,) = Cuda().unsupported_reasons(described("wgrad", dtype=torch.float32))
    assert reason.count("it takes bfloat16 and float16 alone") == 2
    assert Cuda().unsupported_reasons(described("dgrad", dtype=torch.float32)) == []
    assert Cuda().unsupported_reasons(described()) == []


def test_each_verb_asks_for_vectors_of_what_it_reads(on_gpu) -> None:
    on_gpu()
    geometry = make_geometry(hk.Support.dense(16, 12, 3), 1, 1)
    refused = {
        verb: bool(Cuda().unsupported_reasons(described(verb, geometry)))
        for verb in ("fprop", "dgrad", "wgrad")
    }
    assert refused == {"fprop": False, "dgrad": True, "wgrad": True}


@pytest.mark.parametrize(
    ("capability", "built", "driver", "words"),
    [
        ((7, 5), "80", 13000, "below 8.0"),
        ((8, 9), "80", 13000, ""),
        ((9, 0), "90a", 13000, ""),
        ((9, 0), "80", 13000, "not for 9.0; build it again with HETCONV_CUDA_ARCHS"),
        ((10, 0), "80_90a", 13000, "not for 10.0"),
        ((10, 3), "100", 13000, ""),
        ((13, 0), "80_120", 13000, ""),
        ((8, 0), "86_120", 13000, "not for 8.0"),
        ((8, 0), "80", 12080, "driver is for CUDA 12.8, older than the 13.0"),
        ((8, 0), "80", 13010, ""),
    ],
    ids=str,
)
def test_a_build_for_other_gpus_is_refused(
    on_gpu, capability: tuple[int, int], built: str, driver: int, words: str
) -> None:
    on_gpu(capability, built, driver)
    reasons = Cuda().unsupported_reasons(described())
    assert bool(reasons) == bool(words)
    assert words in " ".join(reasons)


@pytest.mark.parametrize(
    ("verb", "stride", "capability", "boxes", "words"),
    [
        ("fprop", 1, (9, 0), "", "brought by TMA."),
        ("dgrad", 2, (12, 0), "", "brought by TMA."),
        ("wgrad", 1, (9, 0), "", "brought by TMA."),
        ("fprop", 2, (9, 0), "", "not by TMA: adjacent outputs do not read adjacent columns."),
        ("wgrad", 2, (9, 0), "", "not by TMA: adjacent outputs do not read adjacent columns."),
        ("dgrad", 3, (9, 0), "", "not by TMA: 9 classes of pixels need more than 4 tensor maps."),
        ("fprop", 1, (8, 9), "", "TMA came with compute capability 9.0, and this is 8.9."),
        ("wgrad", 1, (8, 9), "", "TMA came with compute capability 9.0, and this is 8.9."),
        ("fprop", 1, (9, 0), "the driver encodes no tensor maps", "encodes no tensor maps."),
    ],
    ids=str,
)
def test_what_brings_tiles_is_said(
    on_gpu: Any,
    monkeypatch: pytest.MonkeyPatch,
    verb: str,
    stride: int,
    capability: tuple[int, int],
    boxes: str,
    words: str,
) -> None:
    on_gpu(capability, boxes=boxes)
    monkeypatch.setattr(choice, "ONLY_KERNEL", "narrow")
    support = hk.Support.het(16, 24, 3, p=2)
    support.derived.clear()  # choices are kept there
    (note,) = Cuda().notes(described(verb, make_geometry(support, stride, 1)))
    assert note.startswith("It runs the kernel for narrow groups: tiles of ")
    assert note.endswith(words)
    assert ("cp.async" in note) != (words == "brought by TMA.")


def test_too_large_a_halo_is_a_reason(on_gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu()
    small = devices.GPU_SPECS[9, 0]._replace(shared=4096)
    monkeypatch.setattr(choice, "spec_of", lambda *_: small)
    geometry = make_geometry(hk.Support.het(64, 64, 3, p=8), 1, 1)
    problem = described(geometry=geometry)
    (reason,) = Cuda().unsupported_reasons(problem)
    assert "fits in 4096 bytes of shared memory" in reason
    assert Cuda().estimate(problem) == float("inf")
    with pytest.raises(BackendError, match="shared memory"):
        Cuda().fprop(problem)


def test_wider_groups_are_predicted_to_take_longer(on_gpu) -> None:
    on_gpu()
    seconds = [
        Cuda().estimate(
            described(geometry=make_geometry(hk.Support.het(64, 64, 3, p=p), 1, 1), batch=128,
                      height=56, width=56, strides=(56 * 56 * 64, 1, 56 * 64, 64))
        )
        for p in (8, 4, 2)
    ]  # fmt: skip
    assert seconds == sorted(seconds)
    assert seconds[0] < seconds[2]


def test_a_build_without_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    engines = {name: backends._engines()[name] for name in ("vendor", "reference")}
    monkeypatch.setattr(backends, "_engines", lambda: engines)
    with pytest.raises(BackendError, match=r"'cuda' is not built here.*hetconv info"):
        get_backend("cuda")


def test_it_is_registered_where_it_is_built() -> None:
    if importable():
        assert get_backend("cuda").name == "cuda"
        layer = hk.nn.HetConv2d(16, 16, 3, padding=1, p=2)
        text = str(hk.explain(layer, torch.randn(1, 16, 5, 5), measure=False))
        assert re.search("cuda +refused: The tensors are on cpu", text)
        with (
            pytest.raises(BackendError, match="on cpu, not on an NVIDIA GPU"),
            hk.use_backend("cuda"),
        ):
            layer(torch.randn(1, 16, 5, 5))
    else:
        assert "cuda" not in hk.available_backends()


def importable() -> bool:
    import importlib.util

    return importlib.util.find_spec("hetconv_kernels._cuda") is not None


# Calls, with the kernels on the CPU ---------------------------------------------------------------


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Any:
    return cuda_host.install(monkeypatch)


def near(found: torch.Tensor, exact: Any, sizes: Any, depth: int, dtype: torch.dtype) -> None:
    assert not found.isnan().any()
    assert ((found.double() - exact).abs() <= error_bound(sizes, depth, dtype)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("form", ["contiguous", "channels_last", "live", "wide"])
def test_primitives_equal_the_oracle(host, form: str, stride: int, dtype: torch.dtype) -> None:
    geometry = make_geometry(HET, stride, 1)
    x, w, dy = operands(geometry, dtype)
    mask = torch.tensor(HET.mask)
    values = [t.double().requires_grad_() for t in (x, w)]
    y = oracle(*values, geometry)
    exact = [y.detach(), *torch.autograd.grad(y, values, dy.double())]
    magnitudes = [t.double().abs().requires_grad_() for t in (x, w)]
    y = oracle(*magnitudes, geometry)
    sizes = [y.detach(), *torch.autograd.grad(y, magnitudes, dy.double().abs())]
    given = torch.where(mask, w, float("nan"))  # dead entries are never read
    if form == "channels_last":
        given = given.to(memory_format=LAST)
    if form == "live":
        given = given[mask]
    if form == "wide":
        given = given.float()
    near(run("fprop", geometry, x, x, given, None, None, None), exact[0], sizes[0], 144, dtype)
    near(run("dgrad", geometry, dy, dy, given), exact[1], sizes[1], 216, dtype)
    dw = run("wgrad", geometry, dy, x, given)
    assert dw.dtype == given.dtype
    assert dw.shape == given.shape
    wanted = [torch.where(mask, t, 0.0) for t in (exact[2], sizes[2])]
    if form == "live":
        wanted = [t[mask] for t in wanted]
    near(dw, wanted[0], wanted[1], dy[:, 0].numel(), dtype)
    assert sum(capture.CONVERSIONS.values()) == 0


@pytest.mark.parametrize("act", ["none", "relu", "gelu"])
def test_the_epilogue_is_fused(host, act: str) -> None:
    x, w, residual = operands(GEOMETRY, torch.bfloat16)
    scale, shift = torch.randn(24, dtype=torch.bfloat16), torch.randn(24)
    extras = {"scale": scale, "shift": shift, "residual": residual}
    found = run("fprop", GEOMETRY, x, x, w, scale, shift, residual, extras=extras, act=act)
    plain = oracle(x.double(), w.double(), GEOMETRY)
    exact = common.epilogue(plain, scale.double(), shift.double(), residual.double(), act)
    torch.testing.assert_close(found.double(), exact, rtol=2e-2, atol=0.1)
    assert found.is_contiguous(memory_format=LAST)


def test_what_a_problem_cannot_know_is_copied_and_counted(host) -> None:
    x, w, dy = operands(GEOMETRY, torch.bfloat16)
    expected = run("fprop", GEOMETRY, x, x, w, None, None, dy)
    assert not capture.CONVERSIONS
    storage = torch.empty(x.numel() + 1, dtype=x.dtype)
    unaligned = torch.as_strided(storage, x.shape, x.stride(), 1).copy_(x)
    other = dy.contiguous()
    assert torch.equal(run("fprop", GEOMETRY, unaligned, unaligned, w, None, None, other), expected)
    dw = run("wgrad", GEOMETRY, dy, x, w)
    assert torch.equal(run("wgrad", GEOMETRY, dy, x.contiguous(), w), dw)
    assert capture.CONVERSIONS == {
        "operand brought to an aligned address": 1,
        "operand brought to channels_last": 1,
        "residual brought to the format of y": 1,
    }


def test_an_unaligned_residual_is_read_rightly(host) -> None:
    x, w, dy = operands(GEOMETRY, torch.bfloat16)
    expected = run("fprop", GEOMETRY, x, x, w, None, None, dy)
    storage = torch.empty(dy.numel() + 1, dtype=dy.dtype)
    unaligned = torch.as_strided(storage, dy.shape, dy.stride(), 1).copy_(dy)
    assert torch.equal(run("fprop", GEOMETRY, x, x, w, None, None, unaligned), expected)


@pytest.mark.parametrize("verb", ["fprop", "dgrad", "wgrad"])
def test_an_empty_batch_and_two_runs(host, verb: str) -> None:
    for n in (0, 3):
        x, w, dy = operands(GEOMETRY, torch.bfloat16, n)
        first, second = (x, x) if verb == "fprop" else (dy, x)
        more = (None, None, None) if verb == "fprop" else ()
        found = [run(verb, GEOMETRY, first, second, w, *more) for _ in range(2)]
        assert torch.equal(*found)
        assert found[0].shape == {"fprop": dy, "dgrad": x, "wgrad": w}[verb].shape


def test_tables_are_made_once(host, monkeypatch: pytest.MonkeyPatch) -> None:
    support = hk.Support.het(16, 16, 3, p=4)
    geometry = make_geometry(support, 1, 1)
    x, w, _ = operands(geometry, torch.bfloat16)
    run("fprop", geometry, x, x, w, None, None, None)
    monkeypatch.setattr(choice, "choose_narrow", lambda *_: pytest.fail("lowered again"))
    monkeypatch.setattr(
        "hetconv_kernels.backends.cuda.calls.upload", lambda *_: pytest.fail("uploaded again")
    )
    run("fprop", geometry, x, x, w, None, None, None)


def test_a_launch_that_fails_raises(host) -> None:
    call = host.Narrow()
    with pytest.raises(BackendError, match="the numbers' size is not that of their type"):
        call.launch("bfloat16", 0, 0, 0, 0, 0, 0, 0)
    call.item, call.warps_m, call.warps_n = 2, 9, 1
    with pytest.raises(BackendError, match="a block has 1 to 8 warps"):
        call.launch("bfloat16", 0, 0, 0, 0, 0, 0, 0)
    with pytest.raises(ValueError, match="dtype 'int8'"):
        call.launch("int8", 0, 0, 0, 0, 0, 0, 0)
    call.warps_m, call.buffers, call.tma, call.class_count, call.blocks = 1, 1, 1, 1, 1
    with pytest.raises(BackendError, match="the driver refuses a tensor map"):
        call.launch("bfloat16", 0, 0, 0, 0, 0, 0, 0)


def test_nothing_is_made_ready_during_a_capture(host, monkeypatch: pytest.MonkeyPatch) -> None:
    geometry = make_geometry(hk.Support.het(16, 32, 3, p=8), 1, 1)
    problem = described(geometry=geometry)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(BackendError, match=r"while a CUDA graph is captured.*warmup\(model"):
        Cuda().fprop(problem)


@pytest.mark.parametrize("index", [0, 1])
def test_launches_go_to_the_current_stream_of_the_tensors_device(
    monkeypatch: pytest.MonkeyPatch, index: int
) -> None:
    entered: list[torch.device] = []

    @contextlib.contextmanager
    def device(entering: torch.device) -> Any:
        entered.append(entering)
        yield

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda d: SimpleNamespace(cuda_stream=100 + d.index)
    )
    with calls.current(torch.device("cuda", index)) as stream:
        assert stream == 100 + index
    assert entered == [torch.device("cuda", 1)] * index
