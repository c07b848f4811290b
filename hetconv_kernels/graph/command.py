# SPDX-License-Identifier: Apache-2.0
"""``hetconv optimize``: a network made fast for inference, and saved."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .. import io
from ..errors import ArgumentError, mismatch
from ..files import unwritable
from ..measure.profiling import command as profiling
from ..measure.stats import fitting
from .optimize import OptimizeReport, optimize

_SUFFIX = ".safetensors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command to a parser."""
    profiling.add_target(parser)
    add = parser.add_argument
    add("-o", "--out", type=Path, default=Path("outputs/optimized.safetensors"),
        help="the file to write (outputs/optimized.safetensors)")  # fmt: skip


def run(options: argparse.Namespace, show: Callable[[str], None]) -> int:
    """Runs the command.

    Args:
        options: as `add_arguments` describes them.
        show: prints a text.

    Returns:
        The exit code, 0.

    Raises:
        ArgumentError: the file is called like one of another kind.
        HetconvError: the target is unknown or cannot be built, or the file not be written.
    """
    if options.out.suffix != _SUFFIX:  # before the work: what is written is read by its name
        raise ArgumentError(
            mismatch("--out", repr(str(options.out)), f"a name that ends in {_SUFFIX}",
                     "hetconv_kernels.export.to_onnx writes ONNX.")
        )  # fmt: skip
    dtype = None if options.dtype == "float32" else getattr(torch, options.dtype)
    # `--dtype` is that of the result; the network itself and its inputs are in float32.
    model, example = profiling.target(argparse.Namespace(**vars(options) | {"dtype": "float32"}))
    with fitting(example), torch.no_grad():
        model(example)
    report = optimize(model, example, dtype=dtype)
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(str(options.out), error) from error
    io.save(report.model, options.out)
    if options.json:
        print(json.dumps(_record(report, options.out), indent=2))
    else:
        show(str(report))
        show(f"\nWrote {options.out}: hetconv run {options.out}")
    return 0


def _record(report: OptimizeReport, out: Path) -> dict[str, Any]:
    return {
        "file": str(out),
        "parts": [{"name": part.name, "traced_by": part.traced_by} for part in report.parts],
        "not_traced": {left.name: left.reason for left in report.untraced},
        "frozen": list(report.frozen),
        "largest_error": report.match.error,
    }
