# SPDX-License-Identifier: Apache-2.0
"""Who runs a whole network in bfloat16 or int8, ourselves among them, from the same float network.

In 8 bits all have unsigned activations with a zero point per tensor and signed weights with a scale
per filter, calibrated by least and greatest value on the images that are timed. ONNX Runtime
quantises (pre-processing, then ``quantize_static`` to QDQ); OpenVINO runs the same file. PyTorch
quantises by its FX mode with oneDNN's patterns, which fuse convolution, sum and ReLU; eagerly that
runs oneDNN's quantised operators, and compiled with freezing what inductor makes of it.

Everybody is given the image in the dtype that suits him, before the clock starts.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

import hetconv_kernels as hk
from benchmarks import gate, peers
from benchmarks.networks import NetworkCase, build_network, converted, seeded_network
from benchmarks.peers import Absent, Inference
from benchmarks.rig import OURS, OURS_FLOAT32
from hetconv_kernels.quantization import engine

SessionMaker = Callable[[nn.Module, Tensor, Path], Inference]
_LAST = torch.channels_last


def peers_of(dtype: str) -> dict[str, SessionMaker]:
    """Returns the peers that compute in a dtype, by name."""
    return {"float32": peers.PEERS, "bfloat16": BFLOAT16, "int8": INT8}[dtype]


# bfloat16 -----------------------------------------------------------------------------------------


def eager_bfloat16(module: nn.Module, x: Tensor, folder: Path) -> Inference:
    """PyTorch as it is, weights and image in bfloat16."""
    return peers.eager(module.to(torch.bfloat16), x.to(torch.bfloat16), folder)


def compiled_bfloat16(module: nn.Module, x: Tensor, folder: Path) -> Inference:
    """torch.compile with freezing, weights and image in bfloat16."""
    return peers.compiled(module.to(torch.bfloat16), x.to(torch.bfloat16), folder)


def openvino_bfloat16(module: nn.Module, x: Tensor, folder: Path) -> Inference:
    """OpenVINO for latency, computing in bfloat16."""
    peers.library("openvino")
    return peers.run_openvino(peers.onnx_file(module, x, folder), x, "bf16")


BFLOAT16: dict[str, SessionMaker] = {
    "eager": eager_bfloat16,
    "compiled": compiled_bfloat16,
    "openvino": openvino_bfloat16,
}


# int8 ---------------------------------------------------------------------------------------------


def onnxruntime_int8(module: nn.Module, x: Tensor, folder: Path) -> Inference:
    """ONNX Runtime on the QDQ file that it made."""
    return peers.run_onnxruntime(qdq_file(module, x, folder), x)


def openvino_int8(module: nn.Module, x: Tensor, folder: Path) -> Inference:
    """OpenVINO on the same QDQ file; what is left in float is in the precision it prefers."""
    peers.library("openvino")
    return peers.run_openvino(qdq_file(module, x, folder), x)


def fx_int8(module: nn.Module, x: Tensor, folder: Path) -> Inference:
    """PyTorch's own quantised operators, by oneDNN."""
    from torch.ao.quantization.quantize_fx import convert_fx

    prepared, patterns = _observed(module, x)
    torch.backends.quantized.engine = "onednn"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a later version will have it in torchao
        network = convert_fx(prepared, backend_config=patterns)
    image = x.to(memory_format=_LAST)
    return lambda: network(image)


def compiled_int8(module: nn.Module, x: Tensor, folder: Path) -> Inference:
    """torch.compile with freezing, on the quantised graph that inductor lowers to oneDNN's int8."""
    from torch.ao.quantization.quantize_fx import _convert_to_reference_decomposed_fx

    prepared, patterns = _observed(module, x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = _convert_to_reference_decomposed_fx(prepared, backend_config=patterns)
    image = x.to(memory_format=_LAST)
    program = torch.export.export(network, (image,)).module()
    from torch._inductor import config

    with config.patch(freezing=True):
        fast = torch.compile(program, fullgraph=True)
        fast(image)
    return lambda: fast(image)


INT8: dict[str, SessionMaker] = {
    "onnxruntime": onnxruntime_int8,
    "openvino": openvino_int8,
    "eager": fx_int8,
    "compiled": compiled_int8,
}


def qdq_file(module: nn.Module, x: Tensor, folder: Path) -> Path:
    """Quantises a network as ONNX Runtime's documentation says, once for both that read ONNX."""
    peers.library("onnxruntime")
    whole = peers.onnx_file(module, x, folder)
    path = whole.with_suffix(".qdq.onnx")
    if path.exists():
        return path
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    ready = whole.with_suffix(".ready.onnx")
    quant_pre_process(str(whole), str(ready))
    name = onnx.load(str(ready), load_external_data=False).graph.input[0].name

    class Images(quantization.CalibrationDataReader):
        """Hands out the images one by one."""

        def __init__(self) -> None:
            self.left: Iterator[Tensor] = iter(x.contiguous().split(1))

        def get_next(self) -> dict[str, Any] | None:
            image = next(self.left, None)
            return None if image is None else {name: image.numpy()}

    quantization.quantize_static(
        str(ready), str(path), Images(), quant_format=quantization.QuantFormat.QDQ,
        per_channel=True, activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
    )  # fmt: skip
    return path


def _observed(module: nn.Module, x: Tensor) -> tuple[fx.GraphModule, Any]:
    """Prepares and calibrates a network for PyTorch's FX quantisation with oneDNN's patterns."""
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.backend_config import get_onednn_backend_config
    from torch.ao.quantization.quantize_fx import prepare_fx

    patterns = get_onednn_backend_config()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepared = prepare_fx(
            _with_relu_modules(module), get_default_qconfig_mapping("onednn"), (x[:1],),
            backend_config=patterns,
        )  # fmt: skip
    for image in x.split(1):
        prepared(image)
    return prepared, patterns


def _with_relu_modules(module: nn.Module) -> fx.GraphModule:
    """Traces a network and turns ``torch.relu`` into the module that the patterns look for."""
    traced = fx.symbolic_trace(module)
    for place, node in enumerate(traced.graph.nodes):
        if node.op == "call_function" and node.target is torch.relu:
            traced.add_submodule(f"relu_{place}", nn.ReLU())
            node.op, node.target = "call_module", f"relu_{place}"
    traced.recompile()
    return traced.eval()


# Ours ---------------------------------------------------------------------------------------------


def ours(case: NetworkCase, float32: nn.Module, x: Tensor) -> dict[str, partial[Tensor]]:
    """Makes our runs of a case: in its dtype, and in float32 where that is another one.

    Args:
        case: the network.
        float32: what `networks.build` makes of it as ``ours``.
        x: the images.

    Raises:
        Absent: this build has nothing that runs the case's dtype.
    """
    image = x.to(memory_format=_LAST)
    if case.dtype == "float32":
        return {OURS: partial(float32, image)}
    network, low = our_network(case, x)
    return {OURS: partial(network, low), OURS_FLOAT32: partial(float32, image)}


def our_network(case: NetworkCase, x: Tensor) -> tuple[nn.Module, Tensor]:
    """Makes our network of a case in the case's dtype, and the images as it takes them.

    Raises:
        Absent: this build has nothing that runs the case's dtype.
    """
    if case.dtype == "float32":
        image = x.contiguous(memory_format=_LAST)
        return build_network(case, "ours", image), image
    return (_ours_int8 if case.dtype == "int8" else _ours_bfloat16)(case, x)


def reference_match(run: partial[Tensor]) -> gate.Agreement:
    """Compares our run in 8 bits with the same network on the integer reference, bit for bit.

    The first and the last image alone: the reference takes seconds for each.
    """
    (images,) = run.args
    found = gate.ends(run())
    with hk.use_backend("reference"):
        expected = run.func(gate.ends(images).contiguous(memory_format=_LAST))
    if torch.equal(found, expected):
        return gate.Agreement(True, 0.0, 0.0)
    error = float((found.double() - expected.double()).abs().max())
    return gate.Agreement(False, float("inf"), error)


def _ours_bfloat16(case: NetworkCase, x: Tensor) -> tuple[nn.Module, Tensor]:
    network = converted(case, seeded_network(case))
    x = x.contiguous(memory_format=_LAST)  # as the example is: none has to be brought there
    network = hk.optimize(network, x[:1], dtype=torch.bfloat16).model
    return network, x.to(torch.bfloat16)


def _ours_int8(case: NetworkCase, x: Tensor) -> tuple[nn.Module, Tensor]:
    if engine.engine_names()[0] == "reference":
        raise Absent("the int8 engine is not compiled, or does not run on this processor")
    x = x.contiguous(memory_format=_LAST)
    batches = list(x.split(1))
    network = hk.quantize(
        converted(case, seeded_network(case)), batches, "int8", measure=False
    ).model
    return network, x
