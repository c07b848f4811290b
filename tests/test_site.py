# SPDX-License-Identifier: Apache-2.0
"""The built site: its search index has every page, and versions stand side by side.

`make docs` builds it; CI does before the tests. Without a site the tests of it are skipped.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
SITE = Path(os.environ.get("HETCONV_SITE", ROOT / "site"))


@pytest.fixture
def site() -> Path:
    if not (SITE / "index.html").is_file():
        if os.environ.get("CI"):
            pytest.fail("CI builds the documentation before the tests")
        pytest.skip("no site is built here: `make docs` builds it")
    return SITE


def index(site: Path) -> list[dict[str, str]]:
    found = json.loads((site / "search" / "search_index.json").read_text())["docs"]
    return list(found)


def test_the_index_has_every_page_of_the_navigation_with_its_text(site: Path) -> None:
    pages = re.findall(r"([\w/-]+)\.md$", (ROOT / "mkdocs.yml").read_text(), re.M)
    assert len(pages) > 20
    whole = {entry["location"]: entry["text"] for entry in index(site)}
    for page in pages:
        texts = [text for place, text in whole.items() if place.split("#")[0] == f"{page}.html"]
        assert sum(map(len, texts)) > 200, page


def test_every_page_says_its_version(site: Path) -> None:
    number = versions().version()
    assert f"hetconv_kernels {number}" in (site / "cli.html").read_text()


def versions() -> ModuleType:
    spec = importlib.util.spec_from_file_location("versions", ROOT / "docs" / "versions.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_versions_are_listed_newest_first_and_lead_to_the_newest(tmp_path: Path) -> None:
    for name in ("0.9.0", "0.10.0rc1", "0.10.0", "0.2.1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "index.html").write_text("")
    module = versions()
    module.write_list(tmp_path)
    entries = json.loads((tmp_path / "versions.json").read_text())
    assert [entry["version"] for entry in entries] == ["0.10.0", "0.10.0rc1", "0.9.0", "0.2.1"]
    assert [entry["aliases"] for entry in entries] == [["latest"], [], [], []]
    assert 'url=0.10.0/index.html"' in (tmp_path / "index.html").read_text()
