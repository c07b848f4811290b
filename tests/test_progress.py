# SPDX-License-Identifier: Apache-2.0
"""Progress: lines where nobody looks, rich on a terminal, nothing when not wanted."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from compressing import Columns, Killed, killed_at, run

from hetconv_kernels.compression.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def rounds(progress: Progress) -> None:
    progress.begin("train, epoch 1/2")
    progress.batch()
    progress.end(0, "train, epoch 1/2", {"loss": 0.5, "stopped": []})
    progress.begin("accuracy")
    progress.end(1, "accuracy", 0.75)
    progress.end(2, "keep [it]", None)
    progress.close()


def told(text: str) -> list[str]:
    return [line.split(" s  ", 1)[1].strip() for line in text.splitlines() if " s  " in line]


LINES = ["train, epoch 1/2: loss 0.5", "accuracy: 0.7500", "keep [it]"]


def test_lines() -> None:
    stream = io.StringIO()
    rounds(Progress(stream=stream))
    assert told(stream.getvalue()) == LINES


def test_a_terminal_shows_the_same_words_with_rich() -> None:
    pytest.importorskip("rich", reason="a terminal without rich shows lines")
    stream = Terminal()
    rounds(Progress(stream=stream))
    assert [line for line in told(stream.getvalue()) if line in LINES] == LINES


def test_nothing_is_shown_when_not_wanted() -> None:
    stream = Terminal()
    progress = Progress(False, stream)
    progress.resumed(3)
    rounds(progress)
    assert stream.getvalue() == ""


def test_a_killed_run_says_where_it_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = tmp_path / "state.pt"
    run(Columns(), state=state, progress=True)
    assert "resumed" not in capsys.readouterr().err
    state.unlink()
    with pytest.raises(Killed), killed_at(3, written=True):
        run(Columns(), state=state)
    capsys.readouterr()
    run(Columns(), state=state, progress=True)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "resumed at round 3"
    assert lines[1].startswith("[  3]")
    assert sum("resumed" in line for line in lines) == 1


def test_epochs_say_how_long_the_others_of_their_stage_will_take(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr("hetconv_kernels.compression.progress.time.perf_counter", lambda: now[0])
    stream = io.StringIO()
    progress = Progress(stream=stream)
    for stage, first, epochs, seconds in (("train", 1, 4, 10.0), ("tune", 3, 5, 2.0)):
        for epoch in range(first, epochs + 1):  # the second goes on where it was killed
            progress.begin(f"{stage}, epoch {epoch}/{epochs}")
            progress.batch()
            now[0] += seconds
            progress.end(epoch, f"{stage}, epoch {epoch}/{epochs}", None)
        progress.begin("accuracy")
        progress.end(9, "accuracy", 0.5)
    left = [line.partition(", ")[2].split(", ")[-1] for line in stream.getvalue().splitlines()]
    assert [text for text in left if text.endswith(" left")] == [
        "30 s left", "20 s left", "10 s left", "4 s left", "2 s left",
    ]  # fmt: skip


def test_a_terminal_shows_the_remaining_time_once_an_epoch_has_ended() -> None:
    pytest.importorskip("rich", reason="a terminal without rich shows lines")
    progress = Progress(stream=Terminal())
    totals = []
    for epoch in (1, 2, 3):
        progress.begin(f"train, epoch {epoch}/3")
        for _ in range(5):
            progress.batch()
        totals.append(progress._bar.tasks[0].total)
        progress.end(epoch, f"train, epoch {epoch}/3", None)
    progress.close()
    assert totals == [None, 15, 15]
    assert any(type(c).__name__ == "TimeRemainingColumn" for c in progress._bar.columns)
