# SPDX-License-Identifier: Apache-2.0
"""Shapes in docstrings, ``# [N, C, H, W]``, as code: to Markdown they would be titles."""

from __future__ import annotations

import re
from typing import Any

import griffe

SHAPE = re.compile(r"(?:(?<=\s)|^)# ?((?:\[|\w+ \[|bool|int)[^\n]*)$", re.M)


class Shapes(griffe.Extension):
    """Rewrites every docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Is called by griffe for each object that it has collected."""
        if obj.docstring is not None:
            obj.docstring.value = SHAPE.sub(r"`\1`", obj.docstring.value)
