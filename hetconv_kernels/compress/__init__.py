# SPDX-License-Identifier: Apache-2.0
"""Compressors: they choose a Support (and weights), and never touch a kernel.

    report = hk.compress(model, hk.SelfGrouping(target=0.7), data=batches, evaluate=accuracy)

The package itself is the function: ``hk.compress(...)`` is `hk.compress.compress(...)`.
"""

import sys
from types import ModuleType
from typing import Any

from .admm import ADMM
from .base import Method, compress
from .correlation import FilterCorrelation
from .frequency import FrequencyPruning
from .het import Het
from .play_and_prune import PlayAndPrune
from .report import CompressionReport, LayerReport, compare
from .run import Run
from .self_grouping import self_group
from .self_grouping_network import SelfGrouping
from .stability import Stability
from .wsp import WeakSubnetwork

__all__ = [
    "ADMM",
    "CompressionReport",
    "FilterCorrelation",
    "FrequencyPruning",
    "Het",
    "LayerReport",
    "Method",
    "PlayAndPrune",
    "Run",
    "SelfGrouping",
    "Stability",
    "WeakSubnetwork",
    "compare",
    "compress",
    "self_group",
]


class _CallablePackage(ModuleType):
    """A package that can be called as its main function."""

    def __call__(self, *args: Any, **kwargs: Any) -> CompressionReport:
        """Compresses a network, see `compress`."""
        return compress(*args, **kwargs)


sys.modules[__name__].__class__ = _CallablePackage
