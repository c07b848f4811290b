# SPDX-License-Identifier: Apache-2.0
"""Ranks: what the processes of a distributed training have to agree on.

With one process everything here does nothing. All ranks hold the same weights (DDP), but what they
*measure*, such as the accuracy on their part of the data, differs; a Support chosen from that
would differ too, and the next gradient would be summed over different networks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import HetconvError
from ..support import Support

T = TypeVar("T")


def rank() -> int:
    """Returns the number of this process, 0 without torch.distributed."""
    return dist.get_rank() if _on() else 0


def world_size() -> int:
    """Returns how many processes train together."""
    return dist.get_world_size() if _on() else 1


def barrier() -> None:
    """Waits for all ranks."""
    if world_size() > 1:
        dist.barrier()


def mean_over_ranks(statistic: Tensor) -> Tensor:
    """Averages a statistic over the ranks, in float64; every rank gets the same bits."""
    result = statistic.detach().double()
    if world_size() > 1:
        result = result.clone().contiguous()
        dist.all_reduce(result)
        result /= world_size()
    return result


def sum_over_ranks(value: float) -> float:
    """Sums a number over the ranks."""
    if world_size() == 1:
        return value
    return (
        float(mean_over_ranks(torch.tensor([value], dtype=torch.float64, device=_device()))[0])
        * world_size()
    )


def from_first(make: Callable[[], T]) -> T:
    """Makes something on rank 0 alone, such as a measurement, and gives it to all ranks."""
    if world_size() == 1:
        return make()
    found: list[Any] = [make() if rank() == 0 else None]
    dist.broadcast_object_list(found, 0, device=_device())
    result: T = found[0]
    return result


@torch.no_grad()
def same_buffers(model: nn.Module) -> None:
    """Gives all ranks the running statistics of rank 0, as DDP does before a forward."""
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


@torch.no_grad()
def same_weights(model: nn.Module) -> None:
    """Gives all ranks the parameters and buffers of rank 0, as DDP does when it wraps."""
    if world_size() > 1:
        for parameter in model.parameters():
            dist.broadcast(parameter, 0)
        same_buffers(model)


def check_same_supports(chosen: dict[str, Support]) -> None:
    """Makes sure that all ranks chose the same Supports.

    Raises:
        HetconvError: they did not.
    """
    if world_size() == 1:
        return
    names = sorted(chosen)
    digests = torch.tensor([chosen[name].digest for name in names] or [0], device=_device())
    low, high = digests.clone(), digests.clone()
    dist.all_reduce(low, dist.ReduceOp.MIN)
    dist.all_reduce(high, dist.ReduceOp.MAX)
    different = [n for n, a, b in zip(names, low.tolist(), high.tolist(), strict=False) if a != b]
    if different:
        raise HetconvError(
            f"The ranks chose different Supports for {', '.join(map(repr, different[:3]))}: their "
            "weights differ, or the machines compute differently. Start all ranks with the same "
            "weights and seed; the state file, if one was named, continues from the last round."
        )


def _on() -> bool:
    return dist.is_available() and dist.is_initialized()


def _device() -> torch.device:
    nccl = _on() and dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
