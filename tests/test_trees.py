# SPDX-License-Identifier: Apache-2.0
"""The benchmark of two trees: whose turn it is, what it compares, and how it fails."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import trees
from hetconv_kernels.errors import ArgumentError, HetconvError

ROOT = Path(__file__).resolve().parents[1]
# Answers at once: n calls took n seconds in the first turn and half of that afterwards.
ANSWERS = """
import sys
print("a warning", flush=True)
print("ready", flush=True)
for number, line in enumerate(sys.stdin):
    print(float(line) / (1 + bool(number)), flush=True)
"""


class Scripted:
    """A tree whose calls take what is told, by turns."""

    def __init__(self, name: str, times: list[float], log: list[str]) -> None:
        self.name, self.times, self.log = name, times, log
        self.calls: list[int] = []

    def seconds(self, calls: int) -> float:
        self.calls.append(calls)
        self.log.append(self.name)
        return self.times[(len(self.calls) - 1) % len(self.times)]


def test_trees_take_turns_and_neighbours_are_compared() -> None:
    log: list[str] = []
    # The machine is half as fast in every second turn; the ratio does not see it.
    one = Scripted("one", [0.2, 0.1, 0.2], log)
    one.times = [0.1] + [0.1, 0.2] * 4  # the first call only asks how long one takes
    two = Scripted("two", [0.09, 0.18] * 4, log)
    (first, same), (second, ratio) = trees.compared([one, two], turns=8, seconds=1.0)  # type: ignore[list-item]
    assert "".join(name[1] for name in log[1:]) == "nwwn" * 4
    assert set(one.calls[1:]) == set(two.calls) == {10}
    assert (same.low, same.high) == (1.0, 1.0)
    assert (ratio.low, ratio.high) == pytest.approx((0.9, 0.9))
    assert (first, second) == pytest.approx((0.15, 0.135))


def test_a_process_answers_after_what_it_has_to_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trees, "_WORKER", ANSWERS)
    tree = trees.Tree(ROOT, "none", 1)
    try:
        tree.wait()
        assert [tree.seconds(3), tree.seconds(3)] == [3.0, 1.5]
    finally:
        tree.close()


def test_another_folder_is_no_tree(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"^tree.*a checkout of hetconv_kernels"):
        trees.Tree(tmp_path, "none", 1)


def test_a_process_that_ends_is_quoted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trees, "_WORKER", "raise SystemExit('no such network')")
    monkeypatch.setattr(sys, "argv", ["trees", "resnet18-het4", str(ROOT)])
    with pytest.raises(SystemExit, match=r"the process of .* ended: no such network"):
        trees.main()
    monkeypatch.setattr(trees, "_WORKER", "pass")
    tree = trees.Tree(ROOT, "none", 1)
    with pytest.raises(HetconvError, match="it said nothing"):
        tree.wait()
    tree.close()


def test_the_worker_finds_what_it_is_made_of() -> None:
    """It names what a tree has; the rest of it is a loop that the tests above stand in for."""
    names = {"low_precision": "our_network", "networks": "NETWORKS"}
    for module, name in names.items():
        assert hasattr(__import__(f"benchmarks.{module}", fromlist=[name]), name)
        assert name in trees._WORKER
    compile(trees._WORKER, "worker", "exec")
