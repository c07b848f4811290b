# SPDX-License-Identifier: Apache-2.0
"""The loop that docs/ecosystem.md prints for accelerate runs as printed, with the plain result."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressing import assert_same_network, quietly, tiny
from pages import DOCS, blocks
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hetconv_kernels.compression import Method, Rounds, SelfGrouping
from hetconv_kernels.compression.methods.wsp import WeakSubnetwork

accelerate = pytest.importorskip("accelerate", reason="accelerate, of the dev extra, is missing")

METHODS: dict[str, Method] = {
    "self-grouping": SelfGrouping(
        target=0.4, step=0.2, clusters=2, schedule="LG", local_epochs=1, epochs=2
    ),
    "wsp": WeakSubnetwork(0.5, epochs=3),  # with a penalty on the gradients
}
pytestmark = pytest.mark.one_thread


def given(method: Method) -> dict[str, Any]:
    """Makes what the page's block has from those before it."""
    x = torch.randn(32, 5, 6, 6, generator=torch.Generator().manual_seed(1))
    label = x[:, :3].mean((2, 3)).argmax(1)
    rounds = Rounds(tiny(), method, **quietly())
    optimizer = torch.optim.SGD(rounds.network.parameters(), lr=0.01, momentum=0.9)
    loader = DataLoader(TensorDataset(x, label), batch_size=8)
    return {"rounds": rounds, "optimizer": optimizer, "loader": loader}


def printed() -> str:
    """Finds the page's block."""
    (block,) = (b for b in blocks(DOCS / "ecosystem.md") if "accelerate.Accelerator" in b.text)
    return block.text


@pytest.mark.parametrize("name", METHODS)
def test_the_printed_loop_gives_what_a_plain_loop_gives_bit_by_bit(name: str) -> None:
    under = given(METHODS[name]) | {"torch": torch}
    exec(compile(printed(), "docs/ecosystem.md", "exec"), under)
    assert isinstance(under["optimizer"], accelerate.optimizer.AcceleratedOptimizer)
    plain = given(METHODS[name])
    rounds, optimizer = plain["rounds"], plain["optimizer"]
    for epoch in rounds.epochs(optimizer):
        for images, labels in plain["loader"]:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(rounds.network(images), labels)
            loss.backward()
            epoch.before_step()
            optimizer.step()
            epoch.after_step(loss)
    assert under["rounds"].finished
    assert under["rounds"].report.history == rounds.report.history
    assert len(rounds.report.history) > 1
    assert_same_network(under["rounds"].report.model, rounds.report.model)
