# SPDX-License-Identifier: Apache-2.0
"""Structured-sparse convolutions that are really faster.

One idea: HetConv, self-grouping, grouped, depthwise, pruned and dense convolutions differ only in
which weights exist. A `Support` says which; every backend runs any Support.

    import hetconv_kernels as hk

    layer = hk.nn.HetConv2d(64, 128, 3, stride=2, padding=1, p=4)
    print(hk.explain(layer, torch.randn(8, 64, 56, 56)))
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import errors, functional, nn, ranges
from ._version import __version__
from .backends import available_backends, use_backend
from .explain import explain, warmup
from .info import info
from .support import Support

if TYPE_CHECKING:
    from . import export, io, models, profile, pruning, stats, testing, timing, tuning
    from .compress import (
        ADMM,
        FilterCorrelation,
        FrequencyPruning,
        Het,
        PlayAndPrune,
        SelfGrouping,
        Stability,
        WeakSubnetwork,
        compress,
    )
    from .graph import rules
    from .graph.compact import compact
    from .graph.convert import convert
    from .graph.optimize import optimize

__all__ = [
    "ADMM",
    "FilterCorrelation",
    "FrequencyPruning",
    "Het",
    "PlayAndPrune",
    "SelfGrouping",
    "Stability",
    "Support",
    "WeakSubnetwork",
    "__version__",
    "available_backends",
    "compact",
    "compress",
    "convert",
    "errors",
    "explain",
    "export",
    "functional",
    "info",
    "io",
    "models",
    "nn",
    "optimize",
    "profile",
    "pruning",
    "ranges",
    "rules",
    "stats",
    "testing",
    "timing",
    "tuning",
    "use_backend",
    "warmup",
]

# Loaded when first asked for, so that importing stays cheap: name -> (module, attribute).
_LAZY = {
    "ADMM": (".compress", "ADMM"),
    "FilterCorrelation": (".compress", "FilterCorrelation"),
    "FrequencyPruning": (".compress", "FrequencyPruning"),
    "Het": (".compress", "Het"),
    "PlayAndPrune": (".compress", "PlayAndPrune"),
    "SelfGrouping": (".compress", "SelfGrouping"),
    "Stability": (".compress", "Stability"),
    "WeakSubnetwork": (".compress", "WeakSubnetwork"),
    "compact": (".graph.compact", "compact"),
    "compress": (".compress", None),
    "convert": (".graph.convert", "convert"),
    "export": (".export", None),
    "io": (".io", None),
    "models": (".models", None),
    "optimize": (".graph.optimize", "optimize"),
    "profile": (".profile", None),
    "pruning": (".pruning", None),
    "rules": (".graph.rules", None),
    "stats": (".stats", None),
    "testing": (".testing", None),
    "timing": (".timing", None),
    "tuning": (".tuning", None),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module_name, attribute = _LAZY[name]
    module = importlib.import_module(module_name, __name__)
    value = module if attribute is None else getattr(module, attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
