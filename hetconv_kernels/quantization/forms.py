# SPDX-License-Identifier: Apache-2.0
"""The forms that a value has while a network is being imported."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, fx, nn

from ..nn.quantized import QuantizedLayer
from ..pooling import Pool
from .scheme import Scale


@dataclass
class Integers:
    """Integers of a Scale; ``layer`` is what made them, where pooling could become part of it."""

    node: fx.Node
    scale: Scale
    layer: QuantizedLayer | None = None


@dataclass
class Numbers:
    """What integers stand for: a dequantisation that has not been written."""

    integers: Integers


@dataclass
class Floats:
    """A value in float32."""

    node: fx.Node


@dataclass
class Pending:
    """A computation on integers whose end (sum, activation, quantisation) is not yet known.

    Attributes:
        name: of the layer or step.
        where: for messages.
        make: builds the module from the Scale of the output (None for float32) and from this.
        operands: nodes of integers.
        act: activation so far.
        residual: what is added.
        pool: pooling so far.
        keepdim: of a mean.
        bias: added to a layer that had none.
    """

    kind: str
    name: str
    where: str
    make: Callable[[Scale | None, Pending], nn.Module]
    operands: list[fx.Node]
    act: str = "none"
    residual: Integers | None = None
    pool: Pool | None = None
    keepdim: bool = True
    bias: Tensor | None = None

    @property
    def takes_a_sum(self) -> bool:
        """Whether a residual may still be added."""
        bare = self.residual is None and self.pool is None and self.act == "none"
        return bare and self.kind == "conv"
