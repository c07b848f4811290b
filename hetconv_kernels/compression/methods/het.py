# SPDX-License-Identifier: Apache-2.0
"""Het: makes the convolutions of a network HetConv, by projecting its weights or from scratch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from ...errors import ArgumentError, mismatch
from ...graph import rules
from ...nn import HetConv2d
from ...support import Support
from ..method import STEM, Method, is_stem
from ..run import Run, WeightLayer
from ..schedule import check_count


@dataclass(frozen=True)
class Het(Method):
    """HetConv: full kernels on 1/p of the channels, 1×1 kernels on the rest.

    Source: Singh, Verma, Rai, Namboodiri, "HetConv", CVPR 2019, arXiv 1903.04120.

    Deviations: the paper trains from scratch, which is ``scratch=True``. Projecting trained weights
    (the default: taps that HetConv has not are dropped) needs fewer epochs and is ours. The paper's
    channel order is ``"interleaved"``.

    Attributes:
        p: the part, from 1 to C.
        order: ``"blocked"`` or ``"interleaved"``.
        scratch: whether all layers begin anew from random weights (``reset_parameters``).
        epochs: of training afterwards.
        stem: whether a convolution that reads an image is taken too.

    Raises:
        ArgumentError: a value out of range.
    """

    title: ClassVar[str] = "HetConv"

    p: int = 4
    order: str = "blocked"
    scratch: bool = False
    epochs: int = 90
    stem: bool = False

    def __post_init__(self) -> None:
        check_count("p", self.p, 1)
        check_count("epochs", self.epochs)
        if self.order not in ("blocked", "interleaved"):
            raise ArgumentError(mismatch("order", repr(self.order), "'blocked' or 'interleaved'"))

    def leaves_out(self, name: str, layer: WeightLayer) -> str | None:
        """Leaves out what `rules.het` does, and fully-connected layers."""
        if isinstance(layer, nn.Linear):
            return "it is fully connected: it has nothing but centre taps"
        if is_stem(layer) and not self.stem:
            return STEM
        answer = rules.het(self.p, self.order, skip_stem=False)(name, layer)
        return answer.reason if isinstance(answer, rules.Keep) else None

    def run(self, run: Run) -> None:
        """Projects or begins anew, and trains."""
        run.round("begin anew" if self.scratch else "project", lambda: self._begin(run))
        run.train("train", self.epochs)

    def _begin(self, run: Run) -> int:
        if self.scratch:
            for module in run.model.modules():
                reset = getattr(module, "reset_parameters", None)
                if callable(reset):
                    reset()
        for name, layer in run.layers.items():
            assert isinstance(layer, nn.Conv2d)
            support = Support.het(
                layer.in_channels, layer.out_channels, layer.kernel_size, self.p, self.order
            )
            if self.scratch:
                with torch.no_grad():  # by the live fan-in, which is smaller than the dense one
                    fresh = HetConv2d.from_conv2d(layer, self.p, self.order)
                    fresh.reset_parameters()
                    layer.weight.copy_(fresh.weight)
                    if layer.bias is not None and fresh.bias is not None:
                        layer.bias.copy_(fresh.bias)
            run.choose(name, support.mask)
        return run.macs()

    def rule(self, run: Run) -> rules.Rule:
        """Makes HetConv2d of them, which knows its p and order."""

        def het(name: str, module: nn.Module) -> rules.Answer:
            if name not in run.layers or not isinstance(module, nn.Conv2d):
                return None
            layer = HetConv2d.from_conv2d(module, self.p, self.order)
            layer.set_support(run.support(name))
            return layer

        return rules.first_of(het, super().rule(run))
