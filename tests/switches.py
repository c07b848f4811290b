# SPDX-License-Identifier: Apache-2.0
"""PyTorch's switch of TF32 in convolutions, for the time of a test."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def convolutions_in(precision: str) -> Iterator[None]:
    """Sets ``torch.backends.cudnn.conv.fp32_precision``, and puts it back."""
    convolutions: Any = torch.backends.cudnn.conv
    before = convolutions.fp32_precision
    convolutions.fp32_precision = precision
    try:
        yield
    finally:
        convolutions.fp32_precision = before
