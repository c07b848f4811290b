# SPDX-License-Identifier: Apache-2.0
"""Geometry and Problem: what one call computes, told apart from how it is computed.

The rules of ``nn.Conv2d`` for output shape, dtype and memory format are written here once, for the
real kernels, the fake ones (tracing), and the statistics.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from .accuracy import is_strict
from .errors import ArgumentError, InputTypeError, mismatch
from .integers import INT32_MAX, as_pair
from .pooling import Pool
from .support import Support

__all__ = ["ACTIVATIONS", "Geometry", "Problem", "make_geometry"]

ACTIVATIONS = ("none", "relu", "relu6", "silu", "gelu")
VERBS = ("fprop", "dgrad", "wgrad")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

Pair = tuple[int, int]
Pads = tuple[int, int, int, int]


class Derived(dict[Any, Any]):
    """A dictionary that weak references can be made of."""


@dataclass(frozen=True, eq=False)
class Geometry:
    """A Support placed on an image: everything about a layer's calls but the tensors.

    One object a layer (or one per distinct arguments of the functional form). It crosses the
    operators as a list of integers, `ints`.

    Attributes:
        support: which weights exist.
        stride: (vertical, horizontal), in pixels.
        pads: zeros around the image, in pixels: top, bottom, left, right.
        dilation: (vertical, horizontal), in pixels.
        frozen: whether the weights are a frozen layer's: then engines keep what they derive from
            them (see `packing.FrozenCache`).
    """

    support: Support
    stride: Pair
    pads: Pads
    dilation: Pair
    frozen: bool = False

    # What `ints` lists after the image.
    tail: tuple[int, ...] = field(init=False, repr=False)
    # The (vertical, horizontal) padding when both sides are equal, else None.
    symmetric_padding: Pair | None = field(init=False, repr=False)
    # The cache of chosen backends, by call signature (see `ops`).
    choices: dict[Any, Any] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        top, bottom, left, right = self.pads
        symmetric = (top, left) if top == bottom and left == right else None
        tail = (
            *self.support.shape[1:],
            *self.stride,
            *self.pads,
            *self.dilation,
            self.support.digest,
        )
        # Plain attributes, set once: compilers read them, a lazy property would stop them.
        for name, value in (("tail", tail), ("symmetric_padding", symmetric), ("choices", {})):
            object.__setattr__(self, name, value)

    def __deepcopy__(self, memo: object) -> Geometry:
        return self  # immutable

    def __reduce__(self) -> tuple[Any, ...]:
        return Geometry, (self.support, self.stride, self.pads, self.dilation, self.frozen)

    @cached_property
    def derived(self) -> Derived:
        """What engines derive from the Support for just this geometry.

        Shared by equal geometries; it goes with the last of them.
        """
        stores = self.support.derived.setdefault(Derived, WeakValueDictionary())
        # Not one expression: the store has to be held before it is in a table of weak references.
        own = Derived()
        store: Derived = stores.setdefault((self.stride, self.pads, self.dilation), own)
        return store

    def ints(self, height: int, width: int) -> list[int]:
        """Lists H, W, C, KH, KW, stride (2), pads (4), dilation (2) and the Support's digest."""
        return [height, width, *self.tail]

    def output_size(self, height: int, width: int) -> Pair:
        """Returns the output height and width for an input of height × width pixels."""
        return output_size(self.ints(height, width))


class Ints(NamedTuple):
    """The named form of `Geometry.ints`."""

    height: int
    width: int
    columns: tuple[int, int, int]
    stride: Pair
    pads: Pads
    dilation: Pair
    digest: int


def read_ints(ints: Sequence[int]) -> Ints:
    """Names the integers that `Geometry.ints` lists."""
    h, w, c, kh, kw, sh, sw, top, bottom, left, right, dh, dw, digest = ints
    return Ints(h, w, (c, kh, kw), (sh, sw), (top, bottom, left, right), (dh, dw), digest)


def output_size(ints: Sequence[int]) -> Pair:
    """Returns the output height and width of a convolution given as `Geometry.ints`."""
    h, w, _, kh, kw, sh, sw, top, bottom, left, right, dh, dw, _ = ints
    return (
        (h + top + bottom - dh * (kh - 1) - 1) // sh + 1,
        (w + left + right - dw * (kw - 1) - 1) // sw + 1,
    )


def make_geometry(
    support: Support,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    frozen: bool = False,
) -> Geometry:
    """Builds a Geometry from arguments in the form of ``nn.Conv2d``.

    Args:
        support: which weights exist.
        stride: one number or a pair, in pixels.
        padding: one number, a pair, four numbers (top, bottom, left, right), ``"same"`` or
            ``"valid"``.
        dilation: one number or a pair, in pixels.
        frozen: whether the weights are a frozen layer's.

    Raises:
        InputTypeError: ``support`` is not a Support.
        ArgumentError: a value is out of range, or ``"same"`` meets a stride.
    """
    if not isinstance(support, Support):
        raise InputTypeError(
            mismatch("support", type(support).__name__, "a Support", "See Support.from_mask.")
        )
    strides, (dy, dx) = as_pair("stride", stride, 1), as_pair("dilation", dilation, 1)
    kh, kw = support.kernel
    # One tap has nothing to dilate; told so, PyTorch's bf16 convolution crashes on some shapes.
    dilations = (1 if kh == 1 else dy, 1 if kw == 1 else dx)
    pads = _pads(support, strides, padding, dilations)
    return Geometry(support, strides, pads, dilations, frozen)


def _pads(
    support: Support, strides: Pair, padding: int | str | Sequence[int], dilations: Pair
) -> Pads:
    if isinstance(padding, str):
        if padding == "valid":
            return 0, 0, 0, 0
        if padding != "same":
            raise ArgumentError(mismatch("padding", repr(padding), "'same', 'valid' or numbers"))
        if strides != (1, 1):
            raise ArgumentError(
                mismatch("padding='same'", f"stride={strides}", "stride 1", "Give numbers instead.")
            )
        total_y, total_x = (d * (k - 1) for d, k in zip(dilations, support.kernel, strict=True))
        return total_y // 2, total_y - total_y // 2, total_x // 2, total_x - total_x // 2
    if isinstance(padding, tuple | list) and len(padding) == 4:
        return *as_pair("padding", padding[:2], 0), *as_pair("padding", padding[2:], 0)
    vertical, horizontal = as_pair("padding", padding, 0)
    return vertical, vertical, horizontal, horizontal


def like_channels_last(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Tells whether PyTorch reads these strides as channels_last (its own rule, ties included)."""
    if stride[1] == 0:
        return False
    least = 0
    for dim in (1, 3, 2, 0):
        if shape[dim] == 0 or stride[dim] < least:
            return False
        if dim == 0 and least == stride[1]:
            return False
        least = stride[dim] * (shape[dim] if shape[dim] > 1 else 1)
    return True


def memory_format(first: Tensor, second: Tensor) -> torch.memory_format:
    """Returns the memory format of a result, by the rule of ``nn.Conv2d``.

    channels_last when either operand is laid out so; float64 on CUDA is always contiguous (cuDNN).
    """
    if first.dtype != torch.float64 or first.device.type == "cpu":
        for operand in (first, second):
            if operand.dim() == 4 and like_channels_last(operand.shape, operand.stride()):
                return torch.channels_last
    return torch.contiguous_format


@dataclass(frozen=True)
class Problem:
    """One call of one primitive, free of tensors and of backends.

    Attributes:
        verb: ``"fprop"``, ``"dgrad"`` or ``"wgrad"``.
        geometry: Support, stride, pads, dilation.
        batch: images, N.
        height: input height, in pixels.
        width: input width, in pixels.
        dtype: of the activations and of the arithmetic.
        weight_shape: of the canonical weight or its gradient (see `packing`).
        weight_dtype: of the canonical weight or its gradient; may be wider under autocast.
        device: where everything lives.
        strides: of the first operand (x, or dy).
        channels_last: the memory format of a 4-D result, as `memory_format` says.
        epilogue: which of scale, shift, residual and stats are asked for, in that order.
        act: the activation, one of `ACTIVATIONS`.
        pool: what follows the activation, or None.
        strict: whether only direct sums of products will do (`accuracy.strict_accuracy`).
    """

    verb: str
    geometry: Geometry
    batch: int
    height: int
    width: int
    dtype: torch.dtype
    weight_shape: tuple[int, ...]
    weight_dtype: torch.dtype
    device: torch.device
    strides: tuple[int, ...]
    channels_last: bool
    epilogue: tuple[str, ...] = ()
    act: str = "none"
    pool: Pool | None = None
    strict: bool = field(default_factory=is_strict)

    @property
    def support(self) -> Support:
        """Which weights exist."""
        return self.geometry.support

    @property
    def live_weight(self) -> bool:
        """Whether the weight holds only live entries, in Support order, instead of dense."""
        return not is_dense_shape(self.support, self.weight_shape)

    @property
    def frozen_weight(self) -> bool:
        """Whether the weight is a frozen layer's, so that what is derived from it is kept."""
        return self.geometry.frozen and len(self.weight_shape) == 1

    @cached_property
    def output_size(self) -> Pair:
        """The height and width of y."""
        return self.geometry.output_size(self.height, self.width)

    @property
    def x_shape(self) -> tuple[int, int, int, int]:
        """The shape of x and of dx."""
        return self.batch, self.support.channels, self.height, self.width

    @property
    def y_shape(self) -> tuple[int, int, int, int]:
        """The shape of y and of dy."""
        return self.batch, self.support.filters, *self.output_size

    @property
    def format(self) -> torch.memory_format:
        """The memory format of a 4-D result."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the live weights, for the whole batch."""
        return self.batch * self.support.macs(*self.output_size)

    @property
    def dense_macs(self) -> int:
        """Multiply-accumulates of the dense convolution, for the whole batch."""
        f, c, kh, kw = self.support.shape
        h, w = self.output_size
        return self.batch * f * c * kh * kw * h * w

    @property
    def bytes_moved(self) -> int:
        """The fewest bytes: x, y and the live weights, once each."""
        f, c = self.support.filters, self.support.channels
        h, w = self.output_size
        pixels = self.batch * (c * self.height * self.width + f * h * w)
        return pixels * self.dtype.itemsize + self.support.live * self.weight_dtype.itemsize


def check_call(
    geometry: Geometry, x: Tensor, weight: Tensor, bias: Tensor | None, mixed: bool
) -> None:
    """Refuses a call that no backend could answer, before anything runs.

    Args:
        geometry: the layer.
        x: activations.  # [N, C, H, W]
        weight: dense [F, C, KH, KW], or its live entries (see `packing`).
        bias: [F] or None.
        mixed: whether the weight may be wider than the activations (autocast).

    Raises:
        InputTypeError: a dtype or layout that is not supported, or a mix of dtypes.
        ArgumentError: a rank, channel count, weight, bias, device or image that does not fit.
    """
    support = geometry.support
    f, c = support.filters, support.channels
    check_kinds(x, weight, bias, mixed)
    if x.dim() != 4:
        raise ArgumentError(mismatch("input shape", tuple(x.shape), "[N, C, H, W] or [C, H, W]"))
    if x.shape[1] != c:
        raise ArgumentError(mismatch("input channels", x.shape[1], f"{c}, as in {support}"))
    if tuple(weight.shape) not in weight_shapes(support):
        shapes = " or ".join(map(str, weight_shapes(support)))
        raise ArgumentError(
            mismatch("weight shape", tuple(weight.shape), f"{shapes} for {support}")
        )
    if bias is not None and tuple(bias.shape) != (f,):
        raise ArgumentError(mismatch("bias shape", tuple(bias.shape), f"({f},)"))
    check_image(geometry, x.shape[2], x.shape[3], x.shape[0])


def check_kinds(x: Tensor, weight: Tensor, bias: Tensor | None, mixed: bool) -> None:
    """Refuses what dtypes and devices alone can refuse; args and errors as `check_call`."""
    for name, tensor in (("input", x), ("weight", weight)):
        if tensor.dtype not in DTYPES or tensor.layout != torch.strided:
            raise InputTypeError(
                mismatch(
                    f"{name} dtype and layout",
                    f"{tensor.dtype}, {tensor.layout}",
                    "strided float32, float64, bfloat16 or float16",
                )
            )
    if weight.dtype != x.dtype and not mixed:
        raise InputTypeError(
            mismatch(
                "input dtype",
                x.dtype,
                f"the weight's, {weight.dtype}",
                "Cast one of them, or use torch.autocast.",
            )
        )
    wide = torch.promote_types(x.dtype, torch.float32)  # what sums are kept in
    if bias is not None and bias.dtype not in (x.dtype, weight.dtype, wide):
        raise InputTypeError(mismatch("bias dtype", bias.dtype, f"the weight's, {weight.dtype}"))
    if weight.device != x.device or (bias is not None and bias.device != x.device):
        raise ArgumentError(
            mismatch(
                "devices of input, weight and bias",
                ", ".join(str(t.device) for t in (x, weight, bias) if t is not None),
                "one device",
                "Move them together with .to(device).",
            )
        )


def weight_shapes(support: Support) -> tuple[tuple[int, ...], ...]:
    """Lists the shapes of a canonical weight (see `packing`)."""
    f, c, kh, kw = support.shape
    shapes: list[tuple[int, ...]] = [support.shape, (support.live,)]
    if (kh, kw) == (1, 1):
        shapes.append((f, c))
    if support.uniform_groups not in (None, 1):
        shapes.append((f, c // support.uniform_groups, kh, kw))
    return tuple(shapes)


def is_dense_shape(support: Support, shape: Sequence[int]) -> bool:
    """Tells a dense canonical weight from one that holds only live entries."""
    shape = tuple(shape)
    return shape == support.shape or (support.kernel == (1, 1) and shape == support.shape[:2])


def check_image(geometry: Geometry, height: int, width: int, images: int = 1) -> None:
    """Refuses an image on which the kernel has no place, or no integer counts the places.

    Where there is no image at all it may be without pixels, if padding alone makes room for the
    kernel: ``nn.Conv2d`` takes that too.

    Raises:
        ArgumentError: the output would have no pixels, or more in a row than an int32 counts.
    """
    oh, ow = geometry.output_size(height, width)
    if max(oh, ow) > INT32_MAX:
        raise ArgumentError(
            mismatch(
                "output size",
                f"{oh}x{ow} for pads {geometry.pads}",
                f"at most {INT32_MAX} pixels in a row",
            )
        )
    if min(oh, ow) < 1 or (images and min(height, width) < 1):
        raise ArgumentError(
            mismatch(
                "input size",
                f"{height}x{width}, which gives a {oh}x{ow} output",
                f"an image that a {geometry.support.kernel} kernel with dilation "
                f"{geometry.dilation} and pads {geometry.pads} fits in",
                "Enlarge the image or the padding.",
            )
        )
