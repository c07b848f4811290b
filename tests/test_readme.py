# SPDX-License-Identifier: Apache-2.0
"""What the README says of measurements: it is what the committed results say."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import readme, summary, table

ROOT = Path(__file__).parents[1]


def test_the_readme_agrees_with_the_results() -> None:
    now = readme.README.read_text()
    assert readme.updated(now) == now, "run `python -m benchmarks.readme`"


def test_the_check_notices_a_changed_number(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert readme.main(["--check"]) == 0
    stale = tmp_path / "README.md"
    stale.write_text(readme.README.read_text().replace("2.45 |", "9.45 |", 1))
    monkeypatch.setattr(readme, "README", stale)
    assert readme.main(["--check"]) == 1
    assert "stale" in capsys.readouterr().out
    assert readme.main([]) == 0
    assert stale.read_text() == (ROOT / "README.md").read_text()


@pytest.mark.parametrize("text", ["none", f"{readme.END} {readme.BEGIN}", readme.BEGIN * 2])
def test_missing_markers_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        readme.updated(text)


def test_every_loss_is_shown() -> None:
    shown = summary.losses()
    for row in summary.results(summary.LAYERS)["rows"]:
        lost = [rival for rival in summary.RIVALS if row[rival] and row[rival]["ratio"] < 1]
        assert (f"| {row['case']['name']} |" in shown) == bool(lost)
        for rival in lost:
            assert f"**{row[rival]['ratio']:.2f}**" in shown


def test_a_row_that_never_matched_is_shown_as_a_mismatch(monkeypatch: pytest.MonkeyPatch) -> None:
    data = copy.deepcopy(summary.results(summary.LAYERS))
    del data["rows"][0]["dense"]
    monkeypatch.setattr(summary, "results", lambda name: data)
    assert "| MISMATCH |" in summary.losses()


def test_the_grid_has_the_four_stages_and_all_columns() -> None:
    header, _, *lines = summary.grid().splitlines()
    assert [name in header for name in summary.COLUMNS.values()] == [True] * len(summary.COLUMNS)
    assert [line.split("|")[1].strip() for line in lines] == [
        "64 channels, 56²", "128 channels, 28²", "256 channels, 14²", "512 channels, 7²",
    ]  # fmt: skip
    rows = {row["case"]["name"]: row for row in summary.results(summary.LAYERS)["rows"]}
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
    assert summary.span([3.0, 1.0, 10.0], 1) == "1.0 to 10.0"
    assert summary.span([2.001, 2.0]) == "2.00"


def test_a_table_in_markdown() -> None:
    text = table.markdown(("a", "b"), [("x", "1")])
    assert text.splitlines() == ["| a | b |", "| --- | --: |", "| x | 1 |"]


def test_it_needs_neither_torch_nor_the_package() -> None:
    code = (
        "import sys; from benchmarks import readme; readme.measured();"
        "print({'torch', 'hetconv_kernels'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "set()", done.stderr
