# SPDX-License-Identifier: Apache-2.0
"""Compares two results files: what became faster, what slower, beyond what the intervals explain.

    python -m benchmarks.compare OLD NEW [--across] [--tolerance 0.05]

OLD and NEW are files, or ``REVISION:path`` of a file committed here, as in
``HEAD~5:benchmarks/results/layers-full.json``; with ``--results layers-full`` a revision is enough.

Two runs differ by more than chance: other work on the machine, its clock rate, its temperature. So
two ratios are given for each case, old over new, above 1 for faster now: of our time, and of our
time as a multiple of the fastest dense form that ran beside it, which such a drift hardly touches.
A case counts as slower only when the whole interval of both lies below 1 by more than the
tolerance; the intervals are those of medians, combined so that nothing of the samples is assumed.
Where dense itself took more than a quarter longer or shorter, the machine was another one in
effect: the case is called unsteady, and has to be measured again.

Exit status: 0 nothing became slower, 1 something did or gives wrong results now, 2 the files cannot
be compared, or unsteady cases have to be measured again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.report.schema import problems
from benchmarks.table import lay_out
from hetconv_kernels.files import Json
from hetconv_kernels.measure.timing import median_interval

HARDWARE = ("processor", "instructions", "cores", "threads", "gpu", "system")
VERSIONS = ("torch", "python", "cuda", "cudnn")
# Each of the two medians at this confidence: their ratio's interval then has 95 % at least.
_CONFIDENCE = 0.975
_OURS = "ours"
# How many times longer or shorter dense may take before a case cannot be judged.
_STEADY = 1.25


class IncomparableError(Exception):
    """The two files cannot be compared; the message says why."""


@dataclass(frozen=True)
class Interval:
    """A ratio old over new, above 1 when it is faster now, and the ends of its interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Change:
    """One case in both files.

    Attributes:
        name: of the case, with its kind, backend and verb.
        old_s: our median in the old file, in seconds; None where it was not timed.
        new_s: in the new one.
        ours: ratio of our times.
        beside_dense: ratio of our times as multiples of dense; None where no dense ran.
        verdict: ``faster``, ``slower``, ``unsteady``, ``drift``, ``same``, ``wrong``, ``right
            again``, or why the case cannot be compared.
    """

    name: str
    old_s: float | None
    new_s: float | None
    ours: Interval | None
    beside_dense: Interval | None
    verdict: str

    @property
    def failed(self) -> bool:
        """Whether this is a reason for a failing exit status."""
        return self.verdict in ("slower", "wrong")


def read(where: str, results: str | None = None) -> Json:
    """Reads a results file, or one of a revision.

    Raises:
        IncomparableError: there is none, or it is no results file.
    """
    path = Path(where)
    try:
        if path.is_file():
            text = path.read_text()
        else:
            revision = where
            if ":" not in where:
                if results is None:
                    raise IncomparableError(
                        f"{where} is no file. For a revision give REVISION:path, or --results NAME."
                    )
                revision = f"{where}:./results/{Path(results).stem}.json"
            text = _git_show(revision)
        data = json.loads(text)
    except (OSError, ValueError) as error:
        raise IncomparableError(f"{where} cannot be read: {error}") from error
    wrong = problems(data)
    if wrong:
        raise IncomparableError(f"{where} is no results file of this version: {wrong[0]}")
    return dict(data)


def _git_show(revision: str) -> str:
    git = ["git", "-C", str(Path(__file__).parent), "show", revision]
    done = subprocess.run(git, capture_output=True, text=True, check=False)
    if done.returncode:
        raise IncomparableError(f"git show {revision}: {done.stderr.strip()}")
    return done.stdout


def differences(old: Json, new: Json, names: Sequence[str]) -> list[str]:
    """Lists in what their environments differ."""
    a, b = old["environment"], new["environment"]
    return [f"{n}: {a.get(n)} then, {b.get(n)} now" for n in names if a.get(n) != b.get(n)]


def row_key(row: Json) -> str:
    """Names a row, the same in every file."""
    if row["kind"] == "dispatch":
        return f"dispatch {row['name']} {row['backend']}"
    parts = [row["kind"], row["case"]["name"], row.get("verb", "")]
    return " ".join(part for part in (*parts, row.get("backend", {}).get("asked", "")) if part)


def compare_rows(old: Json, new: Json, tolerance: float) -> list[Change]:
    """Compares every row that one of the files has, those of both first."""
    before, after = ({row_key(row): row for row in data["rows"]} for data in (old, new))
    both = [name for name in before if name in after]
    changes = [_change(name, before[name], after[name], tolerance) for name in both]
    changes += [Change(n, None, None, None, None, "gone") for n in before if n not in after]
    changes += [Change(n, None, None, None, None, "new") for n in after if n not in before]
    return changes


def _change(name: str, old: Json, new: Json, tolerance: float) -> Change:
    if not new.get("match", {"ok": True})["ok"]:
        return Change(name, _median(old), None, None, None, "wrong")
    if not old.get("match", {"ok": True})["ok"]:
        return Change(name, None, _median(new), None, None, "right again")
    changed = _other_question(old, new)
    if changed:
        return Change(name, _median(old), _median(new), None, None, changed)
    ours = _between(*(_samples(row) for row in (old, new)))
    a, b = _beside_dense(old), _beside_dense(new)
    beside = None
    if a is not None and b is not None:
        beside = Interval(b.value / a.value, b.low / a.high, b.high / a.low)
    verdict = _verdict(ours, beside, tolerance)
    if "disturbed" in old or "disturbed" in new:
        return Change(name, _median(old), _median(new), ours, beside, "disturbed")
    if verdict in ("slower", "faster") and beside is not None:
        dense = beside.value / ours.value  # how many times longer dense takes now
        verdict = verdict if 1 / _STEADY <= dense <= _STEADY else "unsteady"
    return Change(name, _median(old), _median(new), ours, beside, verdict)


def _other_question(old: Json, new: Json) -> str:
    """Says why two rows of one name did not measure the same; "" when they did."""
    unlike = {"expected", "quick", "target", "target_dense", "target_composition", "note", "issue"}
    a, b = ({k: v for k, v in row.get("case", {}).items() if k not in unlike} for row in (old, new))
    common = set(a) & set(b)
    if any(a[k] != b[k] for k in common):
        return "another case: " + ", ".join(sorted(k for k in common if a[k] != b[k]))
    digests = [row.get("support", {}).get("digest") for row in (old, new)]
    if digests[0] != digests[1]:
        return "another Support"
    for field in ("cold", "graph", "device"):
        values = [_timings(row).get(field) for row in (old, new)]
        if values[0] != values[1]:
            return f"{field}: {values[0]} then, {values[1]} now"
    return ""


def _verdict(ours: Interval, beside: Interval | None, tolerance: float) -> str:
    intervals = [ours] if beside is None else [ours, beside]
    if all(i.high < 1 - tolerance for i in intervals):
        return "slower"
    if all(i.low > 1 + tolerance for i in intervals):
        return "faster"
    apart = ours.high < 1 - tolerance or ours.low > 1 + tolerance
    return "drift" if apart else "same"


def _between(old: Sequence[float], new: Sequence[float]) -> Interval:
    a, b = (median_interval(samples, _CONFIDENCE) for samples in (old, new))
    return Interval(a.value / b.value, a.low / b.high, a.high / b.low)


def _beside_dense(row: Json) -> Interval | None:
    """Returns how many times longer than ours the dense form that ran beside it took."""
    if "dense" in row:
        return Interval(row["dense"]["ratio"], row["dense"]["low"], row["dense"]["high"])
    variants = _timings(row)["variants"]
    if "dense" not in variants:
        return None
    pairs = zip(variants["dense"]["samples_s"], variants[_OURS]["samples_s"], strict=True)
    found = median_interval([dense / ours for dense, ours in pairs], _CONFIDENCE)
    return Interval(found.value, found.low, found.high)


def _timings(row: Json) -> Json:
    timings: Json = row["timings"]
    return timings if "variants" in timings else timings["dense"]  # a network has one a role


def _samples(row: Json) -> list[float]:
    return list(_timings(row)["variants"][_OURS]["samples_s"])


def _median(row: Json) -> float | None:
    if "timings" not in row:
        return None
    return float(_timings(row)["variants"][_OURS]["median_s"])


def table(changes: Sequence[Change]) -> list[str]:
    """Lays out the changes, the slower ones last, where a terminal shows them."""
    header = ("case", "verdict", "old µs", "new µs", "faster now", "beside dense", " ")
    order = {"slower": 3, "wrong": 3, "unsteady": 2, "faster": 1}
    lines = [
        (
            c.name,
            c.verdict.upper() if c.failed else c.verdict,
            "" if c.old_s is None else f"{c.old_s * 1e6:.1f}",
            "" if c.new_s is None else f"{c.new_s * 1e6:.1f}",
            str(c.ours or ""),
            str(c.beside_dense or ""),
            "<--" if c.failed else "",
        )
        for c in sorted(changes, key=lambda change: order.get(change.verdict, 0))
    ]
    return lay_out(header, lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compares and prints; see the module for the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("old", help="a file, REVISION:path, or a revision with --results")
    parser.add_argument("new", help="likewise")
    parser.add_argument(
        "--results", metavar="NAME", help="the file in benchmarks/results to look at"
    )
    parser.add_argument("--tolerance", type=float, default=0.05, help="ignored change (0.05)")
    parser.add_argument("--across", action="store_true", help="compare different hardware anyway")
    options = parser.parse_args(arguments)
    if not 0 <= options.tolerance < 1:
        parser.error(f"--tolerance {options.tolerance}: expected 0 to 1")
    try:
        old, new = (read(where, options.results) for where in (options.old, options.new))
        machines = differences(old, new, HARDWARE)
        if machines and not options.across:
            raise IncomparableError(
                "the hardware differs, so nothing can be said of the code: "
                f"{'; '.join(machines)}. --across compares anyway."
            )
        changes = compare_rows(old, new, options.tolerance)
        if not any(change.ours for change in changes):
            raise IncomparableError("the files have no case in common that both have timed.")
    except IncomparableError as error:
        print(f"benchmarks.compare: {error}", file=sys.stderr)
        return 2
    for line in table(changes):
        print(line)
    for label, data in (("old", old), ("new", new)):
        e = data["environment"]
        print(f"{label}: {data['name']}, {data['started']}, commit {e['commit']}, "
              f"load before {e.get('load_before')}")  # fmt: skip
    for difference in (*machines, *differences(old, new, VERSIONS)):
        print(f"WARNING: {difference}. A change may come from this and not from the code.")
    counts = {v: sum(c.verdict == v for c in changes) for v in ("faster", "slower", "wrong")}
    unsteady = sum(c.verdict == "unsteady" for c in changes)
    drifted = sum(c.verdict == "drift" for c in changes)
    print(
        f"{len(changes)} cases: {counts['faster']} faster, {counts['slower']} slower, "
        f"{counts['wrong']} wrong now, {drifted} whose time changed but not beside dense."
    )
    if any(change.failed for change in changes):
        return 1
    if unsteady:
        print(f"{unsteady} cases are unsteady: the machine was slower or faster; measure again.")
    return 2 if unsteady else 0


if __name__ == "__main__":
    sys.exit(main())
