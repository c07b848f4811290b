# SPDX-License-Identifier: Apache-2.0
"""Builds the compiled parts that this machine has a compiler for; never fails for lack of one.

A part is a folder of csrc with its own flags. Every source becomes one object, an ``isa_<name>``
source with the vector instructions of its name, so that one binary runs on every processor and
picks its kernels at run time; nvcc puts the kernels of all GPU generations into one binary
likewise. What was built, and why something was not, is written to ``hetconv_kernels/_build.json``,
which ``hetconv info`` prints.

Environment:
    HETCONV_BUILD: ``auto`` (default) builds what it can, ``none`` builds nothing, ``require`` makes
        a part that does not build an error. A machine without nvcc is none, unless the next
        variable names architectures.
    HETCONV_CUDA_ARCHS: ``all`` or ``none``; ``native`` for the GPUs of this machine; or a list out
        of `ARCHITECTURES`, as ``80,90a``. By default ``all``, but ``none`` where the installed
        torch is a build without CUDA, which could not use it.
    HETCONV_CHECKED: ``1`` has the CUDA part end with an error, which names the barrier, where it
        would wait for ever; for debugging.
    MAX_JOBS: the number of compilers that run at once; by default limited by cores and memory.
    CXX, CXXFLAGS, LDFLAGS: as everywhere.
    NVCC, CUDA_HOME: nvcc itself, or the toolkit that has it; else the one on the path.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
PACKAGE = "hetconv_kernels"
MODES = ("auto", "none", "require")
GIB_PER_JOB = 2  # a source with pybind11 or many templates needs 1 to 1.5 GiB
AVX2 = "-mavx2 -mfma -mf16c"
AVX512 = f"{AVX2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512"
# The machine to build for: another one where setuptools is told so (_PYTHON_HOST_PLATFORM).
MACHINE = sysconfig.get_platform().rpartition("-")[2]
X86 = MACHINE in ("x86_64", "amd64")
ARM = MACHINE in ("aarch64", "arm64")
# GPU generations that the CUDA part is built for; the newest also as PTX, for those to come.
ARCHITECTURES = ("80", "86", "89", "90a", "100", "120")


class PartError(Exception):
    """A compiled part cannot be built here; the message is the sentence that the user reads."""


class AbsentError(PartError):
    """It is not wanted, or there is nothing to build it with: a state, not a failure."""


class NoCompilerError(AbsentError):
    """There is nothing to build it with."""


@dataclass(frozen=True)
class Part:
    """One extension module: a folder of csrc and how its sources are compiled.

    Attributes:
        module: the module's last name, ``hetconv_kernels.<module>``.
        folder: the folder with its sources.
        without: what the user loses when it is missing.
        flags: compiler flags of every source.
        isa_flags: more flags for a source called ``isa_<key>.cpp``; x86-64 only.
        arm_flags: the same; aarch64 only.
        link_flags: linker flags.
        cuda: whether nvcc compiles and links it.
        only: sources that hold kernels of some architectures only, and of which.
    """

    module: str
    folder: str
    without: str
    flags: str
    isa_flags: dict[str, str]
    link_flags: str
    cuda: bool = False
    only: dict[str, tuple[str, ...]] = field(default_factory=dict)
    arm_flags: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{PACKAGE}.{self.module}"

    def sources(self) -> list[Path]:
        suffixes = (".cpp", ".cu") if self.cuda else (".cpp",)
        return sorted(p for p in (ROOT / self.folder).glob("*") if p.suffix in suffixes)

    def headers(self) -> list[Path]:
        own = (ROOT / self.folder).rglob("*.h")
        return sorted((*own, *(ROOT / self.folder).parent.glob("*.h")))  # and what engines share

    def extra_flags(self, source: Path) -> str:
        isa = source.stem.removeprefix("isa_")
        of_machine = self.isa_flags if X86 else self.arm_flags if ARM else {}
        flags = of_machine.get(isa, "") if isa != source.stem else ""
        zig = "ziglang" in os.environ.get("CXX", "")
        if zig:  # a clang that spells it in its own way
            flags = flags.replace("-march=armv8.2-a", "-mcpu=generic")
        if isa.startswith("int8_"):
            flags += " -ffp-contract=off"  # in 8 bits every operation is rounded once
            # LLVM would fetch the operands of a tile early, and for them spill its sums: 420 times
            # in the source for AVX-512 VNNI, against 129 in the order that is written. A network in
            # 8 bits then took 1.3 times as long as by g++; with the flag as long.
            flags += " -mllvm -enable-misched=false" if zig and isa != source.stem else ""
        return flags.strip()

    def suited(self, source: Path, names: list[str]) -> list[str]:
        """Lists which architectures it has kernels of, one at least: its launchers are needed."""
        return [n for n in names if n in self.only.get(source.stem, names)] or names[:1]

    def digest(self) -> str:
        """Names the sources by their contents."""
        digest = hashlib.sha256(self.flags.encode())
        for path in (*self.sources(), *self.headers()):
            digest.update(path.name.encode() + path.read_bytes())
        return digest.hexdigest()[:16]


PARTS = (
    Part(
        module="_cpu",
        folder="csrc/cpu",
        without="the backend 'cpu' is absent and 'reference' and 'vendor' serve every layer",
        # GCC 12 reports an uninitialised variable in its own AVX-512 header, and clang does not
        # know that warning, hence the last flags.
        flags=(
            "-std=c++17 -O3 -fvisibility=hidden -fno-semantic-interposition "
            "-fno-math-errno -fno-trapping-math -ffp-contract=fast "
            "-Wall -Wextra -Wno-psabi -Wno-maybe-uninitialized -Wno-unknown-warning-option"
        ),
        isa_flags={
            "avx2": AVX2,
            "avx512": AVX512,
            "avx512bf16": f"{AVX512} -mavx512bf16",
            "int8_avx2": AVX2,
            "int8_avxvnni": f"{AVX2} -mavxvnni",
            "int8_avx512vnni": f"{AVX512} -mavx512vnni",
        },
        arm_flags={"int8_neondot": "-march=armv8.2-a+dotprod"},
        # No OpenMP: its functions are those of the runtime that torch has loaded (openmp.py).
        link_flags="",
    ),
    Part(
        module="_cuda",
        folder="csrc/cuda",
        without="the backend 'cuda' is absent and other backends serve every layer on a GPU",
        flags="-std=c++17 -O3 -Xcompiler=-fvisibility=hidden,-Wall,-Wextra",
        isa_flags={},
        # The runtime goes in; the driver is found at run time, so that any machine can import it.
        link_flags="-cudart=static",
        cuda=True,
        only={
            "wide_fprop": ("90a",),  # wgmma
            "wide_rate": ("90a",),
            "wide_wgrad": ("90a",),
            "narrow_tma": ("90a", "100", "120"),  # TMA
        },
    ),
)


def mode() -> str:
    value = os.environ.get("HETCONV_BUILD", "auto")
    if value not in MODES:
        raise SystemExit(f"HETCONV_BUILD: received {value!r}, expected one of {', '.join(MODES)}.")
    return value


def wish() -> str:
    return os.environ.get("HETCONV_CUDA_ARCHS") or "all"


def torch_without_cuda() -> str | None:
    """Returns the version of the installed torch where that is a build without CUDA.

    Read, not imported: pip builds in an environment of its own, which does not see torch, for a
    Python that does. Where there is no torch, pip will bring one, which may have CUDA.
    """
    folders = list(sys.path)
    for base in (sys.prefix, sys.base_prefix):
        own = {"base": base, "platbase": base}
        folders += [sysconfig.get_path(name, vars=own) for name in ("platlib", "purelib")]
    for folder in folders:
        try:
            text = Path(folder, "torch", "version.py").read_text()
        except OSError:
            continue
        version, cuda = (
            re.search(rf"^{name}\b[^=\n]*=\s*(.*?)\s*$", text, re.M)
            for name in ("__version__", "cuda")
        )
        if cuda is None or cuda[1] != "None":
            return None
        return version[1].strip("'\"") if version else "unknown"
    return None


def jobs() -> int:
    """Returns how many compilers may run at once: MAX_JOBS, else what cores and memory allow."""
    if os.environ.get("MAX_JOBS"):
        return max(1, int(os.environ["MAX_JOBS"]))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        free_kib = int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0])
    except (OSError, IndexError, ValueError):
        return 1
    return max(1, min(cores or 1, free_kib // (GIB_PER_JOB * 1024**2)))


def compiler() -> list[str]:
    """Returns the command of the C++ compiler: CXX where it is set, else g++, clang++ or c++."""
    named = shlex.split(os.environ.get("CXX", ""))
    if named and not shutil.which(named[0]):
        raise PartError(f"the compiler that CXX names, {named[0]!r}, was not found")
    found = next((name for name in ("g++", "clang++", "c++") if shutil.which(name)), None)
    if not named and found is None:
        raise PartError("no C++ compiler was found (install g++, or name one in CXX)")
    return named or [str(found)]


def includes() -> tuple[list[str], str]:
    """Returns the include folders, and the version of pybind11."""
    try:
        import pybind11
    except ImportError:
        raise PartError("pybind11 is not installed (python3 -m pip install pybind11)") from None
    folders = [pybind11.get_include(), sysconfig.get_path("include")]
    if not Path(folders[1], "Python.h").exists():
        raise PartError(f"Python.h is not in {folders[1]} (install your system's python3-dev)")
    return folders, pybind11.__version__


def nvcc() -> str:
    """Returns the command of nvcc: NVCC where it is set, else that of CUDA_HOME, else the path's.

    Raises:
        NoCompilerError: there is none.
    """
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    places = [f"{home}/bin/nvcc" for home in (*homes, "/usr/local/cuda") if home]
    places.insert(len(places) - 1, "nvcc")
    named = os.environ.get("NVCC")
    found = next(filter(None, map(shutil.which, [named] if named else places)), None)
    if found is None:
        where = f"{named!r}, which NVCC names," if named else "nvcc"
        raise NoCompilerError(f"{where} was not found (install the CUDA toolkit, or set NVCC)")
    return found


def architectures(compiler: str) -> list[str]:
    """Returns what to build for: what HETCONV_CUDA_ARCHS says, as far as this nvcc knows it.

    Raises:
        PartError: an architecture that was named is not one of `ARCHITECTURES`.
    """
    wanted = wish().replace(",", " ").split()
    if wanted == ["native"]:
        wanted = native_architectures() or ["all"]
    if wanted != ["all"]:
        unknown = [name for name in wanted if name not in ARCHITECTURES]
        if unknown or not wanted:
            raise PartError(
                f"HETCONV_CUDA_ARCHS: received {' '.join(unknown) or 'nothing'}, expected all, "
                f"native, none or some of {', '.join(ARCHITECTURES)}"
            )
        return [name for name in ARCHITECTURES if name in wanted]
    listing = [compiler, "--list-gpu-code"]
    known = subprocess.run(listing, capture_output=True, text=True, check=False).stdout.split()
    return [name for name in ARCHITECTURES if f"sm_{name.rstrip('a')}" in known]


def native_architectures() -> list[str]:
    """Lists what suits the GPUs of this machine; nothing where nvidia-smi names none."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return []
    query = [smi, "--query-gpu=compute_cap", "--format=csv,noheader"]
    said = subprocess.run(query, capture_output=True, text=True, check=False).stdout
    suited = set()
    for gpu in re.findall(r"^(\d+)\.(\d)$", said, re.M):
        number = int("".join(gpu))
        older = [a for a in ARCHITECTURES if 0 <= number - int(a.rstrip("a")) <= number % 10]
        suited.update(older[-1:])
    return sorted(suited)


def code_flags(names: list[str]) -> list[str]:
    """Returns nvcc's flags for these architectures: machine code of each, PTX of the newest."""
    flags = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in names]
    ptx = f"compute_{ARCHITECTURES[-1]}"
    return flags + [f"-gencode=arch={ptx},code={ptx}"] * (ARCHITECTURES[-1] in names)


def through_nvcc(flags: list[str]) -> list[str]:
    """Returns flags of the host's compiler as nvcc passes them on."""
    return ["-Xcompiler=" + flag.replace(",", r"\,") for flag in flags]


@dataclass(frozen=True)
class Commands:
    """How a part is compiled and linked here (libraries come last), and what is recorded of it."""

    compile: list[str]
    bindings: list[str]  # more for the sources that know Python; the others serve every Python
    link: list[str]
    libraries: list[str]
    facts: dict[str, object]
    architectures: list[str]


def commands(part: Part) -> Commands:
    """Finds the compilers of a part.

    Raises:
        PartError: one is missing.
    """
    if part.cuda and wish() == "none":
        raise AbsentError("HETCONV_CUDA_ARCHS=none leaves it out")
    if part.cuda and not os.environ.get("HETCONV_CUDA_ARCHS") and (version := torch_without_cuda()):
        raise AbsentError(
            f"the installed torch, {version}, is a build without CUDA (HETCONV_CUDA_ARCHS=all, "
            "native or a list builds it all the same)"
        )
    tool = cxx = compiler()
    folders, pybind11_version = includes()
    user, link_user = (shlex.split(os.environ.get(n, "")) for n in ("CXXFLAGS", "LDFLAGS"))
    facts: dict[str, object] = {"compiler": first_line(cxx), "pybind11": pybind11_version}
    flags, names = ["-fPIC", *user], []
    own = ["-DHETCONV_CHECKED"] if part.cuda and os.environ.get("HETCONV_CHECKED") == "1" else []
    if part.cuda:
        tool = [nvcc()]
        names = architectures(tool[0])
        what = f"{len(names)} GPU generations ({', '.join(names)}), which may take minutes"
        said = f"{part.name}: nvcc compiles it for {what}. HETCONV_CUDA_ARCHS=none leaves it out."
        print(said, file=sys.stderr, flush=True)
        if os.environ.get("CXX"):
            tool += [f"-ccbin={cxx[0]}", *through_nvcc(cxx[1:])]
        archs = "_".join(names)  # nvcc cuts at commas
        flags = [*through_nvcc(flags), f"-DHETCONV_ARCHITECTURES={archs}"]
        flags += own
        link_user = through_nvcc(link_user)
        facts |= {"nvcc": first_line(tool, "release"), "architectures": names}
    facts |= {"flags": " ".join([part.flags, *own, *user]), "sources": part.digest()}
    common = [*tool, "-DNDEBUG", *part.flags.split(), *flags]
    libraries = [*part.link_flags.split(), *link_user]
    python = [f"-I{folder}" for folder in folders]
    return Commands(common, python, [*tool, "-shared"], libraries, facts, names)


def first_line(command: list[str], word: str = "") -> str:
    """Returns the line of a compiler's version that has a word in it."""
    said = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    return next((line.strip() for line in said.stdout.splitlines() if word in line), "unknown")


def run(command: list[str], what: str) -> None:
    """Runs one compiler or linker command; its warnings and errors go to the terminal."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    if said:
        print(f"{' '.join(command)}\n{said}", file=sys.stderr, flush=True)
    if done.returncode:
        reason = next((line for line in said.splitlines() if "error" in line.lower()), "no message")
        raise PartError(f"{command[0]} did not accept {what}: {reason.strip()[:300]}")


class BuildParts(build_ext):
    """Compiles every part object by object, keeps the objects that are up to date, records all."""

    def run(self) -> None:
        self.record: dict[str, dict[str, object]] = {}
        self.in_tree = self.inplace  # setuptools clears it while it runs and copies afterwards
        super().run()
        folder = ROOT / PACKAGE if self.in_tree else Path(self.build_lib, PACKAGE)
        folder.mkdir(parents=True, exist_ok=True)
        built = sorted(name[1:] for name, part in self.record.items() if part["built"])
        state = " and ".join(built) or "nothing compiled"
        facts = {"python": platform.python_version(), "state": state, "parts": self.record}
        (folder / "_build.json").write_text(json.dumps(facts, indent=2) + "\n")

    def build_extension(self, ext: Extension) -> None:
        part = next(part for part in PARTS if part.name == ext.name)
        target = Path(self.get_ext_fullpath(ext.name))
        try:
            self.record[part.module] = {"built": True, **self.build_part(part, target)}
        except PartError as error:
            there = ROOT / PACKAGE / target.name
            before = self.recorded(part) if self.in_tree and there.exists() else {}
            if isinstance(error, NoCompilerError) and before.get("sources") == part.digest():
                self.record[part.module] = before  # it came with the tree, built of these sources
                return
            # An older binary of a source that no longer compiles would be loaded in its stead.
            for stale in (target, there) if self.in_tree else (target,):
                stale.unlink(missing_ok=True)
            self.record[part.module] = {"built": False, "reason": str(error)}
            sentence = f"{part.name} was not built: {error}. Without it {part.without}."
            named = wish() not in ("all", "native", "none")
            if mode() == "require" and (named or not isinstance(error, AbsentError)):
                raise SystemExit(sentence) from error
            print(sentence, file=sys.stderr, flush=True)

    def recorded(self, part: Part) -> dict[str, object]:
        """Returns what the tree's record says of a part."""
        try:
            facts = json.loads((ROOT / PACKAGE / "_build.json").read_text())
            return dict(facts["parts"][part.module])
        except (OSError, ValueError, KeyError):
            return {}

    def build_part(self, part: Part, target: Path) -> dict[str, object]:
        found, folder = commands(part), Path(self.build_temp, part.module)
        folder.mkdir(parents=True, exist_ok=True)

        def compile_one(source: Path) -> Path:
            codes = code_flags(part.suited(source, found.architectures))
            command = [*found.compile, *part.extra_flags(source).split(), *codes]
            command += found.bindings if source.stem.endswith("bindings") else []
            key = hashlib.sha256(" ".join(command).encode()).hexdigest()[:8]
            unit = folder / f"{source.stem}-{key}.o"
            newest = max(path.stat().st_mtime for path in (source, *part.headers()))
            if self.force or not unit.exists() or unit.stat().st_mtime < newest:
                threads = [f"--threads={jobs()}"] if source.suffix == ".cu" else []
                # Whole or not at all: a compiler that is stopped leaves no object to be trusted.
                half = unit.with_suffix(".part.o")
                run([*command, *threads, "-c", str(source), "-o", str(half)], source.name)
                half.replace(unit)
            return unit

        with ThreadPoolExecutor(jobs()) as pool:
            units = list(pool.map(compile_one, part.sources()))
        link = [*found.link, *map(str, units), *found.libraries]
        linked = folder / "linked.txt"  # by which command the binary was made
        last = max(unit.stat().st_mtime for unit in units)
        same = linked.exists() and linked.read_text() == " ".join(link)
        if self.force or not (same and target.exists() and target.stat().st_mtime >= last):
            target.parent.mkdir(parents=True, exist_ok=True)
            run([*link, "-o", str(target)], target.name)
            linked.write_text(" ".join(link))
        special = {s.stem: part.extra_flags(s) for s in part.sources() if part.extra_flags(s)}
        return found.facts | ({"source_flags": special} if special else {})


def extensions() -> list[Extension]:
    """Returns the parts whose sources are in the tree; each may be missing in the end."""
    parts = [part for part in PARTS if mode() != "none" and part.sources()]
    return [
        Extension(part.name, [str(p.relative_to(ROOT)) for p in part.sources()], optional=True)
        for part in parts
    ]


if __name__ == "__main__":  # tests import this file
    setup(ext_modules=extensions(), cmdclass={"build_ext": BuildParts})
