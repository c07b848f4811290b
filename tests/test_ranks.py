# SPDX-License-Identifier: Apache-2.0
"""Two processes: every rank chooses the same Supports, and a rank that dies loses one round."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import rank_worker
import torch
import torch.distributed as dist

from hetconv_kernels.compression import ranks

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo"
)


@pytest.fixture(scope="module")
def servers() -> Any:
    """Starts processes that have imported everything already: torch takes seconds to import."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rank_worker"])
    return context


def start(
    servers: Any, folder: Path, what: str, die_at: int = 0
) -> list[tuple[int, dict[str, Any], str]]:
    running = [
        servers.Process(target=rank_worker.main, args=(str(folder), rank, what, die_at))
        for rank in (0, 1)
    ]
    for process in running:
        process.start()
    results = []
    for rank, process in enumerate(running):
        process.join(300)
        if process.exitcode is None:
            process.kill()
        said = folder / f"{what}-{die_at}-{rank}"
        result = said.with_suffix(".json")
        found = json.loads(result.read_text()) if result.exists() else {}
        results.append((process.exitcode, found, said.with_suffix(".err").read_text()))
    return results


def test_ranks_agree_and_a_dead_rank_leaves_a_resumable_state(servers: Any, tmp_path: Path) -> None:
    whole = start(servers, tmp_path, "measure")
    for code, _, error in whole:
        assert code == 0, error
    first, second = whole[0][1], whole[1][1]
    assert first == second
    assert "The ranks chose different Supports for '" in first["differ"]
    assert first["worst"] < 1e-5
    assert first["sharded"] == [True, False]
    assert not any("FSDP" in name for name in first["types"])
    assert first["hooks"] == 0
    for what in ("same output", "self-grouping", "WSP", "untouched", "trains"):
        assert first[what] is True, what
    for method in ("self-grouping", "WSP"):
        before, after = first[f"{method} MACs"]
        assert after < before, method
    assert "before sharding" in first["refused"]
    rounds = {entry["what"]: entry["result"] for entry in first["history"]}
    assert rounds["accuracy after 1"] == pytest.approx(0.885)  # the mean over the ranks
    assert "take back 1" not in rounds
    assert first["accuracy"] == pytest.approx([0.9, 0.885])
    assert min(first["seconds"]) > 0
    assert first["supports"]

    died = start(servers, tmp_path, "died", die_at=5)
    assert died[1][0] == 9
    assert died[0][0] != 0  # the other one cannot go on alone
    assert (tmp_path / "died.pt").exists()
    resumed = start(servers, tmp_path, "died")
    for code, _, error in resumed:
        assert code == 0, error
    for result in resumed:
        for key in ("supports", "weights", "history"):
            assert result[1][key] == first[key], key


def test_alone_everything_is_itself() -> None:
    assert ranks.world_size() == 1
    assert ranks.rank() == 0
    assert ranks.sum_over_ranks(2.5) == 2.5
    statistic = torch.tensor([1.0, 2.0])
    assert ranks.mean_over_ranks(statistic).dtype == torch.float64
    assert ranks.from_first(lambda: 7) == 7
