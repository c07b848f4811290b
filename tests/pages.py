# SPDX-License-Identifier: Apache-2.0
"""The pages of README and docs, and the code blocks that stand in them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]


DOCS = ROOT / "docs"


PAGES = sorted([ROOT / "README.md", *DOCS.rglob("*.md")])


NAMES = [path.relative_to(ROOT).as_posix() for path in PAGES]


FENCE = re.compile(r"^( *)```(\w*)(?: title=\"([^\"]*)\")?\n(.*?)^\1```$", re.M | re.S)


TITLE = "Not run by the tests: "


class Block(NamedTuple):
    """A fenced block of code."""

    language: str
    title: str
    text: str
    line: int


def blocks(path: Path) -> list[Block]:
    """Lists the fenced blocks of a page."""
    text = path.read_text()
    return [
        Block(found[2], found[3] or "", found[4], text[: found.start()].count("\n") + 2)
        for found in FENCE.finditer(text)
    ]
