# SPDX-License-Identifier: Apache-2.0
"""Builds the compiled parts that this machine has a compiler for; never fails for lack of one.

A part is a folder of csrc with its own flags. Every source becomes one object, an ``isa_<name>``
source with the vector instructions of its name, so that one binary runs on every processor and
picks its kernels at run time. What was built, and why something was not, is written to
``hetconv_kernels/_build.json``, which ``hetconv info`` prints.

Environment:
    HETCONV_BUILD: ``auto`` (default) builds what it can, ``none`` builds nothing, ``require`` makes
        a part that does not build an error.
    MAX_JOBS: the number of compilers that run at once; by default limited by cores and memory.
    CXX, CXXFLAGS, LDFLAGS: as everywhere.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
PACKAGE = "hetconv_kernels"
MODES = ("auto", "none", "require")
GIB_PER_JOB = 2  # a source with pybind11 or many templates needs 1 to 1.5 GiB
AVX2 = "-mavx2 -mfma -mf16c"
X86 = platform.machine() in ("x86_64", "AMD64")


class PartError(Exception):
    """A compiled part cannot be built here; the message is the sentence that the user reads."""


@dataclass(frozen=True)
class Part:
    """One extension module: a folder of csrc and how its sources are compiled.

    Attributes:
        module: the module's last name, ``hetconv_kernels.<module>``.
        folder: the folder with its sources.
        without: what the user loses when it is missing.
        flags: compiler flags of every source.
        isa_flags: more flags for a source called ``isa_<key>.cpp``; x86-64 only.
        link_flags: linker flags.
    """

    module: str
    folder: str
    without: str
    flags: str
    isa_flags: dict[str, str]
    link_flags: str

    @property
    def name(self) -> str:
        return f"{PACKAGE}.{self.module}"

    def sources(self) -> list[Path]:
        return sorted((ROOT / self.folder).glob("*.cpp"))

    def headers(self) -> list[Path]:
        return sorted((ROOT / self.folder).rglob("*.h"))

    def extra_flags(self, source: Path) -> str:
        isa = source.stem.removeprefix("isa_")
        return self.isa_flags.get(isa, "") if X86 and isa != source.stem else ""


PARTS = (
    Part(
        module="_cpu",
        folder="csrc/cpu",
        without="the backend 'cpu' is absent and 'reference' and 'vendor' serve every layer",
        # GCC 12 reports an uninitialised variable in its own AVX-512 header, hence the last flag.
        flags=(
            "-std=c++17 -O3 -fopenmp -fvisibility=hidden -fno-semantic-interposition "
            "-fno-math-errno -fno-trapping-math -ffp-contract=fast "
            "-Wall -Wextra -Wno-psabi -Wno-maybe-uninitialized"
        ),
        isa_flags={
            "avx2": AVX2,
            "avx512": f"{AVX2} -mavx512f -mavx512bw -mavx512dq -mavx512vl "
            "-mprefer-vector-width=512",
        },
        # By its plain soname, so that a process which also has torch runs one OpenMP, not two.
        link_flags="-fopenmp",
    ),
)


def mode() -> str:
    value = os.environ.get("HETCONV_BUILD", "auto")
    if value not in MODES:
        raise SystemExit(f"HETCONV_BUILD: received {value!r}, expected one of {', '.join(MODES)}.")
    return value


def jobs() -> int:
    """Returns how many compilers may run at once: MAX_JOBS, else what cores and memory allow."""
    if os.environ.get("MAX_JOBS"):
        return max(1, int(os.environ["MAX_JOBS"]))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        meminfo = Path("/proc/meminfo").read_text()
        free_kib = int(meminfo.split("MemAvailable:")[1].split()[0])
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


def run(command: list[str], what: str) -> None:
    """Runs one compiler or linker command; its warnings and errors go to the terminal."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    if said:
        print(f"{' '.join(command)}\n{said}", file=sys.stderr, flush=True)
    if done.returncode:
        raise PartError(f"{command[0]} did not accept {what} (its messages are above)")


class BuildParts(build_ext):
    """Compiles every part object by object, keeps the objects that are up to date, records all."""

    def run(self) -> None:
        self.record: dict[str, dict[str, object]] = {}
        inplace = self.inplace  # setuptools clears it while it runs and copies afterwards
        super().run()
        folder = ROOT / PACKAGE if inplace else Path(self.build_lib, PACKAGE)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"python": platform.python_version(), "parts": self.record}, indent=2)
        (folder / "_build.json").write_text(text + "\n")

    def build_extension(self, ext: Extension) -> None:
        part = next(part for part in PARTS if part.name == ext.name)
        target = Path(self.get_ext_fullpath(ext.name))
        try:
            self.record[part.module] = {"built": True, **self.build_part(part, target)}
        except PartError as error:
            # An older binary of a source that no longer compiles would be loaded in its stead.
            for stale in (target, ROOT / PACKAGE / target.name):
                stale.unlink(missing_ok=True)
            self.record[part.module] = {"built": False, "reason": str(error)}
            sentence = f"{part.name} was not built: {error}. Without it {part.without}."
            if mode() == "require":
                raise SystemExit(sentence) from error
            print(sentence, file=sys.stderr, flush=True)

    def build_part(self, part: Part, target: Path) -> dict[str, object]:
        cxx = compiler()
        folders, pybind11_version = includes()
        user = shlex.split(os.environ.get("CXXFLAGS", ""))
        common = [*cxx, "-fPIC", "-DNDEBUG", *(f"-I{folder}" for folder in folders)]
        common += part.flags.split()

        def compile_one(source: Path) -> Path:
            command = [*common, *part.extra_flags(source).split(), *user]
            key = hashlib.sha256(" ".join(command).encode()).hexdigest()[:8]
            unit = Path(self.build_temp, part.module, f"{source.stem}-{key}.o")
            newest = max(path.stat().st_mtime for path in (source, *part.headers()))
            if self.force or not unit.exists() or unit.stat().st_mtime < newest:
                unit.parent.mkdir(parents=True, exist_ok=True)
                run([*command, "-c", str(source), "-o", str(unit)], source.name)
            return unit

        with ThreadPoolExecutor(jobs()) as pool:
            units = list(pool.map(compile_one, part.sources()))
        target.parent.mkdir(parents=True, exist_ok=True)
        link = [*cxx, "-shared", *map(str, units), *part.link_flags.split()]
        link += shlex.split(os.environ.get("LDFLAGS", ""))
        run([*link, "-o", str(target)], target.name)
        said = subprocess.run([*cxx, "--version"], capture_output=True, text=True, check=False)
        return {
            "compiler": said.stdout.partition("\n")[0],
            "pybind11": pybind11_version,
            "flags": " ".join([part.flags, *user]),
            "source_flags": {
                source.stem: part.extra_flags(source)
                for source in part.sources()
                if part.extra_flags(source)
            },
        }


def extensions() -> list[Extension]:
    """Returns the parts whose sources are in the tree; each may be missing in the end."""
    parts = [part for part in PARTS if mode() != "none" and part.sources()]
    return [
        Extension(
            part.name, [str(path.relative_to(ROOT)) for path in part.sources()], optional=True
        )
        for part in parts
    ]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildParts})
