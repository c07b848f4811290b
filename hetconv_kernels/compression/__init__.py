# SPDX-License-Identifier: Apache-2.0
"""Compressors: they choose a Support (and weights), and never touch a kernel.

    report = hk.compress(model, hk.methods.SelfGrouping(target=0.7), data=batches)

`hk.compress` is the function and `hk.methods` has the methods; here is what both are made of.
"""

from ..self_grouping import self_group
from .base import compress
from .distillation import Distillation
from .method import Method
from .methods.admm import ADMM
from .methods.correlation import FilterCorrelation
from .methods.frequency import FrequencyPruning
from .methods.het import Het
from .methods.play_and_prune import PlayAndPrune
from .methods.self_grouping_network import SelfGrouping
from .methods.stability import Stability
from .methods.wsp import WeakSubnetwork
from .report import CompressionReport, LayerReport, compare
from .rounds import Rounds
from .run import Run

__all__ = [
    "ADMM",
    "CompressionReport",
    "Distillation",
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
