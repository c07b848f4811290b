# SPDX-License-Identifier: Apache-2.0
"""The narrow CUDA kernels, compiled for the CPU (see `shim`), against the oracle.

What this cannot see is what only a GPU does: timing, and the encodings of instructions. No kernel
here uses wgmma, so none is exempt; `test_cuda_boxes` has more of those whose halos TMA brings.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import shim
import torch
from narrow_cases import (
    DTYPES,
    HET,
    LAYERS,
    SAME,
    SIZES,
    blocks,
    epilogues,
    random_case,
)

from hetconv_kernels import Support
from hetconv_kernels.backends.cuda.narrow_lowering import BlockShape
from hetconv_kernels.problem import Geometry, make_geometry

INTEGERS = ("het8", "interleaved", "ragged", "grouped", "pads", "scattered")

pytestmark = pytest.mark.skipif(shim.compiler() is None, reason="g++ is not installed here")


@pytest.mark.parametrize("name", LAYERS)
def test_layers_match_the_oracle(name: str, tmp_path: Path) -> None:
    geometry, size = LAYERS[name], SIZES.get(name, (8, 10))
    cases = []
    for index, dtype in enumerate(DTYPES):
        for back in (False, True):
            how = {"dtype": dtype, "back": back, "buffers": 1 + index, "live": bool(index)}
            cases.append(shim.fprop_case(geometry.support, geometry, size, **how))
        w_dtype = torch.float32 if index else dtype
        cases.append(shim.wgrad_case(geometry.support, geometry, size, 2, dtype, w_dtype))
    shim.run(cases, tmp_path)


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("boxes", [False, True], ids=["cp.async", "tma"])
def test_integers_are_exact(boxes: bool, name: str, tmp_path: Path) -> None:
    """No rounding hides a product that is wrong, missing or added twice."""
    torch.manual_seed(0)
    geometry, size, cases = LAYERS[name], SIZES.get(name, (8, 10)), []
    whole = {"boxes": boxes, "integers": True}
    for dtype in (*DTYPES, *([] if boxes else [torch.float32])):
        for back in (False, True):
            how = {"dtype": dtype, "back": back, "split": back and dtype == torch.float32}
            cases.append(shim.fprop_case(geometry.support, geometry, size, **how, **whole))
        if dtype != torch.float32:
            cases.append(shim.wgrad_case(geometry.support, geometry, size, 2, dtype, **whole))
    assert not boxes or any(case.numbers["tma"] for case in cases)
    shim.run(cases, tmp_path, seed=5)


SPLIT = pytest.mark.parametrize("split", [False, True], ids=["tf32", "3xtf32"])


@SPLIT
@pytest.mark.parametrize("back", [False, True], ids=["fprop", "dgrad"])
def test_float32_matches_the_oracle(back: bool, split: bool, tmp_path: Path) -> None:
    cases = []
    for index, (name, geometry) in enumerate(LAYERS.items()):
        how = {"dtype": torch.float32, "split": split, "back": back}
        how |= {"buffers": 1 + index % 2, "live": index % 3 == 0}
        size = SIZES.get(name, (8, 10))
        cases.append(shim.fprop_case(geometry.support, geometry, size, 1, **how))
    shim.run(cases, tmp_path)


@SPLIT
def test_blocks_and_epilogues_of_float32_match_the_oracle(split: bool, tmp_path: Path) -> None:
    how = {"dtype": torch.float32, "split": split}
    cases = blocks((1, 1), **how, buffers=2, resident=split)[::2]
    for filters in (64, 13, 136):
        support = Support.het(16, filters, 3, p=2, order="interleaved")
        cases += epilogues(make_geometry(support, 1, 1), **how)
    shim.run(cases, tmp_path)


def test_three_products_of_tf32_are_float32(tmp_path: Path) -> None:
    """One such product errs far beyond what three do: the bounds tell them apart."""
    torch.manual_seed(0)
    cases = [shim.fprop_case(HET, SAME, (8, 10), dtype=torch.float32, split=s) for s in (0, 1)]
    shim.run(cases, tmp_path)
    cases[1].numbers["split"] = 0
    with pytest.raises(AssertionError, match="differ"):
        shim.run(cases, tmp_path)


def test_a_number_that_is_not_rounded_is_found(tmp_path: Path) -> None:
    """The matrix unit would leave its last bits out."""
    torch.manual_seed(0)
    case = shim.fprop_case(HET, SAME, (8, 10), dtype=torch.float32)
    done = shim.execute([case], tmp_path, ("skip-rounding", "1000"))
    assert done.returncode == 3
    assert "which is no TF32" in done.stderr


@pytest.mark.parametrize("filters", [64, 24, 20, 13, 136])
def test_epilogues_match_the_oracle(filters: int, tmp_path: Path) -> None:
    """Also with filters that 16-byte accesses do not reach, and with several parts of them."""
    support = Support.het(16, filters, 3, p=2, order="interleaved")
    shim.run(epilogues(make_geometry(support, 1, 1)), tmp_path)


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("buffers", [1, 2])
def test_blocks_of_all_shapes_match_the_oracle(
    buffers: int, resident: bool, tmp_path: Path
) -> None:
    """Tiles whose lines are no multiple of eight, idle rows, and channels in several rounds."""
    shim.run(blocks((2, 2), buffers=buffers, resident=resident), tmp_path)


@pytest.mark.parametrize("first", range(0, 80, 20))
def test_random_cases_match_the_oracle(first: int, tmp_path: Path) -> None:
    shim.run([random_case(seed) for seed in range(first, first + 20)], tmp_path)


def test_two_runs_agree_bit_for_bit(tmp_path: Path) -> None:
    """Whatever order the threads of a block run in: the second run has another one."""
    for case in (shim.wgrad_case(HET, SAME, (8, 10)), shim.fprop_case(HET, SAME, (8, 10))):
        found = []
        for seed in range(2):
            done = shim.execute([case], tmp_path, seed=seed)
            assert done.returncode == 0, done.stderr
            found.append((tmp_path / "results").read_bytes())
        assert found[0] == found[1]


# The shim can fail ------------------------------------------------------------------------------


def simple(verb: str = "fprop") -> shim.Case:
    """A case of several tiles a block and two buffers.

    With 64 filters every thread would happen to write out the very bytes that it fetches next.
    """
    if verb == "wgrad":
        return shim.wgrad_case(HET, SAME, (24, 24), 1, buffers=2)
    geometry = make_geometry(Support.het(64, 40, 3, p=8), 1, 1)
    how = {"shape": BlockShape(4, 8, 1, 1, 64), "buffers": 2, "resident": True}
    return shim.fprop_case(geometry.support, geometry, (8, 24), 1, **how)


@pytest.mark.parametrize(
    ("verb", "mistake", "at", "said"),
    [
        ("fprop", "skip-barrier", 0, "race|nobody has written"),  # fetched: compute
        ("fprop", "skip-barrier", 1, "race"),  # computed: results over the tile
        ("fprop", "skip-barrier", 2, "race"),  # results: written out
        ("fprop", "skip-barrier", 3, "race|copy is on its way"),  # written out: fetch
        ("fprop", "skip-wait", 0, "copy is on its way"),
        ("fprop", "skip-wait", 1, "copy is on its way"),
        ("fprop", "skip-copy", 100, "nobody has written"),
        ("fprop", "wrong-address", 1000, "outside of"),
        ("wgrad", "skip-barrier", 0, "race|nobody has written"),
        ("wgrad", "skip-barrier", 1, "race|copy is on its way"),
        ("wgrad", "skip-wait", 0, "copy is on its way"),
        ("wgrad", "skip-copy", 100, "nobody has written"),
        ("wgrad", "wrong-address", 1000, "outside of"),
    ],
)
def test_mistakes_are_found(verb: str, mistake: str, at: int, said: str, tmp_path: Path) -> None:
    done = shim.execute([simple(verb)], tmp_path, (mistake, str(at)))
    assert done.returncode == 3, f"not found: {done.stderr}"
    assert any(words in done.stderr for words in said.split("|")), done.stderr


def test_reading_past_the_end_of_a_tensor_is_found(tmp_path: Path) -> None:
    case = simple()
    case.numbers["image_h"] += 1
    done = shim.execute([case], tmp_path)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr, done.stderr


def test_a_wrong_weight_is_found(tmp_path: Path) -> None:
    case = simple()
    case.arrays["source"] = case.arrays["source"].copy()
    known = np.flatnonzero(case.arrays["source"] >= 0)
    case.arrays["source"][known[:8]] = case.arrays["source"][known[8]]
    with pytest.raises(AssertionError, match="differ"):
        shim.run([case], tmp_path)


def test_geometries_are_not_all_alike() -> None:
    """The random cases reach every verb, and strides, dilations and gathered channels."""
    cases = [random_case(seed) for seed in range(80)]
    assert sum(case.numbers["kind"] for case in cases) >= 15
    fprops = [case for case in cases if not case.numbers["kind"]]
    assert {case.numbers["class_count"] > 1 for case in fprops} == {True, False}
    assert {case.numbers["slot_pitch"] > 0 for case in fprops} == {True, False}
    assert {case.numbers["dtype"] for case in cases} == {2, 3}
    assert isinstance(SAME, Geometry)
