# SPDX-License-Identifier: Apache-2.0
"""Checks a wheel, with the standard library and binutils: wheel.py FILE.

What it must hold and must not; that its names, versions and tags agree; and that its compiled parts
run on every processor of their kind: no flag asks for the build machine's own, and no function
outside those of one instruction set uses AVX. It ends with what the wheel needs of a system.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "hetconv_kernels"
# Flags that make code for the machine that builds. The dot product of aarch64 has no other one; it
# is that of a source which is chosen at run time.
NATIVE = re.compile(r"-m(?:arch|tune|cpu)=(?!(?:armv8\.2-a|generic)\+dotprod\b)[\w.+-]+|-xHost")
# A function of the engine that is compiled for one instruction set, by its mangled namespace.
ISA_FUNCTION = re.compile(
    r"NK?7hetconv(?:4avx2|6avx512|10avx512bf16|7generic)"
    r"|NK?7hetconv(?:9int8_avx2|12int8_avxvnni|15int8_avx512vnni|12int8_neondot|12int8_generic)"
    r"|kernels_avx(?:2|512|vnni)"
)
# AVX instructions begin with a v; these baseline ones do too.
BASELINE = {"verr", "verw", "vmcall", "vmfunc", "vmlaunch", "vmxoff", "vmxon"}
# What a compiled part may be linked to: the C and C++ runtime. OpenMP is torch's.
SYSTEM_LIBRARIES = re.compile(r"lib(?:c|m|stdc\+\+|gcc_s|pthread|dl|rt)\.so|ld-linux")


def problems(path: Path, python: str = "") -> list[str]:
    """Lists, in sentences, what is wrong with a wheel; empty when it is right.

    Args:
        path: the wheel.
        python: whose tag a wheel with compiled parts has, as cp311; by default that of this one.
    """
    with zipfile.ZipFile(path) as wheel, tempfile.TemporaryDirectory() as folder:
        files = {name: wheel.read(name) for name in wheel.namelist()}
        found = [*_names(path, files, python), *_contents(files), *_flags(files)]
        for name in parts(files):
            library = Path(wheel.extract(name, folder))
            found += [f"{name}: {problem}" for problem in _binary(library)]
    return found


def parts(files: dict[str, bytes]) -> list[str]:
    """Names the compiled parts."""
    return [name for name in files if name.endswith(".so")]


def version() -> str:
    """Reads the version from the one place where it stands."""
    text = (ROOT / PACKAGE / "_version.py").read_text()
    return re.findall(r'__version__ = "(.*)"', text)[0]


def _names(path: Path, files: dict[str, bytes], python: str) -> list[str]:
    """Compares the file's name, its metadata and the tree."""
    name, named_version, *tags = path.stem.split("-")
    info = f"{PACKAGE}-{version()}.dist-info"
    if f"{info}/METADATA" not in files:
        return [f"There is no {info}/METADATA: the version is not that of _version.py."]
    metadata, wheel = files[f"{info}/METADATA"].decode(), files[f"{info}/WHEEL"].decode()
    here = f"cp{sys.version_info.major}{sys.version_info.minor}"
    wanted = (python or here) if parts(files) else "py3"
    tag, pure = "-".join(tags), "false" if parts(files) else "true"
    facts = {
        f"The file is called {path.name}": (name, named_version) == (PACKAGE, version()),
        f"The tag is {tag}, expected it to begin with {wanted}": tag.startswith(wanted),
        f"WHEEL does not name the tag {tag}": f"Tag: {tag}\n" in wheel,
        f"WHEEL does not say Root-Is-Purelib: {pure}": f"Root-Is-Purelib: {pure}" in wheel,
        "METADATA names another version": f"\nVersion: {version()}\n" in metadata,
        "METADATA names no licence": "\nLicense-Expression: Apache-2.0\n" in metadata,
        "METADATA names no Python": "\nRequires-Python: " in metadata,
        "The licence is missing": f"{info}/licenses/LICENSE" in files,
        "The console script is missing": b"hetconv = "
        in files.get(f"{info}/entry_points.txt", b""),
    }
    return [f"{sentence}." for sentence, right in facts.items() if not right]


def _contents(files: dict[str, bytes]) -> list[str]:
    """Compares the files with those of the tree."""
    strange = {name.split("/")[0] for name in files} - {PACKAGE}
    found = [
        f"{name} does not belong in a wheel." for name in sorted(strange) if ".dist" not in name
    ]
    return found + [f"{name} is missing." for name in sorted(wanted() - files.keys())]


def wanted() -> set[str]:
    """Names the files of the package that every wheel has: code, types and data."""
    return {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / PACKAGE).rglob("*")
        if path.is_file() and path.suffix not in (".so", ".pyc") and path.name != "_build.json"
    }


def _flags(files: dict[str, bytes]) -> list[str]:
    """Looks for the build machine's own processor in the recorded flags."""
    if not parts(files):
        return []
    record = files.get(f"{PACKAGE}/_build.json")
    if record is None:
        return [f"{PACKAGE}/_build.json, the record of the build, is missing."]
    return [
        f"{name} was built with {flag}."
        for name, part in json.loads(record)["parts"].items()
        for flag in NATIVE.findall(json.dumps(part))
    ]


def _binary(library: Path) -> list[str]:
    """Looks into a compiled part: what it is linked to, and where it uses AVX."""
    needed = re.findall(r"NEEDED\s+(\S+)", _objdump("-p", library))
    found = [f"it needs {name}." for name in needed if not SYSTEM_LIBRARIES.match(name)]
    if "x86-64" not in _objdump("-f", library):
        return found
    strayed, own = outside(_objdump("-d", library))
    if not own and library.name.startswith("_cpu."):
        found.append("no function of an instruction set was found: are the symbols gone?")
    return found + [f"{name} uses AVX and belongs to no instruction set." for name in strayed]


def outside(listing: str) -> tuple[list[str], int]:
    """Names the functions of a disassembly that use AVX and belong to no instruction set.

    Returns:
        Their names, and how many AVX instructions the functions of an instruction set have.
    """
    found: list[str] = []
    function, own = "", 0
    for line in listing.splitlines():
        head = re.match(r"^[0-9a-f]+ <(.+)>:$", line)
        if head:
            function = head[1]
            continue
        columns = line.split("\t")
        mnemonic = columns[2].split(" ")[0] if len(columns) > 2 else ""
        if mnemonic.startswith("v") and mnemonic not in BASELINE:
            if ISA_FUNCTION.search(function):
                own += 1
            elif function not in found:
                found.append(function)
    return found, own


def needs(library: Path) -> str:
    """Says the newest versions of the system's libraries that a part needs."""
    text = _objdump("-T", library)
    newest = {}
    for name, number in re.findall(r"\b(GLIBC|GLIBCXX|CXXABI|GOMP|OMP)_([\d.]+)", text):
        newest[name] = max(newest.get(name, (0,)), tuple(map(int, number.split("."))))
    return ", ".join(f"{k} {'.'.join(map(str, v))}" for k, v in sorted(newest.items()))


def _objdump(option: str, library: Path) -> str:
    done = subprocess.run(
        ["objdump", option, str(library)], capture_output=True, text=True, check=True
    )
    return done.stdout


def report(path: Path, python: str = "") -> int:
    """Prints what is wrong with a wheel, and what it needs of a system.

    Returns:
        The number of problems.
    """
    found = problems(path, python)
    for problem in found:
        print(f"{path.name}: {problem}", file=sys.stderr)
    with zipfile.ZipFile(path) as wheel, tempfile.TemporaryDirectory() as folder:
        for name in (name for name in wheel.namelist() if name.endswith(".so")):
            print(f"{name} needs {needs(Path(wheel.extract(name, folder)))}")
    print(f"{path.name}: {len(found)} problems")
    return len(found)


def main() -> int:
    """Checks the wheel that the command line names."""
    if shutil.which("objdump") is None:
        print("wheel.py needs objdump (binutils) to look into compiled parts.", file=sys.stderr)
        return 2
    return int(report(Path(sys.argv[1])) > 0)


if __name__ == "__main__":
    raise SystemExit(main())
