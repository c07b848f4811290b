# SPDX-License-Identifier: Apache-2.0
"""The report in a real browser, headless Chromium: what it lays out, draws, sorts and loads."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import pytest
from browsing import PHONE, browser, in_a_window_of, probed

from benchmarks.report import write_report
from benchmarks.report.shares import missed_lines, share_lines

COMMITTED = Path(__file__).parents[1] / "benchmarks" / "results"
_PROBE = """
<script>
const errors = [];
addEventListener("error", (event) => errors.push(String(event.message)));
addEventListener("securitypolicyviolation", (event) => errors.push(event.blockedURI));
addEventListener("load", () => {
  const column = (table, place) => [...table.tBodies[0].rows].map((r) => r.cells[place].innerText);
  const table = document.querySelector("#layers table");
  const head = [...table.tHead.rows[0].cells].findIndex((th) => th.innerText.startsWith("× dense"));
  const orders = [column(table, head)];
  for (let i = 0; i < 2; i++) {
    table.tHead.rows[0].cells[head].querySelector("button").click();
    orders.push(column(table, head));
  }
  const found = {
    title: document.title,
    headings: [...document.querySelectorAll("h2")].map((h) => h.innerText),
    tables: [...document.querySelectorAll("table")].map((t) => ({
      rows: t.tBodies[0].rows.length, height: t.getBoundingClientRect().height })),
    lost: [...document.querySelectorAll("#layers tr.lost > th")].map((th) => ({
      text: th.innerText, edge: getComputedStyle(th).boxShadow })),
    figures: [...document.querySelectorAll("figure svg")].map((svg) => {
      const box = svg.getBoundingClientRect();
      const marks = [...svg.querySelectorAll(".mark")];
      return { width: box.width, height: box.height, marks: marks.length,
        drawn: marks.filter((m) => m.getBoundingClientRect().width > 0).length,
        said: svg.querySelector("desc").textContent,
        words: [...svg.querySelectorAll("text")].map((t) => t.textContent) };
    }),
    pictures: [...document.querySelectorAll("img.probe")].map((i) => i.naturalWidth),
    loaded: performance.getEntriesByType("resource").map((r) => r.name)
      .filter((name) => !name.startsWith("data:")),
    wide: document.documentElement.scrollWidth - innerWidth,
    ink: getComputedStyle(document.body).color,
    page: getComputedStyle(document.body).backgroundColor,
    orders, errors,
  };
  const out = document.createElement("pre");
  out.id = "probe";
  out.textContent = JSON.stringify(found);
  document.body.append(out);
});
</script>
"""


def encoded(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def look(page: Path, folder: Path, *options: str) -> dict[str, Any]:
    """Opens a page with the probe in it and returns what the probe saw."""
    text = page.read_text()
    pictures = "".join(
        f'<img class="probe" width=9 src="data:image/png;base64,{encoded(p)}">'
        for p in sorted(page.parent.glob("*.png"))
    )
    place = page.with_name("probed.html")
    place.write_text(text.replace("</head>", _PROBE + "</head>").replace("</body>", pictures))
    return probed(place, folder, *options)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report([COMMITTED], tmp_path_factory.mktemp("report"))[0]


@pytest.fixture(scope="module")
def seen(page: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return look(page, tmp_path_factory.mktemp("browser"), "--window-size=1200,900")


def rows_of_tables() -> int:
    """Counts each measurement, each file, and what is said of a file's saved work."""
    found = [json.loads(file.read_text()) for file in COMMITTED.glob("*.json")]
    of_shares = [lines for data in found for lines in (share_lines(data)[1], missed_lines(data)[1])]
    return sum(len(data["rows"]) + 1 for data in found) + sum(map(len, of_shares))


def test_the_page_needs_nothing_from_outside(page: Path) -> None:
    text = page.read_text()
    assert not re.findall(r"<(?:link|iframe|object|embed|script [^>]*src|img)[ >]", text)
    assert not re.findall(r"url\((?!#)|@import", text)
    assert "default-src 'none'" in text
    assert len(re.findall(r"<tr[^>]*><th scope=\"row\"", text)) == rows_of_tables()


def test_tables_and_pictures_are_there_with_a_size(page: Path, seen: dict[str, Any]) -> None:
    assert sum(table["rows"] for table in seen["tables"]) == rows_of_tables()
    assert all(table["height"] > 30 for table in seen["tables"])
    pictures = list(page.parent.glob("*.png"))
    assert len(seen["figures"]) == len(pictures) >= 3
    assert all(f["width"] > 400 and f["height"] > 200 for f in seen["figures"])
    assert len(seen["pictures"]) == len(pictures)
    assert all(width > 800 for width in seen["pictures"])


def test_every_layer_is_drawn_in_the_scatter_and_under_the_roof(seen: dict[str, Any]) -> None:
    layers = {
        file.stem: sum(row["kind"] == "layer" and "dense" in row for row in rows)
        for file in COMMITTED.glob("*.json")
        for rows in [json.loads(file.read_text())["rows"]]
    }
    for kind in ("Scatter", "Roofline"):
        drawn = [f["drawn"] for f in seen["figures"] if f["said"].startswith(kind)]
        assert sum(drawn) == sum(layers.values())
    assert all(f["drawn"] == f["marks"] > 0 for f in seen["figures"])
    assert any("y = x: all saved work is saved time" in f["words"] for f in seen["figures"])


def test_losses_are_marked_before_the_eye(seen: dict[str, Any]) -> None:
    lost = {entry["text"] for entry in seen["lost"]}
    expected = {
        row["case"]["name"]
        for file in COMMITTED.glob("layers-*.json")
        for row in json.loads(file.read_text())["rows"]
        if row.get("verdict") == "lose"
    }
    assert expected
    assert expected <= lost
    assert all("inset" in entry["edge"] for entry in seen["lost"])


def test_a_heading_sorts_its_column(seen: dict[str, Any]) -> None:
    first, up, down = ([float(text.split()[0]) for text in o] for o in seen["orders"])
    assert sorted(first) == up != first
    assert down == up[::-1]


def test_it_opens_without_a_network_or_an_error(seen: dict[str, Any]) -> None:
    assert seen["loaded"] == []
    assert seen["errors"] == []
    assert len(seen["headings"]) == 7


def test_nothing_on_it_is_cut_on_a_phone(page: Path, tmp_path: Path) -> None:
    browser()
    found = in_a_window_of(PHONE, [page], tmp_path)[page.as_uri()]
    assert (found["wide"], found["cut"]) == ([], [])
    assert found["width"] <= PHONE


def test_it_fits_a_telephone_and_follows_a_dark_reader(page: Path, tmp_path: Path) -> None:
    seen = look(
        page, tmp_path, "--window-size=500,900", "--blink-settings=preferredColorScheme=0"
    )  # fmt: skip
    assert seen["wide"] <= 0
    ink, ground = (sum(map(int, re.findall(r"\d+", seen[k])[:3])) for k in ("ink", "page"))
    assert ink > 500 > 150 > ground
