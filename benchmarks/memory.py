# SPDX-License-Identifier: Apache-2.0
"""What planned memory saves: time and page faults of a call with and without an arena.

Both networks run in turns in one process; ``--keep`` starts that process with an allocator that
keeps its memory (glibc's tunables), which is what a user can do without a plan.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

import hetconv_kernels as hk
from benchmarks import record, summary
from hetconv_kernels import models
from hetconv_kernels.files import Json, write_text
from hetconv_kernels.measure import tables, timing

# Name, network, its input, and the Support of its convolutions.
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "dncnn dense 427x640": (models.dncnn, (1, 1, 427, 640), 1),
    "dncnn het4 427x640": (models.dncnn, (1, 1, 427, 640), 4),
    "dncnn het4 512x512": (models.dncnn, (1, 1, 512, 512), 4),
    "resnet18 het4 8x224": (models.resnet18, (8, 3, 224, 224), 4),
    "resnet18 het4 1x224": (models.resnet18, (1, 3, 224, 224), 4),
}
KEEP = "glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=4294967296"


def measure_plan(name: str, seconds: float) -> Json:
    """Times one network with and without its plan; returns the row."""
    make, shape, p = CASES[name]
    torch.manual_seed(0)
    network = make().eval()
    if p > 1:
        network = hk.convert(network, hk.rules.het(p=p)).model
    x = torch.randn(shape).to(memory_format=torch.channels_last)
    with torch.no_grad():
        planned = hk.optimize(network, x).model
        plain = copy.deepcopy(planned)
        hk.plan_memory(plain, False)
        calls = {"plain": lambda: plain(x), "planned": lambda: planned(x)}
        same = torch.equal(calls["plain"](), calls["planned"]())
        timings = timing.interleaved(calls, baseline="plain", rounds=16, max_seconds=seconds)
        faults = {key: statistics.median(_faults(call) for _ in range(5))
                  for key, call in calls.items()}  # fmt: skip
    ratio = timings.speedup("planned", over="plain")
    return {
        "case": name,
        "threads": torch.get_num_threads(),
        "equal": same,
        "median_s": {key: timings.median(key) for key in calls},
        "speedup": {"ratio": ratio.value, "low": ratio.low, "high": ratio.high},
        "page_faults": faults,
        "arena_bytes": hk.release_memory(planned),
    } | record.disturbed(timings)


def memory_table(rows: Mapping[str, Sequence[Json]]) -> str:
    """Lays out the rows in Markdown; a ratio below 1 is in bold."""
    header = ("network", "allocator", "ms without a plan", "with it", "times as fast", "interval",
              "page faults without", "with", "arena, MB")  # fmt: skip
    lines = []
    for allocator, found in rows.items():
        for row in found:
            ratio, faults = row["speedup"], row["page_faults"]
            interval = f"{ratio['low']:.2f} to {ratio['high']:.2f}"
            lines.append(
                (
                    row["case"],
                    allocator,
                    f"{row['median_s']['plain'] * 1e3:.1f}",
                    f"{row['median_s']['planned'] * 1e3:.1f}",
                    summary.marked(ratio) + " disturbed" * ("disturbed" in row),
                    interval,
                    f"{faults['plain']:.0f}",
                    f"{faults['planned']:.0f}",
                    f"{row['arena_bytes'] / 1e6:.1f}",
                )
            )
    return tables.markdown_table(header, lines, left=2)


def _faults(call: Callable[[], object]) -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    call()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def main() -> None:
    """Measures all cases, once by default and once with an allocator that keeps memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0, help="for each case")
    parser.add_argument("--keep", action="store_true", help="this process only, kept memory")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/memory.json"))
    options = parser.parse_args()
    if options.keep:
        print(json.dumps([measure_plan(name, options.seconds) for name in CASES]))
        return
    whole = record.beginning()
    rows = {"default": [measure_plan(name, options.seconds) for name in CASES]}
    command = [sys.executable, "-m", "benchmarks.memory", "--keep", f"--seconds={options.seconds}"]
    kept = subprocess.run(
        command,
        env=os.environ | {"GLIBC_TUNABLES": KEEP},
        capture_output=True,
        text=True,
        check=True,
    )
    rows["kept by the allocator"] = json.loads(kept.stdout)
    print(memory_table(rows))
    write_text(options.out, json.dumps(whole | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
