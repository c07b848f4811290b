# SPDX-License-Identifier: Apache-2.0
"""Machine code of the CUDA engine without a GPU, for A100 and H100; `make aot` looks at all.

nvcc compiles every kernel; none may spill, products are matrix instructions, operands come by
asynchronous copies, and registers do not grow beyond the committed rows of machine_code.json (of
another release of nvcc only the first three are asked). Results are kept in build/cuda-code by what
they are made from.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import machine_code
import pytest
from machine_code import Code
from machine_limits import TMA_KERNELS, problems, regressions

from hetconv_kernels.backends.cuda import scattered_tiles, wide_tiles, wide_wgrad_tiles

EVERYTHING = os.environ.get("HETCONV_AOT_ALL") == "1"
DEFAULT = ("80", "90a")
CUDA = machine_code.ROOT / "csrc" / "cuda"
TABLE = json.loads(machine_code.EXPECTED.read_text())


@pytest.mark.parametrize("architecture", TABLE["rows"])
def test_kernels_are_what_they_were(architecture: str) -> None:
    if reason := machine_code.absent():
        pytest.skip(reason)
    if not EVERYTHING and architecture not in DEFAULT:
        pytest.skip("`make aot` looks at all architectures")
    found = machine_code.rows(architecture)
    expected = TABLE["rows"][architecture]
    assert {code.name for code in found} == set(expected), "python tests/machine_code.py"
    wrong = {code.name: problems(code) for code in found}
    if machine_code.release() == TABLE["nvcc"]:
        for code in found:
            wrong[code.name] += regressions(code, expected[code.name])
    assert {name: sentences for name, sentences in wrong.items() if sentences} == {}


WAIT = """
#include "mbarrier.h"
__global__ void wait_kernel(uint32_t at) { hetconv::cuda::mbarrier_wait(at, 0, 8); }
"""


@pytest.mark.parametrize("checked", [False, True], ids=["ordinary", "checked"])
def test_a_checked_build_names_the_barrier_and_ends_the_launch(
    checked: bool, tmp_path: Path
) -> None:
    """An ordinary one does nothing but wait."""
    if reason := machine_code.absent():
        pytest.skip(reason)
    part = next(part for part in machine_code.build().PARTS if part.cuda)
    (tmp_path / "wait.cu").write_text(WAIT)
    cubin = tmp_path / "wait.cubin"
    flags = [*part.flags.split(), "-gencode=arch=compute_90a,code=sm_90a", f"-I{CUDA}"]
    flags += ["-DHETCONV_CHECKED"] * checked
    command = [machine_code.build().nvcc(), *flags, "-cubin", str(tmp_path / "wait.cu")]
    subprocess.run([*command, "-o", str(cubin)], check=True, capture_output=True)
    tool = machine_code.disassembler()
    assert tool is not None
    sass = subprocess.run([tool, "-sass", str(cubin)], check=True, capture_output=True, text=True)
    assert "SYNCS.PHASECHK" in sass.stdout
    assert ("BPT.TRAP" in sass.stdout) == checked
    assert (b"vprintf" in cubin.read_bytes()) == checked
    assert (b"barrier %u waits for the end of a phase" in cubin.read_bytes()) == checked


def test_the_committed_rows_are_of_these_sources() -> None:
    """Of the architectures that are not compiled here, too."""
    pytest.importorskip("setuptools")
    found = {name: machine_code.digest(name) for name in TABLE["rows"]}
    assert found == TABLE["sources"], "csrc/cuda has changed: run python tests/machine_code.py"


def test_what_no_compiler_reads_is_no_change_of_a_source() -> None:
    text = "int a = 1;  // one\nint b;\n"
    assert machine_code.bare(text) == machine_code.bare("// No\nint a =\n    1;\nint b;")
    assert machine_code.bare(text) != machine_code.bare(text.replace("1", "2"))


def test_the_committed_rows_are_of_all_architectures_and_show_no_problem() -> None:
    pytest.importorskip("setuptools")
    assert tuple(TABLE["rows"]) == machine_code.build().ARCHITECTURES
    assert any(name.startswith("wide_fprop") for name in TABLE["rows"]["90a"])
    for kernels in TABLE["rows"].values():
        for name, row in kernels.items():
            assert problems(Code(name=name, **row)) == []
        assert any(name.startswith("narrow_fprop") for name in kernels)
        assert any(name.startswith("narrow_wgrad") for name in kernels)
        assert sum(name.startswith("scattered_fprop") for name in kernels) == 8
    for architecture, kernels in TABLE["rows"].items():
        brought = {name.split("_kernel")[0] for name in kernels if name.startswith(TMA_KERNELS)}
        assert brought == (set(TMA_KERNELS) if architecture in ("90a", "100", "120") else set())


# The assertions can fail ------------------------------------------------------------------------

GOOD = Code(
    name="narrow_fprop_kernel<Bfloat, true, Clamp>",
    architecture="80",
    registers=128,
    stack=0,
    spills=0,
    shared=0,
    matrix={"HMMA": 448},
    copies={"LDGSTS": 3},
    local=0,
)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"matrix": {}}, "no HMMA"),
        ({"copies": {}}, "no asynchronous copies"),
        ({"stack": 48}, "48 B of stack"),
        ({"spills": 8}, "8 B of spills"),
        ({"local": 2}, "2 local accesses"),
        ({"registers": 256}, "256 registers"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value,
)
def test_lost_speed_is_noticed(change: dict[str, Any], words: str) -> None:
    assert problems(GOOD) == []
    (found,) = problems(dataclasses.replace(GOOD, **change))
    assert words in found


@pytest.mark.parametrize("name", TMA_KERNELS)
def test_boxes_come_by_tma(name: str) -> None:
    boxes = dataclasses.replace(GOOD, name=f"{name}_kernel<Half>", copies={"UTMALDG": 2})
    assert problems(boxes) == []
    (found,) = problems(dataclasses.replace(boxes, copies={"LDGSTS": 3}))
    assert "no copies of boxes by TMA" in found


WIDE = dataclasses.replace(
    GOOD,
    name="wide_fprop_kernel<Bfloat, 256, Clamp, false>",
    architecture="90a",
    registers=168,
    matrix={"HGMMA": 4},
    copies={"LDGSTS": 1, "UBLKCP": 4, "ARRIVES": 1},
    described=4,
    turn=12.5,
)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"described": 0}, "0 HGMMA of operands in shared memory"),
        ({"matrix": {"HMMA": 4}, "described": 0}, "0 HGMMA of operands in shared memory"),
        ({"copies": {"LDGSTS": 1, "ARRIVES": 1}}, "no asynchronous and bulk copies"),
        ({"copies": {"UBLKCP": 1, "ARRIVES": 1}}, "no asynchronous and bulk copies"),
        ({"copies": {"LDGSTS": 1, "UBLKCP": 4}}, "whose end a barrier does not count"),
        ({"turn": 53.0}, "53.0 instructions for each asynchronous copy"),
        ({"registers": 176}, "176 registers"),
        ({"losses": 1}, "1 warnings of lost speed"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value,
)
def test_lost_speed_of_wide_groups_is_noticed(change: dict[str, Any], words: str) -> None:
    assert problems(WIDE) == []
    (found,) = problems(dataclasses.replace(WIDE, **change))
    assert words in found


WIDE_WGRAD = dataclasses.replace(
    WIDE,
    name="wide_wgrad_kernel<Bfloat, 6>",
    copies={"LDGSTS": 8, "ARRIVES": 1},
    described=0,
)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"matrix": {"HMMA": 4}}, "no HGMMA with an operand in registers"),
        ({"described": 2}, "no HGMMA with an operand in registers"),
        ({"copies": {"LDGSTS": 1}}, "no asynchronous copies that a barrier counts"),
        ({"turn": 53.0}, "53.0 instructions for each asynchronous copy"),
        ({"registers": 176}, "176 registers"),
        ({"spills": 8}, "8 B of spills"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value,
)
def test_lost_speed_of_wgrad_of_wide_groups_is_noticed(change: dict[str, Any], words: str) -> None:
    assert problems(WIDE_WGRAD) == []
    (found,) = problems(dataclasses.replace(WIDE_WGRAD, **change))
    assert words in found


SCATTERED = dataclasses.replace(
    GOOD, name="scattered_fprop_kernel<Bfloat, 3, Clamp>", copies={}, products=3.8
)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"matrix": {}}, "no HMMA"),
        ({"registers": 136}, "136 registers"),
        ({"products": 7.0}, "7.0 instructions for each product"),
        ({"products": 0.0}, "0.0 instructions for each product"),
        ({"spills": 8}, "8 B of spills"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value,
)
def test_lost_speed_of_scattered_groups_is_noticed(change: dict[str, Any], words: str) -> None:
    assert problems(SCATTERED) == []
    (found,) = problems(dataclasses.replace(SCATTERED, **change))
    assert words in found


def test_kernels_without_products_need_neither() -> None:
    assert problems(dataclasses.replace(GOOD, name="pack_kernel", matrix={}, copies={})) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"registers": 129}, "129 registers, 128 before"),
        ({"shared": 16}, "16 B of static shared memory"),
        ({"matrix": {"HMMA": 448, "HGMMA": 1}}, "matrix"),
        ({"copies": {"UTMALDG": 1}}, "copies"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value,
)
def test_regressions_are_noticed(change: dict[str, Any], words: str) -> None:
    expected = dataclasses.asdict(GOOD)
    assert regressions(GOOD, expected) == []
    assert regressions(dataclasses.replace(GOOD, registers=100), expected) == []
    (found,) = regressions(dataclasses.replace(GOOD, **change), expected)
    assert words in found


SAID = """ptxas info    : 0 bytes gmem
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized \
due to insufficient register resources for the wgmma pipeline in function '_Z6kernelv'
ptxas info    : Compiling entry function '_Z6kernelv' for 'sm_80'
ptxas info    : Function properties for _Z6kernelv
    48 bytes stack frame, 44 bytes spill stores, 104 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 64 bytes smem, 576 bytes cmem[0]
"""
SASS = """
        Function : _Z6kernelv
        /*0000*/  LDGSTS.E.BYPASS.128 [R1], [R2.64] ;
        /*0010*/  HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
        /*0020*/  STL [R1], R3 ;
        /*0030*/  HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
        /*0040*/  HGMMA.64x256x16.F32.BF16 R24, gdesc[UR16], R24, gsb0 ;
        /*0050*/  HGMMA.64x256x16.F32.BF16 R24, R4, gdesc[UR16], R24, gsb0 ;
        /*0060*/  @!P0 BRA 0x10 ;
        /*0070*/  @!UP0 BRA 0x0 ;
"""


def test_what_the_tools_say_is_read() -> None:
    if not shutil.which("c++filt"):
        pytest.skip("c++filt is not installed")
    (code,) = machine_code.read("80", SAID, SASS)
    assert code == Code(
        name="kernel",
        architecture="80",
        registers=40,
        stack=48,
        spills=148,
        shared=64,
        matrix={"HMMA": 2, "HGMMA": 2},
        copies={"LDGSTS": 1},
        local=1,
        described=1,
        losses=1,
        turn=8.0,
        step=12.0,
        products=3.0,
        traffic={"shared": 9216.0, "global": 0.0},  # one of two HGMMA has its rows in registers
    )


def test_traffic_of_a_loop_of_products_is_counted() -> None:
    """Eight bytes of each lane from memory, two matrices of 128 and a store, for two products."""
    body = """
        /*0000*/  LDG.E.128 R4, [R2.64] ;
        /*0010*/  LDG.E.64.CONSTANT R4, [R2.64] ;
        /*0020*/  LDSM.16.MT88.2 R8, [R3] ;
        /*0030*/  @P0 STS.U16 [R1], R3 ;
        /*0040*/  HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
        /*0050*/  HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
        /*0060*/  @!P0 BRA 0x10 ;
"""
    assert machine_code._traffic(body) == {"shared": (256 + 64) / 2, "global": 128.0}
    assert machine_code._traffic("/*0000*/ EXIT ;") == {}


def test_the_cost_model_has_the_traffic_of_the_machine_code() -> None:
    """Of a step with all taps: each pixel of the halo once, and weights, a turn for 128 bytes."""
    for architecture in ("80", "90a"):
        row = TABLE["rows"][architecture]["scattered_fprop_kernel<Bfloat, 3, Clamp>"]
        shape = scattered_tiles.ScatteredShape(3, 128, 128, 8)
        products = 9 * 7  # columns of a tile
        assert row["traffic"]["shared"] * products == pytest.approx(2 * 128 * shape.halo, rel=0.01)
        slots = 128  # a word of each lane
        assert row["traffic"]["global"] * products == pytest.approx(9 * 256 + slots, rel=0.01)


def test_clocks_of_results_are_what_is_issued_or_half_rate() -> None:
    """A part begins and ends at every second STSM; parts that add a residual are others."""
    few, many = ["FFMA R1, R2, R3, R4"] * 3, ["F2FP R1, R2"] * 3 + ["IMAD R1, R2, R3, R4"] * 4
    store, load = ["STSM.16.MT88.4 [R1], R2"] * 2, ["LDSM.16.MT88.4 R2, [R1]"]
    for part, clocks in ((few, 5.0), (many, 9.0), (2 * many, 16.0)):
        listed = [*store, *load, *store, *part, *store, *part, *store]
        body = "".join(f"/*{16 * place:04x}*/ {text} ;" for place, text in enumerate(listed))
        assert machine_code._results(body) == clocks
    assert machine_code._results("/*0000*/ EXIT ;") == 0.0


def test_the_cost_model_has_the_clocks_of_the_machine_code() -> None:
    rows = TABLE["rows"]["90a"].items()
    found = {name: row["results"] for name, row in rows if "Clamp" in name and "wide" in name}
    large = {name: clocks for name, clocks in found.items() if ", 64," not in name}
    assert len(large) == 10
    for name, clocks in large.items():
        expected = wide_tiles._RESULT_CLOCKS
        if name.endswith(", true>"):
            expected = wide_tiles._FLAT_RESULT_CLOCKS[int(name.split(", ")[1])]
        assert abs(clocks - expected) <= 8, (name, clocks)


def test_the_cost_model_has_the_clocks_of_bringing_flattened_rows() -> None:
    rows = TABLE["rows"]["90a"].items()
    turns = {row["turn"] for name, row in rows if name.endswith(", true>") and "wide" in name}
    assert turns == {wide_tiles._FLAT_PIECE_CLOCKS}


@pytest.mark.parametrize("products", wide_wgrad_tiles.PRODUCTS)
def test_the_cost_model_of_wgrad_has_the_counts_of_the_machine_code(products: int) -> None:
    """Of a product of 64 x 64 by 16: x, and of dy what one of four warps has for all products."""
    row = TABLE["rows"]["90a"][f"wide_wgrad_kernel<Bfloat, {products}>"]
    assert row["turn"] == wide_wgrad_tiles._COPY_CLOCKS
    assert row["traffic"]["shared"] == pytest.approx(2048 + 512 / products, abs=0.01)
    assert row["traffic"]["global"] == 0
    # Two warps of each scheduler issue less than the 32 clocks of the matrix unit.
    assert 2 * row["step"] / 4 < 32
