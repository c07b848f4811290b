# SPDX-License-Identifier: Apache-2.0
"""Who runs a whole network beside us: PyTorch eagerly and compiled, ONNX Runtime, OpenVINO.

ONNX Runtime and OpenVINO are dependencies of this benchmark only (``pip install
'hetconv-kernels[peers]'``); one that is absent is named in the row. All get the same threads and
compute in float32; `benchmarks.low_precision` has them in bfloat16 and int8.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.baselines import prepacked
from hetconv_kernels import export

Inference = Callable[[], Tensor]

# More convolutions are not given to torch.compile: of the 833 of ResNet-50's self-grouped
# composition it was not done after eight minutes.
_MOST_COMPILED = 400


class Absent(Exception):
    """A peer is not installed here, or cannot run this network; the message says which."""


def eager(module: nn.Module, x: Tensor, folder: Path) -> Inference:
    """PyTorch as it is, weights and input in channels_last."""
    module = module.to(memory_format=torch.channels_last)
    image = x.to(memory_format=torch.channels_last)
    return lambda: module(image)


def compiled(module: nn.Module, x: Tensor, folder: Path) -> Inference:
    """torch.compile with freezing: inductor folds, fuses and packs the weights for oneDNN.

    Raises:
        Absent: it would compile for longer than anybody waits.
    """
    count = sum(isinstance(part, nn.Conv2d) for part in module.modules())
    if count > _MOST_COMPILED:
        raise Absent(f"{count} convolutions; torch.compile is given at most {_MOST_COMPILED}")
    module = module.to(memory_format=torch.channels_last)
    image = x.to(memory_format=torch.channels_last)
    fast = prepacked(module, image)
    return lambda: fast(image)


def onnxruntime(module: nn.Module, x: Tensor, folder: Path) -> Inference:
    """ONNX Runtime with all its graph optimisations."""
    library("onnxruntime")
    return run_onnxruntime(onnx_file(module, x, folder), x)


def openvino(module: nn.Module, x: Tensor, folder: Path) -> Inference:
    """OpenVINO for latency, in float32 (its default takes bfloat16 where the processor has it)."""
    library("openvino")
    return run_openvino(onnx_file(module, x, folder), x, "f32")


def run_onnxruntime(path: Path, x: Tensor) -> Inference:
    """Runs an ONNX file by ONNX Runtime, with the threads that PyTorch has."""
    runtime = library("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Between its turns it must not burn the cores that others are being measured on.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.contiguous().numpy()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def run_openvino(path: Path, x: Tensor, precision: str | None = None) -> Inference:
    """Runs an ONNX file by OpenVINO for latency, with the threads that PyTorch has.

    Args:
        path: of the file.
        x: the images.
        precision: of what is not quantised, ``f32`` or ``bf16``; None is OpenVINO's own choice.
    """
    runtime = library("openvino")
    settings: dict[str, Any] = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    if precision is not None:
        settings["INFERENCE_PRECISION_HINT"] = precision
    core = runtime.Core()
    network = core.read_model(str(path))
    network.reshape(list(x.shape))
    request = core.compile_model(network, "CPU", settings).create_infer_request()
    image = x.contiguous().numpy()

    def run() -> Tensor:
        found = request.infer([image], share_inputs=True, share_outputs=True)
        return torch.from_numpy(next(iter(found.values())))

    return run


PEERS: dict[str, Callable[[nn.Module, Tensor, Path], Inference]] = {
    "eager": eager,
    "compiled": compiled,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
}


def library(name: str) -> Any:
    """Imports an optional library.

    Raises:
        Absent: it is not installed.
    """
    if importlib.util.find_spec(name) is None:
        raise Absent(f"{name} is not installed")
    return importlib.import_module(name)


def onnx_file(module: nn.Module, x: Tensor, folder: Path) -> Path:
    """Writes the network once for both that read ONNX."""
    for needed in ("onnx", "onnxscript"):
        library(needed)
    path = folder / f"{id(module)}.onnx"
    if not path.exists():
        export.to_onnx(module, x, path, check=False)  # `benchmarks.gate` checks who runs it
    return path
