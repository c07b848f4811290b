# SPDX-License-Identifier: Apache-2.0
"""The narrow CUDA kernels whose halos TMA brings, compiled for the CPU, against the oracle.

TMA is played there (see tests/native/cuda/tensor_map.h): a driver's function that refuses what the
CUDA driver API forbids, boxes that land late, by lot, and bytes counted at barriers. What is left
to a GPU stands in csrc/cuda/mbarrier.h.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import shim
from narrow_cases import (
    DTYPES,
    HET,
    LAYERS,
    SIZES,
    blocks,
    epilogues,
    random_case,
)

from hetconv_kernels import Support
from hetconv_kernels.backends.cuda.narrow_lowering import BlockShape
from hetconv_kernels.problem import make_geometry

pytestmark = pytest.mark.skipif(shim.compiler() is None, reason="g++ is not installed here")

# Those that no box fits, and why: see Tables.no_tma.
WITHOUT = {
    (name, False): "adjacent outputs"
    for name in ("stride", "stride-1x1", "stride-3", "dilated-stride")
} | {("stride-3", True): "6 classes of pixels"}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_match_the_oracle(name: str, tmp_path: Path) -> None:
    geometry, size = LAYERS[name], SIZES.get(name, (8, 10))
    cases = []
    for index, dtype in enumerate(DTYPES):
        for back in (False, True):
            how = {"dtype": dtype, "back": back, "buffers": 1 + index, "boxes": True}
            case = shim.fprop_case(geometry.support, geometry, size, **how)
            assert case.numbers["tma"] == ((name, back) not in WITHOUT)
            cases.append(case)
        how = {"buffers": 1 + index, "boxes": True}
        case = shim.wgrad_case(geometry.support, geometry, size, 2, dtype, **how)
        assert case.numbers["tma"] == ((name, False) not in WITHOUT)
        cases.append(case)
    shim.run(cases, tmp_path)


def all_kinds(boxes: bool) -> list[shim.Case]:
    """Cases of all epilogues, and of wgrad; with the same operands each time."""
    cases = []
    for filters in (64, 20, 136):
        cases += epilogues(make_geometry(Support.het(16, filters, 3, p=2), 1, 1), boxes)
    for buffers in (1, 2):
        how = {"buffers": buffers, "boxes": boxes}
        cases.append(shim.wgrad_case(HET, LAYERS["het8"], (24, 24), 1, **how))
    return cases


def test_epilogues_match_the_oracle(tmp_path: Path) -> None:
    cases = all_kinds(True)
    assert all(case.numbers["tma"] for case in cases)
    shim.run(cases, tmp_path)


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("buffers", [1, 2])
def test_blocks_of_all_shapes_match_the_oracle(
    buffers: int, resident: bool, tmp_path: Path
) -> None:
    """Also where a box brings neighbours of a round's channels, which nobody reads."""
    cases = blocks((2, 1), buffers=buffers, resident=resident, boxes=True)
    assert sum(case.numbers["tma"] for case in cases) >= 8
    assert {case.numbers["slot_pitch"] > 0 for case in cases if case.numbers["tma"]} == {
        True,
        False,
    }
    shim.run(cases, tmp_path)


def test_random_cases_match_the_oracle(tmp_path: Path) -> None:
    cases = [random_case(seed, True) for seed in range(80, 160)]
    cases = [case for case in cases if case.numbers["tma"]]
    fprops = [case for case in cases if not case.numbers["kind"]]
    assert len(fprops) > 25
    assert len(cases) - len(fprops) > 5
    assert {case.numbers["class_count"] > 1 for case in fprops} == {True, False}
    assert {case.numbers["slot_pitch"] > 0 for case in fprops} == {True, False}
    assert {case.numbers["resident"] for case in fprops} == {0, 1}
    shim.run(cases, tmp_path, seed=3)


def test_both_ways_and_all_orders_agree_bit_for_bit(tmp_path: Path) -> None:
    """TMA brings what cp.async does, whatever order threads run in and boxes land in."""
    found = set()
    for boxes, seed in ((False, 0), (True, 0), (True, 1), (True, 2)):
        done = shim.execute(all_kinds(boxes), tmp_path, seed=seed)
        assert done.returncode == 0, done.stderr
        found.add((tmp_path / "results").read_bytes())
    assert len(found) == 1


# The shim can fail ------------------------------------------------------------------------------


def simple(buffers: int = 2, verb: str = "fprop") -> shim.Case:
    """A case of several tiles a block, and of channels in two rounds."""
    if verb == "wgrad":
        return shim.wgrad_case(HET, LAYERS["het8"], (24, 24), 1, buffers=buffers, boxes=True)
    geometry = make_geometry(Support.het(64, 40, 3, p=8), 1, 1)
    how = {"shape": BlockShape(4, 8, 1, 1, 4), "buffers": buffers, "resident": True, "boxes": True}
    how |= {"epilogue": ("residual",)}
    case = shim.fprop_case(geometry.support, geometry, (8, 24), 1, **how)
    assert case.numbers["tma"]
    return case


@pytest.mark.parametrize(
    ("verb", "mistake", "at", "said"),
    [
        ("fprop", "skip-barrier", 0, "race|nobody has written|no barrier was made"),
        ("fprop", "skip-barrier", 1, "race|copy is on its way"),  # computed: the next round's box
        ("fprop", "skip-barrier", 2, "race|copy is on its way"),  # computed: residual over the halo
        ("fprop", "skip-barrier", 3, "race"),  # residual: added
        ("fprop", "skip-barrier", 4, "race"),  # results: written out
        ("fprop", "skip-barrier", 5, "race"),  # written out: the next tile's box
        ("fprop", "skip-phase", 0, "race|nobody has written|copy is on its way"),
        ("fprop", "skip-phase", 3, "race|copy is on its way"),
        ("fprop", "skip-fence", 0, "without a fence"),
        ("fprop", "skip-fence", 1, "without a fence"),
        ("fprop", "skip-bulk", 0, "deadlock"),
        ("fprop", "wrong-bytes", 1, "which lacks 0 arrivals and 16 bytes"),
        ("fprop", "wrong-corner", 2, "differ"),
        ("fprop", "wrong-place", 0, "not aligned"),
        ("fprop", "skip-wait", 0, "copy is on its way"),  # weights
        ("fprop", "skip-copy", 100, "nobody has written"),
        ("fprop", "wrong-address", 1000, "outside of"),
        ("wgrad", "skip-barrier", 0, "no barrier was made|nobody has written"),
        ("wgrad", "skip-barrier", 1, "race|copy is on its way"),  # computed: the next tile's boxes
        ("wgrad", "skip-phase", 1, "race|nobody has written|copy is on its way"),
        ("wgrad", "skip-bulk", 1, "deadlock"),
        ("wgrad", "wrong-bytes", 0, "deadlock"),
        ("wgrad", "wrong-corner", 1, "differ"),
        ("wgrad", "wrong-place", 1, "not aligned"),
        ("wgrad", "wrong-address", 1000, "outside of"),
    ],
)
@pytest.mark.parametrize("buffers", [1, 2])
def test_mistakes_are_found(
    verb: str, mistake: str, at: int, said: str, buffers: int, tmp_path: Path
) -> None:
    case = simple(buffers, verb)
    done = shim.execute([case], tmp_path, (mistake, str(at)))
    if said == "differ":
        assert done.returncode == 0, done.stderr
        with pytest.raises(AssertionError, match=said):
            case.check((tmp_path / "results").read_bytes())
        return
    assert done.returncode == 3, f"not found: {done.stderr}"
    assert any(words in done.stderr for words in said.split("|")), done.stderr


def test_reading_past_the_end_of_a_tensor_is_found(tmp_path: Path) -> None:
    case = simple()
    case.numbers["image_h"] += 1
    done = shim.execute([case], tmp_path)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("table", "change", "said"),
    [
        ("halos", lambda t: t + np.eye(2)[1:], "more bytes came to the barrier"),
        ("halos", lambda t: t - np.eye(2)[:1], "deadlock"),
        ("halos", lambda t: t[:, ::-1], "differ"),
        ("classes", lambda t: t + np.eye(14, dtype=np.int32)[6:7], "differ"),
        ("classes", lambda t: t + np.eye(14, dtype=np.int32)[7:8], "differ"),
        ("chunks", lambda t: t + 1, "differ"),
    ],
    ids=["wide box", "low box", "turned box", "wrong row", "wrong column", "wrong channels"],
)
def test_wrong_boxes_are_found(
    table: str, change: Callable[[np.ndarray], np.ndarray], said: str, tmp_path: Path
) -> None:
    case = simple()
    case.arrays[table] = np.ascontiguousarray(change(case.arrays[table]), np.int32)
    with pytest.raises(AssertionError, match=said):
        shim.run([case], tmp_path)


@pytest.mark.parametrize(
    ("number", "value", "said"),
    [
        ("x_w", 60, "a stride is no multiple of 16 bytes"),
        ("x_w", 56, "a dimension overlaps the one before"),
        ("x_h", 64, "a dimension overlaps the one before"),
        ("x_h", 2**30, ""),
        ("image_w", 0, "a dimension is not 1 to"),
        ("halos", 257, "a box has not 1 to 256 places"),
        ("halos", 0, "a box has not 1 to 256 places"),
        ("class_count", 5, "there are more classes than tensor maps"),
    ],
)
def test_what_no_map_describes_is_refused(
    number: str, value: int, said: str, tmp_path: Path
) -> None:
    case = simple()
    case.arrays["halos"] = case.arrays["halos"].repeat(4, axis=0)  # as many as maps
    if number == "halos":
        case.arrays["halos"] = np.full_like(case.arrays["halos"], value)
    else:
        case.numbers[number] = value
    done = shim.execute([case], tmp_path)
    assert done.returncode != 0
    assert said in done.stderr, done.stderr
    assert ("refuses a tensor map" in done.stderr) == said.startswith("a ")
