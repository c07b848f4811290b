# SPDX-License-Identifier: Apache-2.0
"""The record: what results/<name>.json holds, checked against a schema before it is written.

Version 1. Times are seconds per call, counts are multiply-accumulates and bytes. A ``ratio`` is how
many times longer the rival took than our layer: above 1 we are faster; ``low`` and ``high`` are the
ends of its interval. A row with ``disturbed`` was taken while other work spoilt it, by the reasons
that it lists: its numbers stay, and no verdict is made from them. New fields may be added within a
version; a field that changes its meaning or goes away needs a new one.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

import hetconv_kernels as hk
from benchmarks import amdahl, rig
from benchmarks.gate import Agreement
from benchmarks.int8_rig import Int8Rig
from benchmarks.networks import NetworkCase
from benchmarks.report.results import verdict
from benchmarks.report.schema import SCHEMA_VERSION, problems
from hetconv_kernels.files import Json
from hetconv_kernels.info import processor
from hetconv_kernels.measure.roofline import Roofs
from hetconv_kernels.measure.timing import Timings

# What `hetconv bench --isa` sets, and what forces a backend.
_HELD = ("HETCONV_ISA", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "HETCONV_BACKEND")


class Record:
    """A results file that grows by a row at a time and is whole after each.

    Attributes:
        path: where it is written.
        data: what it holds.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.path = folder / f"{name}.json"
        self.data: Json = {
            "schema": SCHEMA_VERSION,
            "name": name,
            **beginning(),
            "roofs": [],
            "rows": [],
        }

    def add_roofs(self, roofs: Roofs) -> None:
        """Adds measured ceilings."""
        self.data["roofs"].append(vars(roofs).copy())

    def add(self, row: Json) -> None:
        """Adds a row and writes the file.

        Raises:
            ValueError: the file would depart from the schema.
        """
        self.data["rows"].append(row)
        wrong = problems(self.data)
        if wrong:
            raise ValueError(f"{self.path.name} departs from its schema: " + "; ".join(wrong[:5]))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".json.part")
        part.write_text(json.dumps(self.data, indent=1, allow_nan=False) + "\n")
        part.replace(self.path)  # a run that is cut short leaves whole rows


def layer_row(
    bench: rig.Rig | Int8Rig,
    match: Agreement,
    timings: Timings | None = None,
    roofs: Roofs | None = None,
) -> Json:
    """Makes the row of a layer; without timings it says only that (or whether) it matched."""
    case, support = bench.case, bench.support
    live, whole = support.live, case.f * case.c * case.k**2
    row: Json = {
        "kind": "layer",
        "case": case.to_dict(),
        "backend": {"asked": bench.backend, "ran": bench.ran()},
        "support": {
            "kind": support.kind,
            "digest": f"{support.digest:016x}",
            "groups": len(support.groups),
            "live": live,
            "density": support.density,
        },
        "macs": case.macs(live),
        "dense_macs": case.macs(whole),
        "bytes": case.bytes(live),
        "match": match.to_dict(),
    }
    if timings is None or roofs is None:
        return row
    floor = roofs.floor(row["macs"], row["bytes"])
    median = timings.median(rig.OURS)
    dense = _against(timings, rig.DENSE)
    assert dense is not None
    row |= {
        "median_s": median,
        "floor_s": floor,
        "percent_of_roof": 100 * floor / median,
        "dense": dense,
        "composition": _against(timings, rig.COMPOSITION),
        "unfrozen": _against(timings, rig.DENSE, rig.UNFROZEN),
        "prepacked": _against(timings, rig.PREPACKED),
        "float32": _against(timings, rig.OURS_FLOAT32),
        "verdict": verdict(dense, timings.disturbed),
        "timings": timings.to_dict(),
    } | disturbed(timings)
    return row


def disturbed(*timings: Timings) -> Json:
    """Returns the field of a row that says what disturbed its measurements; none if nothing did."""
    reasons = list(dict.fromkeys(reason for found in timings for reason in found.disturbed))
    return {"disturbed": reasons} if reasons else {}


def _against(timings: Timings, role: str, ours: str = rig.OURS) -> Json | None:
    """Compares our layer with the fastest variant of a role."""
    names = [name for name in timings.samples if name.split(":")[0] == role]
    if not names or ours not in timings.samples:
        return None
    return comparison(timings, names, ours)


def comparison(timings: Timings, names: Sequence[str], ours: str) -> Json:
    """Compares our variant with the fastest of some: its name and time, and the ratio."""
    rival = timings.fastest(names)
    ratio = timings.speedup(ours, over=rival)
    return {
        "name": rival,
        "median_s": timings.median(rival),
        "ratio": ratio.value,
        "low": ratio.low,
        "high": ratio.high,
        "confidence": ratio.confidence,
    }


def dispatch_row(name: str, backend: str, target_us: float, timings: Timings) -> Json:
    """Makes the row of a dispatch measurement: our whole layer beside ``nn.Conv2d``."""
    extra = timings.difference("ours", "dense")
    return {
        "kind": "dispatch",
        "name": name,
        "backend": backend,
        "extra_us": extra.value * 1e6,
        "low_us": extra.low * 1e6,
        "high_us": extra.high * 1e6,
        "target_us": target_us,
        "timings": timings.to_dict(),
    } | disturbed(timings)


def model_row(
    case: NetworkCase,
    match: Agreement,
    absent: dict[str, dict[str, str]],
    timings: dict[str, Timings] | None = None,
    runs: tuple[Sequence[amdahl.TimedRun], Sequence[amdahl.TimedRun]] | None = None,
    ratios: Mapping[str, float] | None = None,
) -> Json:
    """Makes the row of a network; without timings it says only that it did not match.

    ``bound`` is Amdahl's, see `amdahl`: its ``speedup`` is over the eager dense network, whose
    layers were timed; ``over_best`` is over the fastest dense form, from the ratio of the two as
    they were measured in turns.

    Args:
        case: the network.
        match: with the truth, the worst of all who ran it.
        absent: by role, who could not run and why; under ``ours``, why we could not.
        timings: by role, ``dense`` and ``composition``.
        runs: of the eager dense network and of ours, with the time of each convolution.
        ratios: how many times fewer multiply-accumulates each convolution of ours has.

    Without `runs` and `ratios` the row has no bound: in other dtypes than float32 there is none.
    Its ``float32`` is how many times faster we are than ourselves in float32.
    """
    row: Json = {
        "kind": "model",
        "case": case.to_dict(),
        "match": match.to_dict(),
        "absent": absent,
    }
    if timings is None:
        return row
    found = {role: _against(timings[role], role) for role in (rig.DENSE, rig.COMPOSITION)}
    dense = found[rig.DENSE]
    assert dense is not None
    row |= found
    row |= {
        "float32": _against(timings[rig.DENSE], rig.OURS_FLOAT32),
        "median_s": timings[rig.DENSE].median(rig.OURS),
        "timings": {role: timing.to_dict() for role, timing in timings.items()},
    } | disturbed(*timings.values())
    if runs is None or ratios is None:
        return row
    bound = amdahl.bound(runs[0], ratios)
    eager = timings[rig.DENSE].median(f"{rig.DENSE}:eager")
    theirs, ours = (amdahl.medians(side) for side in runs)
    return row | {
        "bound": bound
        | {
            "our_layers_s": sum(ours.values()),
            "over_best": bound["speedup"] * dense["median_s"] / eager,
        },
        # Seconds when dense, seconds of ours, and the ratio of their MACs.
        "layers": {n: [theirs.get(n), time, ratios.get(n)] for n, time in ours.items()},
    }


def training_row(case: NetworkCase, match: Agreement, timings: Timings | None = None) -> Json:
    """Makes the row of a training step; without timings it says only that it did not match."""
    row: Json = {"kind": "training", "case": case.to_dict(), "match": match.to_dict()}
    if timings is None:
        return row
    dense = _against(timings, rig.DENSE)
    assert dense is not None
    return (
        row
        | {
            "median_s": timings.median(rig.OURS),
            "dense": dense,
            "composition": _against(timings, rig.COMPOSITION),
            "verdict": verdict(dense, timings.disturbed),
            "timings": timings.to_dict(),
        }
        | disturbed(timings)
    )


def beginning() -> Json:
    """Returns what every file of measurements begins with: when, by which command, and on what.

    It is asked for before anything is measured, or the load would be the measurement's own.
    """
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command(),
        "environment": environment(),
    }


def command() -> str:
    """Writes the command that this process was started by, without paths outside the checkout."""
    root = str(Path(__file__).resolve().parents[1])
    held = [f"{name}={os.environ[name]}" for name in _HELD if name in os.environ]
    words = ["python", *sys.orig_argv[1:]]
    inside = [w.replace(root + os.sep, "").replace(root, ".") for w in words]
    return shlex.join([*held, *(Path(w).name if os.path.isabs(w) else w for w in inside)])


def environment() -> Json:
    """Describes the machine and the versions, without names or paths of the machine."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "commit": _commit(),
        "processor": processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": os.getloadavg()[0],
        "gpu": gpu,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if gpu else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "hetconv_kernels": hk.__version__,
        "system": platform.system(),
        "backends": list(hk.available_backends()),
    }


# Results are no part of what is measured; the first row would make every checkout a changed one.
_MEASURED = ("results", "memory.json", "overhead.json", "throughput.json")
_CODE = (":/", *(f":(top,exclude)benchmarks/{name}" for name in _MEASURED))


def _commit() -> str | None:
    """Returns the commit of the checkout, with ``+`` when files differ from it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head, changes = (
            subprocess.run([*git, *command], capture_output=True, text=True, check=True).stdout
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--", *_CODE])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.strip() + ("+" if changes else "")
