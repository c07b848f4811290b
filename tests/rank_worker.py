# SPDX-License-Identifier: Apache-2.0
"""What one of two ranks does in test_ranks: it compresses, trains sharded, or dies."""

from __future__ import annotations

import copy
import datetime
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import torch.distributed as dist
import torch.nn.functional as F
from compressing import batches, tiny
from torch import Tensor, nn

import hetconv_kernels as hk
from hetconv_kernels.compression.run import Run
from hetconv_kernels.compression.sharded import gathered, is_sharded
from hetconv_kernels.errors import HetconvError

if dist.is_available() and dist.is_gloo_available():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

METHOD = hk.methods.PlayAndPrune(
    tolerance=0.02, prune_epochs=1, recover_epochs=1, epochs=1, rounds=2, threshold=0.3,
    fraction=0.3,
)  # fmt: skip


def main(folder: str, rank: int, what: str, die_at: int) -> None:
    """Runs as one rank; writes its result as JSON, and what it says on the standard error.

    Args:
        folder: where both ranks meet and write.
        rank: 0 or 1.
        what: ``"measure"`` does everything, ``"died"`` only compresses.
        die_at: the save at which rank 1 dies; 0 is never.
    """
    said = Path(folder) / f"{what}-{die_at}-{rank}"
    os.dup2(os.open(said.with_suffix(".err"), os.O_WRONLY | os.O_CREAT), sys.stderr.fileno())
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet-{what}-{die_at}", rank=rank, world_size=2,
        timeout=datetime.timedelta(minutes=10),
    )  # fmt: skip
    _die(rank, die_at)
    options = _options(rank)
    model = tiny(seed=rank)  # rank 0's weights are everybody's
    report = hk.compress(
        model, METHOD, measure=what == "measure", measure_seconds=0.05,
        state=f"{folder}/{what}.pt", **options,
    )  # fmt: skip
    state = report.model.state_dict()
    found: dict[str, Any] = {
        "supports": {
            n: m.support.digest for n, m in report.model.named_modules() if hasattr(m, "support")
        },
        "weights": {
            k: v.double().sum().item().hex() for k, v in state.items() if isinstance(v, Tensor)
        },
        "history": report.history,
        "accuracy": report.accuracy,
        "seconds": report.seconds,
    }
    if what == "measure":
        found |= _others(rank, model, options)
        found |= _sharded(rank, report.model, options)
    said.with_suffix(".json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def _options(rank: int) -> dict[str, Any]:
    def evaluate(model: nn.Module) -> float:
        # On its own rank 1 would take the first round back, and rank 0 go on with full pressure.
        gone = bool((model[0].weight.flatten(1).abs().sum(1) == 0).any())
        return 0.9 - 0.03 * rank * gone

    def train_step(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    generator = torch.Generator().manual_seed(rank)
    return {
        "evaluate": evaluate,
        "train_step": train_step,
        "example": torch.randn(4, 5, 6, 6, generator=generator),
        "data": lambda epoch: batches()[rank::2],
        "progress": False,
        "compact": False,
    }


def _die(rank: int, die_at: int) -> None:
    count, real = 0, Run._save

    def saving(self: Run) -> None:
        nonlocal count
        count += 1
        if rank == 1 and count == die_at:
            os._exit(9)
        real(self)

    Run._save = saving  # type: ignore[method-assign]


def _others(rank: int, model: nn.Module, options: dict[str, Any]) -> dict[str, Any]:
    """A rank whose choice is not the others', and a search with draws of its own."""
    found: dict[str, Any] = {}
    other = hk.methods.WeakSubnetwork(0.6 if rank else 0.2, epochs=0)
    try:
        hk.compress(model, other, measure=False, **options)
    except HetconvError as error:
        found["differ"] = str(error)
    pruning = hk.methods.FrequencyPruning(search_epochs=2, epochs=0, decay=1.0)
    layer = hk.compress(model, pruning, measure=False, **options).model[3]
    found["frequency"] = layer.mix.support.digest, layer.mix.weight.sum().item()
    return found


def _sharded(rank: int, model: nn.Module, options: dict[str, Any]) -> dict[str, Any]:
    """Trains under FSDP2 as it does alone, then compresses the sharded network."""
    model.eval()  # BatchNorm by running statistics: each rank sees only its part
    alone = copy.deepcopy(model)
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(model[3], mesh=mesh)
    fully_shard(model, mesh=mesh)
    torch.manual_seed(0)
    x, label = torch.randn(8, 5, 6, 6), torch.randint(0, 3, (8,))
    for network, part in ((model, slice(4 * rank, 4 * rank + 4)), (alone, slice(None))):
        optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(network(x[part]), label[part]).backward()
            optimizer.step()
    pairs = zip(model.parameters(), alone.parameters(), strict=True)
    found = {"worst": max((p.full_tensor() - q).abs().max().item() for p, q in pairs)}
    return found | _compressed(model, x, options)


def _compressed(model: nn.Module, x: Tensor, options: dict[str, Any]) -> dict[str, Any]:
    """Compresses a sharded network like the plain one; it stays sharded."""
    with torch.no_grad():
        before = model(x)  # leaves the root unsharded
    plain = gathered(model)
    tables = ("_forward_hooks", "_forward_pre_hooks", "_state_dict_pre_hooks",
              "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")  # fmt: skip
    found: dict[str, Any] = {
        "sharded": [is_sharded(net) for net in (model, plain)],
        "types": [type(m).__name__ for m in plain.modules()],
        "hooks": sum(len(vars(m)[table]) for m in plain.modules() for table in tables),
        "same output": torch.equal(plain(x), before),
    }
    for method in (
        hk.methods.SelfGrouping(target=0.5, step=0.25, clusters=3, epochs=1),
        hk.methods.WeakSubnetwork(0.6, epochs=1),
    ):
        one, two = (
            hk.compress(net, method, measure=False, **options)
            for net in (model, copy.deepcopy(plain))
        )
        first, second = one.model.state_dict(), two.model.state_dict()
        found[method.title] = first.keys() == second.keys() and all(
            torch.equal(v, second[k]) if isinstance(v, Tensor) else v == second[k]
            for k, v in first.items()
        )
        found[f"{method.title} MACs"] = one.macs
    with torch.no_grad():
        found["untouched"] = isinstance(model, FSDPModule) and torch.equal(model(x), before)
    again = fully_shard(one.model, mesh=init_device_mesh("cpu", (2,)))
    F.cross_entropy(again(x), torch.zeros(len(x), dtype=torch.long)).backward()
    found["trains"] = all(p.grad is not None for p in again.parameters())
    spread = parallelize_module(tiny(), init_device_mesh("cpu", (2,)), {"8": ColwiseParallel()})
    try:
        hk.compress(spread, hk.methods.Het(p=2, epochs=0), measure=False, **options)
    except HetconvError as error:
        found["refused"] = str(error)
    return found
