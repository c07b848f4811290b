# SPDX-License-Identifier: Apache-2.0
"""Method: what every method of compression is, and which layers methods leave alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from ..errors import ArgumentError
from ..graph import rules
from .run import Run, WeightLayer, support_of

# Images have one (grey) to four (colour and transparency) channels.
_IMAGE_CHANNELS = 4


@dataclass(frozen=True)
class Method:
    """What every method is: a frozen dataclass of its constants that works on a `Run`.

    Attributes:
        title: how the report calls it.
        needs_accuracy: whether it decides by accuracy.
        removes_filters: whether whole filters go, so that what is left can be a smaller network.
    """

    title: ClassVar[str] = ""
    needs_accuracy: ClassVar[bool] = False
    removes_filters: ClassVar[bool] = False

    def leaves_out(self, name: str, layer: WeightLayer) -> str | None:
        """Says why the method leaves a layer dense; None when it takes it."""
        return None

    def check(self, run: Run) -> None:
        """Refuses a network that the method can do nothing with, before any training."""
        if not run.layers:
            raise ArgumentError(
                f"{self.title} finds no layer to compress: "
                + ("; ".join(f"{n}: {why}" for n, why in list(run.kept.items())[:3]) or "none")
            )

    def run(self, run: Run) -> None:
        """Does the work in rounds; afterwards the masks say what is left."""
        raise NotImplementedError

    def rule(self, run: Run) -> rules.Rule:
        """Returns the rule that makes the network of masked layers one with Supports."""
        chosen = {
            name: support_of(mask) for name, mask in run.masks.items() if not bool(mask.all())
        }
        return rules.supports(chosen)


def is_stem(layer: WeightLayer) -> bool:
    """Whether a layer reads an image: a convolution of at most four channels."""
    return isinstance(layer, nn.Conv2d) and layer.in_channels <= _IMAGE_CHANNELS


STEM = "it reads an image"
