# SPDX-License-Identifier: Apache-2.0
"""Results: one results file of the benchmarks, checked, with the questions that a report asks."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hetconv_kernels.errors import ArgumentError, FileError, mismatch
from hetconv_kernels.files import Json

from .schema import SCHEMA_VERSION, problems

FAMILIES = {
    "het": "HetConv",
    "self_group": "self-grouped",
    "trained_group": "self-grouped",
    "grouped": "grouped",
    "learned_groups": "learned groups",
    "irregular": "single weights",
    "dense": "dense Support",
}
_SHOWN_PROBLEMS = 3


@dataclass(frozen=True)
class Point:
    """A timed layer or primitive, as the figures place it.

    Attributes:
        name: of the case, and of the primitive.
        family: the kind of its Support, one of the values of `FAMILIES`.
        mac_ratio: dense over live multiply-accumulates.
        speedup: how many times longer the fastest dense convolution took.
        low: the lower end of its interval.
        high: the upper end.
        intensity: live multiply-accumulates a byte.
        rate: live multiply-accumulates a second.
        percent_of_roof: the least time for its work over the measured time.
        verdict: ``win``, ``even`` or ``lose`` against dense.
    """

    name: str
    family: str
    mac_ratio: float
    speedup: float
    low: float
    high: float
    intensity: float
    rate: float
    percent_of_roof: float
    verdict: str


@dataclass(frozen=True)
class Roof:
    """The ceilings that were measured for one dtype.

    Attributes:
        dtype: as torch names it.
        device: type of the device.
        macs_per_s: multiply-accumulates a second.
        bytes_per_s: bytes read and written a second.
    """

    dtype: str
    device: str
    macs_per_s: float
    bytes_per_s: float


@dataclass(frozen=True)
class Results:
    """One results file.

    Attributes:
        name: of the file, without folder and suffix.
        data: what it holds, as `schema` says.
    """

    name: str
    data: Json

    @property
    def environment(self) -> Json:
        """Hardware, versions and commit."""
        return dict(self.data["environment"])

    @property
    def hardware(self) -> str:
        """The processor or GPU, its instruction set and the threads, in one phrase."""
        e = self.environment
        on_gpu = any(_device(row) == "cuda" for row in self.data["rows"])
        if on_gpu and e["gpu"]:
            return f"{e['gpu']}"
        parts = [str(e["processor"]), str(e.get("instructions") or ""), f"{e['threads']} threads"]
        return ", ".join(part for part in parts if part)

    def rows(self, kind: str) -> list[Json]:
        """Lists the rows of a kind: layer, primitive, model, training or dispatch."""
        return [row for row in self.data["rows"] if row["kind"] == kind]

    def points(self, dtype: str | None = None, device: str | None = None) -> list[Point]:
        """Lists the timed layers and primitives, of one dtype and device where one is given."""
        return [
            _point(row)
            for row in (*self.rows("layer"), *self.rows("primitive"))
            if "dense" in row
            and dtype in (None, computed_dtype(row))
            and device in (None, _device(row))
        ]

    def roofs(self) -> list[Roof]:
        """Lists the ceilings, one for each device and dtype; of several the highest."""
        found: dict[tuple[str, str], Roof] = {}
        for measured in self.data["roofs"]:
            key = (measured["dtype"], measured["device"].split(":")[0])
            old = found.get(key)
            rates = (measured["macs_per_s"], measured["bytes_per_s"])
            if old is not None:
                rates = (max(rates[0], old.macs_per_s), max(rates[1], old.bytes_per_s))
            found[key] = Roof(*key, *rates)
        return list(found.values())


def computed_dtype(row: Json) -> str:
    """Names the dtype that a row's arithmetic is in; under autocast it is bfloat16."""
    return "bfloat16" if row["case"].get("amp") else str(row["case"]["dtype"])


def read_results(paths: Iterable[str | os.PathLike[str]]) -> list[Results]:
    """Reads results files; a folder stands for all ``*.json`` in it.

    Args:
        paths: files and folders.

    Returns:
        The files in order of their names, each once.

    Raises:
        ArgumentError: there is no file, or two files have the same name.
        FileError: a file cannot be read, is no JSON, or no results file of the benchmarks.
    """
    files: list[Path] = []
    for given in map(Path, paths):
        inside = sorted(given.glob("*.json")) if given.is_dir() else [given]
        files += [path for path in inside if path not in files]
    if not files:
        raise ArgumentError(
            mismatch("results files", "none", "at least one", "`make bench` writes them.")
        )
    names = [path.stem for path in files]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ArgumentError(
            mismatch(
                "results files",
                f"two named {twice[0]}.json",
                "different names",
                "The figures are named after the files; rename one.",
            )
        )
    return sorted(map(_read, files), key=lambda results: results.name)


def _read(path: Path) -> Results:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FileError(f"{path.name} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise FileError(
            f"{path.name} is no JSON ({error}). Expected a file that `make bench` wrote."
        ) from error
    version = data.get("schema") if isinstance(data, dict) else None
    if version is None:
        raise FileError(
            f"{path.name} is no results file: it names no schema. Expected a file that "
            "`make bench` wrote, such as benchmarks/results/layers-quick.json."
        )
    if version != SCHEMA_VERSION:
        raise FileError(
            mismatch(
                f"schema of {path.name}",
                version,
                SCHEMA_VERSION,
                "Read it with the version of hetconv_kernels that wrote it.",
            )
        )
    wrong = problems(data)
    if wrong:
        raise FileError(
            f"{path.name} departs from the schema of results: "
            f"{'; '.join(_short(wrong))}. It is damaged, or was edited; measure again."
        )
    return Results(path.stem, data)


def _short(wrong: Sequence[str]) -> list[str]:
    more = len(wrong) - _SHOWN_PROBLEMS
    return [*wrong[:_SHOWN_PROBLEMS], *([f"and {more} more"] if more > 0 else [])]


def _point(row: Json) -> Point:
    case, dense = row["case"], row["dense"]
    verb = f" {row['verb']}" if row["kind"] == "primitive" else ""
    return Point(
        name=case["name"] + verb,
        family=FAMILIES.get(case.get("support", {}).get("kind"), "other"),
        mac_ratio=row["dense_macs"] / max(row["macs"], 1),
        speedup=dense["ratio"],
        low=dense["low"],
        high=dense["high"],
        intensity=row["macs"] / max(row["bytes"], 1),
        rate=row["macs"] / row["median_s"],
        percent_of_roof=row["percent_of_roof"],
        verdict=row["verdict"],
    )


def _device(row: Json) -> str:
    case = row.get("case")
    return str(case.get("device", "cpu")) if isinstance(case, dict) else "cpu"


def verdict(estimate: Json, reasons: Sequence[str] = ()) -> str:
    """Says ``win`` or ``lose`` when the whole interval is on that side of 1, else ``even``.

    Where the measurement was disturbed it is ``disturbed``, whatever the interval.
    """
    if reasons:
        return "disturbed"
    if estimate["low"] > 1:
        return "win"
    return "lose" if estimate["high"] < 1 else "even"
