# SPDX-License-Identifier: Apache-2.0
"""What a call of a network costs beside its arithmetic: many layers that are almost nothing.

The optimised network is called as users call it, layer by layer, and its native program alone is
called with ready addresses. The difference of the first and the last is what Python and PyTorch
take: the check that nothing has changed, the result's memory, the way into the program. The same
program is saved and called by a host in C++ through the C library, after the others.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

import hetconv_kernels as hk
from benchmarks import record
from hetconv_kernels.files import Json, write_text
from hetconv_kernels.measure import tables, timing

_ROOT = Path(__file__).resolve().parents[1]
_CALLS = 2000  # of the host, in each of its rounds
_ROUNDS = 5


def build_host(folder: Path) -> Path:
    """Builds the C library, and the host of its tests; returns the host.

    Raises:
        subprocess.CalledProcessError: make or the compiler failed.
        FileNotFoundError: there is none.
    """
    subprocess.run(["make", "--quiet", "library"], cwd=_ROOT, check=True)
    library, host = _ROOT / "build" / "library", folder / "server"
    source = _ROOT / "tests" / "native" / "deploy" / "server.cpp"
    where = [f"-I{library}", f"-L{library}", f"-Wl,-rpath,{library}", "-lhetconv", "-ldl"]
    subprocess.run(["g++", "-std=c++17", "-O2", source, *where, "-pthread", "-o", host], check=True)
    return host


def time_host(host: Path, program: Path, calls: int = _CALLS) -> float:
    """Returns the seconds of a call through the C library, in one thread: a median."""
    command = [host, "--time", program, str(calls), "1"]
    said = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(said.stdout)


def measure_chain(layers: int, seconds: float, host: Path | None = None) -> Json:
    """Times a chain of layers on an image of 2 × 2 pixels and 8 channels; returns the row.

    Args:
        layers: how many.
        seconds: at most, beside the host's.
        host: what `build_host` built; None leaves the C library out.
    """
    torch.manual_seed(0)
    chain = (hk.nn.HetConv2d(8, 8, 3, padding=1, p=2) for _ in range(layers))
    x = torch.randn(1, 8, 2, 2).to(memory_format=torch.channels_last)
    with torch.no_grad(), hk.use_backend("cpu"):
        network = hk.optimize(nn.Sequential(*chain).eval(), x).model
        plain = copy.deepcopy(network)
        hk.plan_memory(plain, False)
        same = torch.equal(network(x), plain(x)) and torch.equal(network(x), plain(x))
        (plan,) = network.__dict__["_memory"]._plans.values()
        (piece,) = plan.program._pieces
        frame, y = plan.take(), torch.empty_like(x)
        addresses = [frame.address, *(t.data_ptr() for t in (x, y))]
        calls = {
            "layer by layer": lambda: plain(x),
            "program": lambda: network(x),
            "native part": lambda: piece.program.run(addresses),
        }
        found = timing.interleaved(calls, baseline="layer by layer", max_seconds=seconds)
        medians = {name: found.median(name) for name in calls}
        if host is not None:
            path = host.with_name("chain.hc")
            hk.export.program(network, x, path)
            medians["C library"] = statistics.median(time_host(host, path) for _ in range(_ROUNDS))
    return {
        "layers": layers,
        "threads": torch.get_num_threads(),
        "equal": same,
        "median_s": medians,
        "overhead_s": medians["program"] - medians["native part"],
    } | record.disturbed(found)


def overhead_table(rows: Sequence[Json]) -> str:
    """Lays out the rows in Markdown, in microseconds of a call."""
    ways = ("layer by layer", "program", "native part", "C library")
    header = ("layers", *ways, "Python and PyTorch")
    lines = []
    for row in rows:
        times = [row["median_s"].get(way) for way in ways]
        cells = ["" if time is None else f"{time * 1e6:.1f}" for time in times]
        own = f"{row['overhead_s'] * 1e6:.1f}" + " disturbed" * ("disturbed" in row)
        lines.append((row["layers"], *cells, own))
    return tables.markdown_table(header, lines)


def main() -> None:
    """Measures chains of 1, 20 and 50 layers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="for each chain")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/overhead.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    whole = record.beginning()
    with tempfile.TemporaryDirectory() as folder:
        host = build_host(Path(folder))
        rows = [measure_chain(layers, options.seconds, host) for layers in (1, 20, 50)]
    print(overhead_table(rows))
    write_text(options.out, json.dumps(whole | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
