# SPDX-License-Identifier: Apache-2.0
"""Whether a change of the engine pays: a network in two built trees, by turns.

    git worktree add ../before main && make -C ../before env
    python -m benchmarks.trees resnet50-sg70-b1 ../before .

On a shared machine two runs one after the other differ by more than most changes bring. Here a
process in each tree holds the optimised network, and one of them computes at a time; a ratio is of
neighbouring turns, with its interval.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.networks import NETWORKS
from hetconv_kernels.errors import ArgumentError, HetconvError, mismatch
from hetconv_kernels.measure.samples import Estimate, median_interval
from hetconv_kernels.option_types import real, whole

# Is run in a tree, by what that tree has: answers a number of calls by the median of their seconds.
_WORKER = """
import statistics, sys, time
import torch
from benchmarks import low_precision
from benchmarks.networks import NETWORKS
(case,) = (c for c in NETWORKS if c.name == sys.argv[1])
torch.set_num_threads(int(sys.argv[2]))
torch.manual_seed(1)
with torch.inference_mode():
    network, x = low_precision.our_network(case, torch.randn(case.shape))
    for _ in range(5):
        network(x)
    print("ready", flush=True)
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line) + 1):
            start = time.perf_counter()
            network(x)
            seconds.append(time.perf_counter() - start)
        print(statistics.median(seconds[1:]), flush=True)  # the first one brings its memory near
"""


class Tree:
    """A tree's process, which computes when it is asked to.

    Raises:
        ArgumentError: there is no tree of this project at that place.
        HetconvError: its process ended, with the last thing that it said.
    """

    def __init__(self, place: Path, network: str, threads: int) -> None:
        self.place = place
        if not (place / "benchmarks" / "low_precision.py").is_file():
            expected = "a checkout of hetconv_kernels, built in place"
            raise ArgumentError(mismatch("tree", str(place), expected))
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115, `close` does
        self._process = subprocess.Popen(
            [sys.executable, "-c", _WORKER, network, str(threads)],
            cwd=place, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True,
        )  # fmt: skip

    def wait(self) -> None:
        """Waits until the network is made."""
        while self._line() != "ready":
            pass

    def seconds(self, calls: int) -> float:
        """Returns the median of that many calls."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{calls}\n")
        self._process.stdin.flush()
        return float(self._line())

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()
        self._said.close()

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._said.seek(0)
            said = self._said.read().strip().splitlines() or ["it said nothing"]
            raise HetconvError(f"the process of {self.place} ended: {said[-1]}")
        return line.strip()


def compared(trees: Sequence[Tree], turns: int, seconds: float) -> list[tuple[float, Estimate]]:
    """Has each tree compute by turns, in an order that is reversed each time.

    Args:
        trees: ready ones.
        turns: of each.
        seconds: of a turn, about.

    Returns:
        For each tree the median in seconds, and its time over the first one's.
    """
    calls = max(3, round(seconds / trees[0].seconds(3)))
    found: list[list[float]] = [[] for _ in trees]
    for turn in range(turns):
        order = range(len(trees))
        for number in order if turn % 2 == 0 else reversed(order):
            found[number].append(trees[number].seconds(calls))
    ratios = [[a / b for a, b in zip(own, found[0], strict=True)] for own in found]
    return [
        (statistics.median(own), median_interval(ratio))
        for own, ratio in zip(found, ratios, strict=True)
    ]


def main() -> None:
    """Prints what each tree took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("network", choices=[c.name for c in NETWORKS])
    parser.add_argument("trees", nargs="+", type=Path, help="each built in place")
    parser.add_argument("--threads", type=whole(), default=torch.get_num_threads())
    parser.add_argument("--turns", type=whole(6), default=16)
    parser.add_argument("--seconds", type=real(0), default=0.3, help="of a turn")
    options = parser.parse_args()
    trees: list[Tree] = []
    try:
        for place in options.trees:
            trees.append(Tree(place.resolve(), options.network, options.threads))
        for tree in trees:
            tree.wait()
        rows = compared(trees, options.turns, options.seconds)
    except HetconvError as error:
        sys.exit(f"trees: {error}")
    finally:
        for tree in trees:
            tree.close()
    for tree, (median, ratio) in zip(trees, rows, strict=True):
        of_first = f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}] of the first"
        print(f"{1e3 * median:10.3f} ms  {of_first}  {tree.place}")


if __name__ == "__main__":
    main()
