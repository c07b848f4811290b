# SPDX-License-Identifier: Apache-2.0
"""The built site: its search finds pages without a network, and versions stand side by side.

`make docs` builds it; CI does before the tests. Without a site the tests of it are skipped.
"""

from __future__ import annotations

import functools
import html
import importlib.util
import json
import os
import re
import subprocess
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from urllib.parse import quote

import pytest
from test_report_browser import browser

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


@pytest.mark.parametrize(
    ("words", "page"),
    [
        ("winograd", "backends/cpu.html"),
        ("quantize", "low-precision.html"),
        ("print-completion", "cli.html"),
        ("HetConv2d", "api.html"),
    ],
)
def test_the_search_of_a_browser_finds_it(words: str, page: str, site: Path) -> None:
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(site))
    handler.log_message = lambda *_: None  # type: ignore[attr-defined]
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        address = f"http://127.0.0.1:{server.server_port}/index.html?q={quote(words)}"
        done = subprocess.run(
            [
                browser(), "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom",
                "--virtual-time-budget=20000", "--host-resolver-rules=MAP * ~NOTFOUND, "
                "EXCLUDE 127.0.0.1", address,
            ],
            capture_output=True, text=True, check=True, timeout=120,
        )  # fmt: skip
        server.shutdown()
    found = re.findall(r'<a href="([^"]+)" class="md-search-result__link"', done.stdout)
    assert any(page in html.unescape(link) for link in found), found


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
