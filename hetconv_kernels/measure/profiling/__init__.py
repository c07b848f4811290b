# SPDX-License-Identifier: Apache-2.0
"""The profile: per layer time, share, per cent of the ceiling, bytes, backend and why.

``hk.profile(model, example)`` or ``hetconv profile``; timelines for other tools beside it.
"""

from __future__ import annotations

from .flame import write_timeline
from .measure import profile
from .record import LayerProfile, Profile
from .timeline import ncu_commands, write_proton, write_trace

__all__ = [
    "LayerProfile",
    "Profile",
    "ncu_commands",
    "profile",
    "write_proton",
    "write_timeline",
    "write_trace",
]
