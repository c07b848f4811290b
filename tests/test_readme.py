# SPDX-License-Identifier: Apache-2.0
"""What the README says of measurements: it is what the committed results say."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest

from benchmarks import picture, readme, summary
from hetconv_kernels.measure.tables import markdown_table

ROOT = Path(__file__).parents[1]


def test_the_readme_agrees_with_the_results() -> None:
    now = readme.README.read_text()
    assert readme.updated_readme(now) == now, "run `python -m benchmarks.readme`"


def test_the_check_notices_a_changed_number(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert readme.main(["--check"]) == 0
    stale = tmp_path / "README.md"
    number = f"{summary.network('resnet18-het4')['dense']['ratio']:.2f} |"
    stale.write_text(readme.README.read_text().replace(number, "9.45 |", 1))
    monkeypatch.setattr(readme, "README", stale)
    assert readme.main(["--check"]) == 1
    assert "stale: README.md" in capsys.readouterr().out
    assert readme.main([]) == 0
    assert stale.read_text() == (ROOT / "README.md").read_text()


def test_the_picture_is_drawn_from_the_results(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert picture.SVG.read_text() == picture.draw_svg(), "run `python -m benchmarks.readme`"
    monkeypatch.setattr(picture, "SVG", tmp_path / "speedup.svg")
    assert readme.main(["--check"]) == 1
    assert "stale: speedup.svg" in capsys.readouterr().out


def test_the_picture_has_every_layer_and_the_slower_ones_below_the_line() -> None:
    drawn = picture.draw_svg()
    rows = [
        row
        for row in summary.results(summary.LAYERS_FILE)["rows"]
        if row["case"]["dtype"] == "float32" and not row["case"]["amp"]
    ]
    height = {
        found[2]: float(found[1])
        for found in re.finditer(r'cy="([\d.]+)" [^>]*><title>([^:]*):', drawn)
    }
    assert set(height) == {row["case"]["name"] for row in rows}
    even = picture._y(1.0)
    slower = {name for name, y in height.items() if y > even}
    assert slower == {row["case"]["name"] for row in rows if row["dense"]["ratio"] < 0.9999}
    assert slower, "the losses of the committed run are in the picture"


def test_the_headlines_are_of_the_results() -> None:
    lines = readme.headlines()
    networks = {
        case: summary.network(case)
        for case in ("resnet18-het4", "resnet18-het4-int8", "resnet18-het4-bf16")
    }
    measured = [row for row in networks.values() if row is not None and row.get("dense")]
    assert len(lines) == 1 + len(measured)
    for line, row in zip(lines[1:], measured, strict=True):
        assert f"{row['dense']['ratio']:.2f} times as fast" in line
    assert summary.network("no such network") is None


def test_the_losses_are_counted() -> None:
    text = summary.lost()
    rows = summary.results(summary.LAYERS_FILE)["rows"]
    slower = sum(1 for row in rows if row["dense"] and row["dense"]["ratio"] < 1)
    assert f"Of {len(rows)} rows" in text
    assert f"{slower} are slower than dense" in text


@pytest.mark.parametrize(
    "text", ["none", f"{readme.END} {readme.SECTION_BEGIN}", readme.SECTION_BEGIN * 2]
)
def test_missing_markers_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        readme.updated_readme(text)


def test_every_loss_is_shown() -> None:
    shown = summary.losses()
    for row in summary.results(summary.LAYERS_FILE)["rows"]:
        lost = [rival for rival in summary.RIVALS if row[rival] and row[rival]["ratio"] < 1]
        assert (f"| {row['case']['name']} |" in shown) == bool(lost)
        for rival in lost:
            assert f"**{row[rival]['ratio']:.2f}**" in shown


def test_a_case_is_described_in_todays_words() -> None:
    row = next(
        r for r in summary.results(summary.LAYERS_FILE)["rows"] if r["case"]["name"] == "lose-tiny"
    )
    old = row["case"] | {"note": "in the words of the day it was measured"}
    assert summary.describe_case(old).endswith(summary.NOTES["lose-tiny"])
    gone = row["case"] | {"name": "a case that is no more", "note": "as it was"}
    assert summary.describe_case(gone).endswith("as it was")


def test_a_row_that_never_matched_is_shown_as_a_mismatch(monkeypatch: pytest.MonkeyPatch) -> None:
    data = copy.deepcopy(summary.results(summary.LAYERS_FILE))
    del data["rows"][0]["dense"]
    monkeypatch.setattr(summary, "results", lambda name: data)
    assert "| MISMATCH |" in summary.losses()


def test_the_grid_has_the_four_stages_and_all_columns() -> None:
    header, _, *lines = summary.grid().splitlines()
    names = summary.GRID_COLUMNS.values()
    assert [name in header for name in names] == [True] * len(names)
    assert [line.split("|")[1].strip() for line in lines] == [
        "64 channels, 56²", "128 channels, 28²", "256 channels, 14²", "512 channels, 7²",
    ]  # fmt: skip
    rows = {row["case"]["name"]: row for row in summary.results(summary.LAYERS_FILE)["rows"]}
    cells = [cell.strip() for cell in lines[1].split("|")[2:-1]]
    names = ("het4", "het8", "het16", "het128", "sg70", "sg90")
    assert cells == [f"{rows[f'8x128x28-{name}']['dense']['ratio']:.2f}" for name in names]


@pytest.mark.parametrize("name", summary.all_results())
def test_every_file_says_its_hardware_date_and_commit(name: str) -> None:
    data = summary.results(name)
    text = summary.provenance(data)
    assert data["started"][:10] in text
    assert data["environment"]["commit"][:9] in text
    assert ("local changes" in text) == data["environment"]["commit"].endswith("+")
    assert (data["environment"]["gpu"] or data["environment"]["processor"]) in text


def test_a_span_names_the_ends() -> None:
    assert summary.value_span([3.0, 1.0, 10.0], 1) == "1.0 to 10.0"
    assert summary.value_span([2.001, 2.0]) == "2.00"


def test_a_table_in_markdown() -> None:
    text = markdown_table(("a", "b"), [("x", "1")])
    assert text.splitlines() == ["| a | b |", "| --- | --: |", "| x | 1 |"]


@pytest.mark.parametrize("part", summary.methods())
def test_every_method_of_a_part_is_in_its_table(part: str) -> None:
    shown = summary.methods_table(part)
    for row in summary.methods()[part][part]:
        assert f"| {row['name']} |" in shown
        ratio = f"{row['speedup'][0]:.2f}"
        assert (f"**{ratio}**" if row["speedup"][0] < 1 else f"| {ratio} |") in shown
    assert "commit" in summary.methods_provenance(part)


def test_a_method_that_costs_too_much_quality_is_bold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the lines as they are, and of one that is made to lose more than it may."""
    tables = copy.deepcopy(summary.methods())
    first = tables["digits"]["digits"][0]
    dense = first["test_accuracy"][0]
    first["test_accuracy"] = [dense, dense - 1.5 * first["tolerance"]]
    monkeypatch.setattr(summary, "methods", lambda: tables)
    bold = {
        row["name"]
        for row in tables["digits"]["digits"]
        if row["test_accuracy"][1] < row["test_accuracy"][0] - row["tolerance"]
    }
    shown = {
        line.split("|")[1].strip()
        for line in summary.methods_table("digits").splitlines()
        if line.split("|")[3].strip().startswith("**")
    }
    assert shown == bold
    assert first["name"] in bold


def test_ratios_are_those_of_the_rows_that_are_asked_for() -> None:
    rows = summary.results(summary.LAYERS_FILE)["rows"]
    wanted = [
        row["dense"]["ratio"]
        for row in rows
        if row["case"]["training"] and row["case"]["support"]["kind"] == "het"
    ]
    assert wanted
    found = summary.ratios(summary.LAYERS_FILE, "dense", training=True, kind="het", value=4)
    assert found == wanted
    assert summary.ratios(summary.LAYERS_FILE, "dense", training=True, kind="none") == []


def test_no_training_step_of_a_network_is_invented() -> None:
    found = [
        row
        for data in summary.all_results().values()
        for row in data["rows"]
        if row["kind"] == "training"
    ]
    assert summary.training_networks().count("images of") == len(found)
