# SPDX-License-Identifier: Apache-2.0
"""Writes the report: ``python -m benchmarks.report``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hetconv_kernels.errors import HetconvError

from . import write_report

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
    options = parser.parse_args(argv)
    try:
        page, *pictures = write_report(options.results or [_COMMITTED], options.out)
    except HetconvError as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    print(f"Wrote {page} and {len(pictures)} pictures beside it.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
