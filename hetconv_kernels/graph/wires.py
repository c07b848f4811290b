# SPDX-License-Identifier: Apache-2.0
"""Wires of a graph's channels: which are tied to each other, which must stay, and why."""

from __future__ import annotations

import numpy as np

from ..masks import IntArray


class Wires:
    """Wires, by number; those that are tied are one class."""

    def __init__(self) -> None:
        self._parent: list[int] = []
        self._frozen: list[tuple[IntArray, str]] = []
        self._tied: list[tuple[IntArray, IntArray]] = []

    def new(self, count: int) -> IntArray:
        """Makes wires.  # int [count]"""
        first = len(self._parent)
        self._parent.extend(range(first, first + count))
        return np.arange(first, first + count)

    def tie(self, first: IntArray, second: IntArray) -> None:
        """Ties two rows of wires, pair by pair."""
        self._tied.append((first, second))

    def freeze(self, wires: IntArray | None, reason: str) -> None:
        """Says why wires can neither be removed nor moved."""
        if wires is not None and len(wires):
            self._frozen.append((wires, reason))

    def classes(self) -> tuple[IntArray, int]:
        """Returns the class of each wire, and how many there are.  # int [wires]"""
        for first, second in self._tied:
            for a, b in zip(first.tolist(), second.tolist(), strict=True):
                self._parent[self._find(b)] = self._find(a)
        roots = np.array([self._find(w) for w in range(len(self._parent))], dtype=np.int64)
        kinds, classes = np.unique(roots, return_inverse=True)
        return classes, len(kinds)

    def reasons(self, classes: IntArray) -> dict[int, str]:
        """Gives each class that cannot be removed or moved the first reason why."""
        found: dict[int, str] = {}
        for wires, reason in self._frozen:
            for number in np.unique(classes[wires]).tolist():
                found.setdefault(number, reason)
        return found

    def _find(self, wire: int) -> int:
        root = wire
        while self._parent[root] != root:
            root = self._parent[root]
        while self._parent[wire] != root:
            self._parent[wire], wire = root, self._parent[wire]
        return root
