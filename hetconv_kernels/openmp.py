# SPDX-License-Identifier: Apache-2.0
"""One OpenMP in a process: our CPU engine computes on the threads of torch's runtime.

The engine is linked to no OpenMP of its own. Two runtimes would have two pools of threads, whose
waiting threads take each other's cores. It calls ``GOMP_parallel``, which the runtimes of GCC, LLVM
and Intel all have; torch's wheels bring one of them, under a name that is theirs to choose.
"""

from __future__ import annotations

import ctypes
import os
import re
from functools import cache
from pathlib import Path

_NEEDED = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
_RUNTIME = re.compile(r"/lib(?:gomp|omp|iomp5)\b[^/]*\.so[^/]*$")


@cache
def share_openmp() -> str | None:
    """Makes the OpenMP runtime of this process visible to our compiled part.

    Torch loads its own for all to see; where a build of it does not, this does. Only a process
    without any gets the system's.

    Returns:
        None, or a sentence that says that there is no OpenMP runtime.
    """
    if _visible():
        return None
    for name in (*loaded(), "libgomp.so.1", "libomp.so.5", "libomp.so", "libiomp5.so"):
        try:
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        if _visible():
            return None
    return (
        "no OpenMP runtime was found: torch brought none, and the system has no libgomp.so.1 "
        "(install libgomp1, or a build of torch with OpenMP)"
    )


def loaded() -> list[str]:
    """Lists the files of the OpenMP runtimes that this process has loaded."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    files = dict.fromkeys(line.split(maxsplit=5)[-1] for line in lines if "/lib" in line)
    return [file for file in files if _RUNTIME.search(file)]


def _visible() -> bool:
    """Tells whether a library that is loaded now would find the runtime's functions."""
    if os.name != "posix":
        return False
    everything = ctypes.CDLL(None)
    return all(hasattr(everything, name) for name in _NEEDED)
