# SPDX-License-Identifier: Apache-2.0
"""The record: what results/<name>.json holds, checked against a schema before it is written.

Version 1. Times are seconds per call, counts are multiply-accumulates and bytes. A ``ratio`` is how
many times longer the rival took than our layer: above 1 we are faster; ``low`` and ``high`` are the
ends of its interval. New fields may be added within a version; a field that changes its meaning or
goes away needs a new one.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import hetconv_kernels as hk
from benchmarks import rig
from benchmarks.gate import Match
from hetconv_kernels.roofs import Roofs
from hetconv_kernels.timing import Timings

SCHEMA_VERSION = 1
Json = dict[str, Any]

_NUMBER = {"type": "number"}
_MAYBE_NUMBER = {"anyOf": [_NUMBER, {"type": "null"}]}
_STRING = {"type": "string"}
_ESTIMATE = {
    "type": "object",
    "required": ["name", "median_s", "ratio", "low", "high", "confidence"],
    "properties": {
        "name": _STRING,
        "median_s": _NUMBER,
        "ratio": _NUMBER,
        "low": _NUMBER,
        "high": _NUMBER,
        "confidence": _NUMBER,
    },
}
_MAYBE_ESTIMATE = {"anyOf": [_ESTIMATE, {"type": "null"}]}
_MATCH = {
    "type": "object",
    "required": ["ok", "worst", "max_error"],
    "properties": {"ok": {"type": "boolean"}, "worst": _MAYBE_NUMBER, "max_error": _MAYBE_NUMBER},
}
_VARIANT = {
    "type": "object",
    "required": ["median_s", "p20_s", "p80_s", "n", "iterations", "samples_s"],
    "properties": {"samples_s": {"type": "array", "items": _NUMBER}, "n": {"type": "integer"}},
}
_TIMINGS = {
    "type": "object",
    "required": ["baseline", "device", "cold", "graph", "clock_resolution_s", "variants"],
    "properties": {"variants": {"type": "object", "values": _VARIANT}},
}
LAYER_ROW = {
    "type": "object",
    "required": ["kind", "case", "backend", "support", "macs", "dense_macs", "bytes", "match"],
    "properties": {
        "kind": {"enum": ["layer"]},
        "case": {
            "type": "object",
            "required": ["name", "n", "c", "f", "h", "w", "k", "dtype", "expected", "issue"],
        },
        "backend": {
            "type": "object",
            "required": ["asked", "ran"],
            "properties": {"asked": _STRING, "ran": _STRING},
        },
        "support": {
            "type": "object",
            "required": ["kind", "digest", "groups", "live", "density"],
            "properties": {"digest": _STRING, "live": {"type": "integer"}},
        },
        "macs": {"type": "integer"},
        "dense_macs": {"type": "integer"},
        "bytes": {"type": "integer"},
        "match": _MATCH,
        # All below are absent when the match failed: nothing was timed.
        "median_s": _NUMBER,
        "floor_s": _NUMBER,
        "percent_of_roof": _NUMBER,
        "dense": _ESTIMATE,
        "composition": _MAYBE_ESTIMATE,
        "unfrozen": _MAYBE_ESTIMATE,
        "prepacked": _MAYBE_ESTIMATE,
        "verdict": {"enum": ["win", "even", "lose"]},
        "timings": _TIMINGS,
    },
}
DISPATCH_ROW = {
    "type": "object",
    "required": ["kind", "name", "backend", "extra_us", "low_us", "high_us", "target_us"],
    "properties": {
        "kind": {"enum": ["dispatch"]},
        "name": _STRING,
        "extra_us": _NUMBER,
        "low_us": _NUMBER,
        "high_us": _NUMBER,
        "target_us": _NUMBER,
        "timings": _TIMINGS,
    },
}
PRIMITIVE_ROW = {
    "type": "object",
    "required": ["kind", "case", "verb", "backend", "macs", "dense_macs", "bytes", "match"],
    "properties": {
        "kind": {"enum": ["primitive"]},
        "verb": {"enum": ["fprop", "dgrad", "wgrad"]},
        "match": _MATCH,
        # As in a layer's row, absent when the match failed.
        **{
            name: LAYER_ROW["properties"][name]  # type: ignore[index]
            for name in (
                "case", "backend", "macs", "dense_macs", "bytes", "median_s", "floor_s",
                "percent_of_roof", "verdict", "timings",
            )
        },
        "efficiency": _NUMBER,
        "dense": _ESTIMATE,
        "composition": _MAYBE_ESTIMATE,
    },
}  # fmt: skip
SCHEMA = {
    "type": "object",
    "required": ["schema", "name", "started", "environment", "roofs", "rows"],
    "properties": {
        "schema": {"enum": [SCHEMA_VERSION]},
        "name": _STRING,
        "started": _STRING,
        "environment": {
            "type": "object",
            "required": ["commit", "processor", "threads", "gpu", "torch", "python", "backends"],
        },
        "roofs": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["macs_per_s", "bytes_per_s", "device", "dtype"],
            },
        },
        "rows": {"type": "array", "items": {"anyOf": [LAYER_ROW, DISPATCH_ROW, PRIMITIVE_ROW]}},
    },
}


def problems(value: Any, schema: Json = SCHEMA, where: str = "$") -> list[str]:
    """Lists how a value departs from a schema; empty when it does not.

    The schema is the part of JSON Schema that is used here: type, enum, required, properties,
    items, anyOf, and ``values`` for the schema of every value of a mapping.
    """
    if "anyOf" in schema:
        tries = [problems(value, choice, where) for choice in schema["anyOf"]]
        return [] if any(not found for found in tries) else min(tries, key=len)
    if "enum" in schema:
        known = value in schema["enum"]
        return [] if known else [f"{where}: {value!r} is none of {schema['enum']}"]
    if "type" in schema and not _is(value, schema["type"]):
        return [f"{where}: {type(value).__name__} is no {schema['type']}"]
    found = [
        f"{where}: {key!r} is missing" for key in schema.get("required", ()) if key not in value
    ]
    if isinstance(value, dict):
        for key, item in value.items():
            inner = schema.get("properties", {}).get(key, schema.get("values", {}))
            found += problems(item, inner, f"{where}.{key}")
    if isinstance(value, list):
        for place, item in enumerate(value):
            found += problems(item, schema.get("items", {}), f"{where}[{place}]")
    return found


def _is(value: object, kind: str) -> bool:
    kinds: dict[str, Any] = {
        "object": dict,
        "array": list,
        "string": str,
        "boolean": bool,
        "null": type(None),
        "integer": int,
        "number": int | float,
    }
    if isinstance(value, bool) and kind != "boolean":
        return False
    # NaN and infinity are no JSON, and no measurement either.
    finite = not isinstance(value, float) or abs(value) < float("inf")
    return isinstance(value, kinds[kind]) and finite


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
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "environment": environment(),
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
    bench: rig.Rig, match: Match, timings: Timings | None = None, roofs: Roofs | None = None
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
        "verdict": verdict(dense),
        "timings": timings.to_dict(),
    }
    return row


def verdict(estimate: Json) -> str:
    """Says ``win`` or ``lose`` when the whole interval is on that side of 1, else ``even``."""
    if estimate["low"] > 1:
        return "win"
    return "lose" if estimate["high"] < 1 else "even"


def _against(timings: Timings, role: str, ours: str = rig.OURS) -> Json | None:
    """Compares our layer with the fastest variant of a role."""
    names = [name for name in timings.samples if name.split(":")[0] == role]
    if not names or ours not in timings.samples:
        return None
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
    }


def environment() -> Json:
    """Describes the machine and the versions, without names or paths of the machine."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "commit": _commit(),
        "processor": _processor(),
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


def _commit() -> str | None:
    """Returns the commit of the checkout, with ``+`` when files differ from it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head, changes = (
            subprocess.run([*git, *command], capture_output=True, text=True, check=True).stdout
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.strip() + ("+" if changes else "")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
