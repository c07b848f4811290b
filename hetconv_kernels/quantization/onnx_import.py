# SPDX-License-Identifier: Apache-2.0
"""Reads a quantised network from an ONNX file in QDQ form."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from ..errors import HetconvError
from ..pooling import Pool
from .imported import assemble
from .recipe import Operation, Recipe, refused

_WAY_OUT = (
    "Layers of this kind are left in float by whoever quantises; a network with them is imported "
    "in float and quantised by hetconv_kernels.quantize."
)
_SAME = ("Identity", "Dropout")


def from_onnx(path: str | os.PathLike[str]) -> fx.GraphModule:
    """Reads a convolutional network that was quantised to ONNX's QDQ form.

    Scales and integers are taken over as they are; which weights exist is found from their zeros.
    What is in float between the quantised parts stays in float. Needs onnx.

    Args:
        path: of the file, of opset 13 or newer.

    Returns:
        A network of quantised layers that takes and gives what the file's does, in evaluation mode.

    Raises:
        FileError: no ONNX file, or a node that cannot be imported; the message names it.
        HetconvError: onnx is not installed.
    """
    try:
        import onnx
    except ImportError as error:
        raise HetconvError("reading ONNX needs onnx: pip install onnx") from error
    try:
        model = onnx.load(str(Path(path)))
        onnx.checker.check_model(model)
    except (OSError, ValueError, onnx.checker.ValidationError) as error:
        raise refused(str(path), error, "an ONNX file") from error
    except Exception as error:  # protobuf's own error, whose module is not public
        if type(error).__name__ != "DecodeError":
            raise
        raise refused(str(path), error, "an ONNX file") from error
    return assemble(_Reader(model).recipe())


class _Reader:
    """One graph that is being read."""

    def __init__(self, model: Any) -> None:
        from onnx import numpy_helper

        self.to_array = numpy_helper.to_array
        self.graph = model.graph
        self.constants = {i.name: self._tensor(i) for i in self.graph.initializer}

    def recipe(self) -> Recipe:
        """Reads all nodes."""
        operations = []
        for place, node in enumerate(self.graph.node):
            name = node.name or f"number {place}"
            where = f"ONNX node {name!r} ({node.op_type})"
            if node.op_type == "Constant":
                self._constant(node, where)
                continue
            read = getattr(self, f"_{node.op_type}", None)
            ours = node.domain in ("", "ai.onnx", "com.microsoft")
            if node.op_type in _SAME:
                read = self._same
            if read is None or not ours:
                raise refused(where, "an operator that is not known", _known(), _WAY_OUT)
            operations.append(read(node, where))
        inputs = tuple(i.name for i in self.graph.input if i.name not in self.constants)
        outputs = tuple(o.name for o in self.graph.output)
        return Recipe(inputs, outputs, tuple(operations), self.constants)

    # Pieces -----------------------------------------------------------------------------------

    def _tensor(self, proto: Any) -> Tensor:
        return torch.from_numpy(self.to_array(proto).copy())

    def _constant(self, node: Any, where: str) -> None:
        found = self._attributes(node)
        if "value" in found:
            self.constants[node.output[0]] = self._tensor(found["value"])
        elif {"value_int", "value_ints", "value_float", "value_floats"} & set(found):
            (value,) = found.values()
            self.constants[node.output[0]] = torch.tensor(value)
        else:
            raise refused(where, f"a constant of {sorted(found)}", "a tensor or numbers")

    @staticmethod
    def _attributes(node: Any) -> dict[str, Any]:
        from onnx import helper

        found = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        return {k: v.decode() if isinstance(v, bytes) else v for k, v in found.items()}

    def _known(self, node: Any, place: int, where: str, what: str) -> Tensor | None:
        """Reads an operand that has to be a constant of the file; None where it is not there."""
        if place >= len(node.input) or not node.input[place]:
            return None
        name = node.input[place]
        if name not in self.constants:
            raise refused(where, f"{what} that is computed", f"a constant {what}")
        return self.constants[name]

    def _ints(self, node: Any, place: int, where: str, what: str) -> list[int] | None:
        found = self._known(node, place, where, what)
        return None if found is None else [int(v) for v in found.flatten()]

    def _made(self, kind: str, node: Any, where: str, count: int = 1, **settings: Any) -> Operation:
        return Operation(kind, where, tuple(node.input[:count]), node.output[0], settings)

    # Quantisation -----------------------------------------------------------------------------

    def _QuantizeLinear(self, node: Any, where: str) -> Operation:
        return self._made("quantize", node, where, **self._scales(node, where))

    def _DequantizeLinear(self, node: Any, where: str) -> Operation:
        return self._made("dequantize", node, where, **self._scales(node, where))

    def _scales(self, node: Any, where: str) -> dict[str, Any]:
        scale = self._known(node, 1, where, "scale")
        assert scale is not None
        zero = self._known(node, 2, where, "zero point")
        if zero is None:
            # Of a quantisation without a zero point the standard says uint8.
            source = self.constants.get(node.input[0])
            kind = torch.uint8 if source is None else source.dtype
            zero = torch.zeros(scale.shape, dtype=kind)
        if zero.dtype not in (torch.uint8, torch.int8, torch.int32):
            raise refused(where, f"numbers of {zero.dtype}", "uint8 and int8 (int32 for biases)")
        found = self._attributes(node)
        if found.get("block_size"):
            raise refused(where, "a scale per block", "a scale per tensor or per filter")
        limits = torch.iinfo(zero.dtype)
        return {
            "scale": scale.float(), "zero_point": zero.long(), "dtype": zero.dtype,
            "axis": int(found.get("axis", 1)) % max(1, self._rank(node)),
            "low": limits.min, "high": limits.max,
        }  # fmt: skip

    def _rank(self, node: Any) -> int:
        """The rank of a constant; axes of others are not asked for."""
        source = self.constants.get(node.input[0])
        return 4 if source is None else source.dim()

    # Layers -----------------------------------------------------------------------------------

    def _Conv(self, node: Any, where: str) -> Operation:
        found = self._attributes(node)
        weight_rank = len(found.get("kernel_shape", (0, 0)))
        if weight_rank != 2:
            raise refused(where, f"a kernel of {weight_rank} dimensions", "2")
        pads, stride = self._pads(found, where), list(found.get("strides", (1, 1)))
        dilation = list(found.get("dilations", (1, 1)))
        return self._made(
            "conv", node, where, 3, stride=stride, pads=pads, dilation=dilation,
            groups=int(found.get("group", 1)),
        )  # fmt: skip

    @staticmethod
    def _pads(found: dict[str, Any], where: str) -> list[int]:
        """Returns top, bottom, left, right."""
        mode = found.get("auto_pad", "NOTSET")
        if mode == "VALID":
            return [0, 0, 0, 0]
        if mode != "NOTSET":
            raise refused(where, f"auto_pad={mode}", "pads in numbers")
        top, left, bottom, right = found.get("pads", (0, 0, 0, 0))
        return [top, bottom, left, right]

    def _Gemm(self, node: Any, where: str) -> Operation:
        found = self._attributes(node)
        factors = found.get("alpha", 1.0), found.get("beta", 1.0)
        if factors != (1.0, 1.0) or found.get("transA", 0):
            received = f"alpha, beta = {factors}, transA = {found.get('transA', 0)}"
            raise refused(where, received, "1, 1 and 0")
        return self._made("linear", node, where, 3, transposed=not found.get("transB", 0))

    def _MatMul(self, node: Any, where: str) -> Operation:
        return self._made("linear", node, where, 2, transposed=True)

    # Steps ------------------------------------------------------------------------------------

    def _Add(self, node: Any, where: str) -> Operation:
        return self._made("add", node, where, 2)

    def _Relu(self, node: Any, where: str) -> Operation:
        return self._made("act", node, where, act="relu")

    def _Clip(self, node: Any, where: str) -> Operation:
        bounds = [self._known(node, place, where, "bound") for place in (1, 2)]
        low, high = (None if b is None else float(b) for b in bounds)
        if low == 0.0 and (high is None or math.isinf(high) or high > 3e38):
            return self._made("act", node, where, act="relu")
        if (low, high) != (0.0, 6.0):
            raise refused(where, f"bounds {low}, {high}", "0 and 6 (or none)")
        return self._made("act", node, where, act="relu6")

    def _MaxPool(self, node: Any, where: str) -> Operation:
        found = self._attributes(node)
        top, bottom, left, right = self._pads(found, where)
        dilated = any(d != 1 for d in found.get("dilations", ()))
        uneven = top != bottom or left != right
        if found.get("ceil_mode") or dilated or uneven or len(found["kernel_shape"]) != 2:
            raise refused(where, f"{found}", "2 dimensions, equal pads, no ceil_mode, no dilation")
        stride = tuple(found.get("strides", (1, 1)))
        pool = Pool(tuple(found["kernel_shape"]), stride, (top, left))
        return self._made("max_pool", node, where, pool=pool)

    def _GlobalAveragePool(self, node: Any, where: str) -> Operation:
        return self._made("mean", node, where, size=(1, 1), keepdim=True)

    def _ReduceMean(self, node: Any, where: str) -> Operation:
        found = self._attributes(node)
        axes = found.get("axes") or self._ints(node, 1, where, "axes") or []
        if sorted(a % 4 for a in axes) != [2, 3]:
            raise refused(where, f"axes {list(axes)}", "2 and 3")
        return self._made("mean", node, where, size=(1, 1), keepdim=bool(found.get("keepdims", 1)))

    def _Pad(self, node: Any, where: str) -> Operation:
        mode = self._attributes(node).get("mode", "constant")
        pads = self._ints(node, 1, where, "pads")
        if mode != "constant" or pads is None or (len(node.input) > 3 and node.input[3]):
            raise refused(where, f"mode {mode}", "constant, with pads of all axes in numbers")
        half = len(pads) // 2
        both = list(zip(pads[:half], pads[half:], strict=True))
        value = self._known(node, 2, where, "value")
        flat = tuple(number for pair in reversed(both) for number in pair)
        return self._made("pad", node, where, pads=flat, value=0 if value is None else float(value))

    # Moves ------------------------------------------------------------------------------------

    def _moved(
        self, node: Any, where: str, function: Callable[..., Any], *arguments: Any, **more: Any
    ) -> Operation:
        return self._made("move", node, where, function=function, arguments=arguments, **more)

    def _Flatten(self, node: Any, where: str) -> Operation:
        axis = int(self._attributes(node).get("axis", 1))
        if axis != 1:
            raise refused(where, f"axis {axis}", "1")
        return self._moved(node, where, torch.flatten, 1, flatten=True)

    def _Reshape(self, node: Any, where: str) -> Operation:
        shape = self._ints(node, 1, where, "shape")
        assert shape is not None
        keep = not self._attributes(node).get("allowzero")
        flat = len(shape) == 2 and shape[1] == -1 and (shape[0] == 0 and keep)
        return self._moved(node, where, reshaped, tuple(shape), keep, flatten=flat)

    def _Transpose(self, node: Any, where: str) -> Operation:
        return self._moved(node, where, torch.permute, tuple(self._attributes(node)["perm"]))

    def _Slice(self, node: Any, where: str) -> Operation:
        starts, ends = (self._ints(node, i, where, w) for i, w in ((1, "starts"), (2, "ends")))
        assert starts is not None
        assert ends is not None
        axes = self._ints(node, 3, where, "axes") or list(range(len(starts)))
        steps = self._ints(node, 4, where, "steps") or [1] * len(starts)
        if min(steps) < 1 or min(axes) < 0:
            raise refused(where, f"steps {steps}, axes {axes}", "positive ones")
        index = [slice(None)] * (max(axes) + 1)
        for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
            index[axis] = slice(start, end, step)
        return self._moved(node, where, operator.getitem, tuple(index))

    def _Concat(self, node: Any, where: str) -> Operation:
        axis = int(self._attributes(node)["axis"])
        return self._made("cat", node, where, len(node.input), dim=axis)

    def _same(self, node: Any, where: str) -> Operation:
        return self._made("same", node, where)


def reshaped(x: Tensor, shape: tuple[int, ...], keep: bool) -> Tensor:
    """Reshapes as ONNX does: where ``keep``, a 0 stands for the size that is there."""
    sizes = [x.shape[i] if keep and s == 0 else s for i, s in enumerate(shape)]
    return x.reshape(sizes)


def _known() -> str:
    names = [n[1:] for n in vars(_Reader) if n[:1] == "_" and n[1:2].isupper()]
    return f"one of {', '.join(sorted((*names, *_SAME)))}"
