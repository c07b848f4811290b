# SPDX-License-Identifier: Apache-2.0
"""What nvcc makes of the kernels of csrc/cuda: registers, spills and machine code, without a GPU.

    python tests/machine_code.py [80 90a ...]

writes what it finds to ``tests/machine_code.json``, which `test_cuda_code` compares with.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from bisect import bisect_left
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from functools import cache, lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from machine_limits import problems

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "cuda-code"
EXPECTED = ROOT / "tests" / "machine_code.json"
_PTXAS = re.compile(
    r"Function properties for (\S+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, "
    r"(\d+) bytes spill loads\s+ptxas info\s+: Used (\d+) registers(?:.*?(\d+) bytes smem)?"
)
# Instructions of the integer pipe and of that of IMAD, which take half of a warp a clock each
# (CUDA C++ Programming Guide, "Arithmetic Instructions", compute capability 9.0).
_ALU = frozenset(
    [
        "F2FP",
        "FMNMX",
        "FSEL",
        "FSETP",
        "HMNMX2",
        "IADD3",
        "ISETP",
        "LEA",
        "LOP3",
        "PLOP3",
        "PRMT",
        "SEL",
        "SHF",
        "VIADD",
        "VIMNMX",
    ]
)
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,6})\*/\s+(?:@!?U?P\w+\s+)?(.*?);")


@dataclass(frozen=True)
class Code:
    """What nvcc made of one kernel for one architecture.

    Attributes:
        name: with its template arguments.
        architecture: as "90a".
        registers: of one thread.
        stack: bytes of local memory of one thread.
        spills: bytes spilled, stores and loads.
        shared: bytes of static shared memory.
        matrix: matrix instructions, by name.
        copies: asynchronous copies, by name; ARRIVES has a barrier count their end.
        local: loads and stores of local memory.
        described: HGMMA whose operands both lie in shared memory.
        losses: warnings of ptxas, such as that wgmma is serialized.
        turn: instructions for each LDGSTS of the shortest loop that has one; 0 without such.
        step: instructions of the shortest loop of HGMMA for each four of them, which are a step.
        products: instructions for each HMMA of the shortest loop that has one; 0 without such.
        traffic: bytes that this loop, or that of HGMMA, moves for each product of a warp (HGMMA: of
            a warpgroup): ``shared`` from and to shared memory, operands in it included; ``global``
            asked of L1 and L2 by loads. Copies by other warps are not in it. **Predicted**: lanes
            that are switched off count, and none meets another in a bank.
        results: clocks in which a warp brings its part of 32 pixels from registers to memory,
            no residual added: what it issues, or half-rate instructions, whichever take longer; 0
            where results are not written in such parts. **Predicted**, latencies left out.
    """

    name: str
    architecture: str
    registers: int
    stack: int
    spills: int
    shared: int
    matrix: dict[str, int]
    copies: dict[str, int]
    local: int
    described: int = 0
    losses: int = 0
    turn: float = 0.0
    step: float = 0.0
    products: float = 0.0
    traffic: dict[str, float] = field(default_factory=dict)
    results: float = 0.0


@cache
def build() -> ModuleType:
    """Imports setup.py, which has the flags and the architectures."""
    spec = importlib.util.spec_from_file_location("hetconv_setup_of_code", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look annotations up
    spec.loader.exec_module(module)
    return module


def absent() -> str:
    """Says in a sentence what is missing to compile and disassemble; empty when nothing is."""
    try:
        build().nvcc()
    except build().PartError as error:
        return str(error)
    if disassembler() is None:
        return "cuobjdump is neither on the path nor in Triton's package"
    return "" if shutil.which("c++filt") else "c++filt is not installed"


def disassembler() -> str | None:
    """Finds cuobjdump, which Triton's package brings along."""
    spec = importlib.util.find_spec("triton")
    if spec is not None and spec.origin:
        path = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        if path.exists():
            return str(path)
    return shutil.which("cuobjdump")


@cache
def release() -> str:
    """Returns the release of nvcc, which the numbers depend on."""
    return str(build().first_line([build().nvcc()], "release"))


def sources_of(architecture: str) -> list[Path]:
    """Lists the sources that have kernels for an architecture."""
    part = next(part for part in build().PARTS if part.cuda)
    sources: list[Path] = [path for path in part.sources() if path.suffix == ".cu"]
    return [path for path in sources if architecture in part.only.get(path.stem, architecture)]


def digest(architecture: str) -> str:
    """Names by their contents the sources and flags that an architecture's rows are made from."""
    part = next(part for part in build().PARTS if part.cuda)
    found = hashlib.sha256(part.flags.encode())
    sources = sources_of(architecture)
    headers = {header for source in sources for header in included(source)}
    for path in (*sources, *sorted(headers)):
        found.update(f"{path.name} {bare(path.read_text())}".encode())
    return found.hexdigest()[:16]


def included(source: Path) -> set[Path]:
    """Lists the headers of this tree that a source includes, and those that these do.

    Example: what comes to shared memory for wide groups is nothing to the narrow ones:

        >>> names = {path.name for path in included(ROOT / "csrc" / "cuda" / "narrow_fprop.cu")}
        >>> "narrow.h" in names, "types.h" in names, "wide.h" in names
        (True, True, False)
    """
    found: set[Path] = set()
    left = [source]
    while left:
        path = left.pop()
        for name in re.findall(r'^#include "([^"]+)"', path.read_text(), re.M):
            header = (path.parent / name).resolve()
            if header.exists() and header not in found:
                found.add(header)
                left.append(header)
    return found


def bare(text: str) -> str:
    """Returns C++ without comments and spaces, which no compiler reads."""
    return "".join(re.sub(r"//[^\n]*", "", text).split())


def rows(architecture: str) -> list[Code]:
    """Compiles for one architecture what is not known yet; returns a row for each kernel."""
    part, sources = next(part for part in build().PARTS if part.cuda), sources_of(architecture)
    found = []
    FOLDER.mkdir(parents=True, exist_ok=True)

    def compiled(source: Path) -> list[dict[str, Any]]:
        what = [part.flags, release(), *(field.name for field in fields(Code))]
        texts = [path.read_bytes() for path in (source, *sorted(included(source)))]
        key = hashlib.sha256(b"".join(texts) + " ".join(what).encode()).hexdigest()[:16]
        path = FOLDER / f"{source.stem}-sm{architecture}-{key}.json"
        if not path.exists():
            half = path.with_suffix(f".{os.getpid()}.part")
            half.write_text(json.dumps([asdict(c) for c in _compile(source, architecture)]))
            half.replace(path)
        kept: list[dict[str, Any]] = json.loads(path.read_text())
        return kept

    with ThreadPoolExecutor(build().jobs()) as pool:
        for kernels in pool.map(compiled, sources):
            found += [Code(**kernel) for kernel in kernels]
    return sorted(found, key=lambda code: code.name)


def _compile(source: Path, architecture: str) -> list[Code]:
    part = next(part for part in build().PARTS if part.cuda)
    cubin = FOLDER / f"{source.stem}-sm{architecture}-{os.getpid()}.cubin"
    target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    command = [build().nvcc(), *part.flags.split(), "-DNDEBUG", target, "-Xptxas=-v"]
    done = subprocess.run(
        [*command, "-cubin", str(source), "-o", str(cubin)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    tool = disassembler()
    assert tool is not None
    sass = subprocess.run(
        [tool, "-sass", str(cubin)], capture_output=True, text=True, check=True
    ).stdout
    cubin.unlink()
    return read(architecture, done.stdout + done.stderr, sass)


def read(architecture: str, said: str, sass: str) -> list[Code]:
    """Reads what ptxas said, and the disassembly."""
    _, *parts = re.split(r"\n\s*Function : (\S+)\n", sass)
    bodies = dict(zip(parts[::2], parts[1::2], strict=True))
    found = []
    for name, stack, stores, loads, registers, shared in _PTXAS.findall(said):
        body = bodies[name]
        code = "\n".join(_loops(body)[0])
        found.append(
            Code(
                name=_plain(name),
                architecture=architecture,
                registers=int(registers),
                stack=int(stack),
                spills=int(stores) + int(loads),
                shared=int(shared or 0),
                matrix=_count(code, r"\b(HGMMA|UTC[A-Z]*MMA|HMMA)\b"),
                copies=_count(code, r"\b(LDGSTS|UTMALDG|UBLKCP|ARRIVES)\b"),
                local=sum(_count(code, r"\b(LDL|STL)\b").values()),
                described=len(re.findall(r"\bHGMMA\S* R\d+, gdesc\[", code)),
                turn=_turn(body, "LDGSTS"),
                step=4 * _turn(body, "HGMMA"),
                products=_turn(body, "HMMA"),
                traffic=_traffic(body),
                results=_results(body),
                losses=len(re.findall(rf"^ptxas .*(?:warn|Potential).*{name}.*$", said, re.M)),
            )
        )
    assert len(found) == len(bodies), (len(found), sorted(bodies))
    return found


def _loop(body: str, name: str) -> list[str]:
    """Lists the instructions of the shortest loop that has one of some name; none without such."""
    texts, loops = _loops(body)
    named = [place for place, text in enumerate(texts) if text.startswith(name)]

    def count(loop: slice) -> int:
        return bisect_left(named, loop.stop) - bisect_left(named, loop.start)

    found = [loop for loop in loops if count(loop)]
    if not found:
        return []
    return texts[min(found, key=lambda loop: (loop.stop - loop.start, count(loop)))]


@lru_cache(maxsize=1)
def _loops(body: str) -> tuple[list[str], list[slice]]:
    """Lists the instructions, and which of them each jump backwards repeats."""
    listed = [(int(place, 16), text) for place, text in _INSTRUCTION.findall(body)]
    places, texts = [place for place, _ in listed], [text for _, text in listed]
    found = []
    for index, (end, text) in enumerate(listed):
        jump = re.match(r"BRA\b.*?0x([0-9a-f]+)", text)
        if jump and (begin := int(jump[1], 16)) <= end:
            found.append(slice(bisect_left(places, begin), index + 1))
    return texts, found


def _named(loop: list[str], name: str) -> int:
    return sum(text.startswith(name) for text in loop)


def _turn(body: str, name: str) -> float:
    """Counts the instructions for each of some name in the shortest loop that has one."""
    loop = _loop(body, name)
    return len(loop) / _named(loop, name) if loop else 0.0


def _traffic(body: str) -> dict[str, float]:
    """Counts bytes for each product of the shortest loop that has one; see `Code`."""
    loop = _loop(body, "HGMMA") or _loop(body, "HMMA")
    found = {"shared": 0, "global": 0}
    for text in loop:
        name, *kinds = text.split()[0].split(".")
        if name == "HGMMA":
            rows, columns, depth = (int(size) for size in kinds[0].split("x"))
            both = re.match(r"HGMMA\S* R\d+, gdesc\[", text)
            found["shared"] += 2 * depth * (columns + (rows if both else 0))
        elif name in ("LDSM", "STSM"):
            found["shared"] += 128 * int(kinds[-1] if kinds[-1].isdigit() else 1)
        elif name in ("LDS", "STS", "LDG", "STG", "LDGSTS"):
            widths = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
            width = next((widths[kind] for kind in kinds if kind in widths), 4)
            if name in ("LDS", "STS", "LDGSTS"):
                found["shared"] += 32 * width
            if name in ("LDG", "STG", "LDGSTS"):
                found["global"] += 32 * width
    count = _named(loop, "HGMMA") or _named(loop, "HMMA")
    return {kind: round(number / count, 2) for kind, number in found.items()} if count else {}


def _results(body: str) -> float:
    """Predicts the clocks from one part of the results to the next, each of two STSM."""
    names = [text.split()[0].split(".")[0] for _, text in _INSTRUCTION.findall(body)]
    stored = [place for place, name in enumerate(names) if name == "STSM"]
    found = []
    for begin, end in zip(stored, stored[2:], strict=False):
        part = names[begin:end]
        if "LDSM" not in part and "HGMMA" not in part and "EXIT" not in part:
            slow = sum(name in _ALU for name in part), sum(name == "IMAD" for name in part)
            found.append(float(max(len(part), 2 * slow[0], 2 * slow[1])))
    return sorted(found)[len(found) // 2] if found else 0.0


def _plain(name: str) -> str:
    """Returns a kernel's name without namespaces and arguments."""
    long = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout
    spaces = r"\(anonymous namespace\)::|hetconv::cuda::|(wide|narrow|wgrad|scattered)::|^void "
    short = re.sub(spaces, "", long.strip())
    return short[: short.rindex("(")]


def _count(text: str, pattern: str) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name in re.findall(pattern, text):
        counts[name] = counts.get(name, 0) + 1
    return counts


def main() -> None:
    """Writes the committed rows, of all architectures or of those that are named."""
    names = sys.argv[1:] or build().ARCHITECTURES
    known = json.loads(EXPECTED.read_text()) if EXPECTED.exists() else {}
    table, sources = known.get("rows", {}), known.get("sources", {})
    for name in names:
        kernels = {}
        for code in rows(name):
            row = asdict(code)
            kernels[row.pop("name")] = row
            print(f"sm_{name} {code.name:<50} {code.registers:>4} registers {problems(code)}")
        table[name], sources[name] = kernels, digest(name)
    text = json.dumps({"nvcc": release(), "sources": sources, "rows": table}, indent=1)
    EXPECTED.write_text(text + "\n")


if __name__ == "__main__":
    main()
