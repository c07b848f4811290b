# SPDX-License-Identifier: Apache-2.0
"""What the demo shows, with rich and without."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hetconv_kernels.demo_report import DemoRow, TrainingBar, draw_photographs, remark, show
from hetconv_kernels.measure import tables

DENSE = DemoRow("dense", 30.0, 1000, 2_000_000_000, 0.4, (1.0, 1.0, 1.0), ("torch",), 0.0)
SPARSE = DemoRow("HetConv", 29.5, 333, 666_000_000, 0.5, (0.8, 0.75, 0.85), ("vendor",), 1e-7)
FAST = replace(SPARSE, seconds=0.2, speedup=(2.0, 1.9, 2.1), backends=("cpu", "vendor"))


@pytest.fixture(params=["plain", "rich"])
def style(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "rich" and importlib.util.find_spec("rich") is None:
        pytest.skip("rich is not installed")
    monkeypatch.setattr(tables, "has_rich", lambda: request.param == "rich")
    monkeypatch.setenv("COLUMNS", "160")
    return request.param


@pytest.mark.usefixtures("style")
def test_table_shows_a_slower_result_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    show([DENSE, SPARSE], 20.2)
    printed = capsys.readouterr().out
    noisy, dense, sparse = (
        next(line for line in printed.splitlines() if word in line)
        for word in ("noisy", "dense", "HetConv")
    )
    assert "20.20" in noisy
    for cell in ("30.00", "1,000", "2 G", "400.0", "torch"):
        assert cell in dense
    for cell in ("29.50", "333", "0.666 G", "500.0", "0.80× [0.75, 0.85]", "vendor"):
        assert cell in sparse


@pytest.mark.usefixtures("style")
def test_progress_reaches_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    with TrainingBar(30) as progress:
        for name in ("first", "second"):
            step = progress.stage(name)
            for _ in range(15):
                step(0.125)
    printed = capsys.readouterr().out
    assert "second" in printed
    assert "0.12500" in printed
    assert "100 %" in printed or "30/30" in printed


def test_plain_progress_prints_at_most_twenty_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "has_rich", lambda: False)
    with TrainingBar(1000) as progress:
        step = progress.stage("only")
        for _ in range(1000):
            step(1.0)
    assert capsys.readouterr().out.count("\n") == 20


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        ([DENSE, SPARSE], "`vendor` ran HetConv:"),
        ([DENSE, SPARSE, replace(SPARSE, name="other")], "`vendor` ran HetConv and other:"),
        ([DENSE, FAST], "`vendor` ran part of HetConv:"),
        ([DENSE, replace(FAST, backends=("cpu",))], None),
    ],
    ids=["vendor", "vendor twice", "partly", "another backend"],
)
def test_remark_names_what_vendor_ran(rows: list[DemoRow], named: str | None) -> None:
    text = remark(rows)
    assert ("no speed-up is to be expected" in text) == (named is not None)
    assert named is None or named in text


def test_picture_has_a_panel_for_each_image(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from PIL import Image

    truth = torch.rand(1, 30, 40, generator=torch.Generator().manual_seed(0))
    draw_photographs(tmp_path / "two.png", truth, truth, 20.0, {DENSE: truth, SPARSE: truth})
    draw_photographs(tmp_path / "one.png", truth, truth, 20.0, {DENSE: truth})
    two, one = (Image.open(tmp_path / f"{name}.png").size for name in ("two", "one"))
    assert two[0] * 3 == one[0] * 4
    assert two[1] == one[1]
