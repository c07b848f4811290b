# SPDX-License-Identifier: Apache-2.0
"""The compiled part of the CUDA engine with its kernels on the CPU, as a Python module.

The kernels and the bindings of csrc/cuda are compiled by g++ against tests/native/cuda, so that the
whole engine runs on CPU tensors, from the operator to the kernel; and what tests call it with.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from building import alone

import hetconv_kernels as hk
from hetconv_kernels import ops
from hetconv_kernels.backends.cuda import Cuda, choice
from hetconv_kernels.backends.gpu import capture

ROOT = Path(__file__).resolve().parents[1]
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-Wno-unknown-pragmas", "-Wno-psabi"]
FLAGS += ["-DHETCONV_HOST", "-DHETCONV_ARCHITECTURES=host"]


def build() -> Path:
    """Builds the module once for each state of its sources; returns its path.

    Raises:
        subprocess.CalledProcessError: the compiler refuses; its words go to the terminal.
    """
    import pybind11

    native, own = ROOT / "tests" / "native" / "cuda", ROOT / "csrc" / "cuda"
    machine = [path for path in sorted(native.glob("*.cpp")) if path.stem != "driver"]
    sources = [*sorted(own.glob("*.cu")), own / "bindings.cpp", *machine]
    include = [native, own, pybind11.get_include(), sysconfig.get_path("include")]
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    key = hashlib.sha256(" ".join([*FLAGS, pybind11.__version__, suffix]).encode())
    headers = [p for folder in (own.parent, own, native) for p in sorted(folder.glob("*.h"))]
    for path in [*sources, *headers]:
        key.update(path.read_bytes())
    folder = ROOT / "build" / "native" / f"module-{key.hexdigest()[:16]}"
    module = folder / f"_cuda{suffix}"
    with alone(folder):
        if module.exists():
            return module
        objects = [folder / f"{source.name}.o" for source in sources]
        for source, made in zip(sources, objects, strict=True):
            folders = [f"-I{path}" for path in include]
            command = ["g++", *FLAGS, *folders, "-x", "c++", "-c", source, "-o", made]
            subprocess.run(command, check=True)
        # Linked under another name: a half-written module is never found.
        subprocess.run(["g++", "-shared", *objects, "-o", folder / "linking"], check=True)
        os.replace(folder / "linking", module)
    return module


def load() -> ModuleType:
    """Returns the module, built if need be."""
    spec = importlib.util.spec_from_file_location("hetconv_kernels._cuda", build())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def install(monkeypatch: pytest.MonkeyPatch, groups: str = "narrow") -> ModuleType:
    """Puts the module in the place of the compiled part, and leaves one kernel, for one test."""
    pytest.importorskip("pybind11")
    if not shutil.which("g++"):
        pytest.skip("g++ is not installed here")
    module = load()
    monkeypatch.setitem(sys.modules, "hetconv_kernels._cuda", module)
    monkeypatch.setattr(hk, "_cuda", module, raising=False)
    monkeypatch.setattr(choice, "ONLY_KERNEL", groups)
    capture.CONVERSIONS.clear()
    return module


def operands(geometry: Any, dtype: torch.dtype, n: int = 2) -> tuple[torch.Tensor, ...]:
    """Draws x, w and dy for n images of 6 by 9 pixels."""
    s = geometry.support
    shapes = (n, s.channels, 6, 9), s.shape, (n, s.filters, *geometry.output_size(6, 9))
    x, w, dy = (torch.randn(*shape).to(dtype) for shape in shapes)
    return x.to(memory_format=torch.channels_last), w, dy.to(memory_format=torch.channels_last)


def run(verb: str, geometry: Any, first: Any, second: Any, w: Any, *more: Any, **how: Any) -> Any:
    """Prepares a primitive on the host's kernels, past the refusal of CPU tensors, and calls it."""
    problem = ops.describe(verb, geometry, first, second, w, (6, 9), **how)
    engine = Cuda()
    prepare = {"fprop": engine.fprop, "dgrad": engine.dgrad, "wgrad": engine.wgrad}[verb]
    return prepare(problem)(first, second if verb == "wgrad" else w, *more)
