# SPDX-License-Identifier: Apache-2.0
"""Every method on the data that scikit-learn ships, and its speed on networks of the papers.

    python -m benchmarks.methods [--part PART] [--only TEXT] [--again] [--quick] [--out FOLDER]
                                 [--seconds S] [--publish FOLDER]

``digits`` and ``psnr`` train one network, compress it by every method as the paper has it and in
the form that hardware reads well, and measure quality on images that no decision has seen,
multiply-accumulates and time; ``psnr`` on more photographs too, where ``python -m benchmarks.data
photographs`` has fetched them. ``speed`` compresses networks of the papers' shapes to the papers'
rates and measures time alone: their weights are random, so it has no accuracy. Losses are in.

Each line is written when it is finished, and a second call goes on where the first one stopped;
with ``--again`` it measures anew what is there, with the networks that were trained. ``--publish``
puts what is finished into methods-<part>.json of a folder, and all of it side by side into one
table, methods.md and methods.json.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import nn

import hetconv_kernels as hk
from benchmarks import method_tables
from benchmarks.method_rows import METHOD_NETWORKS, QualityRow, rows, speed_methods
from benchmarks.problems import PROBLEMS, CompressionTask
from benchmarks.record import environment
from benchmarks.report.schema import METHODS_FORMAT, METHODS_SCHEMA, problems
from hetconv_kernels.files import Json

METHOD_PARTS = (*PROBLEMS, "speed")
# Forms of ours that are not trained on the second problem too: they take long, or differ there
# from another line in nothing that is trained.
ONCE = (
    "filter correlation, widths of 8",
    "Play and Prune, widths of 8",
    "stability, widths of 8",
    "frequency pruning, path by prediction",
    "frequency pruning, whole bands",
    "ADMM 70 %, kernels",
    "ADMM 60 %, blocks of 8×8",
)


def cases(
    part: str, out: Path, quick: bool, seconds: float
) -> Iterator[tuple[str, Callable[[], Json]]]:
    """Lists the lines of one part: the name of each, and what makes its record."""
    if part == "speed":
        for network in list(METHOD_NETWORKS)[: 1 if quick else None]:
            for name in list(speed_methods(network))[: 1 if quick else None]:
                yield f"{network}: {name}", partial(speed, network, name, seconds)
        return
    problem = PROBLEMS[part](out / part, quick)
    for row in rows(problem.settings):
        if part == "digits" or row.name not in ONCE:
            yield row.name, partial(quality, problem, row, seconds)


def quality(problem: CompressionTask, row: QualityRow, seconds: float) -> Json:
    """Compresses the network of a problem by one method."""
    settings = problem.settings
    training = problem.training(settings.scratch_rate if row.scratch else settings.rate)
    dense = problem.dense
    report = hk.compress(
        dense, row.method, data=training.data, train_step=training.train_step,
        evaluate=training.evaluate, eval_data=training.eval_data, optimizer=training.optimizer,
        example=problem.example, state=problem.folder / f"{slug(row.name)}.pt",
        measure_seconds=seconds, progress=False,
    )  # fmt: skip
    found = [problem.reference, problem.quality(report.model)]
    before, after = problem.reference_elsewhere, problem.elsewhere(report.model)
    return report.to_dict() | {
        "name": row.name,
        "paper": row.paper,
        f"test_{problem.name if problem.name == 'psnr' else 'accuracy'}": found,
        "tolerance": settings.tolerance,
        "macs_saved": report.macs_saved,
        "within": found[1] >= found[0] - settings.tolerance and report.macs_saved >= 0.5,
        "elsewhere": {name: [before[name], after[name]] for name in before},
    }


def speed(network: str, name: str, seconds: float) -> Json:
    """Compresses one of the papers' networks, untrained, to the paper's rate, and times it."""
    build, shape, skip = METHOD_NETWORKS[network]
    torch.manual_seed(0)
    report = hk.compress(
        build().eval(), speed_methods(network)[name], example=torch.randn(shape), evaluate=_always,
        skip=skip, progress=False, measure_seconds=seconds,
    )  # fmt: skip
    record = report.to_dict() | {"name": name, "network": network}
    del record["history"]  # of weights that nobody trained
    return record


def slug(name: str) -> str:
    """Makes a file name of a line's name."""
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")


def _always(model: nn.Module) -> float:
    return 1.0


def run_part(part: str, options: argparse.Namespace) -> Json:
    """Makes the lines of a part that are not there yet, and gathers all that are."""
    found = []
    for name, make in cases(part, options.out, options.quick, options.seconds):
        path = options.out / part / f"{slug(name)}.json"
        old = json.loads(path.read_text()) if path.exists() else None
        if options.only in name and (old is None or options.again):
            started, before = time.perf_counter(), environment()
            record = json.loads(json.dumps(make()))
            took = time.perf_counter() - started
            # Measured again, a line still tells how long its training took.
            took_all = max(took, old["took_s"] if old else 0.0)
            record |= {"took_s": took_all, "environment": before}
            _write(path, record)
            old = record
            print(f"{took:6.1f} s  {part}: {name}", flush=True)
        if old is not None:
            found.append(old)
    return {
        "format": METHODS_FORMAT,
        "environment": environment(),
        "seconds": sum(record["took_s"] for record in found),
        part: found,
    }


def _write(path: Path, value: Json) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")
    beside.replace(path)


def publish(found: dict[str, Json], folder: Path) -> None:
    """Writes what was found, and one table of it and of the parts that were there before.

    Raises:
        ValueError: something departs from the schema.
    """
    for part, record in found.items():
        wrong = problems(record, METHODS_SCHEMA)
        if wrong:
            raise ValueError(f"methods-{part}.json departs from its schema: {'; '.join(wrong[:5])}")
        _write(folder / f"methods-{part}.json", record)
    parts = {}
    for part in METHOD_PARTS:
        path = folder / f"methods-{part}.json"
        if path.exists():
            parts[part] = json.loads(path.read_text())[part]
    table = method_tables.joined_table(parts)
    _write(folder / "methods.json", table)
    (folder / "methods.md").write_text(method_tables.joined_markdown(table))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="tiny networks, an epoch each")
    add("--only", default="", help="lines whose name has this text")
    add("--again", action="store_true", help="measure lines that are there anew")
    add("--seconds", type=float, default=1.0, help="of timing, for each")
    add("--part", choices=[*METHOD_PARTS, "all", "none"], default="all")
    add("--out", type=Path, default=Path("outputs/methods"), help="states and lines go here")
    add("--publish", type=Path, metavar="FOLDER", help="write the parts and the one table there")
    options = parser.parse_args(arguments)
    chosen = {"all": METHOD_PARTS, "none": ()}.get(options.part, (options.part,))
    found = {part: run_part(part, options) for part in chosen}
    found = {part: record for part, record in found.items() if record[part]}
    text = "\n\n".join(
        method_tables.part_table(part, record[part]) for part, record in found.items()
    )
    print(f"\n{text}\n\n{sum(record['seconds'] for record in found.values()):.0f} s in all.")
    if options.publish is not None:
        publish(found, options.publish)
        print(f"Wrote {options.publish / 'methods.md'} and the records beside it.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
