# SPDX-License-Identifier: Apache-2.0
"""tables: the same cells as plain text, as Markdown, and as rich draws them."""

from __future__ import annotations

import re

import pytest

from hetconv_kernels.measure import tables


def test_text_puts_columns_of_numbers_to_the_right() -> None:
    table = tables.text_table(("layer", "macs"), [("a", 1234567), ("bcd", 8)])
    assert table.splitlines() == [
        "layer       macs",
        "----------------",
        "a      1,234,567",
        "bcd            8",
    ]


def test_text_asks_which_columns_of_words_are_numbers() -> None:
    rows = [("a", "1.5 ms", "won"), ("bcd", "10.25 ms", "lost by far")]
    assert tables.text_table(("case", "took", "so"), rows, left=(0, -1)).splitlines() == [
        "case      took  so",
        "---------------------------",
        "a       1.5 ms  won",
        "bcd   10.25 ms  lost by far",
    ]


def test_a_table_without_rows_is_its_header() -> None:
    assert tables.text_table(("a", "b"), []).splitlines() == ["a  b", "----"]
    assert tables.markdown_table(("a", "b"), []).splitlines() == ["| a | b |", "| --- | --: |"]


def test_markdown_marks_the_columns_of_numbers() -> None:
    assert tables.markdown_table(("a", "b", "c"), [("x", "y", 3)], left=2).splitlines() == [
        "| a | b | c |",
        "| --- | --- | --: |",
        "| x | y | 3 |",
    ]


def test_a_terminal_is_shown_the_same_words_with_rich(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("rich")
    monkeypatch.setenv("COLUMNS", "100")

    def words(rich: bool) -> list[str]:
        monkeypatch.setattr(tables, "has_rich", lambda: rich)
        rows = [("[a]", "3.5"), ("b", 12345)]
        tables.show_table(("what", "found"), rows, "title", left=(0,))
        return re.sub(r"[─-╿]|-{2,}", " ", capsys.readouterr().out).split()

    assert (
        words(rich=True)
        == words(rich=False)
        == ["title", "what", "found", "[a]", "3.5", "b", "12,345"]
    )
