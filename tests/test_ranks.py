# SPDX-License-Identifier: Apache-2.0
"""Two processes: every rank chooses the same Supports, and a rank that dies loses one round."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hetconv_kernels.compress import ranks

# Runs as one of two ranks; prints one line of JSON. Arguments: the folder of the tests, a folder,
# the rank, what to do, and the round at which rank 1 dies.
_SCRIPT = """
import datetime, json, os, sys
here, folder, rank, what, die_at = sys.argv[1], sys.argv[2], int(sys.argv[3]), *sys.argv[4:]
sys.path.insert(0, here)
import torch, torch.distributed as dist
from compressing import batches, tiny
import hetconv_kernels as hk
from hetconv_kernels.compress.state import StateFile
from hetconv_kernels.errors import HetconvError
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/meet-{what}-{die_at}", rank=rank,
                        world_size=2, timeout=datetime.timedelta(minutes=10))
from hetconv_kernels.compress import ranks
from hetconv_kernels.compress.run import Run

def train_step(model, batch):
    return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])

def evaluate(model):
    # On its own rank 1 would take the first round back, and rank 0 go on with full pressure.
    gone = bool((model[0].weight.flatten(1).abs().sum(1) == 0).any())
    return 0.9 - 0.03 * rank * gone

method = hk.compress.PlayAndPrune(tolerance=0.02, prune_epochs=1, recover_epochs=1, epochs=1,
                                  rounds=2, threshold=0.3, fraction=0.3)
def sharded(model):
    # Trains under FSDP2 as it does alone.
    import copy
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    model.eval()  # BatchNorm by running statistics: each rank sees only its part
    alone = copy.deepcopy(model)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    torch.manual_seed(0)
    x, label = torch.randn(8, 5, 6, 6), torch.randint(0, 3, (8,))
    for network, part in ((model, slice(4 * rank, 4 * rank + 4)), (alone, slice(None))):
        optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(network(x[part]), label[part]).backward()
            optimizer.step()
    pairs = zip(model.parameters(), alone.parameters(), strict=True)
    worst = max((p.full_tensor() - q).abs().max().item() for p, q in pairs)
    try:
        hk.compress(model, hk.Het(p=2, epochs=0), measure=False, **options)
    except HetconvError as error:
        return {"worst": worst, "refused": str(error)}

count = 0
real = Run._save
def saving(self):
    global count
    count += 1
    if rank == 1 and count == int(die_at):
        os._exit(9)
    real(self)
Run._save = saving
model = tiny(seed=rank)              # rank 0's weights are everybody's
options = {"evaluate": evaluate, "train_step": train_step, "example": torch.randn(4, 5, 6, 6),
           "data": lambda epoch: batches()[rank::2], "progress": False, "compact": False}
report = hk.compress(model, method, measure=what == "measure", measure_seconds=0.05,
                     state=f"{folder}/{what}.pt", **options)
supports = {n: m.support.digest for n, m in report.model.named_modules() if hasattr(m, "support")}
weights = {k: v.double().sum().item().hex() for k, v in report.model.state_dict().items()
           if isinstance(v, torch.Tensor)}
found = {}
if what == "measure":
    # A rank whose choice is not the others'.
    other = hk.compress.WeakSubnetwork(0.6 if rank else 0.2, epochs=0)
    try:
        hk.compress(model, other, measure=False, **options)
    except HetconvError as error:
        found["differ"] = str(error)
    pruning = hk.compress.FrequencyPruning(search_epochs=2, epochs=0, decay=1.0)
    layer = hk.compress(model, pruning, measure=False, **options).model[3]
    found["frequency"] = layer.mix.support.digest, layer.mix.weight.sum().item()
    found |= sharded(report.model)
print(json.dumps(found | {"supports": supports, "weights": weights, "history": report.history,
                  "accuracy": report.accuracy, "seconds": report.seconds}))
dist.barrier()
dist.destroy_process_group()
"""

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo"
)


def start(folder: Path, what: str, die_at: int = 0) -> list[tuple[int, dict[str, Any], str]]:
    here = str(Path(__file__).resolve().parent)
    arguments = [[sys.executable, "-c", _SCRIPT, here, str(folder), str(rank), what, str(die_at)]
                 for rank in (0, 1)]  # fmt: skip
    running = [
        subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for words in arguments
    ]
    results = []
    for process in running:
        out, error = process.communicate(timeout=300)
        lines = out.strip().splitlines()
        results.append((process.returncode, json.loads(lines[-1]) if lines else {}, error))
    return results


def test_ranks_agree_and_a_dead_rank_leaves_a_resumable_state(tmp_path: Path) -> None:
    whole = start(tmp_path, "measure")
    for code, _, error in whole:
        assert code == 0, error
    first, second = whole[0][1], whole[1][1]
    assert first == second
    assert "The ranks chose different Supports for '" in first["differ"]
    assert first["worst"] < 1e-5
    assert "before sharding" in first["refused"]
    rounds = {entry["what"]: entry["result"] for entry in first["history"]}
    assert rounds["accuracy after 1"] == pytest.approx(0.885)  # the mean over the ranks
    assert "take back 1" not in rounds
    assert first["accuracy"] == pytest.approx([0.9, 0.885])
    assert min(first["seconds"]) > 0
    assert first["supports"]

    died = start(tmp_path, "died", die_at=5)
    assert died[1][0] == 9
    assert died[0][0] != 0  # the other one cannot go on alone
    assert (tmp_path / "died.pt").exists()
    resumed = start(tmp_path, "died")
    for code, _, error in resumed:
        assert code == 0, error
    for result in resumed:
        for key in ("supports", "weights", "history"):
            assert result[1][key] == first[key], key


def test_alone_everything_is_itself() -> None:
    assert ranks.world_size() == 1
    assert ranks.rank() == 0
    assert ranks.total(2.5) == 2.5
    statistic = torch.tensor([1.0, 2.0])
    assert ranks.mean(statistic).dtype == torch.float64
    assert ranks.from_first(lambda: 7) == 7
