# SPDX-License-Identifier: Apache-2.0
"""optimize: everything that makes a trained network fast for inference, with an account of it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from ..errors import HetconvError, TraceError, VerificationError, mismatch
from ..measure import tables
from ..nn.base import SupportLayer
from . import formats, trace
from .account import Part, account
from .average import Average, deepest, native_averages
from .channels import Channels
from .check import Match, verify
from .compact import shrink
from .computed import computed_weights
from .convert import convert
from .copying import copied, settle
from .fold import LeftAlone, fold
from .frozen_norm import make_ordinary
from .hooks import calls_of
from .layout import set_module
from .narrow import Narrow, check_narrow, narrow
from .order import order
from .parts import children, same_around
from .planned import PlannedNetwork, planned
from .replay import check_gpu, replay_on_gpu
from .trace import as_inputs, check_network
from .worth import LeftPlain, leave_plain

__all__ = ["OptimizeReport", "optimize"]


@dataclass(frozen=True)
class OptimizeReport:
    """What `optimize` did and did not do, and why; ``str()`` says it.

    Attributes:
        model: the network to run.
        parts: what was done, for the whole network or for each part that could be traced.
        untraced: the modules that could not be traced, and why.
        frozen: layers outside of all parts that were frozen.
        match: how far the outputs are from the original's; those of the part that is farthest,
            where a rounding makes code around the parts choose otherwise, as that of a detector.
        settled: weights that a parametrisation, pruning or a norm computed at each call, and
            frozen batch normalisations: they are ordinary ones now.
        dtype: of weights and activations, where another than the original's was asked for.
        fixed: optional arguments of the forward that the result no longer has: they are fixed to
            their defaults, since the example did not give them.
        cuda_graph: whether calls on a GPU are captured and replayed.
    """

    model: nn.Module
    parts: tuple[Part, ...]
    untraced: tuple[LeftAlone, ...]
    frozen: tuple[str, ...]
    match: Match
    settled: tuple[str, ...] = ()
    dtype: torch.dtype | None = None
    fixed: tuple[str, ...] = ()
    cuda_graph: bool = False

    def __str__(self) -> str:
        lines = [f"outputs compared: {self.match}"]
        if self.dtype is not None:
            name = str(self.dtype).removeprefix("torch.")
            lines.append(f"weights and activations in {name}, outputs in the dtype of the inputs")
        if self.cuda_graph:
            lines.append("calls on a GPU are captured in CUDA graphs and replayed")
        if self.fixed:
            lines.append(
                f"fixed to their defaults, for the example gives no others: {', '.join(self.fixed)}"
            )
        for part in self.parts:
            lines += ["", *account(part)]
        if self.settled:
            lines += ["", f"made ordinary, once and for all: {', '.join(self.settled)}"]
        if self.frozen:
            lines += ["", f"frozen, as they are: {', '.join(self.frozen)}"]
        if self.untraced:
            rows = [(left.name or "(the model)", left.reason) for left in self.untraced]
            lines += ["", tables.text_table(("not traced", "because"), rows)]
        return "\n".join(lines)


@torch.inference_mode(False)  # what is made there cannot be read or written everywhere
@torch.no_grad()
def optimize(
    model: nn.Module,
    example: Any,
    dtype: torch.dtype | None = None,
    *,
    leave_plain: bool = True,
    cuda_graph: bool = False,
) -> OptimizeReport:
    """Makes a trained network fast for inference.

    In turn: weights that are computed at each call (parametrised, pruned, normed) become ordinary
    ones; `compact` removes dead channels; `order` rearranges channels so that groups are
    contiguous; `fold` takes batch normalisation, residual sums and activations into the
    convolutions; layers with a Support are frozen, and those for which no Support pays at the size
    of the example, what a call takes in Python included, are left as plain ``nn.Linear`` or
    ``nn.Conv2d`` with zeros, whose multiplications `stats` then counts. A `FusedConv2d` stays: what
    it took over would be a step as long as what it adds. Average pooling becomes an `AveragePool`
    where the engine takes its image. Where the network cannot be traced, its parts are tried, down
    to single layers; one that is called several times, as the tower of a detector's head is for
    each map, on what each call gives it. The outputs of the result are compared with the
    original's.

    With a dtype, weights are then rounded to it, once, and activations are of it from layer to
    layer; sums and shifts inside of a layer stay float32, and the outputs have the dtype of the
    inputs. The outputs may then err by twice what the original errs when all of it is cast.

    The original is not touched. The result does not train. Where it could be traced it recycles the
    memory of its activations, see `PlannedNetwork`.
    Optional arguments of the forward that the example does not give keep their defaults, and the
    result has them no more; the report says which.

    Args:
        model: the network, in evaluation mode.
        example: an input of the size that matters, or a tuple of inputs. On a CPU images in
            another memory format are brought into channels_last as they come in, and outputs
            have the original's; where users give channels_last, the example should too.
        dtype: ``torch.bfloat16`` or ``torch.float16``; None keeps the network's own.
        leave_plain: whether layers may be left plain; False keeps every Support.
        cuda_graph: whether calls on an NVIDIA GPU are captured, once for each signature of inputs
            (the latest eight), and replayed. It pays where launches take longer than what they
            launch: small images, few of them. The network must be traceable as a whole.

    Returns:
        The report, with the network as ``report.model``.

    Raises:
        InputTypeError: no nn.Module, or no tensor in the example.
        ArgumentError: the network is in training mode, the dtype is another one, or a CUDA graph
            is asked for and the example not on a GPU.
        BackendError: a CUDA graph is asked for, and there is no GPU or a step cannot be captured.
        TraceError: a CUDA graph is asked for, and the network cannot be traced as a whole.
        VerificationError: the outputs differ by more than rounding.
    """
    trace.check_float(model)
    check_network(model)
    inputs = as_inputs(example)
    if dtype is not None:
        check_narrow(dtype)
    if cuda_graph:
        check_gpu(inputs)
    work = _Work(copied(model), leave_plain and dtype is None, dtype != torch.float16)
    settled = settle(work.root) + make_ordinary(work.root) + _plain_weights(work)
    with torch.no_grad():
        result = work.optimize(work.root, "", [inputs])
        if result is not None:
            work.root = result
        frozen = tuple(_freeze(work.root))
        if dtype is not None:
            work.root = narrow(work.root, dtype)
    if cuda_graph:
        _captured(work)
    matched = work.match
    if result is None and dtype is None:
        matched = _compared(model, work, frozen, inputs)
    elif matched is None or frozen or dtype is not None or cuda_graph:
        matched = verify(model, work.root, inputs, "optimize", dtype, work.depth)
    parts, untraced = tuple(work.parts), tuple(work.untraced)
    fixed = () if result is None else _fixed_arguments(model, len(inputs))
    return OptimizeReport(
        work.root, parts, untraced, frozen, matched, settled, dtype, fixed, cuda_graph
    )


def _compared(
    model: nn.Module, work: _Work, frozen: tuple[str, ...], inputs: tuple[Any, ...]
) -> Match:
    """Compares a network whose parts were optimised with the original.

    A detector chooses among boxes, and a rounding can make it choose another. Then each part and
    each frozen layer is compared on all that it is called with, and what is around them, which has
    to give the same bit for bit.

    Raises:
        VerificationError: the outputs differ by more than rounding explains.
    """
    try:
        return verify(model, work.root, inputs, "optimize", depth=work.depth)
    except VerificationError:
        parts = [part.name for part in work.parts]
        layers = [n for n in frozen if not any(n.startswith(f"{part}.") for part in parts)]
        names = parts + layers
        modules = {name: model.get_submodule(name) for name in names}
        given = calls_of(modules, lambda: model(*copy.deepcopy(inputs)))
        by_name = any(call.keywords for calls in given.values() for call in calls)
        if not parts or by_name or not same_around(model, work.root, names, inputs):
            raise
    matches = [
        verify(modules[n], work.root.get_submodule(n), call.arguments, "optimize", depth=work.depth)
        for n, calls in given.items()
        for call in calls
    ]
    return max(matches, key=lambda match: match.error)


def _captured(work: _Work) -> None:
    """Has the network capture its calls.

    Raises:
        TraceError: it was not traced as a whole.
    """
    body = work.root.body if isinstance(work.root, Narrow) else work.root
    if not isinstance(body, PlannedNetwork):
        why = next((left.reason for left in work.untraced), "it is no graph")
        raise TraceError(
            mismatch("network for cuda_graph", f"one that is not traced: {why}",
                     "one that is traced as a whole", "Leave cuda_graph out.")
        )  # fmt: skip
    replay_on_gpu(body)


def _plain_weights(work: _Work) -> tuple[str, ...]:
    """Makes convolutions that compute their weight at each call plain, in place."""
    done = convert(work.root, computed_weights(), inplace=True)
    work.root = done.model
    return tuple(f"{swap.name}.weight" if swap.name else "weight" for swap in done.swapped)


def _fixed_arguments(model: nn.Module, given: int) -> tuple[str, ...]:
    """Names the arguments of a forward that come after those that an example gives."""
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    arguments = inspect.signature(model.forward).parameters.values()
    return tuple(p.name for p in arguments if p.kind not in kinds)[given:]


@dataclass
class _Work:
    """A network on its way.

    Attributes:
        root: a copy of the network, which is changed.
        plain: whether layers may be left plain.
        averages: whether the engine has averages of the dtype.
    """

    root: nn.Module
    plain: bool
    averages: bool
    parts: list[Part] = field(default_factory=list)
    untraced: list[LeftAlone] = field(default_factory=list)
    match: Match | None = None

    @property
    def depth(self) -> int:
        """What the deepest of the averages adds up."""
        return deepest(average for part in self.parts for average in part.averages)

    def optimize(
        self, module: nn.Module, name: str, calls: list[tuple[Any, ...]]
    ) -> nn.Module | None:
        """Optimises a module as a whole, or its children in place; returns what replaces it.

        Args:
            module: in evaluation mode.
            name: of it; "" is the whole network.
            calls: the arguments of each call. The first is the example, the outputs of all are
                compared.
        """
        try:
            if len({len(inputs) for inputs in calls}) > 1:
                raise TraceError("it is called with different numbers of arguments")
            compacted, traced = shrink(copied(module), calls[0])
            _, reordered = order(Channels(traced))
            folded = fold(traced.eval())
            how = traced.meta["traced by"]
            traced, brought, plain, averages, matches = self._finished(module, traced, calls)
        except HetconvError as error:
            self.untraced.append(LeftAlone(name, str(error)))
            self._children(module, name, calls)
            return None
        self.match = matches[0]
        self.parts.append(Part(name, how, compacted, reordered, folded, plain, brought, averages))
        return planned(traced)

    def _finished(
        self, module: nn.Module, traced: fx.GraphModule, calls: list[tuple[Any, ...]]
    ) -> tuple[
        fx.GraphModule, tuple[str, ...], tuple[LeftPlain, ...], tuple[Average, ...], list[Match]
    ]:
        """Sees to memory formats, plain layers and averages; compares the outputs.

        Returns:
            The graph, its inputs that are brought into channels_last, plain layers, averages, and
            matches.

        Raises:
            HetconvError: the outputs differ, or the graph cannot take an input.
        """
        if formats.pay(traced, calls[0]):
            last = copied(traced)
            with suppress(*trace.FAILURES):  # unless the network looks at strides
                brought = formats.into_channels_last(last, calls[0])
                plain = leave_plain(last, calls, program=True) if self.plain else ()
                averages = native_averages(last, calls) if self.averages else ()
                before, after = (m(*copy.deepcopy(calls[0])) for m in (module, last))
                formats.keep_outputs(last, before, after)
                matches = [_verified(module, last, each, averages) for each in calls]
                return last, brought, plain, averages, matches
        plain = leave_plain(traced, calls, program=True) if self.plain else ()
        averages = native_averages(traced, calls) if self.averages else ()
        matches = [_verified(module, traced, each, averages) for each in calls]
        return traced, (), plain, averages, matches

    def _children(self, module: nn.Module, name: str, calls: list[tuple[Any, ...]]) -> None:
        """Optimises the children on what they are called with; those of mere lists of modules too.

        A child that is a layer stays: `_freeze` has it.
        """
        parts = dict(children("", module))

        def run() -> None:
            for inputs in calls:
                module(*copy.deepcopy(inputs))

        for key, seen in calls_of(parts, run).items():
            path = f"{name}.{key}" if name else key
            if not seen or not any(True for _ in parts[key].children()):
                continue
            if any(call.keywords for call in seen):
                self.untraced.append(LeftAlone(path, "it is called with keyword arguments"))
                continue
            new = self.optimize(parts[key], path, [call.arguments for call in seen])
            if new is not None:
                set_module(module, key, new)


def _verified(
    module: nn.Module, traced: nn.Module, inputs: tuple[Any, ...], averages: tuple[Average, ...]
) -> Match:
    """Compares a part with its graph.

    Raises:
        HetconvError: they differ, or the graph cannot take these inputs.
    """
    try:
        return verify(module, traced, inputs, "optimize", depth=deepest(averages))
    except HetconvError:
        raise
    except trace.FAILURES as error:  # the graph of another call's sizes
        shapes = [tuple(x.shape) for x in inputs if isinstance(x, torch.Tensor)]
        raise TraceError(
            f"the graph of its first call cannot take {shapes}, which another gives it: {error}"
        ) from error


def _freeze(root: nn.Module) -> Iterator[str]:
    for name, module in root.named_modules():
        if isinstance(module, SupportLayer) and not module.frozen and module._owns_weight:
            module.freeze()
            yield name
