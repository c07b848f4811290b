# SPDX-License-Identifier: Apache-2.0
"""The documentation and the pages that commands write, as a phone shows them: nothing is cut."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from browsing import DESKTOP, PHONE, answered, browser, in_a_window_of
from pages import DOCS, ROOT

import hetconv_kernels as hk
from hetconv_kernels.measure import profiling


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    browser()
    if importlib.util.find_spec("mkdocs") is None or not importlib.util.find_spec("material"):
        pytest.skip("the docs extra is not installed")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True,
        check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def seen(site: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    pages = [p for p in sorted(site.rglob("*.html")) if p.name != "404.html"]
    assert len(pages) == len(list(DOCS.rglob("*.md")))
    found = {}
    for width in (PHONE, DESKTOP):
        folder = tmp_path_factory.mktemp(f"browser-{width}")
        opened = in_a_window_of(width, pages, folder)
        found[width] = {uri.partition("site0/")[2] or uri: said for uri, said in opened.items()}
        assert len(found[width]) == len(pages)
    return found


@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_no_page_is_wider_than_the_window(seen: dict[int, dict[str, Any]], width: int) -> None:
    wide = {name: s["wide"] for name, s in seen[width].items() if s["width"] > width}
    assert wide == {}
    assert all(said["words"] > 500 for said in seen[width].values())


@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_nothing_is_cut_that_does_not_scroll(seen: dict[int, dict[str, Any]], width: int) -> None:
    assert {name: s["cut"] for name, s in seen[width].items() if s["cut"]} == {}
    assert {name: s["wide"] for name, s in seen[width].items() if s["wide"]} == {}


def test_a_phone_shows_the_whole_of_every_equation(seen: dict[int, dict[str, Any]]) -> None:
    scrolled = {name: s["equations"] for name, s in seen[PHONE].items() if s["equations"]}
    assert scrolled == {}


# What a reader sees after a search: waits until the theme's worker has answered the question.
_FOUND = """
(async () => {
  const meta = () => (document.querySelector(".md-search-result__meta") || {}).innerText || "";
  while (!/\\d+ matching|No matching/.test(meta())) await new Promise((r) => setTimeout(r, 50));
  answer({
    said: meta().trim(),
    typed: document.querySelector(".md-search__input").value,
    places: [...document.querySelectorAll(".md-search-result__link")]
      .map((a) => new URL(a.href).pathname.slice(1)),
    texts: [...document.querySelectorAll(".md-search-result__link")].map((a) => a.innerText),
  });
})();
"""


@pytest.mark.parametrize(
    ("words", "page"),
    [("self-grouping", "methods/self-grouping.html"), ("quantize", "low-precision.html")],
)
def test_the_search_of_the_built_site_finds_the_page(
    words: str, page: str, site: Path, tmp_path: Path
) -> None:
    found = answered(site, f"index.html?q={words}", _FOUND, tmp_path)
    assert found["typed"] == words
    assert re.fullmatch(r"\d+ matching documents?", found["said"])
    assert page in found["places"]
    assert all((site / place).is_file() for place in found["places"])
    assert any(words in text.lower() for text in found["texts"])


def test_the_search_says_that_there_is_nothing(site: Path, tmp_path: Path) -> None:
    found = answered(site, "methods/index.html?q=zyxwvutsrq", _FOUND, tmp_path)
    assert (found["said"], found["places"]) == ("No matching documents", [])


def test_a_timeline_fits_a_phone(tmp_path: Path) -> None:
    browser()
    page = tmp_path / "timeline.html"
    profiling.write_timeline(hk.models.digits_net(8).eval(), torch.randn(2, 1, 8, 8), page)
    found = in_a_window_of(PHONE, [page], tmp_path)[page.as_uri()]
    assert (found["wide"], found["cut"]) == ([], [])
    assert found["width"] <= PHONE


@pytest.mark.parametrize(
    ("inner", "key"),
    [
        ('<div style="width: 600px; height: 9px">x</div>', "wide"),
        ('<div style="overflow: hidden"><p style="width: 600px">x</p></div>', "cut"),
    ],
)
def test_what_does_not_fit_is_noticed(inner: str, key: str, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(f"<!DOCTYPE html><body>{inner}</body>")
    found = in_a_window_of(PHONE, [page], tmp_path)[page.as_uri()]
    assert found[key]
    assert (found["width"] > PHONE) == (key == "wide")
    page.write_text(
        '<!DOCTYPE html><div style="overflow: auto"><p style="width: 600px">x</p></div>'
    )
    found = in_a_window_of(PHONE, [page], tmp_path)[page.as_uri()]
    assert (found["wide"], found["cut"]) == ([], [])
