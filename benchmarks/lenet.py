# SPDX-License-Identifier: Apache-2.0
"""LeNet-5 on real MNIST digits: what each method leaves of it, at which accuracy, and how fast.

    python -m benchmarks.data mnist
    python -m benchmarks.lenet [--only TEXT] [--seeds S …] [--again] [--data FOLDER] [--out FOLDER]
                               [--publish FOLDER]

The dense network (20-50-500-10) is trained once a seed on 7,000 digits; 1,000 decide, and 2,000
that no decision has seen are for the table. Every method that decides by accuracy may cost 0.3
points on the way. A line is written to the folder when it is finished, and is not done again; with
``--again`` it is measured anew, with the network that was trained.
``--publish`` writes lenet.json and lenet.md, the table with mean and spread over the seeds, and the
paper's row where it has one. Lines that --out does not have stay as lenet.json has them; each says
what it was measured on.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import hetconv_kernels as hk
from benchmarks.data import DIGESTS, MNIST
from benchmarks.methods import slug
from benchmarks.record import environment
from hetconv_kernels import methods
from hetconv_kernels.compression import Distillation, Method
from hetconv_kernels.compression.command import top1_accuracy, train_dense, trainer
from hetconv_kernels.measure import tables

TOLERANCE = 0.003
# What a paper says of this network, where its abstract or its authors' code does.
PAPER = {
    "self-grouping": "19.6× fewer weights, -0.23 points",
    "ADMM": "167× fewer weights, no loss",
}
# Lines that learn from the dense network too, which no paper has.
DISTILLED = ("ADMM, distilled",)
# The rates of each layer by hand, as the paper has them. A line that is distilled loses less by the
# rates that the layers' sensitivity gives.
_BY_HAND = {
    "features.0": (0.1, 0.2, 0.4, 0.6, 0.68, 0.72, 0.75),
    "features.2": (0.5, 0.7, 0.8, 0.88, 0.908, 0.932, 0.9532),
    "classifier.1": (0.825, 0.939, 0.973, 0.988, 0.9934, 0.9958, 0.99746),
    "classifier.3": (0.4, 0.6, 0.76, 0.86, 0.9, 0.93, 0.948),
}
_BATCH = 64
_DENSE_EPOCHS, _DENSE_RATE = 20, 0.03  # at the start
_RATE = 0.01  # of the methods' training, at the start; where few weights are left, a higher one
_RATES = dict.fromkeys(("ADMM", "ADMM, distilled"), 0.03)
_SEEDS = (0, 1, 2, 3, 4)
_TIMED = 64  # images


def lenet_methods() -> dict[str, Method]:
    """Lists the methods by the names of their lines."""
    saved: dict[str, Any] = {"tolerance": TOLERANCE, "target": 0.95, "epochs": 6}
    return {
        "HetConv": methods.Het(p=4, epochs=6),
        "self-grouping": methods.SelfGrouping(target=0.8, step=0.2, clusters=8, epochs=6),
        "WSP": methods.WeakSubnetwork(percentile=0.7, epochs=6),
        "frequency pruning": methods.FrequencyPruning(
            target=0.9, single=True, stem=True, search_epochs=4, epochs=6
        ),
        "filter correlation": methods.FilterCorrelation(
            **saved, fraction=0.15, pair_epochs=1, tune_epochs=2, least_correlation=0.0
        ),
        "stability": methods.Stability(**saved, fraction=0.15, probe_epochs=1, tune_epochs=2),
        "Play and Prune": methods.PlayAndPrune(
            **saved, fraction=0.15, threshold=0.15, prune_epochs=1, recover_epochs=2
        ),
        "ADMM": _admm(_BY_HAND),
        "ADMM, distilled": _admm(None),
    }


def _admm(layer_rates: dict[str, tuple[float, ...]] | None) -> methods.ADMM:
    """Prunes in small steps, by rates that were tried with seed 0 on the images that decide."""
    return methods.ADMM(
        rates=(0.8, 0.92, 0.96, 0.98, 0.987, 0.991, 0.99403),  # 167.5 times fewer weights
        layer_rates=layer_rates, stem=True, updates=1, admm_epochs=1, retrain_epochs=4, rho=0.05,
    )  # fmt: skip


def compressed_line(name: str, seed: int, folder: Path, out: Path) -> dict[str, Any]:
    """Compresses by one method; returns what its line says."""
    data = hk.datasets.mnist(folder, validation=1000, digests=DIGESTS)
    torch.manual_seed(seed)
    training = trainer(data, _BATCH, _RATES.get(name, _RATE), False)
    dense = hk.models.lenet5().to(memory_format=torch.channels_last)
    anew = trainer(data, _BATCH, _DENSE_RATE / 10, False)  # train_dense takes ten times that
    dense = train_dense(dense, anew, _DENSE_EPOCHS, seed, out / f"dense-{seed}.pt")
    step = Distillation(dense) if name in DISTILLED else None
    report = hk.compress(
        dense, lenet_methods()[name], data=training.data, train_step=step,
        eval_data=training.eval_data, optimizer=training.optimizer,
        example=data.test.images[:_TIMED], seed=seed, state=out / f"{slug(name)}-{seed}.pt",
        measure_seconds=2.0,
    )  # fmt: skip
    return {
        "name": name,
        "seed": seed,
        "weights": list(report.live),
        "macs": list(report.macs),
        "seconds": list(report.seconds or ()),
        "speedup": list(report.speedup or ()),
        "accuracy": [top1_accuracy(model, data) for model in (dense, report.model)],
        "notes": list(report.notes),
        "environment": environment(),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--only", default="", metavar="TEXT", help="lines whose name has this text")
    add("--seeds", type=int, nargs="+", default=list(_SEEDS))
    add("--again", action="store_true", help="measure lines that are there anew")
    add("--data", type=Path, default=MNIST, help=f"folder ({MNIST})")
    add("--out", type=Path, default=Path("outputs/lenet"))
    add("--publish", type=Path, metavar="FOLDER", help="write lenet.json and lenet.md there")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    found = []
    for name in lenet_methods():
        for seed in options.seeds:
            path = options.out / f"{slug(name)}-{seed}.json"
            if options.only in name and (options.again or not path.exists()):
                record = compressed_line(name, seed, options.data, options.out)
                path.write_text(json.dumps(record, indent=1) + "\n")
            if path.exists():
                found.append(json.loads(path.read_text()))
                print(told(found[-1]), flush=True)
    if options.publish is not None:
        _publish(found, options.publish)
    return 0


def _publish(found: Sequence[dict[str, Any]], folder: Path) -> None:
    """Writes lenet.json and lenet.md; lines that are not found anew stay as they are there."""
    path = folder / "lenet.json"
    record = json.loads(path.read_text()) if path.exists() else {"lines": []}
    record = {"environment": environment()} | record  # of the lines that have none of their own
    by_place = {(line["name"], line["seed"]): line for line in [*record["lines"], *found]}
    order = list(lenet_methods())
    lines = sorted(by_place.values(), key=lambda line: (order.index(line["name"]), line["seed"]))
    path.write_text(json.dumps(record | {"lines": lines}, indent=1) + "\n")
    (folder / "lenet.md").write_text(f"{lenet_table(lines)}\n\n{below(lines)}\n")


def lenet_table(found: Sequence[dict[str, Any]]) -> str:
    """Lays out the lines, the seeds of a method in one: mean ± standard deviation.

    Args:
        found: what `compressed_line` gave.
    """
    header = (
        "method", "seeds", "fewer weights", "fewer MACs", "accuracy, %", "points", "speed-up",
        "the paper",
    )  # fmt: skip
    rows = []
    for name in dict.fromkeys(record["name"] for record in found):
        mine = [record for record in found if record["name"] == name]
        after = [100 * record["accuracy"][1] for record in mine]
        points = [100 * (r["accuracy"][1] - r["accuracy"][0]) for r in mine]
        speed = [record["speedup"][0] for record in mine if record["speedup"]]
        rows.append(
            (
                name,
                len(mine),
                _spread([r["weights"][0] / r["weights"][1] for r in mine], ".1f", "×"),
                _spread([r["macs"][0] / r["macs"][1] for r in mine], ".1f", "×"),
                _spread(after, ".2f"),
                _spread(points, "+.2f"),
                _spread(speed, ".2f", "×") if speed else "",
                PAPER.get(name, ""),
            )
        )
    return tables.markdown_table(header, rows)


def below(found: Sequence[dict[str, Any]]) -> str:
    """Says what the table is held to: the dense networks, one for each seed."""
    dense = {record["seed"]: 100 * record["accuracy"][0] for record in found}
    return (
        f"Dense: {_spread(list(dense.values()), '.2f')} % of the images that no decision has seen. "
        "Distilled: trained on what the dense network says of an image too, which the papers do "
        "not. "
        f"Points: against the dense network of the same seed. Speed-up: measured against it, "
        f"{_TIMED} images at once."
    )


def _spread(values: Sequence[float], form: str, unit: str = "") -> str:
    """Writes the mean and, of several values, the standard deviation of the sample."""
    text = f"{statistics.mean(values):{form}}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):{form.removeprefix('+')}}"
    return text + unit


def told(record: dict[str, Any]) -> str:
    """Says what one line found."""
    fewer = [record[key][0] / record[key][1] for key in ("weights", "macs")]
    before, after = (100 * value for value in record["accuracy"])
    return (
        f"{record['name']}, seed {record['seed']}: {fewer[0]:.1f}× fewer weights, {fewer[1]:.1f}× "
        f"fewer MACs, {before:.2f} % -> {after:.2f} % ({after - before:+.2f})"
    )


if __name__ == "__main__":
    raise SystemExit(main())
