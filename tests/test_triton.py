# SPDX-License-Identifier: Apache-2.0
"""The Triton engine without a GPU: absence, refusals, tables, launches; starts the interpreter."""

from __future__ import annotations

import dataclasses
import doctest
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fresh
import numpy as np
import pytest
import torch
from pretending import CUDA, described, pretended

import hetconv_kernels as hk
from hetconv_kernels.backends.gpu import axes, capture
from hetconv_kernels.backends.triton import (
    Triton,
    borders,
    lowering,
    wgrad_choice,
    wgrad_lowering,
    words,
)
from hetconv_kernels.errors import BackendError
from hetconv_kernels.problem import make_geometry

ROOT = Path(__file__).resolve().parents[1]
INTERPRETED = sorted((ROOT / "tests" / "interpreted").glob("test_*.py"))
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


# The interpreter ----------------------------------------------------------------------------------


@needs_triton
def test_in_the_interpreter(request: pytest.FixtureRequest) -> None:
    """Runs tests/interpreted, where Triton's interpreter stands in for the GPU."""
    day = request.config.getoption("--triton-sample")
    sample = [] if day is None else [f"--triton-sample={day}"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *sample, "tests/interpreted"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert re.search(r"\d+ passed", done.stdout), done.stdout
    assert "skipped" not in done.stdout
    # Each file's line of dots; a sample leaves some of every file.
    assert all(path.name in done.stdout for path in INTERPRETED), done.stdout


# Absence and refusals -----------------------------------------------------------------------------


def test_without_triton_the_engine_is_absent_and_says_how_to_get_it() -> None:
    code = (
        "import sys, importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'triton' else find(name, *rest)\n"
        "import hetconv_kernels as hk\n"
        "print(hk.available_backends())\n"
        "hk.use_backend('triton')"
    )
    done = fresh.python(code)
    assert "triton" not in done.stdout
    assert "BackendError" in done.stderr
    assert "pip install 'hetconv-kernels[triton]'" in done.stderr


@needs_triton
def test_choosing_on_a_cpu_does_not_import_triton() -> None:
    code = (
        "import sys, torch, hetconv_kernels as hk\n"
        "before = 'triton' in sys.modules\n"
        "hk.nn.HetConv2d(4, 4, 3)(torch.randn(1, 4, 5, 5))\n"
        "print(hk.available_backends(), before or 'triton' not in sys.modules)"
    )
    done = fresh.python(code, environment={"HETCONV_BACKEND": "auto"})
    assert "'triton'" in done.stdout
    assert done.stdout.strip().endswith("True")


@needs_triton
def test_cpu_tensors_are_refused_by_name() -> None:
    with pytest.raises(BackendError, match="tensors are on cpu, not on an NVIDIA GPU"):
        hk.functional.support_conv2d(
            torch.randn(1, 4, 5, 5), torch.randn(4, 4, 3, 3), hk.Support.dense(4, 4, 3),
            backend="triton",
        )  # fmt: skip


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Lets problems claim to be on a GPU of some capability."""
    yield from pretended(monkeypatch)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": torch.float64}, "float64 has no matrix instructions"),
        ({"batch": 2**22}, "more than 2\\*\\*31"),
        ({"device": torch.device("meta")}, "not on an NVIDIA GPU"),
    ],
    ids=["dtype", "pixels", "device"],
)
def test_problems_beyond_the_engine_are_refused(on_gpu, changes: Any, words: str) -> None:
    on_gpu()
    reasons = Triton().unsupported_reasons(described(**{"device": CUDA, **changes}))
    assert any(re.search(words, reason) for reason in reasons)


@pytest.mark.parametrize(
    ("stride", "pads", "dilation", "words"),
    [
        ((300, 300), 1, 1, "more than 65535 residue classes"),
        (1, (2**31 - 1, 2**31 - 1, 0, 2), (2**30, 1), "beyond 32-bit places"),
        ((2**31 - 1, 1), 1, 1, "beyond 32-bit places"),
    ],
    ids=["classes", "reach", "stride"],
)
def test_geometries_beyond_the_kernels_integers_are_refused(
    on_gpu, stride: Any, pads: Any, dilation: Any, words: str
) -> None:
    on_gpu()
    geometry = make_geometry(hk.Support.dense(8, 8, 3), stride, pads, dilation)
    p = dataclasses.replace(described("dgrad", device=CUDA), geometry=geometry)
    reasons = Triton().unsupported_reasons(p)
    assert any(words in reason for reason in reasons), reasons


@pytest.mark.parametrize(("capability", "refused"), [((7, 5), True), ((8, 0), False)])
def test_old_parts_are_refused(on_gpu, capability: tuple[int, int], refused: bool) -> None:
    on_gpu(capability)
    reasons = Triton().unsupported_reasons(described(device=CUDA))
    assert bool(reasons) == refused
    assert not refused or "Compute capability 7.5 is below 8.0" in reasons[0]


def test_a_table_is_not_made_during_a_capture(on_gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(BackendError, match=r"while a CUDA graph is captured.*warmup\(model"):
        capture.upload(np.zeros(3, np.int32), CUDA)


# Lowering -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [1, 2, 3, 5])
@pytest.mark.parametrize("dilation", [1, 2, 3, 4])
@pytest.mark.parametrize("taps", [1, 2, 3, 5, 7])
def test_residue_classes_share_out_the_taps(taps: int, stride: int, dilation: int) -> None:
    classes = axes.residues(taps, stride, dilation)
    assert sorted(k for c in classes for k in c.taps) == list(range(taps))
    for r, residue in enumerate(classes):
        for i, k in enumerate(residue.taps):
            # q = stride * p + r meets dy row p - (offset + i * step) at tap k.
            assert (k * dilation - r) == stride * (residue.offset + i * residue.step)


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("pads", [(0, 0), (1, 2), (5, 0)])
def test_the_classes_of_dgrad_write_every_pixel_once(stride: int, pads: tuple[int, int]) -> None:
    geometry = make_geometry(hk.Support.dense(1, 1, 3), stride, (*pads, 0, 0), 1)
    rows = [rows for rows, _ in axes.dgrad_axes(geometry, (11, 11))][::stride]
    written = sorted(axis.first + i * axis.store for axis in rows for i in range(axis.pixels))
    assert written == list(range(11))
    for axis in rows:
        for i in range(axis.pixels):
            for k in range(axis.taps):
                source = axis.base + i * axis.load + k * axis.tap
                taps = axes.residues(3, stride, 1)
                tap = taps[rows.index(axis)].taps[k]
                assert source * stride + tap - pads[0] == axis.first + i * axis.store


def test_a_step_word_refuses_what_it_cannot_hold() -> None:
    block, row, col = (np.array(v) for v in ([0, 2**21 - 1], [31, 0], [0, 31]))
    slabs = np.array([0, 2**31 - 1])
    packed = words.step_words(block, row, col)
    assert packed.dtype == np.int32
    assert packed.min() >= 0, "the sign would fill the upper half of a word of boxes"
    boxes = words.box_words(packed, slabs)
    np.testing.assert_array_equal(boxes.astype(np.int32), packed)
    np.testing.assert_array_equal(boxes >> 32, slabs)
    for both in (packed, boxes):
        np.testing.assert_array_equal(words.tap_rows(both), row)
        np.testing.assert_array_equal(words.tap_cols(both), col)
    np.testing.assert_array_equal(packed >> 10, block)
    for place, name in enumerate(("channel block", "tap row", "tap column")):
        for wrong in (-1, 2**21):
            numbers = [np.array([0]), np.array([0]), np.array([0])]
            numbers[place] = np.array([wrong])
            with pytest.raises(BackendError, match=f"{name} of a step.*expected 0 to"):
                words.step_words(*numbers)


@pytest.mark.parametrize("verb", ["fprop", "dgrad"])
@pytest.mark.parametrize("form", ["contiguous", "channels_last", "live"])
def test_every_live_weight_is_packed_once(verb: str, form: str) -> None:
    s = hk.Support.het(20, 24, 3, p=3, order="interleaved")
    classes = axes.dgrad_classes(make_geometry(s, 2, 1)) if verb == "dgrad" else None
    found = lowering.Lowering(s, 16, 16, classes=classes).source(form)
    places = np.sort(found[found >= 0])
    mask = torch.tensor(s.mask)
    if form == "live":
        expected = np.arange(s.live)
    else:
        laid = mask.permute(0, 2, 3, 1) if form == "channels_last" else mask
        expected = np.flatnonzero(laid.contiguous().numpy())
    np.testing.assert_array_equal(places, expected)


@pytest.mark.parametrize("order", ["blocked", "interleaved"])
@pytest.mark.parametrize("form", ["contiguous", "channels_last", "live"])
def test_every_live_weight_has_one_gradient(form: str, order: str) -> None:
    s = hk.Support.het(20, 24, 3, p=3, order=order)
    blocks = lowering.Block(16, 16, align=16), lowering.Block(32, 16, align=16)
    lowered = wgrad_lowering.WgradLowering(s, *blocks, reorder=order == "interleaved")
    assert [p.taps for p in lowered.parts] == [3, 1]
    assert (lowered.channels is None) == (order == "blocked")
    places = lowered.places(form)
    known = places[places >= 0]
    assert len(known) == len(set(known.tolist())) == s.live


def test_a_choice_for_wgrad_works_out_no_places(on_gpu) -> None:
    on_gpu()
    s = hk.Support.het(136, 104, 3, p=4)
    found = wgrad_choice.wgrad_choices(described("wgrad", s, device=CUDA))
    plans = [jobs.plan for each in found for jobs in each.lowering.parts]
    assert len(plans) > 10
    assert not any("slab_source" in vars(plan) for plan in plans)
    jobs = found[0].lowering.parts[0]
    assert found[0].lowering.places("live").max() < found[0].lowering.size
    assert "slab_source" in vars(jobs.plan)


def test_docstring_examples_run() -> None:
    for module in (axes, borders, words):
        outcome = doctest.testmod(module)
        assert outcome.attempted > 0
        assert outcome.failed == 0


@needs_triton
def test_the_kernels_read_the_fields_that_the_host_fills() -> None:
    from hetconv_kernels.backends.triton import fields, geometry

    for prefix, names in (("", geometry.GATHER_FIELDS), ("WGRAD_", geometry.WGRAD_FIELDS)):
        places = [getattr(fields, prefix + name.upper()).value for name in names]
        assert places == [*range(len(names))]
    assert len(geometry.GATHER_FIELDS) == fields.CLASS_FIELDS.value


# Launches -----------------------------------------------------------------------------------------


class FakeKernel:
    """Stands in for a ``triton.jit`` function, and for what it compiles to."""

    def __init__(self) -> None:
        self.compiled: list[tuple[Any, ...]] = []
        self.started: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def jit(*arguments: Any, num_warps: int, num_stages: int, enable_fp_fusion: bool) -> Any:
            self.compiled.append((grid, *arguments, num_warps, num_stages))
            return {grid: lambda *again: self.started.append(again)}

        return jit


def test_a_launch_compiles_once_for_each_alignment(monkeypatch: pytest.MonkeyPatch) -> None:
    from hetconv_kernels.backends.triton import launch

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    capture = {"on": False}
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capture["on"])
    kernel = FakeKernel()
    start = launch.Launch(kernel, (3,), (64, True), 4, 3, CUDA, fixed={2: 5})
    storage = torch.empty(64)
    whole, odd = storage[:32], storage[1:33]
    assert whole.data_ptr() % 16 == 0
    for argument in (whole, whole, odd, whole, odd):
        start(argument, None)
    assert [entry[1].data_ptr() for entry in kernel.compiled] == [whole.data_ptr(), odd.data_ptr()]
    assert kernel.compiled[0][0] == (3, 1, 1)
    assert kernel.compiled[0][2:] == (None, 5, 64, True, 4, 3)
    assert len(kernel.started) == 3
    assert kernel.started[0][1:] == (None, 5, 64, True)
    capture["on"] = True
    start(whole, None)
    with pytest.raises(BackendError, match="while a CUDA graph is captured"):
        start(whole.double(), None)
