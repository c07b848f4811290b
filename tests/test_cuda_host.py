# SPDX-License-Identifier: Apache-2.0
"""The narrow CUDA kernels, compiled for the CPU (see `shim`), against the oracle.

What this cannot see is what only a GPU does: timing, and the encodings of instructions. No kernel
here uses wgmma or TMA, so none is exempt; `test_cuda_boxes` has those whose halos TMA brings.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import shim
import torch

from hetconv_kernels import Support
from hetconv_kernels.backends.cuda.lowering import Shape
from hetconv_kernels.problem import Geometry, make_geometry

pytestmark = pytest.mark.skipif(shim.compiler() is None, reason="g++ is not installed here")

HET = Support.het(64, 64, 3, p=8)
SAME = make_geometry(HET, 1, 1)


def ragged(filters: int, channels: int, groups: int, keep: float, kernel: int = 3) -> Support:
    """A self-grouped Support with unequal clusters, each on channels of its own choice."""
    rng = np.random.default_rng(filters * 1000 + channels)
    labels = np.sort(rng.integers(0, groups, filters))
    return Support.self_grouped(labels, rng.random((groups, channels)) < keep, kernel)


def masked(filters: int, channels: int, kernel: tuple[int, int], density: float) -> Support:
    """A Support of single weights, and one filter without any."""
    rng = np.random.default_rng(filters * 100 + channels)
    mask = rng.random((filters, channels, *kernel)) < density
    mask[filters // 2] = False
    return Support.from_mask(mask)


LAYERS = {
    "het8": make_geometry(HET, 1, 1),
    "het4": make_geometry(Support.het(64, 64, 3, p=4), 1, 1),
    "interleaved": make_geometry(Support.het(64, 64, 3, p=4, order="interleaved"), 1, 1),
    "interleaved-uneven": make_geometry(Support.het(40, 24, 3, p=3, order="interleaved"), 1, 1),
    "wide": make_geometry(Support.het(128, 128, 3, p=8), 1, 1),
    "ragged": make_geometry(ragged(64, 64, 4, 0.3), 1, 1),
    "ragged-narrow": make_geometry(ragged(48, 32, 7, 0.4), 1, 1),
    "grouped": make_geometry(Support.grouped(64, 64, 3, 8), 1, 1),
    "dense-1x1": make_geometry(Support.dense(16, 24, 1)),
    "dense-5x5": make_geometry(Support.dense(8, 8, 5), 1, 2),
    "stride": make_geometry(Support.het(32, 32, 3, p=4), 2, 1),
    "stride-1x1": make_geometry(Support.dense(16, 16, 1), 2),
    "stride-3": make_geometry(Support.grouped(16, 32, 3, 2), (3, 2), 1),
    "dilated": make_geometry(Support.het(32, 32, 3, p=4), 1, 2, 2),
    "dilated-stride": make_geometry(Support.het(16, 16, 3, p=2), 2, (1, 3), (1, 3)),
    "pads": make_geometry(Support.het(16, 16, 3, p=2), 1, (0, 3, 2, 1)),
    "row": make_geometry(masked(16, 16, (1, 3), 0.5), 1, (0, 1)),
    "scattered": make_geometry(masked(24, 16, (3, 3), 0.2), 1, 1),
    "one-filter-group": make_geometry(Support.grouped(16, 16, 3, 16), 1, 1),
}
SIZES = {"dense-1x1": (5, 9), "stride": (9, 12), "stride-1x1": (7, 8), "pads": (6, 7)}
DTYPES = (torch.bfloat16, torch.float16)


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


def epilogues(geometry: Geometry, boxes: bool = False) -> list[shim.Case]:
    """Cases of all epilogues; with the same operands each time."""
    parts = [("scale",), ("shift",), ("residual",), ("scale", "shift", "residual"), ("residual",)]
    shape = Shape(4, 8, 1, 1, 64) if geometry.support.filters == 136 else None
    cases = []
    for index, (act, epilogue) in enumerate(zip(shim.ACTS, parts, strict=True)):
        torch.manual_seed(index)
        how = {"dtype": DTYPES[index % 2], "act": act, "epilogue": epilogue, "shape": shape}
        how |= {"vectors": index != 3, "buffers": 1 + index % 2, "resident": index % 2 == 0}
        cases.append(shim.fprop_case(geometry.support, geometry, (5, 11), boxes=boxes, **how))
    return cases


@pytest.mark.parametrize("filters", [64, 24, 20, 13, 136])
def test_epilogues_match_the_oracle(filters: int, tmp_path: Path) -> None:
    """Also with filters that 16-byte accesses do not reach, and with several parts of them."""
    support = Support.het(16, filters, 3, p=2, order="interleaved")
    shim.run(epilogues(make_geometry(support, 1, 1)), tmp_path)


STATS = {
    "edges": (SAME, Shape(5, 7, 2, 1, 3)),
    "columns-of-warps": (make_geometry(Support.het(64, 128, 3, p=4), 1, 1), Shape(4, 8, 1, 2, 4)),
    "parts": (make_geometry(Support.het(16, 136, 3, p=2), 2, 1), Shape(4, 8, 1, 1, 64)),
    "scattered": (make_geometry(masked(24, 16, (3, 3), 0.2), 1, 1), Shape(4, 16, 2, 1, 64)),
    "odd": (make_geometry(Support.het(16, 13, 3, p=2), 1, 1), Shape(4, 8, 4, 1, 64)),
    "one-tile": (make_geometry(Support.dense(8, 8, 1)), Shape(16, 16, 8, 1, 64)),
}


def stats(name: str, batch: int = 3, boxes: bool = False) -> list[shim.Case]:
    """Cases that sum for batch normalisation."""
    geometry, shape = STATS[name]
    cases = []
    for index, dtype in enumerate(DTYPES):
        how = {"dtype": dtype, "shape": shape, "buffers": 1 + index, "resident": bool(index)}
        how |= {"stats": True, "epilogue": ("shift",) * index, "boxes": boxes}
        cases.append(shim.fprop_case(geometry.support, geometry, (9, 11), batch, **how))
    return cases


@pytest.mark.parametrize("name", STATS)
def test_sums_of_batch_normalisation_match_the_oracle(name: str, tmp_path: Path) -> None:
    """Also on the edges of images, for idle rows, and where a block has no tile."""
    cases = stats(name, 1 if name == "one-tile" else 3)
    assert (name == "one-tile") == (len(cases[0].arrays["sums"]) == 1)
    shim.run(cases, tmp_path)


def test_a_wrong_sum_is_found(tmp_path: Path) -> None:
    case = shim.fprop_case(HET, SAME, (9, 11), shape=Shape(5, 7, 2, 1, 3), stats=True)
    assert case.sums is not None
    case.sums[0][1, 5] *= 1.001
    with pytest.raises(AssertionError, match="sums differ"):
        shim.run([case], tmp_path)


BLOCKS = [
    (HET, Shape(8, 16, 4, 1, 64)),
    (HET, Shape(5, 7, 2, 1, 3)),
    (Support.het(64, 128, 3, p=4), Shape(4, 8, 1, 2, 4)),
    (Support.het(64, 128, 3, p=4), Shape(4, 8, 1, 1, 4)),
    (Support.het(64, 40, 3, p=4, order="interleaved"), Shape(4, 8, 1, 1, 3)),
    (ragged(64, 64, 4, 0.3), Shape(4, 8, 2, 1, 2)),
]


def blocks(stride: tuple[int, int], **how: object) -> list[shim.Case]:
    """Cases of blocks of all shapes, each with a stride of 1 and with that one."""
    return [
        shim.fprop_case(support, make_geometry(support, each, 1), (9, 17), 1, shape=shape, **how)
        for support, shape in BLOCKS
        for each in ((1, 1), stride)
    ]


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("buffers", [1, 2])
def test_blocks_of_all_shapes_match_the_oracle(
    buffers: int, resident: bool, tmp_path: Path
) -> None:
    """Tiles whose lines are no multiple of eight, idle rows, and channels in several rounds."""
    shim.run(blocks((2, 2), buffers=buffers, resident=resident), tmp_path)


@cache
def random_case(seed: int, boxes: bool = False) -> shim.Case:
    """A case that nobody thought of."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    channels, filters = (int(rng.choice([8, 16, 24, 32, 48, 64])) for _ in range(2))
    kernel = tuple(int(n) for n in rng.choice([1, 2, 3, 3, 3, 5], 2))
    kind = rng.choice(["het", "grouped", "ragged", "masked", "dense"])
    if kind == "het":
        odd = tuple(n | 1 for n in kernel)
        order = str(rng.choice(["blocked", "interleaved"]))
        support = Support.het(channels, filters, odd, p=int(rng.integers(1, 9)), order=order)
    elif kind == "grouped":
        support = Support.grouped(channels, filters, kernel, int(rng.choice([1, 2, 4, 8])))
    elif kind == "ragged":
        groups = int(rng.integers(1, 6))
        keep = rng.random((groups, channels)) < rng.uniform(0.1, 0.9)
        support = Support.self_grouped(rng.integers(0, groups, filters), keep, kernel)
    elif kind == "masked":
        support = masked(filters, channels, kernel, float(rng.uniform(0.02, 0.5)))
    else:
        support = Support.dense(channels, filters, kernel)
    stride = tuple(int(n) for n in rng.choice([1, 1, 1, 2, 3], 2))
    dilation = tuple(int(n) for n in rng.choice([1, 1, 1, 2, 3], 2))
    reach = [d * (k - 1) for d, k in zip(dilation, support.kernel, strict=True)]
    pads = tuple(int(rng.integers(0, reach[n // 2] + 2)) for n in range(4))
    geometry = make_geometry(support, stride, pads, dilation)
    size = tuple(int(rng.integers(reach[n] + 1, reach[n] + 12)) for n in range(2))
    batch, dtype = int(rng.integers(1, 4)), DTYPES[int(rng.integers(2))]
    live, buffers = bool(rng.integers(2)), [None, 1, 2][int(rng.integers(3))]
    verb = rng.choice(["fprop", "dgrad", "wgrad"])
    if verb == "wgrad":
        w_dtype = dtype if rng.integers(2) else torch.float32
        return shim.wgrad_case(support, geometry, size, batch, dtype, w_dtype, live, buffers, boxes)
    how: dict[str, object] = {"buffers": buffers, "resident": bool(rng.integers(2)), "live": live}
    how["boxes"] = boxes
    if verb == "fprop":
        how["act"] = str(rng.choice(shim.ACTS))
        asked = [n for n in ("scale", "shift", "residual") if rng.integers(2)]
        how["epilogue"] = tuple(asked)
    return shim.fprop_case(support, geometry, size, batch, dtype, verb == "dgrad", **how)


@pytest.mark.parametrize("first", range(0, 80, 20))
def test_random_cases_match_the_oracle(first: int, tmp_path: Path) -> None:
    shim.run([random_case(seed) for seed in range(first, first + 20)], tmp_path)


def test_two_runs_agree_bit_for_bit(tmp_path: Path) -> None:
    """Whatever order the threads of a block run in: the second run has another one."""
    summed = shim.fprop_case(HET, SAME, (8, 10), stats=True)
    for case in (shim.wgrad_case(HET, SAME, (8, 10)), shim.fprop_case(HET, SAME, (8, 10)), summed):
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
    how = {"shape": Shape(4, 8, 1, 1, 64), "buffers": 2, "resident": True}
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
