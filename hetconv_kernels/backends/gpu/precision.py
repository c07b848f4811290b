# SPDX-License-Identifier: Apache-2.0
"""How products of float32 are made on a GPU: as PyTorch's switch for convolutions says."""

from __future__ import annotations

from typing import Any

import torch


def precision(dtype: torch.dtype) -> str:
    """Returns ``"tf32"`` where PyTorch's convolutions may take TF32, else ``"tf32x3"``.

    The latter takes each number as the sum of two TF32 ones, three products for one.
    """
    # `allow_tf32` raises once a user has set one of the newer switches, which know of the old one.
    convolutions: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    return "tf32" if dtype != torch.float32 or convolutions.fp32_precision == "tf32" else "tf32x3"
