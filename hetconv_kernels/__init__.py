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

from . import errors, functional, nn
from ._version import __version__ as __version__
from .accuracy import strict_accuracy
from .backends import available_backends, use_backend
from .info import info
from .measure.explain import explain, warmup
from .openmp import share_openmp as _share_openmp
from .support import Support

if TYPE_CHECKING:
    from . import datasets, export, models, quantization
    from .compression import compress, methods
    from .graph import rules
    from .graph.compact import compact
    from .graph.convert import convert
    from .graph.optimize import optimize
    from .graph.planned import plan_memory, release_memory
    from .io import load, save
    from .measure import stats, tuning
    from .measure.profiling import profile
    from .quantization.quantize import quantize

__all__ = [
    "Support",
    "available_backends",
    "compact",
    "compress",
    "convert",
    "datasets",
    "errors",
    "explain",
    "export",
    "functional",
    "info",
    "load",
    "methods",
    "models",
    "nn",
    "optimize",
    "plan_memory",
    "profile",
    "quantization",
    "quantize",
    "release_memory",
    "rules",
    "save",
    "stats",
    "strict_accuracy",
    "tuning",
    "use_backend",
    "warmup",
]

# Loaded when first asked for, so that importing stays cheap: a module, or the module of a name.
_LAZY_MODULES = {
    "datasets": ".datasets",
    "export": ".export",
    "methods": ".compression.methods",
    "models": ".models",
    "quantization": ".quantization",
    "rules": ".graph.rules",
    "stats": ".measure.stats",
    "tuning": ".measure.tuning",
}
_LAZY_NAMES = {
    "compact": ".graph.compact",
    "compress": ".compression",
    "convert": ".graph.convert",
    "load": ".io",
    "optimize": ".graph.optimize",
    "plan_memory": ".graph.planned",
    "profile": ".measure.profiling",
    "quantize": ".quantization.quantize",
    "release_memory": ".graph.planned",
    "save": ".io",
}


_share_openmp()  # before the compiled part is imported


def __getattr__(name: str) -> Any:
    if name in _LAZY_MODULES:
        value = importlib.import_module(_LAZY_MODULES[name], __name__)
    elif name in _LAZY_NAMES:
        value = getattr(importlib.import_module(_LAZY_NAMES[name], __name__), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
