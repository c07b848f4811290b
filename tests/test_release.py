# SPDX-License-Identifier: Apache-2.0
"""The check of wheels: on wheels made here with one thing wrong each, and on the tree's build."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("wheel_check", ROOT / ".ci" / "wheel.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check = _load()
INFO = f"hetconv_kernels-{check.version()}.dist-info"
COMPILED = f"cp{sys.version_info.major}{sys.version_info.minor}"
Files = dict[str, bytes]


def good() -> Files:
    """The files of a wheel without compiled parts that has nothing wrong."""
    files = {name: (ROOT / name).read_bytes() for name in check.wanted()}
    metadata = (
        f"Metadata-Version: 2.4\nName: hetconv-kernels\nVersion: {check.version()}\n"
        "License-Expression: Apache-2.0\nRequires-Python: >=3.11,<3.14\n"
    )
    return files | {
        f"{INFO}/METADATA": metadata.encode(),
        f"{INFO}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{INFO}/licenses/LICENSE": (ROOT / "LICENSE").read_bytes(),
        f"{INFO}/entry_points.txt": b"[console_scripts]\nhetconv = hetconv_kernels.cli:main\n",
    }


def write(folder: Path, files: Files, tag: str = "py3-none-any") -> Path:
    path = folder / f"hetconv_kernels-{check.version()}-{tag}.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in files.items():
            wheel.writestr(name, content)
    return path


def test_a_good_wheel_has_no_problems(tmp_path: Path) -> None:
    assert check.problems(write(tmp_path, good())) == []


def without(name: str) -> Callable[[Files], Files]:
    return lambda files: {key: value for key, value in files.items() if key != name}


def replaced(name: str, old: str, new: str) -> Callable[[Files], Files]:
    return lambda files: files | {name: files[name].replace(old.encode(), new.encode())}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (without("hetconv_kernels/py.typed"), "py.typed is missing"),
        (without("hetconv_kernels/backends/triton/table.json"), "table.json is missing"),
        (without("hetconv_kernels/backends/gpu/constants.json"), "constants.json is missing"),
        (without("hetconv_kernels/_cpu.pyi"), "_cpu.pyi is missing"),
        (without(f"{INFO}/licenses/LICENSE"), "The licence is missing"),
        (without(f"{INFO}/entry_points.txt"), "The console script is missing"),
        (without(f"{INFO}/METADATA"), "the version is not that of _version.py"),
        (lambda files: files | {"tests/test_x.py": b""}, "tests does not belong"),
        (lambda files: files | {"benchmarks/x.py": b""}, "benchmarks does not belong"),
        (replaced(f"{INFO}/METADATA", check.version(), "9.9"), "names another version"),
        (replaced(f"{INFO}/METADATA", "Apache", "MIT"), "names no licence"),
        (replaced(f"{INFO}/WHEEL", "py3-none-any", "cp311-abi3-any"), "does not name the tag"),
        (replaced(f"{INFO}/WHEEL", "true", "false"), "Root-Is-Purelib"),
    ],
)
def test_each_mistake_is_found(change: Callable[[Files], Files], says: str, tmp_path: Path) -> None:
    found = check.problems(write(tmp_path, change(good())))
    assert any(says in problem for problem in found), found


@pytest.mark.parametrize("flag", ["-march=native", "-march=x86-64-v4", "-mtune=native", "-xHost"])
@pytest.mark.parametrize("where", ["flags", "source_flags"])
def test_flags_for_one_machine_are_found(flag: str, where: str) -> None:
    part = {"built": True, "flags": "-O3", "source_flags": {"isa_avx2": "-mavx2"}}
    record = {"parts": {"_cpu": part}}
    files = {"hetconv_kernels/_cpu.so": b"", "hetconv_kernels/_build.json": b""}
    files["hetconv_kernels/_build.json"] = json.dumps(record).encode()
    assert check._flags(files) == []
    part[where] = f"-O3 {flag}" if where == "flags" else {"engine": flag}
    files["hetconv_kernels/_build.json"] = json.dumps(record).encode()
    assert check._flags(files) == [f"_cpu was built with {flag}."]
    del files["hetconv_kernels/_build.json"]
    assert "missing" in check._flags(files)[0]


LISTING = """\
0000000000001000 <_ZN7hetconv4avx25fpropEv>:
    1000:\tc5 fc 28 c1          \tvmovaps %ymm1,%ymm0
0000000000002000 <_ZNSt6vectorIiE9push_backEv>:
    2000:\t0f 28 c1             \tmovaps %xmm1,%xmm0
"""


def test_avx_outside_of_its_instruction_set_is_found() -> None:
    assert check.outside(LISTING) == ([], 1)
    strayed = LISTING.replace("\tmovaps %xmm1,%xmm0", "\tvmovaps %xmm1,%xmm0")
    assert check.outside(strayed) == (["_ZNSt6vectorIiE9push_backEv"], 1)
    # Without names nothing can be told apart, which is a problem and no pass.
    assert check.outside(LISTING.replace("_ZN7hetconv4avx25fpropEv", ".text")) == ([".text"], 0)


def test_a_part_without_its_functions_is_no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"-p": "  NEEDED  libm.so.6\n", "-f": "file format elf64-x86-64", "-d": ""}
    monkeypatch.setattr(check, "_objdump", lambda option, library: said[option])
    assert "no function of an instruction set" in check._binary(Path("_cpu.x.so"))[0]
    assert check._binary(Path("_cuda.x.so")) == []
    for library in ("libtorch.so", "libgomp.so.1", "libomp.so.5"):  # OpenMP is torch's
        said["-p"] = f"  NEEDED  {library}\n"
        assert check._binary(Path("_cuda.x.so")) == [f"it needs {library}."]


def test_the_build_of_this_tree_runs_on_every_processor_of_its_kind() -> None:
    library = next((ROOT / "hetconv_kernels").glob("_cpu*.so"), None)
    if library is None or shutil.which("objdump") is None:
        pytest.skip("there is no compiled part here, or no objdump to look into it")
    if "asan" in check._objdump("-p", library):
        pytest.skip("this build has sanitizers in it")
    assert check._binary(library) == []
    assert "GLIBC" in check.needs(library)


def test_no_flag_of_the_build_script_is_for_one_machine() -> None:
    text = (ROOT / "setup.py").read_text().replace("never with ``-march", "")
    assert 'arm_flags={"int8_neondot": "-march=armv8.2-a+dotprod"}' in text
    text = text.replace('"-march=armv8.2-a", "-mcpu=generic"', "")  # what it is called by a clang
    assert check.NATIVE.findall(text) == []


def test_the_manifest_takes_what_the_commands_need() -> None:
    manifest = (ROOT / "MANIFEST.in").read_text()
    for name in ("csrc", "constraints", "tests", "benchmarks", "docs", "examples", ".ci"):
        assert f"graft {name}\n" in manifest
    assert "mkdocs.yml" in manifest
