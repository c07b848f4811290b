# SPDX-License-Identifier: Apache-2.0
"""`make gpu` without a GPU: its flow, its launches and captures, and all that it compiles."""

from __future__ import annotations

import importlib.util
import json
import os
import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rehearsal import Rehearsal, check_descriptor, rehearsal

from benchmarks import bench, gate, primitives, tune
from benchmarks.cases import GPU_CASES, Case, het_case
from benchmarks.record import Record
from hetconv_kernels.measure.roofline import Roofs

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: nothing to rehearse"),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"
    ),
]
EVERYTHING = os.environ.get("HETCONV_AOT_ALL") == "1"
all_of_it = pytest.mark.skipif(not EVERYTHING, reason="part of `make aot`: it compiles a minute")
BY_NAME = {case.name: case for case in GPU_CASES}
FEW = [
    (BY_NAME["gpu-r50-conv5-128-het4"], verb) for verb in ("fprop", "dgrad", "wgrad", "step")
] + [(BY_NAME["gpu-r50-conv5-128-sg70"], "fprop")]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A rehearsed Hopper, on which results are taken to be right and gradients of rivals made."""

    def backward(verb: str, x: Any, dy: Any, w: Any, *_: Any) -> tuple[torch.Tensor, ...]:
        made = {"dgrad": (x,), "wgrad": (w,), "step": (x, w)}[verb]
        return tuple(torch.empty_like(t) for t in made)

    def check(self: bench.Bench, verb: str, name: str) -> gate.Agreement:
        self.variants[verb][name][0]()
        return gate.Agreement(True, 0.5, 0.0)

    roofs = Roofs(4e14, 3e12, "cuda", "bfloat16")
    monkeypatch.setattr(bench.Bench, "_backward", staticmethod(backward))
    monkeypatch.setattr(bench.Bench, "check", check)
    monkeypatch.setattr(primitives, "measure_roofs", lambda *_: roofs)
    with rehearsal(monkeypatch) as made:
        yield made


def test_the_table_of_make_gpu(tmp_path: Path, gpu: Rehearsal, capsys) -> None:  # type: ignore[no-untyped-def]
    """Every row is described, compiled, started, captured and written, in the real order."""
    wanted = primitives.rows_of(full=False) if EVERYTHING else FEW
    assert primitives.run_rows(Record(tmp_path, "p"), wanted, "triton", 1.5) == 0
    rows = json.loads((tmp_path / "p.json").read_text())["rows"]
    assert [(row["case"]["name"], row["verb"]) for row in rows] == [(c.name, v) for c, v in wanted]
    assert all(row["backend"]["ran"] == "triton" and row["median_s"] > 0 for row in rows)
    names = Counter(name for name, _ in gpu.compiled)
    assert min(names["fprop_kernel_tma"], names["wgrad_kernel_tma"]) > 0
    assert all(shared <= 227 * 1024 for _, shared in gpu.compiled)
    # A kernel that was met is not compiled again, and every variant is captured by itself and again
    # with the others.
    assert gpu.started > 3 * len(gpu.compiled)
    variants = [name for row in rows for name in row["timings"]["variants"]]
    assert {"ours", "dense", "composition"} <= set(variants)
    assert gpu.captures == 2 * len(variants)
    with capsys.disabled():
        print(f"\n{len(gpu.compiled)} kernels for {len(rows)} rows: {dict(names)}")


def test_tuning_runs_every_choice(gpu: Rehearsal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "normal_", lambda self: self)
    most = 8 if EVERYTHING else 1
    cases = [BY_NAME[f"gpu-r50-{name}"] for name in ("conv5-128-het4", "conv4-128-sg70")]
    cases = cases if EVERYTHING else cases[:1]
    *_, found = tune.measured_entries(cases, (9, 0), tune.timed, most)
    assert {key.split()[1] for key in found} == {"fprop", "dgrad", "wgrad"}
    assert gpu.started > 3 * most


def test_descriptors_are_kept_by_address_and_keep_no_memory(gpu: Rehearsal) -> None:
    from hetconv_kernels.backends.triton import prepared, tma_calls

    tensors = [torch.empty(2, 8, 8, 64, dtype=torch.bfloat16) for _ in range(2)]
    shape = [2, 8, 8, 64]
    made = tma_calls.Descriptor(tensors[0], shape, [4096, 512, 64, 1], [1, 4, 4, 64])
    first, second = map(made, tensors)
    assert first is made(tensors[0])
    assert first is not second
    assert [d.base.data_ptr() for d in (first, second)] == [t.data_ptr() for t in tensors]
    assert first.base.dtype == torch.bfloat16
    gone = weakref.ref(tensors.pop())
    assert gone() is None
    for place in range(3 * prepared.MOST_KEPT):
        made(tensors[0].view(-1)[8 * place :])
    assert len(made._kept) <= prepared.MOST_KEPT


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "float32", "n": 2},
        {"c": 36, "f": 20, "n": 3},
        {"stride": 3, "n": 2},
        {"support": replace(het_case(4), order="interleaved"), "n": 2},
    ],
    ids=["float32", "tails", "stride-3", "interleaved"],
)
@all_of_it
def test_odd_cases_compile_and_start_too(
    tmp_path: Path, gpu: Rehearsal, change: dict[str, Any]
) -> None:
    case: Case = replace(BY_NAME["gpu-r50-conv3-128-het4"], **{"name": "odd", **change})
    wanted = [(case, verb) for verb in bench.VERBS]
    assert primitives.run_rows(Record(tmp_path, "p"), wanted, "triton", 1.5) == 0
    assert gpu.started


def test_a_rehearsal_notices_what_a_driver_would_refuse() -> None:
    base = torch.empty(64, dtype=torch.bfloat16)
    good = {"base": base, "shape": [4, 8], "strides": [8, 1]}
    block = {"block_size": [4, 8], "swizzle": 1}
    check_descriptor(SimpleNamespace(**good), block)
    wrong: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"base": base[1:]}, {}),
        ({"strides": [12, 1]}, {}),
        ({"shape": [0, 8]}, {}),
        ({}, {"block_size": [512, 8]}),
        ({}, {"block_size": [4, 64]}),
    ]
    for change, other in wrong:
        with pytest.raises(AssertionError):
            check_descriptor(SimpleNamespace(**(good | change)), block | other)
