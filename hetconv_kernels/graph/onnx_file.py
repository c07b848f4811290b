# SPDX-License-Identifier: Apache-2.0
"""An ONNX file beside the network that it was written of, where ONNX Runtime is installed."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .check import match


class OnnxFile(nn.Module):
    """Runs an ONNX file in ONNX Runtime, on the CPU.

    Args:
        path: of the file.

    Raises:
        Whatever ONNX Runtime raises where it cannot load the file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        runtime: Any = importlib.import_module("onnxruntime")
        options = runtime.SessionOptions()
        options.log_severity_level = 4  # what it cannot load it says by an exception, too
        self._session = runtime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )

    def forward(self, *inputs: Any) -> list[Tensor]:
        """Gives the outputs in the file's order, which is that of the leaves of the network's."""
        tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
        names = [each.name for each in self._session.get_inputs()]
        if len(names) != len(tensors):
            raise ValueError(f"it has {len(names)} inputs, and the example {len(tensors)}")
        given = {n: t.detach().cpu().numpy() for n, t in zip(names, tensors, strict=True)}
        return [torch.from_numpy(y) for y in self._session.run(None, given)]


def warn_of_differences(model: nn.Module, path: Path, inputs: tuple[Any, ...]) -> None:
    """Runs a file beside its network, and warns where ONNX Runtime gives something else.

    Args:
        model: the network, on the CPU or elsewhere.
        path: of the file.
        inputs: arguments of the network's forward.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        return
    try:
        file = OnnxFile(path)
        file(*inputs)
    except Exception as error:  # noqa: BLE001  # its exceptions have no class in common
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        warnings.warn(f"ONNX Runtime cannot run {path}: {reason}", stacklevel=3)
        return
    found = match(model, file, inputs)
    if not found.ok:
        warnings.warn(
            f"ONNX Runtime gives other outputs for {path} than the network: {found}. The network "
            "as it was written computes the same as the given one; torch's exporter or ONNX "
            "Runtime does not. Try form='composition', or another version of them.",
            stacklevel=3,
        )
