# SPDX-License-Identifier: Apache-2.0
"""What is installed, built and usable here: the facts that a bug report needs."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from . import openmp
from ._version import __version__
from .accuracy import is_strict
from .backends import ENGINE_OF_CODE, available_backends, forced_code

__all__ = ["info"]

# Variables that change what is built, chosen, or how many threads compute.
_VARIABLES = ("HETCONV_", "OMP_", "GOMP_", "KMP_", "MKL_", "ONEDNN_", "DNNL_", "ATEN_", "TRITON_")
_LIBRARIES = ("numpy", "triton", "pybind11", "scikit-learn", "matplotlib", "rich", "safetensors")


def info() -> dict[str, Any]:
    """Reports versions, devices, backends and how the compiled parts were built.

    Returns:
        A JSON-serialisable dictionary; keys: version, python, platform, libc, torch, torch_cuda,
        libraries, cpu, cuda, backends, forced_backend, strict_accuracy, extensions, build,
        environment. Under build are the compilers and their flags, under cpu the instruction sets
        of our engine, best first, under environment the variables that are set and matter.
    """
    build = Path(__file__).with_name("_build.json")
    return {
        "version": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "libc": " ".join(platform.libc_ver()).strip() or None,
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "libraries": {name: _version(name) for name in _LIBRARIES},
        "cpu": {
            "processor": processor(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "engine_isas": _isas(),
            "cores": os.cpu_count(),
            "usable_cores": len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "openmp": openmp.loaded(),
        },
        "cuda": _cuda(),
        "backends": list(available_backends()),
        "forced_backend": ENGINE_OF_CODE[forced_code()],
        "strict_accuracy": is_strict(),
        "extensions": {
            name: importlib.util.find_spec(f"hetconv_kernels.{name}") is not None
            for name in ("_cpu", "_cuda")
        },
        "build": json.loads(build.read_text()) if build.exists() else None,
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(_VARIABLES)},
    }


def processor() -> str:
    """Names the processor as the operating system does, with its family if that is no number."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    found: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), value.strip())
    name = found.get("model name")
    if not name:
        return platform.processor() or platform.machine()
    # A virtual machine may hide which one it is.
    family = found.get("cpu family")
    return f"{name}, family {family}" if family and not re.search(r"\d", name) else name


def _isas() -> list[str]:
    """Lists the instruction sets that our CPU engine can run here, the one it takes first."""
    if importlib.util.find_spec("hetconv_kernels._cpu") is None or openmp.share_openmp():
        return []
    from . import _cpu

    return _cpu.isas()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cuda() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    return [
        {
            "name": torch.cuda.get_device_name(i),
            "capability": ".".join(map(str, torch.cuda.get_device_capability(i))),
            "memory_gib": round(torch.cuda.get_device_properties(i).total_memory / 2**30, 1),
        }
        for i in range(torch.cuda.device_count())
    ]
