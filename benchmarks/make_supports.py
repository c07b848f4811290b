# SPDX-License-Identifier: Apache-2.0
"""Adds to self_grouped.json the self-grouped Supports of the cases that it lacks (see `supports`).

python -m benchmarks.make_supports [NAME...]

Those that are named are made anew; k-means differs a little between versions of its library. What
no case asks for any more goes.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from benchmarks.cases import CPU_CASES, GPU_CASES
from benchmarks.held_out import HELD_OUT_CASES
from benchmarks.networks import NETWORKS, self_grouped_layers
from benchmarks.supports import SELF_GROUPED_FILE, SMALL, entry_of, make_support, support_key
from hetconv_kernels import models

Shape = tuple[int, int, int, int, int]


def wanted_shapes() -> list[Shape]:
    """Lists the layers whose Supports the cases need, as `make_support` takes them."""
    whole = {
        shape
        for case in NETWORKS
        if case.support.kind == "self_group"
        for _, shape in self_grouped_layers(case, models.create(case.network))
    }
    layers = {
        (case.support.value, case.c, case.f, case.k, case.support.seed)
        for case in (*CPU_CASES, *GPU_CASES, *HELD_OUT_CASES)
        if case.support.kind == "self_group"
    }
    return sorted(layers | whole | {SMALL})


def entries_for(shapes: list[Shape], known: dict[str, Any], anew: set[str]) -> dict[str, Any]:
    """Returns the entry of each layer: the known one, unless it is to be made anew."""
    found = {}
    for shape in shapes:
        name = support_key(*shape)
        kept = None if name in anew else known.get(name)
        found[name] = entry_of(make_support(*shape)) if kept is None else kept
    return found


def main() -> None:
    """Writes the file: what is missing, and what is named, is made."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    shapes = wanted_shapes()
    parser.add_argument("names", nargs="*", metavar="NAME", help="entries to make anew")
    anew = set(parser.parse_args().names)
    if unknown := anew - {support_key(*shape) for shape in shapes}:
        parser.error(f"no case asks for {', '.join(sorted(unknown))}")
    known = json.loads(SELF_GROUPED_FILE.read_text()) if SELF_GROUPED_FILE.exists() else {}
    entries = entries_for(shapes, known, anew)
    lines = [f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries.items()]
    SELF_GROUPED_FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
