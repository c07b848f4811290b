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
from .accuracy import strict_accuracy
from .backends import available_backends, use_backend
from .explain import explain, warmup
from .info import info
from .openmp import share as _share_openmp
from .support import Support

if TYPE_CHECKING:
    from . import (
        compression,
        export,
        io,
        models,
        profiling,
        pruning,
        quantization,
        stats,
        testing,
        timing,
        tuning,
    )
    from .compression import (
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
    from .graph.planned import plan_memory, release_memory
    from .profiling import profile
    from .quantization.quantize import quantize

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
    "compression",
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
    "plan_memory",
    "profile",
    "profiling",
    "pruning",
    "quantization",
    "quantize",
    "ranges",
    "release_memory",
    "rules",
    "stats",
    "strict_accuracy",
    "testing",
    "timing",
    "tuning",
    "use_backend",
    "warmup",
]

# Loaded when first asked for, so that importing stays cheap: name -> (module, attribute).
_LAZY = {
    "ADMM": (".compression", "ADMM"),
    "FilterCorrelation": (".compression", "FilterCorrelation"),
    "FrequencyPruning": (".compression", "FrequencyPruning"),
    "Het": (".compression", "Het"),
    "PlayAndPrune": (".compression", "PlayAndPrune"),
    "SelfGrouping": (".compression", "SelfGrouping"),
    "Stability": (".compression", "Stability"),
    "WeakSubnetwork": (".compression", "WeakSubnetwork"),
    "compact": (".graph.compact", "compact"),
    "compress": (".compression", "compress"),
    "compression": (".compression", None),
    "convert": (".graph.convert", "convert"),
    "export": (".export", None),
    "io": (".io", None),
    "models": (".models", None),
    "optimize": (".graph.optimize", "optimize"),
    "profile": (".profiling", "profile"),
    "profiling": (".profiling", None),
    "plan_memory": (".graph.planned", "plan_memory"),
    "release_memory": (".graph.planned", "release_memory"),
    "quantization": (".quantization", None),
    "quantize": (".quantization.quantize", "quantize"),
    "pruning": (".pruning", None),
    "rules": (".graph.rules", None),
    "stats": (".stats", None),
    "testing": (".testing", None),
    "timing": (".timing", None),
    "tuning": (".tuning", None),
}


_share_openmp()  # before the compiled part is imported


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
