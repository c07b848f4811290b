# SPDX-License-Identifier: Apache-2.0
"""The profile: per layer time, share, per cent of the ceiling, bytes, backend and why.

``hk.profile(model, example)`` or ``hetconv profile``; timelines for other tools beside it.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from .measure import profile
from .record import LayerProfile, Profile
from .timeline import ncu_commands, write_proton, write_trace

__all__ = [
    "LayerProfile",
    "Profile",
    "ncu_commands",
    "profile",
    "write_proton",
    "write_trace",
]


class _CallablePackage(ModuleType):
    """A package that can be called as its main function."""

    def __call__(self, *args: Any, **kwargs: Any) -> Profile:
        """Profiles a network, see `profile`."""
        return profile(*args, **kwargs)


sys.modules[__name__].__class__ = _CallablePackage
