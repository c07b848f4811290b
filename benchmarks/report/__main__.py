# SPDX-License-Identifier: Apache-2.0
"""Writes the report: ``python -m benchmarks.report``; with ``--shares`` prints a part of it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hetconv_kernels.errors import HetconvError

from . import read_results, shares, write_report

_COMMITTED = Path(__file__).resolve().parents[1] / "results"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 0, or 1 when the report cannot be written."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument(
        "results", nargs="*", type=Path, help="JSON files, or folders of them (benchmarks/results)"
    )
    parser.add_argument(
        *("-o", "--out"), type=Path, default=Path("outputs/report"),
        help="the .html file, or a folder for report.html and its pictures (outputs/report)",
    )  # fmt: skip
    parser.add_argument(
        "--shares", action="store_true",
        help="write nothing; print how much of their MAC ratio layers reach, with the misses",
    )  # fmt: skip
    options = parser.parse_args(argv)
    try:
        if options.shares:
            _print_shares(options.results or [_COMMITTED])
            return 0
        page, *pictures = write_report(options.results or [_COMMITTED], options.out)
    except HetconvError as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    print(f"Wrote {page} and {len(pictures)} pictures beside it.")
    return 0


def _print_shares(paths: Sequence[Path]) -> None:
    for results in read_results(paths):
        lines = shares.share_report(results.data)
        if lines:
            print(f"{results.name}.json: {results.hardware}", *lines, "", sep="\n")


if __name__ == "__main__":
    sys.exit(main())
