# SPDX-License-Identifier: Apache-2.0
"""Compressors: they choose a Support (and weights), and never touch a kernel.

    report = hk.compress(model, hk.methods.SelfGrouping(target=0.7), data=batches)

`hk.compress` is the function and `hk.methods` has the methods; here is what both are made of.
"""

from .admm import ADMM
from .base import Method, compress
from .correlation import FilterCorrelation
from .frequency import FrequencyPruning
from .het import Het
from .play_and_prune import PlayAndPrune
from .report import CompressionReport, LayerReport, compare
from .rounds import Rounds
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
    "Rounds",
    "Run",
    "SelfGrouping",
    "Stability",
    "WeakSubnetwork",
    "compare",
    "compress",
    "self_group",
]
