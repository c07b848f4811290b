# SPDX-License-Identifier: Apache-2.0
"""Extra state as a tensor: what a layer saves beside its weights, for those who walk tensors.

A ``state_dict`` that holds anything but tensors breaks averaging loops, casts, safetensors and the
JIT tracer. The extra state is JSON, whose characters are below 128; each is kept as the odd number
2·c + 1, so that it is read back through a cast to a 16-bit float (exact up to 256) and through an
average of equal values that rounds, or truncates, to one less. Example: "{" is 123, kept as 247.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from ..errors import SupportError, mismatch


def extra_state(described: dict[str, Any]) -> Tensor:
    """Writes plain data as a tensor.  # uint8 [characters]"""
    text = bytearray(json.dumps(described).encode("ascii"))
    # An ordinary tensor, whatever the mode that the state is asked for in.
    with torch.inference_mode(False):
        return torch.frombuffer(text, dtype=torch.uint8) * 2 + 1


def described_by(state: Any, key: str) -> Any:
    """Reads an extra state back, as a tensor or, of older checkpoints, a dictionary.

    Args:
        state: what a checkpoint holds.
        key: of the entry that is wanted.

    Raises:
        SupportError: it is no extra state of this package.
    """
    found = state
    if isinstance(state, Tensor):
        try:
            codes = state.detach().cpu().flatten().float().div(2).floor()
            found = json.loads(bytes(codes.to(torch.uint8).tolist()).decode("ascii"))
        except (ValueError, RuntimeError, RecursionError) as error:
            raise SupportError(
                mismatch("extra state", f"{error!r:.80}", "what get_extra_state saved")
            ) from error
    if not isinstance(found, dict) or key not in found:
        raise SupportError(
            mismatch("extra state", type(found).__name__, "what get_extra_state saved")
        )
    return found[key]
