# SPDX-License-Identifier: Apache-2.0
"""The methods that `compress` takes: ``hk.compress(model, hk.methods.SelfGrouping(target=0.7))``.

One of your own is a subclass of `Method`; docs/extend/compressor.md has a whole small one.
"""

from ..method import Method
from .admm import ADMM
from .correlation import FilterCorrelation
from .frequency import FrequencyPruning
from .het import Het
from .play_and_prune import PlayAndPrune
from .self_grouping_network import SelfGrouping
from .stability import Stability
from .wsp import WeakSubnetwork

__all__ = [
    "ADMM",
    "FilterCorrelation",
    "FrequencyPruning",
    "Het",
    "Method",
    "PlayAndPrune",
    "SelfGrouping",
    "Stability",
    "WeakSubnetwork",
]
