# SPDX-License-Identifier: Apache-2.0
"""Headless Chromium for the tests of pages: the report and the documentation."""

from __future__ import annotations

import html
import http.server
import json
import os
import queue
import re
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PHONE, DESKTOP = 390, 1280  # pixels


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


def answered(site: Path, address: str, script: str, folder: Path, seconds: float = 60.0) -> Any:
    """Opens a page of a site as a reader does, its own scripts running, by a server of files.

    Workers need a server, and take their time: no moment of loading says that they are done. So the
    page gets a script more, which waits for what it wants and calls ``answer(json)``.

    Args:
        site: the folder that is served.
        address: of the page in it, as ``index.html?q=word``.
        script: JavaScript that calls ``answer`` once.
        folder: for the browser.
        seconds: how long to wait.

    Returns:
        What the script answered.
    """
    tail = (
        "<script>const answer = (said) => fetch('/answer', {method: 'POST', "
        f"body: JSON.stringify(said)}});\n{script}</script>"
    ).encode()
    answers: queue.Queue[Any] = queue.Queue()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, directory=str(site))

        def log_message(self, *_: Any) -> None:
            pass

        def do_POST(self) -> None:
            answers.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def do_GET(self) -> None:
            page = Path(self.translate_path(self.path))
            if page.suffix != ".html" or not page.is_file():
                return super().do_GET()
            whole = page.read_bytes().replace(b"</body>", tail + b"</body>")
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(whole)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        opened = f"http://127.0.0.1:{server.server_address[1]}/{address}"
        options = ("--remote-debugging-port=0", "--window-size=1280,900")  # it stays open
        with subprocess.Popen(
            [*command(folder, *options), opened],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        ) as process:  # fmt: skip
            try:
                return answers.get(timeout=seconds)
            except queue.Empty:
                raise AssertionError(f"{opened} did not answer within {seconds:.0f} s") from None
            finally:
                process.terminate()
                server.shutdown()
