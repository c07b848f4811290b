# SPDX-License-Identifier: Apache-2.0
"""Timelines of a profile for other tools: traces, pages of bars, and Proton."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from profiled import small
from torch import nn

from hetconv_kernels.errors import HetconvError
from hetconv_kernels.measure import profiling
from hetconv_kernels.measure.profiling import flame, timeline


def test_a_trace_has_layers_and_primitives(tmp_path: Path) -> None:
    path = profiling.write_trace(small(), torch.randn(2, 3, 6, 6), tmp_path / "a" / "t.json")
    events = json.loads(path.read_text())["traceEvents"]
    names = [event.get("name", "") for event in events if event.get("ph") == "X"]
    assert sum(name.startswith("hetconv.fprop reference 2x8x6x6") for name in names) == 3
    assert {"0", "3", "5", "7"} <= set(names)
    (tmp_path / "file").write_text("")
    with pytest.raises(HetconvError, match="cannot be written"):
        profiling.write_trace(small(), torch.randn(2, 3, 6, 6), tmp_path / "file" / "t.json")


def test_a_timeline_is_one_page_with_layers_primitives_and_operators(tmp_path: Path) -> None:
    path = profiling.write_timeline(small(), torch.randn(2, 3, 6, 6), tmp_path / "a" / "t.html")
    text = path.read_text()
    for said in (
        "Sequential on (2, 3, 6, 6)", "<title>3: ", "fprop reference 2x8x6x6", "aten::",
        "Where the time is", "default-src 'none'",
    ):  # fmt: skip
        assert said in text
    assert not re.search(r"(?:src|href)=", text), "nothing is loaded"
    assert "<script" not in text
    (tmp_path / "file").write_text("")
    with pytest.raises(HetconvError, match="cannot be written"):
        profiling.write_timeline(small(), torch.randn(2, 3, 6, 6), tmp_path / "file" / "t.html")


def test_bars_stand_where_they_ran_and_their_names_are_text() -> None:
    whole = flame.Bar("the whole", "operator", 0.0, 1200.0, 0.0, 0)
    bars = [
        flame.Bar("<b>", "layer", 100.0, 600.0, 200.0, 1),
        flame.Bar("fprop cpu", "primitive", 200.0, 400.0, 400.0, 2),
        flame.Bar("short", "operator", 900.0, 0.1, 0.1, 1),
    ]
    text = flame.page("Net", "(1, 3)", [whole, *bars])
    assert 'x="100.0" y="24" width="600.0"' in text
    assert 'x="200.0" y="48" width="400.0"' in text
    assert "&lt;b&gt;: 600.0 µs, 200.0 µs of its own" in text
    assert "<b>" not in text
    assert "1 bars are too short" in text
    assert "short</text>" not in text
    assert re.search(
        r"fprop cpu</td><td>primitive</td><td class=\"number\">400.0</td>.*33.3%", text
    )
    assert re.search(r"between them</td><td></td><td class=\"number\">599.9</td>", text)


def test_proton_is_refused_where_it_cannot_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    x = torch.randn(2, 3, 6, 6)
    if timeline.importlib.util.find_spec("triton") is not None:
        with pytest.raises(HetconvError, match="on cpu: expected a CUDA device"):
            profiling.write_proton(small(), x, tmp_path / "p")
    monkeypatch.setattr(timeline.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(HetconvError, match=r"pip install 'hetconv-kernels\[triton\]'"):
        profiling.write_proton(small(), x, tmp_path / "p")


def test_proton_is_started_around_the_passes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The calls to proton, without a GPU: an example that says it is on one."""
    said: list[Any] = []
    proton: Any = ModuleType("triton.profiler")
    proton.start = lambda name, **more: said.append((name, more["hook"])) or 7
    proton.finalize = said.append
    proton.scope = lambda name: torch.autograd.profiler.record_function(name)
    triton = ModuleType("triton")
    triton.profiler = proton  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "triton", triton)
    monkeypatch.setitem(sys.modules, "triton.profiler", proton)
    monkeypatch.setattr(timeline.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(timeline, "run_passes", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    class OnGpu(torch.Tensor):
        is_cuda = True

    x = torch.randn(2, 3, 6, 6).as_subclass(OnGpu)
    path = profiling.write_proton(nn.ReLU(), x, tmp_path / "p.hatchet")
    assert path == tmp_path / "p.hatchet"
    assert said == [(str(tmp_path / "p"), "triton"), 7]
