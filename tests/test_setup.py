# SPDX-License-Identifier: Apache-2.0
"""The build of the compiled parts: its states, what it compiles again, and what it links.

A stand-in for nvcc, which writes down its calls, shows the logic everywhere; what the real one made
is looked at where the CUDA part is built.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import machine_code
import pytest

ROOT = Path(__file__).resolve().parents[1]
NVCC = """#!/bin/sh
echo "$@" >> "$(dirname "$0")/calls"
case "$*" in
    --version) echo "Cuda compilation tools, release 13.0, V13.0.88"; exit;;
    --list-gpu-code) echo sm_80; echo sm_90; echo sm_120; exit;;
esac
[ -z "$REFUSED" ] || { echo "fatal error: unsupported GNU version!"; exit 1; }
while [ "$1" != -o ]; do shift; done
echo made > "$2"
"""


@pytest.fixture(scope="module")
def build() -> ModuleType:
    pytest.importorskip("setuptools")
    return machine_code.build()


class Tree:
    """A small tree with a CUDA part, and a stand-in for nvcc beside it."""

    def __init__(self, folder: Path) -> None:
        self.root, self.tools = folder / "tree", folder / "tools"
        (self.root / "csrc" / "cuda").mkdir(parents=True)
        (self.root / "hetconv_kernels").mkdir()
        self.tools.mkdir()
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, self.root / name)
        for name in ("__init__.py", "_version.py"):
            text = '__version__ = "1.0"\n' if name == "_version.py" else ""
            (self.root / "hetconv_kernels" / name).write_text(text)
        for name in ("cuda/bindings.cpp", "cuda/kernel.cu", "cuda/kernel.h", "names.h"):
            (self.root / "csrc" / name).write_text("// nothing\n")

    def nvcc(self) -> None:
        path = self.tools / "nvcc"
        path.write_text(NVCC)
        path.chmod(0o755)

    def build(self, **environment: str) -> subprocess.CompletedProcess[str]:
        (self.tools / "calls").write_text("")
        kept = {k: v for k, v in os.environ.items() if not re.match("HETCONV|CUDA|NVCC|CXX", k)}
        kept["NVCC"] = str(self.tools / "nvcc")
        # Asked for, or a torch without CUDA in this environment would leave it out.
        kept["HETCONV_CUDA_ARCHS"] = "all"
        return subprocess.run(
            [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
            cwd=self.root,
            env=kept | environment,
            capture_output=True,
            text=True,
            check=False,
        )

    def calls(self) -> list[str]:
        """Lists what nvcc compiled and linked in the last build."""
        lines = (self.tools / "calls").read_text().splitlines()
        return [line for line in lines if " -o " in line]

    @property
    def facts(self) -> Any:
        return json.loads((self.root / "hetconv_kernels" / "_build.json").read_text())

    @property
    def binaries(self) -> list[Path]:
        return list((self.root / "hetconv_kernels").glob("_cuda*.so"))


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    pytest.importorskip("setuptools")
    pytest.importorskip("pybind11")
    if not shutil.which("g++"):
        pytest.skip("no C++ compiler, which nvcc itself needs")
    return Tree(tmp_path)


@pytest.mark.parametrize("mode", ["auto", "require"])
def test_a_machine_without_nvcc_is_a_state(tree: Tree, mode: str) -> None:
    done = tree.build(HETCONV_BUILD=mode)
    assert done.returncode == 0, done.stderr
    assert "install the CUDA toolkit" in done.stderr
    assert "other backends serve every layer on a GPU" in done.stderr
    assert tree.facts["state"] == "nothing compiled"
    assert "was not found" in tree.facts["parts"]["_cuda"]["reason"]
    assert not tree.binaries


def test_architectures_that_were_named_are_required(tree: Tree) -> None:
    done = tree.build(HETCONV_BUILD="require", HETCONV_CUDA_ARCHS="80")
    assert done.returncode != 0
    assert "was not found" in done.stderr


def test_it_can_be_left_out(tree: Tree) -> None:
    tree.nvcc()
    assert tree.build(HETCONV_CUDA_ARCHS="none", HETCONV_BUILD="require").returncode == 0
    assert tree.facts["parts"]["_cuda"]["reason"] == "HETCONV_CUDA_ARCHS=none leaves it out"
    assert tree.calls() == []


def test_what_is_up_to_date_is_not_compiled_again(tree: Tree) -> None:
    tree.nvcc()
    done = tree.build()
    assert done.returncode == 0, done.stderr
    assert len(tree.calls()) == 3  # two sources and a binary
    facts = tree.facts
    assert facts["state"] == "cuda"
    assert facts["parts"]["_cuda"]["architectures"] == ["80", "90a", "120"]  # what this nvcc knows
    assert "release 13.0" in facts["parts"]["_cuda"]["nvcc"]
    assert len(tree.binaries) == 1
    assert tree.build().returncode == 0
    assert tree.calls() == []
    assert tree.facts == facts
    source = tree.root / "csrc" / "cuda" / "kernel.cu"
    os.utime(source, (time.time() + 5,) * 2)
    tree.build()
    first, last = tree.calls()
    assert "kernel.cu" in first
    assert "-shared" in last
    shared = tree.root / "csrc" / "names.h"  # of all engines
    os.utime(shared, (time.time() + 5,) * 2)
    tree.build()
    assert len(tree.calls()) == 3


def test_kernels_are_compiled_for_what_was_asked(tree: Tree) -> None:
    tree.nvcc()
    assert tree.build(HETCONV_CUDA_ARCHS="90a", CXX="g++", MAX_JOBS="3").returncode == 0
    (kernel,) = (call for call in tree.calls() if "kernel.cu" in call)
    words = kernel.split()
    assert [word for word in words if "gencode" in word] == [
        "-gencode=arch=compute_90a,code=sm_90a"
    ]
    assert {"-DNDEBUG", "-ccbin=g++", "--threads=3", "-Xcompiler=-fPIC"} <= set(words)
    link = tree.calls()[-1].split()
    assert "-cudart=static" in link
    assert "-lcuda" not in link


def test_a_checked_build_is_another_one(tree: Tree) -> None:
    """It is compiled anew where an ordinary one is up to date, and said in the record."""
    tree.nvcc()
    compiled = []
    for environment in ({}, {"HETCONV_CHECKED": "1"}, {"HETCONV_CHECKED": "1"}, {}):
        assert tree.build(**environment).returncode == 0
        kernels = [call for call in tree.calls() if "kernel.cu" in call]
        compiled.append(["-DHETCONV_CHECKED" in call.split() for call in kernels])
        recorded = tree.facts["parts"]["_cuda"]["flags"].split()
        assert ("-DHETCONV_CHECKED" in recorded) == bool(environment)
    assert compiled == [[False], [True], [], []]  # the objects of both are kept
    assert tree.calls()[-1].split()[0] == "-shared"


def test_a_source_of_one_architecture_is_built_for_no_other(tree: Tree) -> None:
    tree.nvcc()
    (tree.root / "csrc" / "cuda" / "wide_fprop.cu").write_text("// nothing\n")
    built = {}
    for wish in ("80,90a", "80"):
        assert tree.build(HETCONV_CUDA_ARCHS=wish).returncode == 0
        for call in tree.calls():
            codes = re.findall(r",code=(\w+)", call)
            built |= {
                (wish, name): codes for name in ("wide_fprop", "kernel") if f"/{name}.cu" in call
            }
    assert built["80,90a", "wide_fprop"] == ["sm_90a"]
    assert built["80,90a", "kernel"] == ["sm_80", "sm_90a"]
    # Without a kernel, for what it launches nothing on.
    assert built["80", "wide_fprop"] == built["80", "kernel"] == ["sm_80"]


def test_a_compiler_that_refuses_is_reported(tree: Tree) -> None:
    tree.nvcc()
    tree.build()
    assert tree.binaries
    (tree.root / "csrc" / "cuda" / "kernel.cu").write_text("// changed\n")
    done = tree.build(REFUSED="1", HETCONV_CUDA_ARCHS="80")
    assert done.returncode == 0
    assert "unsupported GNU version" in tree.facts["parts"]["_cuda"]["reason"]
    assert not tree.binaries, "the binary of other sources would be loaded in its stead"
    assert tree.build(REFUSED="1", HETCONV_BUILD="require").returncode != 0


def test_a_binary_that_came_with_the_tree_is_kept_where_there_is_no_nvcc(tree: Tree) -> None:
    tree.nvcc()
    tree.build()
    facts = tree.facts
    (tree.tools / "nvcc").unlink()
    shutil.rmtree(tree.root / "build")
    tree.build()
    assert tree.binaries
    assert tree.facts == facts
    (tree.root / "csrc" / "cuda" / "kernel.h").write_text("// changed\n")
    tree.build()
    assert not tree.binaries


def torch_of(folder: Path, version: str, cuda: str) -> str:
    """Puts a torch of that kind there, as far as it is read; returns a PYTHONPATH with it."""
    (folder / "torch").mkdir(parents=True)
    (folder / "torch" / "version.py").write_text(
        f"from typing import Optional\n__version__ = {version!r}\ndebug = False\n"
        f"cuda: Optional[str] = {cuda}\ngit_version = 'abc'\nhip: Optional[str] = None\n"
    )
    return str(folder)


def test_a_torch_without_cuda_leaves_the_cuda_part_out(tree: Tree, tmp_path: Path) -> None:
    tree.nvcc()
    path = torch_of(tmp_path / "cpu", "2.13.0+cpu", "None")
    done = tree.build(HETCONV_CUDA_ARCHS="", PYTHONPATH=path, HETCONV_BUILD="require")
    assert done.returncode == 0, done.stderr
    assert tree.calls() == []
    reason = tree.facts["parts"]["_cuda"]["reason"]
    assert "the installed torch, 2.13.0+cpu, is a build without CUDA" in reason
    assert "HETCONV_CUDA_ARCHS=all" in reason
    assert reason in done.stderr


@pytest.mark.parametrize("wish", ["all", "80", "native"])
def test_it_is_built_for_a_torch_without_cuda_when_asked(
    tree: Tree, tmp_path: Path, wish: str
) -> None:
    tree.nvcc()
    path = torch_of(tmp_path / "cpu", "2.13.0+cpu", "None")
    assert tree.build(HETCONV_CUDA_ARCHS=wish, PYTHONPATH=path).returncode == 0
    assert tree.facts["state"] == "cuda"


def test_a_torch_with_cuda_has_it_built_and_the_minutes_are_announced(
    tree: Tree, tmp_path: Path
) -> None:
    tree.nvcc()
    path = torch_of(tmp_path / "cuda", "2.13.0", "'13.0'")
    done = tree.build(HETCONV_CUDA_ARCHS="", PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    assert tree.facts["state"] == "cuda"
    assert "3 GPU generations (80, 90a, 120), which may take minutes" in done.stderr
    assert "HETCONV_CUDA_ARCHS=none leaves it out" in done.stderr


def test_torch_is_found_from_the_environment_that_pip_builds_in(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That one has the interpreter's prefixes, and none of its packages on the path."""
    monkeypatch.setattr(sys, "path", [])
    for name in ("prefix", "exec_prefix", "base_prefix", "base_exec_prefix"):
        monkeypatch.setattr(sys, name, str(tmp_path))
    assert build.torch_without_cuda() is None, "none yet: pip will bring one"
    own = {"base": str(tmp_path), "platbase": str(tmp_path)}
    torch_of(Path(build.sysconfig.get_path("purelib", vars=own)), "2.12.1+cpu", "None")
    assert build.torch_without_cuda() == "2.12.1+cpu"


@pytest.mark.parametrize("wish", ["70", "sm_80", ",", "80,auto"])
def test_an_unknown_architecture_is_refused(
    build: ModuleType, wish: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HETCONV_CUDA_ARCHS", wish)
    with pytest.raises(build.PartError, match=r"HETCONV_CUDA_ARCHS: received .* expected all"):
        build.architectures("nvcc")


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ("8.0", ["80"]),
        ("8.7", ["86"]),
        ("9.0\n9.0", ["90a"]),
        ("10.3", ["100"]),
        ("12.1\n8.9", ["120", "89"]),
        ("7.5", []),
        ("no devices were found", []),
    ],
    ids=repr,
)
def test_native_is_what_the_gpus_here_run(
    build: ModuleType,
    capabilities: str,
    expected: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\necho '{capabilities}'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert build.native_architectures() == expected


def test_the_newest_architecture_comes_as_ptx_too(build: ModuleType) -> None:
    flags = build.code_flags(list(build.ARCHITECTURES))
    assert len(flags) == len(build.ARCHITECTURES) + 1
    assert flags[-1] == "-gencode=arch=compute_120,code=compute_120"
    assert not any("code=compute" in flag for flag in build.code_flags(["80", "90a"]))


def test_what_only_gcc_has_stands_behind_a_question_for_clang() -> None:
    """Clang has GCC's vectors, but not its shuffle: `permute_lanes` and its like are for both."""
    found = {
        path.name
        for path in (ROOT / "csrc" / "cpu").iterdir()
        if "__builtin_shuffle(" in path.read_text()
    }
    assert found == {"vec.h"}
    parts = re.split(
        r"^#if defined\(__clang__\)$", (ROOT / "csrc/cpu/vec.h").read_text(), flags=re.M
    )
    assert "__builtin_shuffle(" not in parts[0]
    for part in parts[1:]:
        clang, gcc = part.split("#else", 1)
        assert "__builtin_shuffle(" not in clang
        assert "__builtin_shuffle(" not in gcc.split("#endif", 1)[1]


def test_clang_compiles_the_engine_in_ci() -> None:
    assert 'stage "clang" compiled clang' in (ROOT / ".ci" / "run").read_text()
    assert re.search(r"^clang:", (ROOT / "Makefile").read_text(), re.M)


# What the real nvcc made --------------------------------------------------------------------------


def binary() -> Path:
    spec = importlib.util.find_spec("hetconv_kernels._cuda")
    if spec is None or spec.origin is None:
        pytest.skip("hetconv_kernels._cuda is not built here")
    return Path(spec.origin)


def test_the_binary_needs_no_driver() -> None:
    if not shutil.which("readelf"):
        pytest.skip("readelf is not installed")
    path = binary()
    said = subprocess.run(["readelf", "-d", path], capture_output=True, text=True, check=True)
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", said.stdout)
    assert needed
    assert [name for name in needed if re.match("libcuda|libtorch|libc10", name)] == []


def test_the_binary_imports_without_a_gpu_and_without_torch() -> None:
    path = binary()
    code = (
        "import importlib.util, sys;"
        f"spec = importlib.util.spec_from_file_location('_cuda', {str(path)!r});"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module);"
        "assert 'torch' not in sys.modules;"
        "maps = open('/proc/self/maps').read(); assert 'libcuda.so' not in maps"
    )
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], env=hidden, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("machine", "source", "expected"),
    [
        ("x86", "isa_int8_avx2.cpp", "-mavx2 -mfma -mf16c -ffp-contract=off"),
        ("x86", "isa_int8_neondot.cpp", "-ffp-contract=off"),
        ("arm", "isa_int8_neondot.cpp", "-march=armv8.2-a+dotprod -ffp-contract=off"),
        ("arm", "isa_int8_avx2.cpp", "-ffp-contract=off"),
        ("arm", "isa_avx512.cpp", ""),
        ("other", "isa_int8_neondot.cpp", "-ffp-contract=off"),
    ],
)
def test_a_source_has_the_flags_of_the_machine_that_it_is_compiled_for(
    machine: str, source: str, expected: str, build: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "X86", machine == "x86")
    monkeypatch.setattr(build, "ARM", machine == "arm")
    (cpu,) = (part for part in build.PARTS if part.module == "_cpu")
    assert (ROOT / cpu.folder / source).exists()
    assert cpu.extra_flags(Path(source)) == expected
