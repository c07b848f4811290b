# SPDX-License-Identifier: Apache-2.0
"""The report: what it reads and refuses, what its tables and figures say, and its files."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.report import figures, passes, read_results, tables, write_report
from benchmarks.report.__main__ import main
from benchmarks.report.schema import problems
from hetconv_kernels import colours
from hetconv_kernels.errors import ArgumentError, FileError, HetconvError

Json = dict[str, Any]
Capture = pytest.CaptureFixture[str]


def estimate(ratio: float, spread: float = 0.1, name: str = "dense:nhwc") -> Json:
    return {
        "name": name, "median_s": ratio * 1e-3, "ratio": ratio, "low": ratio - spread,
        "high": ratio + spread, "confidence": 0.96,
    }  # fmt: skip


def layer(name: str, ratio: float, composition: float | None = None, **case: Any) -> Json:
    return {
        "kind": "layer",
        "case": {
            "name": name, "n": 8, "c": 64, "f": 64, "h": 9, "w": 9, "k": 3, "dtype": "float32",
            "expected": "win", "issue": None, "target": 2.0, "support": {"kind": "het"}, **case,
        },
        "backend": {"asked": "auto", "ran": "cpu"},
        "support": {"kind": "het", "digest": "0", "groups": 4, "live": 9, "density": 0.3},
        "macs": 1000, "dense_macs": 3000, "bytes": 100,
        "match": {"ok": True, "worst": 0.1, "max_error": 0.1},
        "median_s": 1e-3, "floor_s": 5e-4, "percent_of_roof": 50.0, "dense": estimate(ratio),
        "composition": None if composition is None else estimate(composition),
        "unfrozen": None, "prepacked": None,
        "verdict": "win" if ratio > 1.1 else "lose" if ratio < 0.9 else "even",
    }  # fmt: skip


def mismatch_row(name: str) -> Json:
    row = layer(name, 2.0)
    for key in ("median_s", "floor_s", "percent_of_roof", "dense", "composition", "verdict"):
        del row[key]
    row["match"] = {"ok": False, "worst": None, "max_error": None}
    return row


def network(name: str = "net-het4", layers: Json | None = None) -> Json:
    return {
        "kind": "model",
        "case": {"name": name, "network": "net", "support": {"kind": "het"}, "n": 2, "size": 32},
        "match": {"ok": True, "worst": 0.1, "max_error": 0.1},
        "absent": {"dense": {"openvino": "not installed"}},
        "median_s": 1e-2,
        "dense": estimate(1.5, name="dense:onnxruntime"),
        "composition": estimate(0.7, name="composition:eager"),
        "bound": {"our_layers_s": 1, "rest_s": 0, "speedup": 1.8, "over_best": 1.7},
        "layers": {
            "a": [2e-3, 1e-3, 3.0],
            "b": [1e-3, 3e-3],
            "new": [None, 1e-3],
            **(layers or {}),
        },
    }


def results_file(folder: Path, *rows: Json, name: str = "layers-test") -> Path:
    data = {
        "schema": 1,
        "name": name,
        "started": "2026-01-02T03:04:05+00:00",
        "command": "python -m pytest benchmarks --full",
        "environment": {
            "commit": "0123456789abcdef", "processor": "Some <CPU>", "instructions": "AVX512",
            "cores": 2, "threads": 2, "gpu": None, "torch": "2.13", "python": "3.11",
            "backends": [], "load_before": 0.1,
        },
        "roofs": [
            {"macs_per_s": 1e11, "bytes_per_s": 1e10, "device": "cpu", "dtype": "float32"},
            {"macs_per_s": 2e11, "bytes_per_s": 2e10, "device": "cpu", "dtype": "float32"},
        ],
        "rows": list(rows),
    }  # fmt: skip
    assert problems(data) == []
    path = folder / f"{name}.json"
    path.write_text(json.dumps(data))
    return path


def tags(text: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", text))


# Reading -----------------------------------------------------------------------------------------


def test_a_folder_stands_for_its_files(tmp_path: Path) -> None:
    for name in ("b", "a"):
        results_file(tmp_path, layer("one", 2.0), name=name)
    assert [r.name for r in read_results([tmp_path, tmp_path / "a.json"])] == ["a", "b"]


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (lambda data: "{", "is no JSON"),
        (lambda data: b"\xff\xfe\x00", "is no JSON"),
        (lambda data: "[1, 2]", "names no schema"),
        (lambda data: '{"format": "hetconv_kernels.methods/1"}', "names no schema"),
        (lambda data: json.dumps({**data, "schema": 99}), "received 99, expected 1"),
        (lambda data: json.dumps({**data, "rows": [{"kind": "layer"}]}), "'case' is missing"),
        (lambda data: json.dumps(data).replace("50.0", "NaN"), "percent_of_roof"),
    ],
)
def test_a_foreign_or_damaged_file_is_refused(
    tmp_path: Path, write: Callable[[Json], str | bytes], said: str
) -> None:
    path = results_file(tmp_path, layer("one", 2.0))
    text = write(json.loads(path.read_text()))
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(FileError, match=re.escape(said)) as error:
        read_results([path])
    assert "layers-test.json" in str(error.value)


def test_no_file_two_of_one_name_and_a_missing_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="make bench"):
        read_results([tmp_path])
    with pytest.raises(FileError, match=r"gone\.json cannot be read"):
        read_results([tmp_path / "gone.json"])
    (tmp_path / "x").mkdir()
    paths = [results_file(f, layer("one", 2.0)) for f in (tmp_path, tmp_path / "x")]
    with pytest.raises(ArgumentError, match="two named layers-test"):
        read_results(paths)


def test_points_and_roofs_by_hand(tmp_path: Path) -> None:
    rows = (layer("plain", 2.0), layer("mixed", 0.5, amp=True), mismatch_row("wrong"))
    (results,) = read_results([results_file(tmp_path, *rows)])
    plain, mixed = results.points()
    assert [p.name for p in results.points("float32", "cpu")] == ["plain"]
    assert [p.name for p in results.points("bfloat16")] == ["mixed"]
    assert (plain.mac_ratio, plain.speedup, plain.family) == (3.0, 2.0, "HetConv")
    assert (plain.intensity, plain.rate) == (10.0, pytest.approx(1e6))
    assert mixed.verdict == "lose"
    (roof,) = results.roofs()
    assert (roof.macs_per_s, roof.bytes_per_s) == (2e11, 2e10)
    assert results.hardware == "Some <CPU>, AVX512, 2 threads"


# Tables ------------------------------------------------------------------------------------------


def test_every_row_is_in_the_table_and_losses_are_marked() -> None:
    rows = [
        layer("good", 2.5, composition=0.6, issue="https://example.org/issues/1"),
        layer("bad", 0.5),
        layer("known", 0.5, expected="lose"),
        layer("same", 1.0, issue="javascript:alert(1)"),
        mismatch_row("wrong"),
    ]
    text = tables.layers(rows)
    lines = {tags(line).split()[0]: line for line in re.findall(r"<tr[ >].*?</tr>", text)[1:]}
    assert list(lines) == ["good", "bad", "known", "same", "wrong"]
    assert "2.50 [2.40, 2.60]" in lines["good"]
    assert "0.60 ▼" in lines["good"]
    assert "▲ faster" in lines["good"]
    assert 'href="https://example.org/issues/1"' in lines["good"]
    assert 'class="lost"' not in lines["good"]
    assert 'class="lost"' in lines["bad"]
    assert "2 missed" in lines["bad"]
    assert "▼ slower" in lines["bad"]
    assert "▼ slower (expected)" in lines["known"]
    assert "≈ the same" in lines["same"]
    assert "href" not in lines["same"]
    assert "✕ wrong result" in lines["wrong"]
    cells = {len(re.findall(r"<t[hd][ >]", line)) for line in lines.values()}
    assert cells == {len(re.findall("<button", text))}
    assert "× composition" in text
    assert "× prepacked" not in text  # no row has one


def test_networks_and_dispatch_have_whole_lines() -> None:
    wrong = network()
    wrong["match"]["ok"] = False
    row = {
        "kind": "dispatch", "name": "with grad", "backend": "auto", "extra_us": 9.0, "low_us": 8.0,
        "high_us": 10.0, "target_us": 4.0,
    }  # fmt: skip
    for text in (tables.networks([network(), wrong]), tables.dispatch([row])):
        lines = re.findall(r"<tr[ >].*?</tr>", text)
        assert len({len(re.findall(r"<t[hd][ >]", line)) for line in lines}) == 1
    said = tags(tables.networks([network()]))
    assert "0.70 ▼ [0.60, 0.80] eager" in said
    assert "1.70" in said
    old = network()
    del old["bound"]["over_best"]
    assert "1.80" not in tables.networks([old])  # what older files called a bound was none
    assert "openvino" in said
    assert "▼ no" in tables.dispatch([row])


# The page ----------------------------------------------------------------------------------------


def test_the_page_says_where_everything_comes_from(tmp_path: Path) -> None:
    rows = (layer("good", 2.5), layer("bad", 0.5), layer("<b>odd$ & $", 1.0), network())
    path, *pictures = write_report([results_file(tmp_path, *rows)], tmp_path / "out")
    assert path == tmp_path / "out" / "report.html"
    assert [p.name for p in pictures] == [
        "speed-up-layers-test.png", "roofline-layers-test-cpu-float32.png",
        "layers-layers-test-net-het4.png",
    ]  # fmt: skip
    for picture in pictures:
        assert picture.read_bytes().startswith(b"\x89PNG")
    text = path.read_text()
    for said in ("0123456789abcdef", "Some &lt;CPU&gt;, AVX512", "--full", "2026-01-02T03:04:05"):
        assert said in text
    assert "<b>odd" not in text
    said = tags(text)
    assert "4 layers and networks 2 faster than dense 1 no measurable difference 1 slower" in said
    assert "Slower than dense: 1. All together 3.00 ms dense and 5.00 ms ours." in said


def test_figures_follow_the_page_and_are_the_same_each_time(tmp_path: Path) -> None:
    (results,) = read_results([results_file(tmp_path, layer("one", 2.0), layer("bad", 0.5))])
    one, two = (figures.scatter("s", results.points(), "here").svg() for _ in range(2))
    assert one == two
    assert "one: 2.00× [1.90, 2.10] of 3.00, 50 % of the roof" in one
    assert len(re.findall('class="mark"', one)) == 2
    for role in ("ink", "muted", "rule", "loss", "blue"):
        assert f"var(--{role})" in one
    assert not set(re.findall(r"#[0-9a-f]{6}", one)) - {"#ffffff", "#000000"}
    assert 'role="img" aria-labelledby="s-title s-alt"' in one
    assert "1 lose, among them bad at 0.50" in one


def test_a_timeline_has_every_layer_where_it_runs() -> None:
    row = network()
    assert passes.timeline("pass", row) is None, "it does not say what the whole dense one took"
    row["timings"] = {"dense": {"variants": {"dense:eager": {"median_s": 5e-3}}}}
    picture = passes.timeline("pass", row)
    assert picture is not None
    assert list(picture.tips.values()) == [
        "dense, a: 2.00 ms", "dense, b: 1.00 ms", "dense, everything else: 2.00 ms",
        "ours, a: 1.00 ms", "ours, b: 3.00 ms", "ours, new: 1.00 ms",
        "ours, everything else: 5.00 ms",
    ]  # fmt: skip
    assert "Dense, in PyTorch: 5.00 ms; ours: 10.00 ms" in picture.alt
    bars = {bar.get_gid(): bar for bar in picture.figure.axes[0].patches}
    assert bars["pass-ours-1"].get_x() == pytest.approx(1.0)
    assert bars["pass-ours-1"].get_width() == pytest.approx(3.0)
    assert len(re.findall('class="mark"', picture.svg())) == 7
    row["median_s"] = 4e-3  # less than its layers, each timed for itself, add up to
    picture = passes.timeline("pass", row)
    assert picture is not None
    assert [tip for tip in picture.tips.values() if "everything else" in tip] == [
        "dense, everything else: 2.00 ms"
    ]


def test_a_deep_network_shows_its_longest_layers() -> None:
    many = {f"l{i}": [i * 1e-3, i * 1e-3] for i in range(60)}
    picture = figures.layer_bars("bars", network(layers=many))
    assert len(picture.tips) == 40
    assert "The 23 shortest layers are left out." in picture.alt
    assert any(tip.startswith("l59:") for tip in picture.tips.values())


def test_colours_are_told_apart_and_readable() -> None:
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(a: str, b: str) -> float:
        high, low = sorted((luminance(a), luminance(b)), reverse=True)
        return (high + 0.05) / (low + 0.05)

    lights = [pair[0] for pair in colours.COLOURS.values()]
    assert len(set(lights)) == len(lights)
    assert len(set(colours.FAMILY_MARKS.values())) == len(colours.FAMILY_MARKS)
    assert len({mark for _, mark in colours.FAMILY_MARKS.values()}) == len(colours.FAMILY_MARKS)
    for theme in (0, 1):
        page = colours.COLOURS["page"][theme]
        for role in ("ink", "muted", "loss", "win", "blue"):  # WCAG 2.2, 1.4.3: text
            assert contrast(colours.COLOURS[role][theme], page) >= 4.5, role
        for role, _ in colours.FAMILY_MARKS.values():  # and 1.4.11: marks
            assert contrast(colours.COLOURS[role][theme], page) >= 2.5, role


# The command -------------------------------------------------------------------------------------


def test_the_command_writes_and_says_so(tmp_path: Path, capsys: Capture) -> None:
    file = results_file(tmp_path, layer("one", 2.0))
    assert main([str(file), "-o", str(tmp_path / "r.html")]) == 0
    assert "and 2 pictures beside it" in capsys.readouterr().out
    assert (tmp_path / "r.html").is_file()


def test_the_command_refuses_in_one_sentence(tmp_path: Path, capsys: Capture) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text("{}")
    assert main([str(bad)]) == 1
    assert "report: bad.json is no results file" in capsys.readouterr().err


def test_a_missing_matplotlib_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = results_file(tmp_path, layer("one", 2.0))
    monkeypatch.setattr(figures.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(HetconvError, match=r"pip install 'hetconv-kernels\[matplotlib\]'"):
        write_report([file], tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    file = results_file(tmp_path, layer("one", 2.0))
    (tmp_path / "taken").write_text("")
    with pytest.raises(HetconvError, match="cannot be written"):
        write_report([file], tmp_path / "taken" / "page.html")


def test_the_row_builders_here_fit_the_schema() -> None:
    broken = copy.deepcopy(layer("one", 2.0))
    broken["dense"]["ratio"] = "2"
    assert problems(broken, {"anyOf": [{"type": "null"}]}) != []
