# SPDX-License-Identifier: Apache-2.0
"""The demo from end to end at its smallest, and what it refuses."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hetconv_kernels import available_backends, demo, demo_data, rules, use_backend
from hetconv_kernels.cli import main
from hetconv_kernels.errors import ArgumentError, BackendError, HetconvError
from hetconv_kernels.graph.convert import convert
from hetconv_kernels.models import DnCNN, dncnn
from hetconv_kernels.nn import HetConv2d, SelfGroupConv2d

for package in ("sklearn", "PIL", "matplotlib"):
    pytest.importorskip(package, reason="the demo needs pip install 'hetconv-kernels[demo]'")
pytestmark = pytest.mark.one_thread


def options(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return parser.parse_args(words)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One run of ``--quick``, with a log of what was read and trained, in order."""
    out = tmp_path_factory.mktemp("demo") / "new" / "folder"
    log: list[tuple[str, Any]] = []
    real_photograph, real_train = demo.photograph, demo.train_denoiser

    def photograph(name: str) -> torch.Tensor:
        log.append(("read", name))
        return real_photograph(name)

    def train(model: DnCNN, patches: demo_data.Patches, *rest: Any) -> None:
        log.append(("train", patches.photo))
        real_train(model, patches, *rest)

    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(demo, "photograph", photograph)
        patch.setattr(demo, "train_denoiser", train)
        code = demo.run(options("--quick", "--out", str(out)))
    record = json.loads((out / "demo.json").read_text())
    return {"code": code, "out": out, "log": log, "printed": printed.getvalue(), "record": record}


def test_quick_run_succeeds_and_prints_every_network(quick: dict[str, Any]) -> None:
    assert quick["code"] == 0
    for name in ("noisy", "dense", "HetConv", "self-grouped"):
        assert f"\n{name} " in quick["printed"]
    assert "never trained on" in quick["printed"]


def test_held_out_photograph_is_read_after_all_training(quick: dict[str, Any]) -> None:
    read = demo_data.TRAINED_ON, demo_data.HELD_OUT
    assert [kind for kind, _ in quick["log"]] == ["read", *["train"] * 4, "read"]
    assert (quick["log"][0][1], quick["log"][-1][1]) == read
    trained_on = demo_data.photograph(demo_data.TRAINED_ON)
    assert all(torch.equal(what, trained_on) for kind, what in quick["log"] if kind == "train")


def test_every_network_removes_noise(quick: dict[str, Any]) -> None:
    record = quick["record"]
    assert 19.5 < record["noisy_psnr_db"] < 21
    for name, network in record["networks"].items():
        assert network["psnr_db"] > record["noisy_psnr_db"] + 0.5, name


def test_record_counts_live_weights_and_macs(quick: dict[str, Any]) -> None:
    networks, pixels = quick["record"]["networks"], 96 * 128
    outer, inner = 2 * 16 * 9, 2 * 16 * 16 * 9
    assert networks["dense"]["live_weights"] == outer + inner
    # HetConv, p = 4: 3×3 on a quarter of the 16 channels, 1×1 on the rest.
    assert networks["HetConv"]["live_weights"] == outer + 2 * 16 * (9 * 4 + 12)
    kept = (networks["self-grouped"]["live_weights"] - outer) / inner
    assert 0.2 < kept <= 0.305
    for network in networks.values():
        assert network["macs"] == network["live_weights"] * pixels


def test_record_says_what_ran_and_how_long(quick: dict[str, Any]) -> None:
    record = quick["record"]
    assert record["networks"]["dense"]["backends"] == ["torch"]
    for name in ("HetConv", "self-grouped"):
        network = record["networks"][name]
        assert set(network["backends"]) <= set(available_backends())
        assert network["difference"] <= 1e-4
        low, high = network["speedup"][1:]
        assert 0 < low <= high
    variants = record["timings"]["variants"]
    assert list(variants) == list(record["networks"])
    for name, network in record["networks"].items():
        assert network["seconds"] == variants[name]["median_s"] > 0
    uses_vendor = any("vendor" in n["backends"] for n in record["networks"].values())
    assert ("no speed-up is to be expected" in quick["printed"]) == uses_vendor


def test_networks_in_8_bits_have_their_rows_where_their_engine_is(quick: dict[str, Any]) -> None:
    networks = quick["record"]["networks"]
    rows = [name for name in networks if name.endswith(", int8")]
    there = demo.has_int8(torch.device("cpu"))
    assert rows == (["HetConv, int8", "self-grouped, int8"] if there else [])
    for name in rows:
        assert networks[name]["backends"] == ["cpu int8"]


def test_8_bits_cost_less_than_two_tenths_of_a_decibel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "has_int8", lambda device: True)  # on the reference too
    assert demo.run(options("--quick", "--out", str(tmp_path))) == 0
    networks = json.loads((tmp_path / "demo.json").read_text())["networks"]
    for name in ("HetConv", "self-grouped"):
        network, integers = networks[name], networks[f"{name}, int8"]
        assert network["psnr_db"] - integers["psnr_db"] < 0.2
        assert 0 < integers["difference"] < 0.2
        # Channels that nothing reads are gone: `quantize` begins with `optimize`.
        assert 0 < integers["live_weights"] <= network["live_weights"]
        assert integers["macs"] == integers["live_weights"] * 96 * 128


@pytest.mark.parametrize("name", ["vendor", "reference"])
def test_there_are_no_rows_in_8_bits_for_a_backend_that_is_not_their_engine(name: str) -> None:
    with use_backend(name):
        assert not demo.has_int8(torch.device("cpu"))


def test_picture_shows_five_different_panels(quick: dict[str, Any]) -> None:
    import numpy as np
    from PIL import Image

    pixels = np.asarray(Image.open(quick["out"] / "demo.png").convert("L"), float)
    panels = np.array_split(pixels[:, : pixels.shape[1] // 5 * 5], 5, axis=1)
    assert all(panel.std() > 20 for panel in panels)
    for i in range(4):
        assert np.abs(panels[i] - panels[i + 1]).mean() > 1


def test_same_seed_same_pictures(tmp_path: Path) -> None:
    def quality(seed: str, out: str) -> list[float]:
        words = ("--quick", "--steps", "4", "--seed", seed, "--out", str(tmp_path / out))
        demo.run(options(*words))
        record = json.loads((tmp_path / out / "demo.json").read_text())
        return [network["psnr_db"] for network in record["networks"].values()]

    first = quality("1", "a")
    assert first == quality("1", "b")
    assert first != quality("2", "c")


def test_sparse_networks_start_from_the_dense_weights() -> None:
    dense = dncnn(4, 16, 1, batch_norm=False)
    for make, kind in ((demo.to_hetconv, HetConv2d), (demo.to_groups, SelfGroupConv2d)):
        sparse = make(dense)
        layers = dict(sparse.named_modules())
        changed = [name for name, layer in layers.items() if isinstance(layer, kind)]
        assert len(changed) == 2
        for name in changed:
            live = torch.from_numpy(layers[name].support.mask.copy())
            weight = dense.get_submodule(name).weight
            assert torch.equal(layers[name].weight, weight * live)
            assert layers[name].weight.data_ptr() != weight.data_ptr()


def test_backend_option_forces_the_sparse_layers(tmp_path: Path) -> None:
    words = ("--quick", "--steps", "2", "--backend", "reference", "--out", str(tmp_path))
    assert demo.run(options(*words)) == 0
    networks = json.loads((tmp_path / "demo.json").read_text())["networks"]
    assert networks["HetConv"]["backends"] == networks["self-grouped"]["backends"] == ["reference"]


def test_a_network_that_computes_something_else_is_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def off_by_one(network: torch.nn.Module, rule: Any, inplace: bool = False) -> Any:
        report = convert(network, rule, inplace)
        if isinstance(rule, type(rules.dense())) and rule.__qualname__.startswith("dense"):
            next(iter(report.model.parameters())).data.add_(1)
        return report

    monkeypatch.setattr(demo, "convert", off_by_one)
    with pytest.raises(HetconvError, match="differs from its masked dense twin"):
        demo.run(options("--quick", "--steps", "2", "--out", str(tmp_path)))
    assert not (tmp_path / "demo.json").exists()


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (("--channels", "4"), ArgumentError, "--channels"),
        (("--device", "toaster"), HetconvError, "toaster"),
        (("--backend", "toaster"), BackendError, "toaster"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_bad_options(
    words: tuple[str, ...], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        demo.run(options("--quick", "--out", str(tmp_path / "out"), *words))
    assert not (tmp_path / "out").exists()


def test_a_step_too_few_is_refused_where_options_are_read(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        options("--quick", "--steps", "1")
    assert "--steps: received '1', expected an integer, at least 2" in capsys.readouterr().err


def test_out_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(HetconvError, match="--out"):
        demo.run(options("--quick", "--out", str(tmp_path / "file")))


@pytest.mark.parametrize("package", ["sklearn", "PIL", "matplotlib"])
def test_missing_extra_is_one_sentence_and_exit_code_1(
    package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, package, None)
    assert main(["demo", "--quick"]) == 1
    error = capsys.readouterr().err
    assert "pip install 'hetconv-kernels[demo]'" in error
    assert error.count("\n") == 1
