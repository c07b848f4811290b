# SPDX-License-Identifier: Apache-2.0
"""Why a layer is or is not fast: `explain`, and `warmup` before a capture."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..backends import ENGINE_OF_CODE, available_backends, choose, get_backend
from ..errors import ArgumentError, InputTypeError, mismatch
from ..nn.base import SupportLayer
from ..nn.conv import SupportConv2d
from ..nn.fused import FusedConv2d
from ..nn.linear import SupportLinear
from ..nn.quantized_layer import QuantizedLayer
from .explanation import Candidate, Explanation, packing_seconds

__all__ = ["Candidate", "Explanation", "explain", "warmup"]


def explain(
    layer: SupportLayer | FusedConv2d | QuantizedLayer, x: Tensor, measure: bool = True
) -> Explanation:
    """Explains which backend runs a layer's forward pass, why, and how fast each one is.

    Args:
        layer: a layer of this package with a Support, fused or quantised too; without residual.
        x: an example input.  # [N, C, H, W] or [C, H, W], of a linear layer [..., C]
        measure: whether to time the backends that can run it, interleaved (never on meta).

    Returns:
        The explanation; print it.

    Raises:
        InputTypeError: the layer is not one of these.
        ArgumentError, BackendError: as the layer's forward.
    """
    if isinstance(layer, QuantizedLayer):
        from .explain_quantized import explain_quantized  # only for those

        return explain_quantized(layer, x, measure)
    if not isinstance(layer, SupportConv2d | SupportLinear | FusedConv2d):
        raise InputTypeError(
            mismatch(
                "layer",
                type(layer).__name__,
                "a layer of hetconv_kernels.nn with a Support",
                "For a whole model call explain on each of its layers.",
            )
        )
    if x.dim() == 3 and isinstance(layer, SupportConv2d):
        x = x.unsqueeze(0)
    problem = layer.problem(x)
    forced = layer._backend_code()
    chosen = choose(problem, forced).backend.name
    runnable = [n for n in available_backends() if not get_backend(n).unsupported_reasons(problem)]
    measurable = measure and problem.batch and not x.is_meta
    measured, packing, disturbed = _measure(layer, x, runnable) if measurable else ({}, {}, ())
    candidates = []
    for name in available_backends():
        engine = get_backend(name)
        reasons = tuple(engine.unsupported_reasons(problem))
        notes = getattr(engine, "notes", lambda _: ())  # an engine may have more to say
        candidates.append(
            Candidate(
                name,
                reasons,
                None if reasons else engine.efficiency(problem),
                None if reasons else engine.estimate(problem),
                measured.get(name),
                () if reasons else tuple(notes(problem)),
                packing.get(name),
            )
        )
    support = layer.support
    sizes = sorted(
        ((len(g.filters), int(g.mask.any((1, 2)).sum())) for g in support.groups), reverse=True
    )
    dtype = f"{x.dtype}" + (f" autocast to {problem.dtype}" if x.dtype != problem.dtype else "")
    layout = "channels_last" if problem.channels_last else "contiguous"
    return Explanation(
        layer=repr(layer),
        input=f"{tuple(x.shape)}, {dtype}, {x.device}, {layout}",
        groups=tuple(sizes[:4]),
        group_count=len(sizes),
        density=support.density,
        macs=problem.macs,
        dense_macs=problem.dense_macs,
        chosen=chosen,
        forced=ENGINE_OF_CODE[forced] != "auto",
        candidates=tuple(candidates),
        frozen=layer.frozen,
        disturbed=disturbed,
    )


def warmup(model: nn.Module, *inputs: Any, backward: bool = False) -> None:
    """Runs a model once so that nothing is looked up or built later, during a graph capture.

    The model's mode, buffers and gradients, and the random state, are as before afterwards.

    Args:
        model: any module.
        *inputs: what its forward takes, on the model's device.
        backward: whether to run the backward pass too (gradients are discarded).
    """
    tensors = [*model.parameters(), *model.buffers()]
    devices = sorted({t.device.index or 0 for t in tensors if t.is_cuda})
    with (
        _same_buffers(model),
        torch.random.fork_rng(devices=devices),
        torch.set_grad_enabled(backward),
    ):
        outputs = model(*inputs)
        if backward:
            results = outputs if isinstance(outputs, tuple | list) else (outputs,)
            results = [t for t in results if isinstance(t, Tensor) and t.requires_grad]
            wanted = [p for p in model.parameters() if p.requires_grad]
            if not results:
                raise ArgumentError(
                    "warmup(backward=True): no output of the model needs a gradient."
                )
            # Laid out like the outputs, as a loss makes them; those of a sum would be expanded.
            ones = [torch.ones_like(t) for t in results]
            torch.autograd.grad(results, wanted, ones, allow_unused=True)


@contextmanager
def _same_buffers(model: nn.Module) -> Iterator[None]:
    """Puts back the buffers that are changed meanwhile, and leaves no trace on the others."""
    kept = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        for module, name, buffer, copy in kept:
            module._buffers[name] = buffer
            # A needless write would make engines forget what they prepared from a fused weight;
            # in-place versions do not tell (batch normalisation changes its buffers unversioned).
            if not buffer.is_meta and not torch.equal(buffer, copy):
                with torch.no_grad():
                    buffer.copy_(copy)


def _measure(
    layer: SupportConv2d | SupportLinear | FusedConv2d, x: Tensor, names: list[str]
) -> tuple[dict[str, float], dict[str, float], tuple[str, ...]]:
    """Times each backend; returns the seconds of a steady call and of packing in one, and why not
    to trust them.
    """
    from .timing import interleaved  # not needed to import the package

    def call(name: str) -> Any:
        def run() -> Tensor:
            layer.backend = name
            y: Tensor = layer.forward(x)  # without the hooks that others may have put on the layer
            return y

        return run

    before = layer.backend
    try:
        with torch.no_grad():
            calls = {name: call(name) for name in names}
            timings = interleaved(calls, device=x.device, rounds=9)
            return (
                {name: timings.median(name) for name in names},
                {name: packing_seconds(calls[name]) for name in names},
                timings.disturbed,
            )
    finally:
        layer.backend = before
