# SPDX-License-Identifier: Apache-2.0
"""The benchmark of LeNet-5: what it says of a line, and what it needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import lenet, summary
from hetconv_kernels import methods, models
from hetconv_kernels.errors import HetconvError


def test_all_eight_methods_have_a_line() -> None:
    found = lenet.lenet_methods()
    own = [method for name, method in found.items() if name not in lenet.DISTILLED]
    assert len({type(method) for method in own}) == len(own) == 8
    assert set(lenet.PAPER) | set(lenet.DISTILLED) <= set(found)
    distilled = found["ADMM, distilled"]
    assert isinstance(distilled, methods.ADMM)
    assert distilled.layer_rates is None


def test_the_rates_by_hand_are_of_every_layer_and_leave_as_few_weights_as_the_paper() -> None:
    method = lenet.lenet_methods()["ADMM"]
    assert isinstance(method, methods.ADMM)
    layers = {n: m for n, m in models.lenet5().named_modules() if hasattr(m, "weight")}
    assert method.layer_rates is not None
    assert set(method.layer_rates) == set(layers)
    for step, rate in enumerate(method.rates):
        left = sum(
            round((1 - method.layer_rates[name][step]) * layer.weight.numel())
            for name, layer in layers.items()
        )
        assert left == pytest.approx((1 - rate) * 430_500, rel=1.2e-2)
    assert 430_500 / left >= 167


def record(seed: int, weights: int, accuracy: float, name: str = "ADMM") -> dict[str, Any]:
    return {
        "name": name, "seed": seed, "weights": [1000, weights], "macs": [1000, 100],
        "seconds": [2e-3, 1e-3], "speedup": [2.0, 1.9, 2.1], "accuracy": [0.985, accuracy],
        "notes": [],
    }  # fmt: skip


def test_a_finished_line_is_told_and_not_done_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file, name in (("admm-3", "ADMM"), ("admm-distilled-3", "ADMM, distilled")):
        (tmp_path / f"{file}.json").write_text(json.dumps(record(3, 10, 0.983, name)))
    words = ["--only", "ADMM", "--seeds", "3", "--out", str(tmp_path), "--publish", str(tmp_path)]
    assert lenet.main(words) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{name}, seed 3: 100.0× fewer weights, 10.0× fewer MACs, 98.50 % -> 98.30 % (-0.20)"
        for name in ("ADMM", "ADMM, distilled")
    ]
    published = json.loads((tmp_path / "lenet.json").read_text())
    assert [line["name"] for line in published["lines"]] == ["ADMM", "ADMM, distilled"]
    assert published["lines"][0] == record(3, 10, 0.983)
    environment = published["environment"]
    text = (tmp_path / "lenet.md").read_text()
    assert "167× fewer weights" in text
    assert "Dense: 98.50 % of the images" in text
    # A line of another machine's: the others stay, with the environment that they were taken in.
    (tmp_path / "admm-distilled-3.json").unlink()
    elsewhere = environment | {"commit": "another"}
    anew = record(3, 10, 0.98) | {"environment": elsewhere}
    (tmp_path / "admm-3.json").write_text(json.dumps(anew))
    assert lenet.main(["--only", "none of them", *words[2:]]) == 0
    again = json.loads((tmp_path / "lenet.json").read_text())
    assert again == {"environment": environment, "lines": [anew, published["lines"][1]]}
    assert summary.lines_provenance(again, again["lines"]).count("commit") == 2


def test_a_finished_line_is_measured_anew_when_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "wsp-3.json"
    path.write_text(json.dumps(record(3, 10, 0.983, "WSP")))
    asked: list[tuple[str, int]] = []

    def compressed_line(name: str, seed: int, folder: Path, out: Path) -> dict[str, Any]:
        asked.append((name, seed))
        return record(seed, 20, 0.98, name)

    monkeypatch.setattr(lenet, "compressed_line", compressed_line)
    words = ["--only", "WSP", "--out", str(tmp_path), "--seeds"]
    assert lenet.main([*words, "3"]) == 0
    assert not asked
    assert lenet.main([*words, "3", "4", "--again"]) == 0
    assert asked == [("WSP", 3), ("WSP", 4)]
    assert json.loads(path.read_text()) == record(3, 20, 0.98, "WSP")


def test_the_seeds_of_a_method_are_one_row_with_mean_and_spread() -> None:
    lines = [record(0, 10, 0.98), record(1, 20, 0.99), record(0, 500, 0.985, "WSP")]
    rows = [line.strip("| ").split(" | ") for line in lenet.lenet_table(lines).splitlines()]
    # 100 and 50 times fewer: mean 75, deviation 50 / √2; 98 and 99 %: 98.5 and 1 / √2.
    assert rows[2] == [
        "ADMM", "2", "75.0 ± 35.4×", "10.0 ± 0.0×", "98.50 ± 0.71", "+0.00 ± 0.71", "2.00 ± 0.00×",
        "167× fewer weights, no loss",
    ]  # fmt: skip
    assert rows[3][:4] == ["WSP", "1", "2.0×", "10.0×"]


def test_without_the_digits_it_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(HetconvError, match="train-images"):
        lenet.main(["--only", "ADMM", "--data", str(tmp_path), "--out", str(tmp_path / "out")])
