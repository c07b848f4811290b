# SPDX-License-Identifier: Apache-2.0
"""The benchmark of whole networks: everybody computes the same, who is absent is named."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from benchmarks import amdahl, gate, peers, record, table
from benchmarks.cases import SupportSpec
from benchmarks.networks import NETWORKS, NetworkCase, build_network
from benchmarks.report import schema
from benchmarks.test_models import _runs, layer_names, measure_case
from hetconv_kernels import export
from hetconv_kernels.measure.timing import Timings

pytestmark = pytest.mark.one_thread

SMALL = NetworkCase("small", "resnet20", SupportSpec("het", 2), n=2, size=16, target_dense=2.0)


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_cases_name_the_papers_networks() -> None:
    names = [case.name for case in NETWORKS]
    assert names[:3] == ["vgg16-het4", "resnet18-het4", "vgg16-sg70"]
    assert names[3:6] == ["resnet50-het4", "densenet121-het4", "dncnn-het4"]
    assert {(case.n, case.size) for case in NETWORKS[:5]} == {(8, 224)}


@pytest.mark.parametrize("case", NETWORKS[3:6], ids=lambda case: case.name)
def test_no_layer_of_ours_is_left_in_a_composition(case: NetworkCase) -> None:
    image = torch.randn(2, case.channels, 32, 32)
    with torch.no_grad():
        ours = build_network(case, "ours", image)
        composition = export.plain(ours, "composition")  # as build_network makes it, but once
        assert gate.NetworkTruth(ours, image).match(composition(image)).ok
    assert export.support_layers(composition) == []
    assert len(export.support_layers(ours)) > 10


@pytest.mark.parametrize("kind", ["het", "self_group"])
def test_a_composition_computes_what_ours_computes(kind: str, x: torch.Tensor) -> None:
    if kind == "self_group":
        pytest.importorskip("sklearn", reason="no Support of this size is committed")
    case = NetworkCase("c", "resnet20", SupportSpec(kind, {"het": 2, "self_group": 10}[kind]))
    with torch.no_grad():
        ours, composition, dense = (
            build_network(case, f, x) for f in ("ours", "composition", "dense")
        )
        assert gate.NetworkTruth(ours, x).match(composition(x)).ok
        assert not gate.NetworkTruth(ours, x).match(dense(x)).ok
    assert export.support_layers(composition) == export.support_layers(dense) == []


def test_who_is_left_out_of_a_quick_run_is_absent_with_the_reason(
    x: torch.Tensor, tmp_path
) -> None:
    left_out = {"compiled": "slow", "onnxruntime": "not now", "openvino": "not now"}
    with torch.no_grad():
        module = torch.nn.Conv2d(3, 4, 3).eval()
        runs, absent = _runs("dense", module, x, tmp_path, skipped=left_out)
    assert absent == left_out
    assert list(runs) == ["dense:eager"]


@pytest.mark.parametrize("peer", ["eager", "onnxruntime", "openvino"])
def test_peers_compute_the_network(peer: str, x: torch.Tensor, tmp_path) -> None:
    with torch.no_grad():
        dense = build_network(SMALL, "dense", x)
        try:
            run = peers.PEERS[peer](copy.deepcopy(dense), x, tmp_path)
        except peers.Absent as reason:
            pytest.skip(str(reason))
        assert gate.NetworkTruth(dense, x).match(run()).ok
        assert not gate.NetworkTruth(dense, x).match(run() + 1e-3).ok


def test_an_absent_peer_is_named(monkeypatch, x: torch.Tensor, tmp_path) -> None:
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(peers.PEERS, "compiled", peers.eager)
    runs, absent = _runs("dense", torch.nn.ReLU(), x, tmp_path)
    assert list(runs) == ["dense:eager", "dense:compiled"]
    assert absent["openvino"] == "openvino is not installed"


def test_row_and_table(monkeypatch, x: torch.Tensor, tmp_path) -> None:
    monkeypatch.setattr(peers, "PEERS", {"eager": peers.eager})
    with torch.no_grad():
        row = measure_case(SMALL, x, tmp_path, 0.05)
    assert schema.problems(json.loads(json.dumps(row)), schema.MODEL_ROW) == []
    assert row["match"]["ok"]
    assert len(row["layers"]) == 19
    header, _, line = table.model_table([row])
    assert header.startswith("network")
    assert line.startswith("small")


def test_pytest_benchmark_collects_a_network(
    request: pytest.FixtureRequest, monkeypatch, x: torch.Tensor, tmp_path
) -> None:
    pytest.importorskip("pytest_benchmark", reason="the collector is not installed")
    benchmark = request.getfixturevalue("benchmark")
    monkeypatch.setattr(peers, "PEERS", {"eager": peers.eager})
    with torch.no_grad():
        row = measure_case(SMALL, x, tmp_path, 0.05, benchmark)
    samples = row["timings"]["dense"]["variants"]["ours"]["samples_s"]
    assert benchmark.stats.stats.rounds == len(samples) >= 6


def test_the_row_has_amdahls_bound() -> None:
    """Eager takes 10 s in turns with the best dense form, which takes 8 s; by hooks, 20 s."""
    medians = {"dense:eager": 10.0, "dense:compiled": 8.0, "ours": 4.0}
    rivals = {"composition:eager": 5.0, "ours": 4.0}
    timings = {}
    for role, found in (("dense", medians), ("composition", rivals)):
        samples = {name: (time,) * 6 for name, time in found.items()}
        timings[role] = Timings(f"{role}:eager", samples, dict.fromkeys(samples, 1))
    runs = (
        [amdahl.TimedRun(20.0, {"a": 12.0, "b": 4.0})],
        [amdahl.TimedRun(9.0, {"a": 4.0, "b": 2.0})],
    )
    match = gate.Agreement(True, 0.1, 0.0)
    row = record.model_row(SMALL, match, {}, timings, runs, {"a": 3.0, "b": 2.0})
    assert row["bound"] == {
        "total_s": 20.0, "layers_s": 16.0, "rest_s": 4.0, "speedup": 2.0, "our_layers_s": 6.0,
        "over_best": 1.6,
    }  # fmt: skip
    assert row["layers"] == {"a": [12.0, 4.0, 3.0], "b": [4.0, 2.0, 2.0]}
    assert row["dense"]["ratio"] == 2.0
    assert schema.problems(row["bound"], schema.MODEL_ROW["properties"]["bound"]) == []
    assert "1.60" in table.model_table([row])[2]


def test_a_row_without_a_match_was_not_timed() -> None:
    row = record.model_row(
        SMALL, gate.Agreement(False, 3.0, 1.0), {"dense": {"openvino": "absent"}}
    )
    assert "MISMATCH" in table.model_table([row])[2]
    assert "openvino" in table.model_table([row])[2]
    assert "median_s" not in row


def test_layers_are_those_that_change(x: torch.Tensor) -> None:
    with torch.no_grad():
        ours, dense = build_network(SMALL, "ours", x), build_network(SMALL, "dense", x)
        names = layer_names(ours)
        ratios = amdahl.layer_mac_ratios(dense, ours, x, names)
    assert names == layer_names(dense)
    # The classifier is so small that it is left plain where that is predicted to be faster.
    assert names == [name for name in export.support_layers(ours) if name != "fc"]
    assert ratios.pop("conv1") == 1
    assert list(ratios.values()) == pytest.approx([9 / 5] * 18)  # p = 2
