# SPDX-License-Identifier: Apache-2.0
"""Tables on a GPU, and CUDA-graph captures: what the engines for GPUs share."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor

from ...errors import BackendError

# Whole-tensor copies that calls had to make, by reason: a test or a user may look.
CONVERSIONS: Counter[str] = Counter()
# What launches under a capture used: the captured graph goes on reading it.
_pinned: list[Any] = []


def capturing(device: torch.device) -> bool:
    """Tells whether a CUDA graph is being captured on the current stream."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


# What PyTorch's own wrapper asks, without the object that it makes at each call.
_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def current_stream(device: torch.device) -> int:
    """Returns the current CUDA stream of a device, as an integer."""
    if _raw_stream is None:
        return int(torch.cuda.current_stream(device).cuda_stream)
    return int(_raw_stream(device.index))


def refuse_capture(device: torch.device, what: str) -> None:
    """Refuses to build something while a CUDA graph is being captured.

    Raises:
        BackendError: a capture is running.
    """
    if capturing(device):
        raise BackendError(
            f"{what} is met for the first time while a CUDA graph is captured; expected it to be "
            "ready. Run hetconv_kernels.warmup(model, example) before the capture."
        )


def upload(array: Any, device: torch.device) -> Tensor:
    """Puts a numpy table on a device, outside inference mode and outside any capture."""
    refuse_capture(device, "A Plan's table")
    with torch.inference_mode(False):
        return torch.as_tensor(array, device=device)


def pin(device: torch.device, *used: Any) -> None:
    """Keeps what a launch under capture used for as long as the process lives."""
    if capturing(device):
        _pinned.extend(used)


class DeviceTables:
    """Tensors on a device that outlive a call, and the streams that use them.

    Freed memory is handed out again on the stream that it was allocated on, as soon as it is free:
    the allocator has to know of other streams whose kernels may still be reading it.

    Args:
        tensors: what is kept.
    """

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors = tensors
        self._streams: set[int] = set()

    def lend(self, device: torch.device) -> None:
        """Has the current stream of the device use them; said to the allocator once a stream."""
        place = _lent_to(device)
        if place is None or place in self._streams:
            return
        stream = torch.cuda.current_stream(device)
        for tensor in self.tensors:
            tensor.record_stream(stream)
        self._streams.add(place)


def _lent_to(device: torch.device) -> int | None:
    """Returns the current stream; None on the CPU, and under a capture, which pins what it uses."""
    if device.type != "cuda" or capturing(device):
        return None
    return current_stream(device)
