# SPDX-License-Identifier: Apache-2.0
"""Networks that torch.fx cannot trace, saved with an example as torch.export's graph."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from networks import Forks, equal
from torch import nn

import hetconv_kernels as hk
from hetconv_kernels.errors import ArgumentError, FileError, TraceError

pytest.importorskip("safetensors", reason="safetensors is not installed")


class Sizes(nn.Module):
    """Its code branches on a size, which torch.export follows and torch.fx does not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv(x[..., :4] if x.shape[3] > 4 else x))


def test_with_an_example_the_graph_of_torch_export_is_saved(tmp_path: Path) -> None:
    model, x = Sizes().eval(), torch.rand(2, 3, 4, 6)
    hk.save(model, tmp_path / "class")
    with pytest.raises(FileError, match=r"example=\.\.\.\) an input"):
        hk.load(tmp_path / "class")
    hk.save(model, tmp_path / "graph", example=x)
    equal(hk.load(tmp_path / "graph"), model, x)
    assert not hk.load(tmp_path / "graph").training
    # What torch.fx traces keeps its class.
    hk.save(model.conv, tmp_path / "conv", example=x)
    equal(hk.load(tmp_path / "conv", into=nn.Conv2d(3, 4, 1)), model.conv, x)


def test_an_example_is_of_no_use_to_what_cannot_be_traced(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="Forks cannot be traced"):
        hk.save(Forks().eval(), tmp_path / "net", example=torch.rand(1, 3, 2, 2))
    with pytest.raises(ArgumentError, match="training mode"):
        hk.save(Sizes().train(), tmp_path / "net", example=torch.rand(1, 3, 2, 2))
    assert not (tmp_path / "net").exists()
