# SPDX-License-Identifier: Apache-2.0
"""Why a quantised layer is as fast as it is: `hk.explain` for layers in 8 bits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..backends import ENGINE_OF_CODE, forced_code
from ..nn.quantized_layer import QuantizedLayer
from ..quantization.engine import engine_name, engine_names
from .explanation import Candidate, Explanation, packing_seconds
from .timing import interleaved


def explain_quantized(layer: QuantizedLayer, x: Tensor, measure: bool = True) -> Explanation:
    """Explains which engine runs a layer in 8 bits, and how fast each one is.

    Both give the same integers. Nothing is predicted: what is not measured is not known.

    Args:
        layer: a `QuantizedConv2d` or `QuantizedLinear` without residual.
        x: an example input of the Scale's dtype.
        measure: whether to time the engines, interleaved.

    Raises:
        InputTypeError, ArgumentError, BackendError: as the layer's forward.
    """
    layer(x)  # refuses what the layer refuses
    support = layer.support
    code = layer._backend_code()
    forced = ENGINE_OF_CODE[code or forced_code()] != "auto"
    names = engine_names() if x.device.type == "cpu" else ("reference",)
    timed, packing = _measure(layer, x, names) if measure and x.numel() else ({}, {})
    problem = layer.problem(x)
    sizes = sorted(
        ((len(g.filters), int(g.mask.any((1, 2)).sum())) for g in support.groups), reverse=True
    )
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return Explanation(
        layer=repr(layer),
        input=f"{tuple(x.shape)}, {x.dtype}, {x.device}, "
        f"{'channels_last' if last else 'contiguous'}",
        groups=tuple(sizes[:4]),
        group_count=len(sizes),
        density=support.density,
        macs=problem.macs,
        dense_macs=problem.dense_macs,
        chosen=engine_name(x.device, code),
        forced=forced,
        frozen=True,
        candidates=tuple(
            Candidate(n, (), None, None, timed.get(n), packing_s=packing.get(n)) for n in names
        ),
    )


def _measure(
    layer: QuantizedLayer, x: Tensor, names: tuple[str, ...]
) -> tuple[dict[str, float], dict[str, float]]:
    """Times each engine, and what of a steady call it spends on packing the weight."""

    def call(name: str) -> Callable[[], Tensor]:
        def run() -> Tensor:
            layer.backend = name
            made: Tensor = layer.forward(x)
            return made

        return run

    before = layer.backend
    try:
        # One engine after the other: their packed weights take turns in the layer.
        timed, packing = {}, {}
        for name in names:
            timed[name] = interleaved({name: call(name)}, device=x.device, rounds=9).median(name)
            packing[name] = packing_seconds(call(name))
        return timed, packing
    finally:
        layer.backend = before
