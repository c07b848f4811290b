# SPDX-License-Identifier: Apache-2.0
"""Headless Chromium for the tests of pages: the report and the documentation."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def browser() -> str:
    """Finds Chromium; CI must have one, elsewhere the test is skipped."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        reason = f"none of {', '.join(NAMES)} is installed: `make browser` installs one"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return found


def command(folder: Path, *options: str) -> list[str]:
    """Returns the command line of a browser that keeps its profile in a folder."""
    return [
        browser(), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
        "--no-first-run", "--disable-dev-shm-usage", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", f"--user-data-dir={folder / 'profile'}",
        *options,
    ]  # fmt: skip


def probed(page: Path, folder: Path, *options: str) -> dict[str, Any]:
    """Opens a page that writes what it found as JSON into ``<pre id="probe">``; returns that."""
    done = subprocess.run(
        [*command(folder, *options), "--dump-dom", page.as_uri()],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    seen = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.S)
    assert seen, f"the page did not load: {done.stdout[-500:]}\n{done.stderr[-2000:]}"
    return dict(json.loads(html.unescape(seen[1])))


# Chromium's own window is not narrower than 500 pixels; a frame is as narrow as it is told.
_FRAMES = """<!DOCTYPE html>
<meta charset="utf-8">
<iframe id="frame" width="WIDTH" height="2000" style="border: 0" sandbox="allow-same-origin">
</iframe>
<script>
const frame = document.getElementById("frame"), pages = PAGES, found = {};
const opened = (page) => new Promise((done) => { frame.onload = done; frame.src = page; });
const said = (e) => e.tagName.toLowerCase() + "." + (e.getAttribute("class") || "") + ": "
  + (e.textContent || "").trim().slice(0, 60);
(async () => {
  for (const page of pages) {
    await opened(page);
    const inner = frame.contentDocument, view = frame.contentWindow, wide = [], cut = [];
    // Down to what scrolls: what is in that can be reached. `edge`: of what cuts its contents off.
    const walk = (e, edge) => {
      const style = view.getComputedStyle(e), box = e.getBoundingClientRect();
      if (style.display === "none" || style.visibility === "hidden" || style.position === "fixed")
        return;
      if (edge === null && box.width > 0 && box.right > WIDTH + 1) wide.push(said(e));
      if (edge !== null && box.width > 0 && box.right > edge + 1) cut.push(said(e));
      if (style.overflowX === "auto" || style.overflowX === "scroll") return;
      if (style.overflowX !== "visible" && box.width > 20 && e !== inner.body) edge = box.right;
      else if (style.overflowX !== "visible" && e !== inner.body) return;  // for screen readers
      if (!(e instanceof view.SVGElement)) for (const child of e.children) walk(child, edge);
    };
    walk(inner.body, null);
    found[page] = {
      width: inner.documentElement.scrollWidth, wide: wide.slice(0, 8), cut: cut.slice(0, 8),
      words: inner.body.innerText.length,
      equations: [...inner.querySelectorAll(".math-block")]
        .filter((e) => e.scrollWidth > e.clientWidth + 1)
        .map((e) => `${e.scrollWidth} in ${e.clientWidth} ${said(e)}`),
    };
  }
  const out = document.createElement("pre");
  out.id = "probe";
  out.textContent = JSON.stringify(found);
  document.body.append(out);
})();
</script>
"""


def in_a_window_of(width: int, pages: list[Path], folder: Path) -> dict[str, Any]:
    """Opens pages one after another in a frame of a width; says of each how wide it became.

    Their scripts do not run.

    Args:
        width: in pixels.
        pages: HTML files.
        folder: for the browser.

    Returns:
        By the page's address: its width, what reaches beyond the window, and what is cut.
    """
    wrapper = folder / "frames.html"
    wrapper.write_text(
        _FRAMES.replace("WIDTH", str(width)).replace(
            "PAGES", json.dumps([page.as_uri() for page in pages])
        )
    )
    return probed(
        wrapper, folder, f"--window-size={max(width, 500)},2000", "--allow-file-access-from-files",
        "--disable-web-security", "--virtual-time-budget=60000",
    )  # fmt: skip
