# SPDX-License-Identifier: Apache-2.0
"""Tuning: measuring, where the user asks for it, what a cost model otherwise predicts.

Nothing is tuned by default, and nothing during a CUDA-graph capture. What was measured is kept on
disk by device and versions, so that the next process starts with it:

    with hk.tuning.tune():
        model(x)  # each layer's first call measures its candidates
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .._version import __version__
from ..errors import ArgumentError, mismatch

__all__ = ["tune"]

FORMAT = "hetconv_kernels.tuning/1"
_enabled = False


@contextlib.contextmanager
def tune(enabled: bool = True) -> Iterator[None]:
    """Measures the candidates of calls that are met for the first time, on GPUs.

    A first call takes seconds longer. Outside of it measurements that are there are still used.

    Args:
        enabled: False turns tuning off within a block that has it on.

    Raises:
        ArgumentError: a CUDA graph is being captured.
    """
    global _enabled
    if enabled and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise ArgumentError(
            mismatch("tune", "a running CUDA-graph capture", "none", "Tune before the capture.")
        )
    before, _enabled = _enabled, enabled
    try:
        yield
    finally:
        _enabled = before


def is_tuning(device: torch.device) -> bool:
    """Tells whether a call on this device is to be measured now."""
    if not _enabled or device.type != "cuda":
        return False
    return not torch.cuda.is_current_stream_capturing()


class Store:
    """Measurements on disk: one JSON file, whole at every moment, merged under a lock.

    A file that cannot be read counts as empty and is replaced at the next write.

    Args:
        path: the file; its folder is made when something is written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: dict[str, Any] | None = None

    def get(self, key: str) -> Any:
        """Returns what is kept under a key, None if nothing is."""
        if self._known is None:
            self._known = self._read()
        return self._known.get(key)

    def put(self, key: str, value: Any) -> None:
        """Keeps a JSON value; what other processes wrote meanwhile is kept too.

        Where the folder cannot be written the value is kept for this process only.
        """
        self.get(key)
        assert self._known is not None
        self._known[key] = value
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.with_suffix(".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                self._known = self._read() | {key: value}
                self._write()
        except OSError:
            return

    def _write(self) -> None:
        handle, name = tempfile.mkstemp(dir=self.path.parent, suffix=".part")
        try:
            with os.fdopen(handle, "w") as part:
                json.dump({"format": FORMAT, "entries": self._known}, part, indent=1)
            Path(name).replace(self.path)
        except OSError:
            Path(name).unlink(missing_ok=True)
            raise

    def _read(self) -> dict[str, Any]:
        try:
            data = json.loads(self.path.read_text())
        except (OSError, ValueError, RecursionError):
            return {}
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            return {}
        entries = data.get("entries")
        return dict(entries) if isinstance(entries, dict) else {}


def folder() -> Path:
    """Returns where measurements are kept: HETCONV_CACHE, or the user's cache folder."""
    given = os.environ.get("HETCONV_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hetconv_kernels"


@cache
def store(device: torch.device) -> Store:
    """Returns the measurements of a device with the versions that are installed."""
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = "none"
    parts = (
        torch.cuda.get_device_name(device),
        str(torch.cuda.get_device_capability(device)),
        str(torch.cuda.get_device_properties(device).multi_processor_count),
        torch.__version__,
        triton,
        __version__,
    )
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    return Store(folder() / f"tuning-{digest}.json")


def pick(
    key: str, candidates: Mapping[str, Callable[[], object]], device: torch.device
) -> str | None:
    """Returns the name of the candidate that was measured to be fastest.

    Args:
        key: of the call; measurements of the same key are used again.
        candidates: name -> a call that does the work once.
        device: where they run.

    Returns:
        A name; None when nothing was measured: tuning is off, or no candidate runs here.
    """
    kept = store(device)
    entry = kept.get(key)
    if isinstance(entry, dict) and entry.get("name") in candidates:
        return str(entry["name"])
    if not is_tuning(device):
        return None
    from .timing import interleaved  # only where something is measured

    running = {name: call for name, call in candidates.items() if _runs(name, call)}
    if not running:
        return None
    timings = interleaved(running, rounds=7, warmup=2, device=device)
    name = timings.fastest(list(running))
    kept.put(key, {"name": name, "seconds": timings.median(name)})
    return name


def _runs(name: str, call: Callable[[], object]) -> bool:
    """Runs a candidate once; one that needs more than the device has is left out."""
    try:
        call()
    except Exception as error:  # noqa: BLE001 compilers and drivers have types of their own
        warnings.warn(f"Tuning leaves {name} out: {error}", RuntimeWarning, stacklevel=3)
        return False
    return True
