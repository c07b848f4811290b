# SPDX-License-Identifier: Apache-2.0
"""``--json`` of a command: stdout is one JSON document, what is said to people goes to stderr."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable
from typing import Any


def add_argument(parser: argparse.ArgumentParser) -> None:
    """Adds the option to a command's parser."""
    parser.add_argument("--json", action="store_true",
        help="print JSON, and everything else on stderr")  # fmt: skip


def emit(options: argparse.Namespace, work: Callable[[], Any]) -> int:
    """Does what a command does, and prints its record where ``--json`` asks for it.

    Args:
        options: with ``json``.
        work: prints for people, and returns what is to be printed for programs.

    Returns:
        The exit code, 0.
    """
    if not options.json:
        work()
        return 0
    out = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        record = work()
    print(json.dumps(record, indent=2, default=str), file=out)
    return 0
