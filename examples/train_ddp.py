# SPDX-License-Identifier: Apache-2.0
"""Compresses and trains with several processes.

    torchrun --nproc-per-node 2 examples/train_ddp.py [--epochs N]

Every rank trains on its own part of the digits. Statistics that choose what is dropped are averaged
over the ranks, so that all choose the same. When a rank dies, start the command again: the state in
--folder continues from the last round.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.distributed as dist

import hetconv_kernels as hk
from hetconv_kernels.datasets import Split, digits
from hetconv_kernels.models import digits_net


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--folder", type=Path, default=Path("outputs/ddp"))
    options = parser.parse_args()

    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    if torch.cuda.is_available():
        torch.cuda.set_device(rank % torch.cuda.device_count())
        device = torch.device("cuda", torch.cuda.current_device())
    else:
        device = torch.device("cpu")

    data = digits()
    part = Split(data.train.images[rank::size], data.train.labels[rank::size])
    judged = Split(data.validation.images[rank::size], data.validation.labels[rank::size])
    torch.manual_seed(0)
    model = digits_net().to(device)

    # HetConv needs no pre-training: this trains it from scratch.
    report = hk.compress(
        model,
        hk.methods.Het(p=4, scratch=True, epochs=options.epochs),
        data=part.shuffled(64),
        eval_data=judged.batches(256),
        example=data.test.images[:64],
        optimizer=lambda parameters: torch.optim.SGD(parameters, 0.1, 0.9, weight_decay=1e-4),
        state=options.folder / "state.pt",
        measure_seconds=2.0,
    )
    if rank == 0:
        print(report)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
