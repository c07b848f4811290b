# SPDX-License-Identifier: Apache-2.0
"""The wheels for every Linux: how ziglang compiles them, and which Pythons they are for."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import ModuleType

import machine_code
import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def build() -> ModuleType:
    pytest.importorskip("setuptools")
    return machine_code.build()


@pytest.fixture
def wheels(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / ".ci"))
    monkeypatch.delitem(sys.modules, "wheel", raising=False)  # .ci/wheel.py, not the library
    import wheels

    return wheels


def test_this_python_is_found_with_its_own_version(wheels: ModuleType) -> None:
    found = wheels.interpreters()
    version = "{}.{}".format(*sys.version_info)
    assert found[version] == sys.executable
    assert set(found) <= set(wheels.PYTHONS)


def test_the_pythons_are_those_that_the_package_is_for(wheels: ModuleType) -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert all(f"Python :: {version}" in text for version in wheels.PYTHONS)
    assert text.count('"Programming Language :: Python :: 3.') == len(wheels.PYTHONS)


@pytest.mark.parametrize(
    ("machine", "source", "expected"),
    [
        ("x86", "isa_int8_avx2.cpp",
         "-mavx2 -mfma -mf16c -ffp-contract=off -mllvm -enable-misched=false"),
        ("x86", "isa_avx2.cpp", "-mavx2 -mfma -mf16c"),
        ("x86", "int8_plan.cpp", "-ffp-contract=off"),
        ("arm", "isa_int8_neondot.cpp",
         "-mcpu=generic+dotprod -ffp-contract=off -mllvm -enable-misched=false"),
    ],
)  # fmt: skip
def test_ziglang_gets_its_own_spelling_and_the_order_that_is_written(
    machine: str, source: str, expected: str, build: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "python -m ziglang c++ -target x86_64-linux-gnu.2.28")
    monkeypatch.setattr(build, "X86", machine == "x86")
    monkeypatch.setattr(build, "ARM", machine == "arm")
    (cpu,) = (part for part in build.PARTS if part.module == "_cpu")
    assert cpu.extra_flags(Path(source)) == expected


def test_only_bindings_are_compiled_for_one_python(build: ModuleType) -> None:
    # The other objects serve the wheels of all Pythons.
    if shutil.which("g++") is None:
        pytest.skip("no compiler")
    (cpu,) = (part for part in build.PARTS if part.module == "_cpu")
    found = build.commands(cpu)
    assert not any(word.startswith("-I") for word in found.compile)
    assert any(Path(word.removeprefix("-I"), "Python.h").exists() for word in found.bindings)
    knowing = {source.name for source in cpu.sources() if "pybind11" in source.read_text()}
    assert knowing
    assert all(name.endswith("bindings.cpp") for name in knowing)
