# SPDX-License-Identifier: Apache-2.0
"""What is installed, built and usable here: the facts that a bug report needs."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ._version import __version__
from .backends import NAMES, available_backends, forced_code

_LIBRARIES = ("numpy", "triton", "pybind11", "scikit-learn", "matplotlib", "rich", "safetensors")


def info() -> dict[str, Any]:
    """Reports versions, devices, backends and how the compiled parts were built.

    Returns:
        A JSON-serialisable dictionary; keys: version, python, platform, torch, libraries, cpu,
        cuda, backends, forced_backend, extensions, build.
    """
    build = Path(__file__).with_name("_build.json")
    return {
        "version": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "libraries": {name: _version(name) for name in _LIBRARIES},
        "cpu": {
            "capability": torch.backends.cpu.get_cpu_capability(),
            "cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
        },
        "cuda": _cuda(),
        "backends": list(available_backends()),
        "forced_backend": NAMES[forced_code()],
        "extensions": {
            name: importlib.util.find_spec(f"hetconv_kernels.{name}") is not None
            for name in ("_cpu", "_cuda")
        },
        "build": json.loads(build.read_text()) if build.exists() else None,
    }


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
