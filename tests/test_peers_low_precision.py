# SPDX-License-Identifier: Apache-2.0
"""The benchmark of whole networks in bfloat16 and int8: everybody is judged by one bound."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import gate, low_precision, peers, table
from benchmarks.cases import SupportSpec
from benchmarks.networks import NETWORKS, NetworkCase, build_network
from benchmarks.report import schema
from benchmarks.rig import OURS_FLOAT32
from benchmarks.test_models import _runs, measure_case

LOW = [case for case in NETWORKS if case.dtype != "float32" and case.n > 1]
SMALL = NetworkCase("small", "resnet20", SupportSpec("het", 2), n=2, size=16, dtype="int8")
DTYPES = ("bfloat16", "int8")


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def dense(x: torch.Tensor) -> torch.nn.Module:
    with torch.no_grad():
        return build_network(SMALL, "dense", x)


def test_targets_are_those_that_were_set() -> None:
    found = {c.name: (c.dtype, c.target_dense, c.target_composition) for c in LOW}
    assert found == {
        "resnet18-het4-int8": ("int8", 2.5, 1.5),
        "vgg16-het4-int8": ("int8", 2.6, 1.4),
        "vgg16-sg70-int8": ("int8", 2.2, 2.5),
        "resnet18-het4-bf16": ("bfloat16", 2.3, 1.4),
        "vgg16-het4-bf16": ("bfloat16", None, None),
        "vgg16-sg70-bf16": ("bfloat16", 2.4, 2.5),
    }
    assert {(case.n, case.size) for case in LOW} == {(8, 224)}


@pytest.mark.parametrize(
    ("dtype", "peer", "form"),
    [
        ("bfloat16", "eager", "dense"),
        ("bfloat16", "openvino", "composition"),
        ("int8", "onnxruntime", "dense"),
        ("int8", "openvino", "composition"),
        ("int8", "eager", "composition"),
    ],
)
def test_peers_compute_the_network_in_their_precision(
    dtype: str, peer: str, form: str, x: torch.Tensor, tmp_path: Path
) -> None:
    with torch.no_grad():
        network = build_network(SMALL, form, x)  # type: ignore[arg-type]
        try:
            run = low_precision.peers_of(dtype)[peer](copy.deepcopy(network), x, tmp_path)
        except peers.Absent as reason:
            pytest.skip(str(reason))
        found = run()
        assert gate.NetworkTruth(network, x).match(found, dtype).ok
        assert not gate.NetworkTruth(network, x).match(found.float()).ok, "that was float32"
        other = build_network(SMALL, "composition" if form == "dense" else "dense", x)
        assert not gate.NetworkTruth(other, x).match(found, dtype).ok


@pytest.mark.slow  # inductor compiles for minutes
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_compiled_peer_computes_in_its_precision(
    dtype: str, dense: torch.nn.Module, x: torch.Tensor, tmp_path: Path
) -> None:
    with torch.no_grad():
        found = low_precision.peers_of(dtype)["compiled"](copy.deepcopy(dense), x, tmp_path)()
        assert gate.NetworkTruth(dense, x).match(found, dtype).ok
        assert not gate.NetworkTruth(dense, x).match(found.float()).ok


def test_pytorchs_own_int8_fuses_convolution_sum_and_relu(
    dense: torch.nn.Module, x: torch.Tensor
) -> None:
    """The rival is the one its user would have: nothing is left in float between its layers."""
    from torch.ao.quantization.quantize_fx import convert_fx

    with torch.no_grad():
        prepared, patterns = low_precision._observed(copy.deepcopy(dense), x)
        network = convert_fx(prepared, backend_config=patterns)
    kinds = [type(module).__name__ for module in network.modules()]
    assert kinds.count("ConvAddReLU2d") == 9
    assert "ReLU" not in kinds
    assert not any(type(m) is torch.nn.Conv2d for m in network.modules())


def test_the_qdq_file_has_unsigned_activations_and_weights_per_filter(
    dense: torch.nn.Module, x: torch.Tensor, tmp_path: Path
) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    with torch.no_grad():
        path = low_precision.qdq_file(dense, x, tmp_path)
        assert low_precision.qdq_file(dense, x, tmp_path) == path
    graph = onnx.load(str(path)).graph
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    convs = [node for node in graph.node if node.op_type == "Conv"]
    assert len(convs) > 18
    for conv in convs:
        image, weight = (makers[name] for name in conv.input[:2])
        assert image.op_type == weight.op_type == "DequantizeLinear"
        assert values[image.input[2]].dtype == "uint8"
        assert values[weight.input[0]].dtype == "int8"
        assert values[weight.input[1]].shape == (values[weight.input[0]].shape[0],)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bound_refuses_what_is_not_the_network(
    dtype: str, dense: torch.nn.Module, x: torch.Tensor
) -> None:
    with torch.no_grad():
        exact = dense(x)
        assert gate.NetworkTruth(dense, x).match(exact, dtype).ok
        for wrong in (exact * 1.1, exact.flip(1), exact + exact.std(), exact * float("nan")):
            found = gate.NetworkTruth(dense, x).match(wrong, dtype)
            assert not found.ok
            assert found.worst > 1


def test_rounding_to_8_bits_leaves_the_network_alone(
    dense: torch.nn.Module, x: torch.Tensor
) -> None:
    with torch.no_grad():
        before = dense(x)
        rounded = gate.rounded_to_8_bits(dense)(x)
        assert torch.equal(dense(x), before)
    off = float((rounded - before).norm() / before.norm())
    assert 1e-4 < off < 0.1


def test_a_row_in_bfloat16_has_no_bound_but_our_own_float32(
    monkeypatch: pytest.MonkeyPatch, x: torch.Tensor, tmp_path: Path
) -> None:
    monkeypatch.setattr(low_precision, "BFLOAT16", {"eager": low_precision.eager_bfloat16})
    with torch.no_grad():
        row = measure_case(replace(SMALL, dtype="bfloat16"), x, tmp_path, 0.05)
    assert row["match"]["ok"]
    assert schema.problems(json.loads(json.dumps(row)), schema.MODEL_ROW) == []
    assert row["case"]["dtype"] == "bfloat16"
    assert row["float32"]["name"] == OURS_FLOAT32
    assert row["dense"]["name"].startswith("dense:")
    assert "bound" not in row
    assert table.model_table([row])[2].startswith("small")


def test_where_we_are_absent_the_row_says_so_and_has_no_times(
    monkeypatch: pytest.MonkeyPatch, x: torch.Tensor, tmp_path: Path
) -> None:
    def absent(*_: object) -> None:
        raise peers.Absent("no engine")

    monkeypatch.setattr(low_precision, "_ours_int8", absent)
    monkeypatch.setattr(low_precision, "INT8", {"eager": low_precision.fx_int8})
    with torch.no_grad():
        row = measure_case(SMALL, x, tmp_path, 0.05)
    assert row["absent"]["ours"] == {"int8": "no engine"}
    assert row["match"]["worst"] > 0, "the peers were not checked"
    assert "median_s" not in row
    assert schema.problems(json.loads(json.dumps(row)), schema.MODEL_ROW) == []
    assert "not timed" in table.model_table([row])[2]


def test_absent_libraries_are_named_in_every_precision(
    monkeypatch: pytest.MonkeyPatch, dense: torch.nn.Module, x: torch.Tensor, tmp_path: Path
) -> None:
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(low_precision.BFLOAT16, "compiled", low_precision.eager_bfloat16)
    monkeypatch.setattr(
        low_precision, "INT8", {k: v for k, v in low_precision.INT8.items() if k != "compiled"}
    )
    with torch.no_grad():
        runs, missing = _runs("dense", dense, x, tmp_path, "bfloat16")
        assert list(runs) == ["dense:eager", "dense:compiled"]
        assert missing == {"openvino": "openvino is not installed"}
        runs, missing = _runs("dense", dense, x, tmp_path, "int8")
        assert list(runs) == ["dense:eager"]
        assert missing["onnxruntime"] == "onnxruntime is not installed"
        assert missing["openvino"] == "openvino is not installed"
