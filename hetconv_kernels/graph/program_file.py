# SPDX-License-Identifier: Apache-2.0
"""Saves a wholly native network as a file that hosts without Python run: see docs/deploy.md."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from .._version import __version__
from ..arena import ALIGNMENT, Arena, placing
from ..errors import BackendError, TraceError, VerificationError, mismatch
from ..files import writing
from ..nn.quantized_layer import QuantizedLayer
from ..packing import live_weight
from ..problem import is_dense_shape
from .check import Match, verify
from .copying import copied
from .engine_only import EngineOnly, check_inputs, engine_only
from .names import describe_node, module_of
from .narrow import Narrow
from .planned import PlannedNetwork, _Recording
from .program import Called, Native, Program
from .seen import Seen, Spec
from .trace import FAILURES, as_inputs, check_network

__all__ = ["SavedNetwork", "save_program"]

try:
    from .. import _cpu
except ImportError:  # nothing is compiled here
    _cpu = None  # type: ignore[assignment]

_DTYPES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.uint8: "uint8",
    torch.int8: "int8",
}
_WAY_OUT = (
    "Leave such steps to the program's caller, by a network that ends before them; or write a file "
    "for another runtime, with hetconv_kernels.export.to_onnx."
)


@dataclass(frozen=True)
class SavedNetwork:
    """What `hetconv_kernels.export.program` saved; ``str()`` says it.

    Attributes:
        path: of the file.
        network: what the file computes, bit for bit, to be called from Python.
        steps: the kinds of the native steps, in order.
        changed: what became another step than in the network that was given.
        match: how far the outputs are from the given network's; None in 8 bits, where a number that
            is rounded in another order may be a step off.
        bytes: of the file.
        arena: bytes that a running call needs.
    """

    path: Path
    network: PlannedNetwork
    steps: tuple[str, ...]
    changed: tuple[str, ...]
    match: Match | None
    bytes: int
    arena: int

    def __str__(self) -> str:
        kinds = {kind: self.steps.count(kind) for kind in dict.fromkeys(self.steps)}
        lines = [
            f"{self.path.name}: {self.bytes:,} bytes; a call needs an arena of {self.arena:,}",
            "steps: " + ", ".join(f"{count} {kind}" for kind, count in kinds.items()),
        ]
        if self.match is not None:
            lines.append(f"outputs compared: {self.match}")
        return "\n".join([*lines, *self.changed])


def save_program(model: nn.Module, example: Any, path: str | os.PathLike[str]) -> SavedNetwork:
    """See `hetconv_kernels.export.program`."""
    check_network(model)
    inputs = check_inputs(as_inputs(example))
    if _cpu is None:
        raise BackendError(
            mismatch(
                "backend 'cpu'",
                "none: the native engine is not built here",
                "the engine, which programs are of",
                "`hetconv info` says why it was not built.",
            )
        )
    made = engine_only(model, inputs)
    with torch.no_grad(), placing(None):
        run = _Recording(made.network)
        try:
            expected = run.run(*inputs)
        except FAILURES as error:
            raise TraceError(
                f"{type(model).__name__} cannot be run on the engine alone: {error}"
            ) from error
        program = run.program(expected)
    match = _verified(model, made, inputs)
    file = _File(program, run._seen, inputs)
    contents = file.contents(type(model).__name__)
    _check(contents, inputs, file.outputs, expected)
    with writing(path) as beside:
        beside.write_bytes(contents)
    return SavedNetwork(
        Path(path), made.network, file.kinds, made.changed, match, len(contents), file.arena
    )


@torch.no_grad()
def _verified(model: nn.Module, made: EngineOnly, inputs: tuple[Tensor, ...]) -> Match | None:
    if any(isinstance(m, QuantizedLayer) for m in model.modules()):
        return None
    if isinstance(model, Narrow):  # beside what its rounded weights give in float32
        wide = copied(model.body).float()
        return verify(wide, made.network, inputs, "export.program", model.dtype, made.depth)
    return verify(model, made.network, inputs, "export.program", depth=made.depth)


class _File:
    """A program on its way into a file."""

    def __init__(
        self, program: Program | None, record: list[Seen], inputs: tuple[Tensor, ...]
    ) -> None:
        self.record = record
        pieces = [] if program is None else program._pieces
        self.pieces = [p for p in pieces if isinstance(p, Native)]
        self._refuse(program is None, [p.number for p in pieces if isinstance(p, Called)])
        assert program is not None
        arena = Arena(program.lifetimes)
        self.arena = -(-arena.bytes // ALIGNMENT) * ALIGNMENT
        self.inputs = [i for i, seen in enumerate(record) if seen.node.op == "placeholder"]
        fresh = {record[i].made: i for p in self.pieces for i, *_ in p.fresh}
        self.outputs = [*self._outputs(fresh)]
        storages = [spec.storage for _, spec in self.outputs]
        self.bases = {record[i].specs[0].storage: 1 + k for k, i in enumerate(self.inputs)}  # type: ignore[union-attr]
        self.bases |= {s: 1 + len(inputs) + k for k, s in enumerate(storages)}
        self.kinds = tuple(kind for piece in self.pieces for kind in piece.program.kinds)

    def contents(self, name: str) -> bytes:
        """Returns the bytes of the file."""
        kept: list[Tensor] = []
        parts = []
        for piece in self.pieces:
            bases = [0, *(self._base(index) for index in piece.outside)]
            weights = [self._weights(self.record[n], kept) for n in piece.numbers]
            parts.append((piece.program, weights, bases))
        inputs = [(str(self.record[i].node.target), self.record[i].specs[0]) for i in self.inputs]
        ins, outs = (
            [(name, _DTYPES[s.dtype], s.shape, s.stride) for name, s in some if s is not None]
            for some in (inputs, self.outputs)
        )
        made_by = f"hetconv_kernels {__version__}"
        return bytes(_cpu.saved_program(parts, self.arena, ins, outs, made_by, name))

    def _refuse(self, nothing: bool, called: list[int]) -> None:
        """Refuses steps that are PyTorch's; what is a view of an output is none."""
        foreign = [self.record[i] for i in called if not self._is_view(self.record[i])]
        if not foreign and not nothing:
            return
        names = [_named(seen.node) for seen in foreign[:8]]
        more = f" and {len(foreign) - 8} more" if len(foreign) > 8 else ""
        raise BackendError(
            mismatch(
                "steps of a program",
                f"{', '.join(names)}{more}, which only PyTorch computes" if names else "none",
                "steps that the engine has",
                _WAY_OUT,
            )
        )

    def _is_view(self, seen: Seen) -> bool:
        made = {s.made for s in self.record if s.made >= 0 and s.node.op != "placeholder"}
        return (
            seen.made == -1
            and seen.spec is not None
            and seen.spec.storage in made
            and (seen.node.op != "call_module" or type(module_of(seen.node)) is nn.Flatten)
        )

    def _outputs(self, fresh: dict[int, int]) -> Iterator[tuple[str, Spec]]:
        """Lists what is returned: each a whole tensor that a step has made."""
        index = {seen.node: seen for seen in self.record}
        seen_storages: set[int] = set()
        result = self.record[-1].node
        leaves = pytree.tree_leaves(pytree.tree_map(lambda a: a, result.args[0]))
        for number, node in enumerate(leaves):
            spec = index[node].spec if isinstance(node, fx.Node) else None
            owner = None if spec is None else fresh.get(spec.storage)
            if (
                spec is None
                or owner is None
                or spec.storage in seen_storages
                or not self._whole(spec, owner)
            ):
                raise BackendError(
                    mismatch(
                        f"output {number} of a program",
                        "an input, a constant, or a part or a second view of another output",
                        "a whole tensor that a step of its own has made",
                        "Return whole tensors, each once, and let the caller take parts of them.",
                    )
                )
            seen_storages.add(spec.storage)
            yield node.name, spec

    def _whole(self, spec: Spec, owner: int) -> bool:
        made = self.record[owner].spec
        return made is not None and spec.offset == 0 and spec.extent == made.extent

    def _base(self, index: int) -> int:
        spec = self.record[index].spec
        assert spec is not None
        if spec.offset or spec.storage not in self.bases:
            raise BackendError(
                mismatch(
                    "operand of a program",
                    f"a part of {describe_node(self.record[index].node)}",
                    "whole inputs and outputs",
                    _WAY_OUT,
                )
            )
        return self.bases[spec.storage]

    @staticmethod
    def _weights(seen: Seen, kept: list[Tensor]) -> tuple[bytes, int, int, str] | None:
        """Returns a layer's Support and live weights; the tensor stays alive in `kept`."""
        module: Any = module_of(seen.node)
        if not hasattr(module, "support"):
            return None
        weight = module.weight.detach()
        dense = is_dense_shape(module.support, weight.shape)
        live = (live_weight(module.support, weight) if dense else weight.reshape(-1)).contiguous()
        kept.append(live)
        bits = module.support.bits.tobytes()
        return bits, live.data_ptr(), live.numel(), _DTYPES[live.dtype]


def _check(
    contents: bytes, inputs: tuple[Tensor, ...], outputs: list[tuple[str, Spec]], expected: Any
) -> None:
    """Runs a file's contents as a host will, and compares the bits."""
    program = _cpu.SavedProgram(contents)
    results = [torch.empty(spec.extent, dtype=spec.dtype) for _, spec in outputs]
    addresses = [x.data_ptr() for x in inputs], [y.data_ptr() for y in results]
    program.run(*addresses, torch.get_num_threads())
    for y, (name, spec), truth in zip(results, outputs, pytree.tree_leaves(expected), strict=True):
        found = y.as_strided(spec.shape, spec.stride)
        if not torch.equal(_bits(found), _bits(truth)):
            raise VerificationError(
                f"the file computes another {name} than the network does. It was not written."
            )


def _named(node: fx.Node) -> str:
    module = module_of(node)
    return describe_node(node) if module is None else f"{node.target} ({type(module).__name__})"


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().reshape(-1).view(torch.uint8)
