# SPDX-License-Identifier: Apache-2.0
"""Constants of the predictions for a GPU: fitted to what was measured, and kept as data."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pretending import CUDA, Pretend, described, pretended

import hetconv_kernels as hk
from benchmarks import calibrate, calibrate_gpu
from benchmarks.calibrate_gpu import Measured, fit_shares, judge_auto, vendor_seconds
from hetconv_kernels.backends.cuda import Cuda, choice
from hetconv_kernels.backends.gpu import constants, devices
from hetconv_kernels.backends.triton import Triton
from hetconv_kernels.backends.vendor import Vendor

SPEC = devices.GPU_SPECS[9, 0]
NOMINAL = constants.constants_of()
on_gpu = pytest.fixture(pretended)


def rows(vendor: float, ours: float, count: int = 12) -> list[Measured]:
    """Makes rows of a GPU whose shares are known; every third one is off by half."""
    found = []
    for place in range(count):
        support = hk.Support.het(64 * (1 + place % 4), 128, 3, p=2)
        problem = dataclasses.replace(described("fprop", support, batch=4 + place), device=CUDA)
        truth = vendor_seconds(
            Measured(problem, 1.0, {}, {}), SPEC, NOMINAL._replace(vendor=vendor)
        )
        off = 1.5 if place % 3 == 2 else 1.0
        predicted = 1e-5 * (place + 1)
        found.append(
            Measured(problem, truth, {"cuda": off * predicted / ours}, {"cuda": predicted})
        )
    return found


@pytest.mark.parametrize(("vendor", "ours"), [(0.3, 0.5), (0.45, 0.9), (0.7, 0.62)])
def test_the_shares_that_a_gpu_has_are_found(vendor: float, ours: float) -> None:
    entry = fit_shares(rows(vendor, ours), SPEC, NOMINAL)
    assert entry.vendor == pytest.approx(vendor, abs=0.006)
    assert entry.ours["cuda"] == pytest.approx(ours, abs=0.002)
    assert entry.ours["triton"] == NOMINAL.ours["triton"]  # it has no rows
    assert (entry.measured, entry.rows) == (True, 12)


@pytest.mark.parametrize("launch", [2e-6, 9.5e-6])
def test_a_launch_is_found_where_single_images_were_measured(launch: float) -> None:
    truth = NOMINAL._replace(vendor=0.35, launch=launch)
    found = []
    for place in range(16):
        support = hk.Support.het(64 * (1 + place % 4), 128, 3, p=2)
        problem = described("fprop", support, batch=1 if place < 5 else 8 * place)
        problem = dataclasses.replace(problem, device=CUDA)
        row = Measured(problem, 1.0, {}, {})
        found.append(row._replace(vendor=vendor_seconds(row, SPEC, truth)))
    entry = fit_shares(found, SPEC, NOMINAL)
    assert entry.launch == pytest.approx(launch, abs=2e-7)
    assert entry.vendor == pytest.approx(0.35, abs=0.011)
    # Two of them are too few to tell.
    assert fit_shares(found[3:], SPEC, NOMINAL).launch == NOMINAL.launch


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="5 rows were measured, and a fit needs 8: run make gpu"):
        fit_shares(rows(0.5, 0.5, 5), SPEC, NOMINAL)


def test_a_fit_picks_the_faster_one_where_the_nominal_constants_do_not() -> None:
    """CuDNN is at a quarter of its peak, we at nine tenths of what we predict."""
    problem = rows(0.25, 0.9, 1)[0].problem
    slow = vendor_seconds(Measured(problem, 1, {}, {}), SPEC, NOMINAL._replace(vendor=0.25))
    # Ours takes two thirds of that; by the nominal constants it would be slower.
    row = Measured(problem, slow, {"cuda": slow / 1.5}, {"cuda": 0.9 * slow / 1.5})
    nominal, found = (judge_auto([row], SPEC, one) for one in (
        NOMINAL, fit_shares([row] * 8, SPEC, NOMINAL)
    ))  # fmt: skip
    assert nominal["right_within_5_percent"] == 0
    assert nominal["worst_cost"] == pytest.approx(1.5)
    assert found == {"cases": 1, "right_within_5_percent": 1, "worst_cost": 1.0}


def test_an_entry_is_used_on_its_gpu_and_on_no_other(
    on_gpu: Pretend, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    on_gpu()
    path = tmp_path / "constants.json"
    calibrate_gpu.write(
        NOMINAL._replace(measured=True, ours={"cuda": 0.3, "triton": 0.4}), "A", path
    )
    calibrate_gpu.write(NOMINAL._replace(measured=True), "B", path)
    monkeypatch.setattr(constants, "constant_entries", lambda: json.loads(path.read_text()))
    assert set(constants.constant_entries()["devices"]) == {"A", "B"}
    problem = dataclasses.replace(described("fprop"), device=CUDA)
    monkeypatch.setattr(choice, "best", lambda _: SimpleNamespace(seconds=3e-5))
    for name, seconds, is_measured in (("A", 1e-4, True), ("C", 3e-5 / 0.75, False)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_, name=name: name)
        assert Cuda().estimate(problem) == pytest.approx(seconds)
        assert Cuda().measured(problem) == Triton().measured(problem) == is_measured


def test_nothing_was_measured_yet() -> None:
    """The committed file says so; a session on a GPU changes it, and this test."""
    assert constants.constant_entries()["devices"] == {}
    assert not NOMINAL.measured
    assert NOMINAL.rows == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_fitted(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out.json"
    assert calibrate.main(["--device", "cuda", "--out", str(out)]) == 2
    assert "finds no CUDA device" in capsys.readouterr().out
    assert not out.exists()


# Predictions --------------------------------------------------------------------------------------


def seconds(batch: int, **changes: Any) -> float:
    problem = dataclasses.replace(described("fprop", batch=batch), device=CUDA)
    return Vendor().estimate(dataclasses.replace(problem, **changes))


def test_a_small_batch_of_cudnn_is_bound_by_a_tile_and_not_by_its_products() -> None:
    one, two, many = (seconds(batch) - NOMINAL.launch - NOMINAL.latency for batch in (1, 2, 128))
    products = described("fprop", batch=1).dense_macs / (
        SPEC.processors * SPEC.clock * SPEC.rate * NOMINAL.vendor
    )
    assert one > 1.5 * products
    assert two < 1.7 * one  # the same rounds hold more tiles
    assert many == pytest.approx(128 * products, rel=0.15)


@pytest.mark.parametrize("verb", ["fprop", "dgrad", "wgrad"])
def test_every_verb_has_a_prediction_that_grows_with_the_batch(verb: str) -> None:
    few, many = (
        Vendor().estimate(dataclasses.replace(described(verb, batch=batch), device=CUDA))
        for batch in (1, 64)
    )
    assert 0 < few < many


def test_memory_is_as_fast_as_the_device_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """An H200 and an H100 have one capability, and different memories."""
    found = {}
    for name, kilohertz, bits in (("H100", 2619000, 5120), ("H200", 3201000, 6144), ("old", 0, 0)):
        properties = SimpleNamespace(
            multi_processor_count=132, memory_clock_rate=kilohertz, memory_bus_width=bits
        )
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_, p=properties: p)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
        devices._spec_of.cache_clear()
        found[name] = devices._spec_of(0).bandwidth
    devices._spec_of.cache_clear()
    assert found["H100"] == pytest.approx(3.0e12, rel=0.02)
    assert found["H200"] == pytest.approx(4.4e12, rel=0.02)
    assert found["old"] == SPEC.bandwidth
