# SPDX-License-Identifier: Apache-2.0
"""Throughput of a socket: a process for each core with one thread, images a second of all.

    python -m benchmarks.throughput resnet18-het4 resnet18-het4-int8

This is how a server that has many requests runs a network: no threads that wait for one another,
and caches and memory that all processes share. Ours and every peer take turns, all processes at
once, in rounds. A ratio is of rounds, with its interval.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import low_precision, record, summary
from benchmarks.networks import NETWORKS, NetworkCase, build_network
from benchmarks.peers import Absent, Inference
from benchmarks.rig import COMPOSITION, DENSE, OURS
from hetconv_kernels.errors import ArgumentError, mismatch
from hetconv_kernels.files import Json, write_text
from hetconv_kernels.measure import disturbance, tables
from hetconv_kernels.measure.timing import median_interval
from hetconv_kernels.option_types import real, whole

_WAIT = 600.0  # seconds until a process that builds its networks is given up


def runs_of(case: NetworkCase, folder: Path, only: Sequence[str] = ()) -> dict[str, Inference]:
    """Builds ours and every peer that is here, dense and as a composition, each checked to run.

    Args:
        case: the network.
        folder: for files that peers read.
        only: names of peers; empty for all.
    """
    torch.manual_seed(1)
    x = torch.randn(case.shape)
    forms = {form: build_network(case, form, x) for form in (OURS, DENSE, COMPOSITION)}  # type: ignore[arg-type]
    found = {OURS: low_precision.ours(case, forms[OURS], x)[OURS]}
    for role in (DENSE, COMPOSITION):
        for name, start in low_precision.peers_of(case.dtype).items():
            if only and name not in only:
                continue
            try:
                found[f"{role}:{name}"] = start(forms[role], x, folder)
            except Absent:
                continue
    for run in found.values():
        run()
    return found


def serve(case: NetworkCase, core: int | None, only: Sequence[str], pipe: Any) -> None:
    """Is one process: says what it can run, then counts calls in the windows that it is told.

    Args:
        case: the network.
        core: the one to stay on; None leaves that to the system.
        only: the peers to run; empty for all.
        pipe: to the parent: names out; (name, begin, end) in, on the monotonic clock; calls out.
    """
    if core is not None:
        os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        runs = runs_of(case, Path(folder), only)
        pipe.send(list(runs))
        while (task := pipe.recv()) is not None:
            name, begin, end = task
            pipe.send(counted(runs[name], begin, end))


def counted(
    run: Callable[[], object], begin: float, end: float, clock: Callable[[], float] = time.monotonic
) -> float:
    """Counts the calls of a window; the last one by the share of it that lies inside."""
    while clock() < begin:
        run()  # warm when the window opens, and others are as busy
    calls, before = 0.0, clock()
    while before < end:
        run()
        now = clock()
        calls += 1.0 if now <= end else (end - before) / (now - before)
        before = now
    return calls


def measure_processes(
    case: NetworkCase, processes: int, rounds: int, seconds: float, only: Sequence[str] = ()
) -> Json:
    """Runs all processes in rounds; returns the row of a network."""
    context = multiprocessing.get_context("spawn")
    cores = sorted(os.sched_getaffinity(0))
    pipes, workers = [], []
    for number in range(processes):
        mine, theirs = context.Pipe()
        core = cores[number] if processes == len(cores) else None
        worker = context.Process(target=serve, args=(case, core, only, theirs), daemon=True)
        worker.start()
        theirs.close()
        pipes.append(mine)
        workers.append(worker)
    try:
        names = _same([_received(pipe) for pipe in pipes])
        rates: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(rounds):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                begin = time.monotonic() + seconds / 4
                for pipe in pipes:
                    pipe.send((name, begin, begin + seconds))
                calls = sum(_received(pipe) for pipe in pipes)
                rates[name].append(calls * case.n / seconds)
        for pipe in pipes:
            pipe.send(None)
    finally:
        for worker in workers:
            worker.join(10)
            worker.kill()
    return row(case, processes, rates)


def row(case: NetworkCase, processes: int, rates: Mapping[str, Sequence[float]]) -> Json:
    """Makes the row: images a second of each, and ours against the best of each role."""
    found: Json = {
        "case": case.to_dict(),
        "processes": processes,
        "images_per_s": {name: median_interval(values).value for name, values in rates.items()},
        "samples": {name: list(values) for name, values in rates.items()},
    }
    for role in (DENSE, COMPOSITION):
        rivals = [name for name in rates if name.split(":")[0] == role]
        if rivals:
            best = max(rivals, key=lambda name: found["images_per_s"][name])
            pairs = zip(rates[OURS], rates[best], strict=True)
            ratio = median_interval([ours / theirs for ours, theirs in pairs])
            found[role] = {
                "name": best, "ratio": ratio.value, "low": ratio.low, "high": ratio.high
            }  # fmt: skip
    return found


def _received(pipe: Any) -> Any:
    if not pipe.poll(_WAIT):
        raise RuntimeError(f"a process of the benchmark did not answer in {_WAIT:.0f} s")
    return pipe.recv()


def _same(lists: Sequence[list[str]]) -> list[str]:
    first = lists[0]
    if any(names != first for names in lists):
        raise RuntimeError(f"the processes run different networks: {lists}")
    return first


def shown_rows(rows: Sequence[Json]) -> str:
    """Lays out the rows; a ratio below 1 is in bold."""
    header = ("network", "processes", "ours, images/s", "fastest dense", "× dense", "interval",
              "fastest composition", "× composition", "interval")  # fmt: skip
    lines = []
    for found in rows:
        cells = [found["case"]["name"], str(found["processes"])]
        cells.append(f"{found['images_per_s'][OURS]:.1f}")
        for role in (DENSE, COMPOSITION):
            rival = found.get(role)
            if rival is None:
                cells += ["", "", ""]
                continue
            interval = f"{rival['low']:.2f} to {rival['high']:.2f}"
            cells += [rival["name"].partition(":")[2], summary.marked(rival), interval]
        lines.append(cells)
    return tables.markdown_table(header, lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures the networks that are named and writes them all to one file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="+", metavar="NETWORK", help="cases of benchmarks.networks")
    parser.add_argument("--processes", type=whole(), default=disturbance.cores())
    parser.add_argument("--rounds", type=whole(6), default=9)
    parser.add_argument("--seconds", type=real(0), default=2.0, help="of a window (2)")
    parser.add_argument("--peer", action="append", default=[], help="only this one (repeatable)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/throughput.json"))
    options = parser.parse_args(arguments)
    cases = {case.name: case for case in NETWORKS}
    for name in options.names:
        if name not in cases:
            raise ArgumentError(mismatch("network", repr(name), f"one of {', '.join(cases)}"))
    whole_file = record.beginning()
    rows = []
    for name in options.names:
        rows.append(
            measure_processes(
                cases[name], options.processes, options.rounds, options.seconds, options.peer
            )
        )
        write_text(options.out, json.dumps(whole_file | {"rows": rows}, indent=1) + "\n")
    print(shown_rows(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
