# SPDX-License-Identifier: Apache-2.0
"""Which backend runs a layer, and why, in one line."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...backends import ENGINE_OF_CODE, available_backends, choose, get_backend, predict
from ...nn import FrequencyConv2d, FusedConv2d, SupportConv2d, SupportLinear
from ...nn.quantized_layer import QuantizedLayer
from ...nn.quantized_steps import QuantizedPad, QuantizedStep
from ...problem import Problem
from ...quantization.engine import engine_name


def backend_and_reason(layer: nn.Module, arguments: tuple[Any, ...]) -> tuple[str, str]:
    """Names what runs a layer on these arguments, and says why.

    Args:
        layer: any layer with weights.
        arguments: of its forward.

    Returns:
        The backend's name, or ``"torch"``; and a clause.
    """
    if isinstance(layer, FrequencyConv2d):
        return layer.path_for(arguments[0]), "the faster by prediction of its two paths"
    if isinstance(layer, QuantizedLayer):
        name = engine_name(arguments[0].device, layer._backend_code())
        return name, "in 8 bits; the engines give the same integers" + (
            "" if name == "cpu" else ", and the compiled one is not here or not wanted"
        )
    if isinstance(layer, QuantizedPad):
        return "torch", "moves integers"
    if isinstance(layer, QuantizedStep):
        return engine_name(arguments[0].device, layer._backend_code()), "a step between integers"
    problem = _problem(layer, arguments)
    if problem is None:
        return "torch", "a plain layer of PyTorch"
    code = layer._backend_code()  # type: ignore[operator]  # only our layers have a problem
    return reason(problem, code)


def reason(problem: Problem, code: int) -> tuple[str, str]:
    """Names the backend of a problem and says why: forced, or what the others would have taken."""
    chosen = choose(problem, code).backend.name
    if ENGINE_OF_CODE[code] != "auto":
        return chosen, "forced"
    said = [f"predicted {_micros(problem, chosen)}"]
    for name in available_backends(problem.device.type):
        if name in (chosen, "reference"):
            continue
        refusals = get_backend(name).unsupported_reasons(problem)
        said.append(
            f"{name} refused: {refusals[0]}" if refusals else f"{name} {_micros(problem, name)}"
        )
    return chosen, "; ".join(said)


def _problem(layer: nn.Module, arguments: tuple[Any, ...]) -> Problem | None:
    if isinstance(layer, SupportConv2d | SupportLinear | FusedConv2d):
        return layer.problem(*arguments)
    return None


def predicted(layer: nn.Module, arguments: tuple[Any, ...]) -> float | None:
    """Returns the seconds that the cost model predicts of a layer of ours; None of any other."""
    problem = None if isinstance(layer, FrequencyConv2d) else _problem(layer, arguments)
    if problem is None:
        return None
    engine = choose(problem, layer._backend_code()).backend  # type: ignore[operator]
    return predict(engine, problem)


def _micros(problem: Problem, name: str) -> str:
    engine = get_backend(name)
    guess = "" if engine.measured(problem) else " (not measured on this hardware)"
    return f"{predict(engine, problem) * 1e6:.0f} µs{guess}"
