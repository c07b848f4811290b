# SPDX-License-Identifier: Apache-2.0
"""CITATION.cff and references.bib name every paper that docs/methods names, and the version."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import hetconv_kernels as hk

ROOT = Path(__file__).parents[1]
PAGES = sorted(p for p in (ROOT / "docs" / "methods").glob("*.md") if p.stem != "index")
CITATION = (ROOT / "CITATION.cff").read_text()
BIB = (ROOT / "docs" / "references.bib").read_text()


def squeezed(text: str) -> str:
    """Takes out what the three formats write differently: braces, breaks, case."""
    return re.sub(r"\s+", " ", text.replace("{", "").replace("}", "")).lower()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_paper_of_a_method_can_be_cited(page: Path) -> None:
    text = page.read_text()
    title = re.search(r"\*([^*]{20,}?)\*,\s", text)
    assert title, "a method's page begins with its paper"
    for place in (CITATION, BIB):
        assert squeezed(title[1]) in squeezed(place)
        for number in set(re.findall(r"arXiv (\d{4}\.\d{5})", text.partition("##")[0])):
            assert f"arXiv:{number}" in place


def test_the_version_is_that_of_the_package() -> None:
    assert f"version: {hk.__version__}\n" in CITATION


def test_no_entry_is_of_a_paper_that_no_page_names() -> None:
    assert CITATION.count("  - type: ") == BIB.count("\n@") + 1 == len(PAGES)
