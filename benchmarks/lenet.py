# SPDX-License-Identifier: Apache-2.0
"""LeNet-5 on real MNIST digits: what each method leaves of it, and at which accuracy.

    python -m benchmarks.data mnist
    python -m benchmarks.lenet [--only TEXT] [--seed S] [--data FOLDER] [--out FOLDER]

The dense network (20-50-500-10) is trained once a seed on 7,000 digits; 1,000 decide, and 2,000
that no decision has seen are for the table. Every method may cost 0.3 points on the way. A line is
written to the folder when it is finished, and is not done again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

import hetconv_kernels as hk
from benchmarks.data import DIGESTS, MNIST
from benchmarks.methods import slug
from hetconv_kernels import methods
from hetconv_kernels.compression import Method
from hetconv_kernels.compression.command import top1_accuracy, train_dense, trainer

TOLERANCE = 0.003
_DENSE_EPOCHS, _BATCH, _RATE = 10, 64, 0.01


def lenet_methods() -> dict[str, Method]:
    """Lists the methods by the names of their lines."""
    saved: dict[str, Any] = {"tolerance": TOLERANCE, "target": 0.95, "epochs": 6}
    return {
        "filter correlation": methods.FilterCorrelation(
            **saved, fraction=0.15, pair_epochs=1, tune_epochs=2, least_correlation=0.0
        ),
        "stability": methods.Stability(**saved, fraction=0.15, probe_epochs=1, tune_epochs=2),
        "Play and Prune": methods.PlayAndPrune(
            **saved, fraction=0.15, threshold=0.15, prune_epochs=1, recover_epochs=2
        ),
        # The first two rates are on the way; the last is the paper's 167 times fewer weights.
        "ADMM": methods.ADMM(
            rates=(0.9, 0.98, 1 - 1 / 167.5),
            stem=True,
            updates=2,
            admm_epochs=1,
            retrain_epochs=4,
            rho=0.03,
        ),
    }


def line(name: str, seed: int, folder: Path, out: Path) -> dict[str, Any]:
    """Compresses by one method; returns what its line says."""
    data = hk.datasets.mnist(folder, validation=1000, digests=DIGESTS)
    torch.manual_seed(seed)
    training = trainer(data, _BATCH, _RATE, False)
    dense = hk.models.lenet5()
    slow = trainer(data, _BATCH, _RATE / 10, False)  # train_dense takes ten times that
    dense = train_dense(dense, slow, _DENSE_EPOCHS, seed, out / f"dense-{seed}.pt")
    report = hk.compress(
        dense, lenet_methods()[name], data=training.data, eval_data=training.eval_data,
        optimizer=training.optimizer, example=data.test.images[:1], seed=seed,
        state=out / f"{slug(name)}-{seed}.pt", measure=False, leave_plain=False,
    )  # fmt: skip
    return {
        "name": name,
        "seed": seed,
        "weights": list(report.live),
        "macs": list(report.macs),
        "accuracy": [top1_accuracy(model, data) for model in (dense, report.model)],
        "notes": list(report.notes),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="lines whose name has this text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, default=MNIST, help=f"folder ({MNIST})")
    parser.add_argument("--out", type=Path, default=Path("outputs/lenet"))
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in lenet_methods():
        path = options.out / f"{slug(name)}-{options.seed}.json"
        if options.only in name and not path.exists():
            record = line(name, options.seed, options.data, options.out)
            path.write_text(json.dumps(record, indent=1) + "\n")
        if path.exists():
            print(told(json.loads(path.read_text())))
    return 0


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
