# SPDX-License-Identifier: Apache-2.0
"""A written ONNX file beside its network: what differs, and what cannot run, is spoken of."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path

import pytest
import torch
from layers import C, F, image
from torch import nn

from hetconv_kernels import export
from hetconv_kernels.graph.onnx_file import OnnxFile, warn_of_differences

pytest.importorskip("onnxscript", reason="onnxscript is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")


def test_a_file_that_gives_something_else_is_spoken_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is where torch's exporter or ONNX Runtime has a fault: here the network is another."""
    layer, x, path = nn.Sequential(nn.Conv2d(C, F, 3)).eval(), image(), tmp_path / "net.onnx"
    export.to_onnx(layer, x, path)
    with torch.no_grad():
        layer[0].weight[0, 0, 0, 0] += 0.01
    with pytest.warns(UserWarning, match=r"gives other outputs for .*net\.onnx.*largest error"):
        warn_of_differences(layer, path, (x,))
    with pytest.raises(ValueError, match="it has 1 inputs, and the example 2"):
        OnnxFile(path)(x, x)
    path.write_bytes(b"no file of ONNX")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        monkeypatch.setattr(export, "warn_of_differences", lambda *_: pytest.fail("it was run"))
        export.to_onnx(layer, x, tmp_path / "other.onnx", check=False)
    with pytest.warns(UserWarning, match=r"ONNX Runtime cannot run .*net\.onnx: "):
        warn_of_differences(layer, path, (x,))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_differences(layer, path, (x,))


def test_two_inputs_and_two_outputs_keep_their_order(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(C, F, 3)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"z": self.conv(x) + 1, "a": self.conv(y).relu()}

    network, path = Two().eval(), tmp_path / "net.onnx"
    inputs = (image(), 2 * image())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "ONNX Runtime")
        export.to_onnx(network, inputs, path)
    with torch.no_grad():
        z, a = network(*inputs).values()
    found = OnnxFile(path)(*inputs)
    for one, two in zip(found, (z, a), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
