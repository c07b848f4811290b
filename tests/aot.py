# SPDX-License-Identifier: Apache-2.0
"""Ahead-of-time compilation: what each shipped configuration becomes, without a GPU.

    python tests/aot.py --capability 90 [--name PART] [--out FILE]

Each configuration says what its machine code must show, and `shortcomings` lists where it does not:
the matrix instruction of its path, asynchronous copies of both operands, every stage of the
pipeline for both, no spills, no local memory, shared memory within the device's limit.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shipped import Configuration, chosen

from hetconv_kernels.backends.gpu.devices import GPU_SPECS
from hetconv_kernels.backends.triton.tiles import box_stages, box_warps, stages, wgrad_stages

CAPABILITIES = (80, 90, 100, 120)
_FROM_SHARED = r"warp_group_dot %.*!ttg\.memdesc<[^>]*> \* !ttg\.memdesc<"
_SECOND_FROM_SHARED = r"warp_group_dot %.*> \* !ttg\.memdesc<"
_ITEM = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a configuration.

    Attributes:
        name: of the configuration.
        capability: compute capability, as 90.
        stages: that were asked for.
        buffers: leading dimensions of the rings of buffers in shared memory, one an operand.
        from_shared: whether the matrix unit reads both operands from shared memory; for wgrad x,
            since dy is read once for all taps and stays in registers.
        matrix: matrix instructions, by name.
        copies: asynchronous copies, by name.
        registers: of one thread.
        stack: bytes of local memory of one thread.
        spills: bytes spilled.
        local: loads and stores of local memory.
        shared: bytes of shared memory.
        limit: of shared memory on this spec.
        loads: synchronous loads from global memory inside the loop that multiplies.
        seconds: that compiling took.
        triton: version.
    """

    name: str
    capability: int
    stages: int
    buffers: list[int]
    from_shared: bool
    matrix: dict[str, int]
    copies: dict[str, int]
    registers: int
    stack: int
    spills: int
    local: int
    shared: int
    limit: int
    loads: int
    seconds: float
    triton: str


def compile_configuration(configuration: Configuration, capability: int) -> Compiled:
    """Compiles one configuration for one capability and reads the result."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, signature, constants, attributes = _source(configuration)
    spec = GPU_SPECS[divmod(capability, 10)]
    item = _ITEM[configuration.dtype]
    if configuration.kernel.startswith("wgrad"):
        depth = wgrad_stages(configuration.tile, configuration.taps, item, spec)
    elif configuration.kernel == "tma":
        depth = box_stages(configuration.tile, item, spec)
    else:
        depth = stages(configuration.tile, item, spec)
    warps = configuration.tile.warps
    if configuration.kernel == "tma":
        warps = box_warps(configuration.tile, configuration.epilogue != "ragged")
    started = time.perf_counter()
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "num_stages": depth, "enable_fp_fusion": True},
    )
    seconds = time.perf_counter() - started
    sass, usage = _disassemble(compiled.asm["cubin"])
    gradient = configuration.kernel.startswith("wgrad")
    from_shared = _SECOND_FROM_SHARED if gradient else _FROM_SHARED
    return Compiled(
        name=configuration.name,
        capability=capability,
        stages=depth,
        buffers=_buffers(compiled.asm["ttgir"], configuration),
        from_shared=bool(re.search(from_shared, compiled.asm["ttgir"])),
        matrix=_count(sass, r"\b(HGMMA|UTC[A-Z]*MMA|HMMA)\b"),
        copies=_count(sass, r"\b(LDGSTS|UTMALDG|UBLKCP)\b"),
        registers=usage["REG"],
        stack=usage["STACK"],
        spills=int(getattr(compiled.metadata, "n_spills", 0) or 0),
        local=sum(_count(sass, r"\b(LDL|STL)\b").values()),
        shared=compiled.metadata.shared,
        limit=spec.shared,
        loads=_loads_in_loop(sass),
        seconds=round(seconds, 2),
        triton=triton.__version__,
    )


def shortcomings(compiled: Compiled, configuration: Configuration) -> list[str]:
    """Lists what the machine code of a configuration must show and does not."""
    wanted = {90: "HGMMA", 100: "UTC"}.get(compiled.capability, "HMMA")
    if not _wide(configuration):
        wanted = "HMMA"
    found = []
    if not any(name.startswith(wanted) for name in compiled.matrix):
        found.append(f"no {wanted} instruction: {compiled.matrix}")
    general = configuration.epilogue == "general"
    gradient = configuration.kernel.startswith("wgrad")
    operands = 1 + configuration.taps if gradient else 2
    if not compiled.copies and not general:
        found.append("no asynchronous copies")
    # The word of a step of boxes is itself 64 bits wide.
    if compiled.loads > (configuration.kernel == "tma") and not general:
        found.append(f"{compiled.loads} synchronous loads in the loop")
    # mma.sync is done with its operands when the next copy starts, and needs one buffer less.
    # The parts of a split float32 are made in registers, which frees the buffer early too.
    ring = compiled.stages - (wanted == "HMMA" or configuration.precision == "tf32x3")
    # So does dy, which wgrad's boxes bring to registers.
    early = gradient and configuration.box is not None
    full = sum(count >= ring for count in compiled.buffers)
    present = sum(count >= ring - early for count in compiled.buffers)
    if (present < operands or full < operands - early) and not general:
        found.append(f"{compiled.buffers} buffers for {compiled.stages} stages of {operands}")
    if (compiled.stack or compiled.spills or compiled.local) and not general:
        found.append(
            f"{compiled.stack} B of stack, {compiled.spills} spills, "
            f"{compiled.local} local accesses"
        )
    if configuration.box is not None and not compiled.from_shared:
        found.append("an operand of the product goes through registers")
    if compiled.shared > compiled.limit:
        found.append(f"{compiled.shared} B of shared memory, {compiled.limit} there")
    return found


def _wide(configuration: Configuration) -> bool:
    """Whether wgmma takes this tile: 64 rows for four warps."""
    tile = configuration.tile
    rows = tile.filters if configuration.kernel.startswith("wgrad") else tile.pixels
    return rows >= 64 and tile.warps % 4 == 0


def _source(configuration: Configuration) -> tuple[Any, Any, Any, Any]:
    """Returns the kernel with its signature, constants and what is known of its arguments."""
    from hetconv_kernels.backends.triton.fprop import fprop_kernel_gather
    from hetconv_kernels.backends.triton.fprop_tma import fprop_kernel_tma
    from hetconv_kernels.backends.triton.wgrad import wgrad_kernel_gather
    from hetconv_kernels.backends.triton.wgrad_tma import wgrad_kernel_tma

    dtype, tile = configuration.dtype, configuration.tile
    unit = 16 // _ITEM[dtype]
    fused, general = (configuration.epilogue == name for name in ("fused", "general"))
    constants: dict[str, Any]
    descriptors: dict[str, list[int]] = {}
    if configuration.kernel == "gather":
        kernel: Any = fprop_kernel_gather
        pointers = {"x": dtype, "slabs": dtype, "y": dtype, "words": "i32", "starts": "i32"}
        pointers |= {"rows": "i32", "geometry": "i64"}
        if fused:
            pointers |= {"scale": "fp32", "shift": "fp32", "residual": dtype}
        if general:
            pointers |= {"shift": dtype}
        constants = {
            "BM": tile.pixels,
            "BN": tile.filters,
            "BK": tile.channels,
            "UNIT": 1 if general else unit,
            "ROW_UNIT": 1 if general else unit,
            "LAST": not general,
            "PADDED": True,
            "TAIL": fused or general,
            "SCATTER": general,
            "ACT": "relu" if fused else "gelu" if general else "none",
            "PRECISION": configuration.precision,
            "INTERPRETED": False,
        }
    elif configuration.kernel == "tma":
        assert configuration.box is not None
        kernel, box = fprop_kernel_tma, configuration.box
        whole = configuration.epilogue != "ragged"
        folded = configuration.epilogue == "folded"
        read = (
            [box.images, box.rows, 1, box.cols, tile.channels] if folded else [*box, tile.channels]
        )
        pointers = {"words": "i64", "starts": "i32", "rows": "i32", "geometry": "i64"}
        descriptors = {"xd": read, "wd": [tile.filters, tile.channels]}
        pointers |= {"y": dtype}
        if whole:
            descriptors["yd"] = [*box, tile.filters]
        else:
            pointers |= {"residual": dtype}
        if fused:
            descriptors["rd"] = [*box, tile.filters]
            pointers |= {"scale": "fp32", "shift": "fp32"}
        constants = {
            "BI": box.images,
            "BH": box.rows,
            "BW": box.cols,
            "BF": tile.filters,
            "BK": tile.channels,
            "ROW_UNIT": unit,
            "FOLD": folded,
            "WHOLE": whole,
            "SCATTER": not whole,
            "ACT": "relu" if fused else "none" if whole else "silu",
            "INTERPRETED": False,
        }
    elif configuration.box is not None:
        kernel, box = wgrad_kernel_tma, configuration.box
        pointers = {"partials": "fp32", "words": "i32", "owners": "i32", "rows": "i32"}
        pointers |= {"geometry": "i64"}
        descriptors = {"dyd": [*box, tile.filters], "xd": [*box, tile.channels]}
        constants = {
            "BI": box.images,
            "BH": box.rows,
            "BW": box.cols,
            "BF": tile.filters,
            "BC": tile.channels,
            "TAPS": configuration.taps,
            "ROW_UNIT": unit,
            "INTERPRETED": False,
        }
    else:
        kernel = wgrad_kernel_gather
        pointers = {"dy": dtype, "x": dtype, "partials": "fp32", "words": "i32", "owners": "i32"}
        pointers |= {"rows": "i32", "geometry": "i64"}
        constants = {
            "BP": tile.pixels,
            "BF": tile.filters,
            "BC": tile.channels,
            "TAPS": configuration.taps,
            "UNIT": 1 if general else unit,
            "ROW_UNIT": 1 if general else unit,
            "LAST_X": not general,
            "LAST_Y": not general,
            "SCATTER": general,
            "PRECISION": configuration.precision,
            "INTERPRETED": False,
        }
    names = kernel.arg_names
    types = {name: f"*{pointers[name]}" for name in pointers}
    types |= {name: f"tensordesc<{dtype}{shape}>" for name, shape in descriptors.items()}
    signature = {name: types.get(name, "constexpr") for name in names}
    given = {(names.index(name),): value for name, value in constants.items()}
    given |= {(i,): None for i, n in enumerate(names) if n not in types | constants}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in pointers}
    return kernel, signature, given, aligned


def _buffers(ttgir: str, configuration: Configuration) -> list[int]:
    """Lists the leading dimensions of the rings of buffers in shared memory."""
    found = re.findall(r"ttg\.local_alloc\s*:\s*\(\)\s*->\s*!ttg\.memdesc<((?:\d+x)+)[bf]", ttgir)
    shapes = [tuple(map(int, text.rstrip("x").split("x"))) for text in found]
    tile, box = configuration.tile, configuration.box
    if configuration.kernel != "tma" or box is None:
        return [s[0] for s in shapes]
    return [s[0] for s in shapes if s != (*box, tile.filters)]  # the result's own is no ring


def _count(text: str, pattern: str) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name in re.findall(pattern, text):
        counts[name] = counts.get(name, 0) + 1
    return counts


def _loads_in_loop(sass: str) -> int:
    """Counts wide synchronous loads in the shortest loop that multiplies.

    The word of the next step and its kin are scalars; only loads of 64 bits or more, or of a
    fraction of 32, feed the product.
    """
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", sass)
    places = [(int(address, 16), text) for address, text in lines]
    loops = []
    for address, text in places:
        jump = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
        if not jump or int(jump.group(1), 16) >= address:
            continue
        body = [t for a, t in places if int(jump.group(1), 16) <= a <= address]
        # Waits that are placed out of line, behind the program's end, jump back too: no loops.
        if not any("MMA" in t for t in body) or any(t.strip() == "EXIT" for t in body):
            continue
        loads = sum(bool(re.search(r"\bLDG\.E\.(U16|U8|128|64)", t)) for t in body)
        loops.append((len(body), loads))
    return min(loops, default=(0, 0))[1]


def _disassemble(cubin: bytes) -> tuple[str, dict[str, int]]:
    """Returns the machine code and the resources of a kernel, by the tools in Triton's wheel."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        sass, usage = (
            subprocess.run(
                [_tool("cuobjdump"), option, str(path)], capture_output=True, text=True, check=True
            ).stdout
            for option in ("-sass", "-res-usage")
        )
    found = dict(re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage))
    return sass, {name: int(value) for name, value in found.items()}


def _tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compiles, prints a line for each configuration, and fails when one shows a problem."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--capability", type=int, action="append", choices=CAPABILITIES)
    parser.add_argument("--name", default="", help="a regular expression that names must match")
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("The interpreter replaces the compiler: unset TRITON_INTERPRET.")
        return 2
    rows, failed = [], False
    for capability in options.capability or CAPABILITIES:
        for configuration in chosen(capability, options.name):
            compiled = compile_configuration(configuration, capability)
            wrong = shortcomings(compiled, configuration)
            failed |= bool(wrong)
            rows.append({**asdict(compiled), "problems": wrong})
            print(
                f"sm_{capability} {compiled.name:<34} {compiled.registers:>4} registers "
                f"{compiled.shared // 1024:>4} KB {compiled.stages} stages {compiled.buffers} "
                f"{compiled.seconds:>5} s  {'; '.join(wrong) or 'as it should be'}",
                flush=True,
            )
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
