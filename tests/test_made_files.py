# SPDX-License-Identifier: Apache-2.0
"""Files of networks that the package makes: what was damaged or changed is refused at loading."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made import MAKERS, image, plain_network

import hetconv_kernels as hk
from hetconv_kernels import io
from hetconv_kernels.file_tensors import text_digest

safetensors = pytest.importorskip("safetensors", reason="the safetensors extra is not installed")
from safetensors.torch import load_file, save_file  # noqa: E402


def rewritten(path: Path, change: Callable[[Any], None]) -> None:
    """Changes the description in a file and its digest, as a careful attacker would."""
    with safetensors.safe_open(str(path), "pt") as file:
        description = json.loads(file.metadata()[io._KEY])
    change(description)
    text = json.dumps(description)
    metadata = {io._KEY: text, io._DIGEST_KEY: text_digest(text)}
    save_file(load_file(str(path)), str(path), metadata=metadata)


def of_layers(name: str, values: list[Any]) -> list[tuple[str, Any]]:
    return [(name, value) for value in values]


ODD: list[tuple[str, Any]] = [
    *of_layers(
        "stride", [0, [0, 1], [1], [1, 2, 3], [True, 1], ["a", 1], None, [2**40, 1], [1.5, 1]]
    ),
    *of_layers("dilation", [[-1, 1], [0, 1], [], [[1], 1], {}, [1, None]]),
    *of_layers("pads", [[-1, 0, 0, 0], [0, 0], [0, 0, 0, {}], "same", [0, 0, 0, 2**33]]),
    *of_layers("act", [{}, "softmax", None, 3]),
    *of_layers("pool", [[], [[2, 2]], [[2, 2], [0, 1], [0, 0]], [[2, 2], [2, 2], [5, 5]], "max"]),
    *of_layers("backend", ["none", 7, {}]),
    *of_layers("start_dim", ["one", None, 1.5, [], True]),
    *of_layers("output_size", [{}, "one", [[1]], 2**40]),
]


@pytest.mark.parametrize(("name", "value"), ODD, ids=lambda value: str(value)[:20])
@pytest.mark.parametrize("form", ["optimised", "bfloat16", "int8"])
def test_arguments_that_no_layer_has_are_refused_before_they_run(
    form: str, name: str, value: Any, saved_networks: dict[str, Path], tmp_path: Path
) -> None:
    """With the digest of the changed description: what is described is checked, too."""
    path = tmp_path / "net.safetensors"
    path.write_bytes(saved_networks[form].read_bytes())
    changed: list[str] = []

    def change(description: Any) -> None:
        for number, layer in description["layers"].items():
            if name in layer.get("arguments", {}) and not changed:
                layer["arguments"][name] = value
                changed.append(number)

    rewritten(path, change)
    if not changed:
        pytest.skip(f"no layer of a network in this form has {name}")
    with pytest.raises(hk.errors.FileError, match="description of a layer"):
        hk.load(path)


@pytest.mark.parametrize("form", ["optimised", "bfloat16", "int8"])
@pytest.mark.parametrize("args", [[], ["x"], [None], [3, 4, 5], [{"dict": {}}]], ids=str)
def test_a_layer_that_is_called_with_something_else_is_refused(
    form: str, args: Any, saved_networks: dict[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / "net.safetensors"
    path.write_bytes(saved_networks[form].read_bytes())

    def change(description: Any) -> None:
        step = next(s for s in description["graph"] if s["op"] == "call_module")
        step["args"] = args

    rewritten(path, change)
    with pytest.raises(hk.errors.FileError, match="arguments of a step"):
        hk.load(path)


@pytest.mark.parametrize("form", ["optimised", "bfloat16", "int8"])
def test_a_flipped_bit_of_a_made_networks_file_is_found_or_harmless(
    form: str, saved_networks: dict[str, Path], tmp_path: Path
) -> None:
    raw, x = saved_networks[form].read_bytes(), image()
    with torch.no_grad():
        wanted = hk.load(saved_networks[form])(x)
    generator, path = np.random.default_rng(0), tmp_path / "net.safetensors"
    places = generator.choice(8 * len(raw), 150, replace=False)
    found = 0
    for place in places.tolist():
        damaged = bytearray(raw)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(bytes(damaged))
        try:
            loaded = hk.load(path)
        except hk.errors.FileError:
            found += 1
            continue
        with torch.no_grad():
            assert torch.equal(loaded(x), wanted), place
    assert found > 100


@pytest.fixture(scope="module")
def saved_networks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("networks")
    paths = {}
    for form, maker in MAKERS.items():
        paths[form] = folder / f"{form}.safetensors"
        hk.save(maker(plain_network(), image()), paths[form])
    return paths
