# SPDX-License-Identifier: Apache-2.0
"""Results of a program that lie in planes: which ones, and that no number changes by it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from planning import engine, needs_engine, poisoned, unplanned  # noqa: F401
from programs import assert_equal_calls
from torch import Tensor, nn

import hetconv_kernels as hk
from hetconv_kernels.graph import program_builder

pytestmark = [needs_engine, pytest.mark.usefixtures("poisoned")]
LAST = torch.channels_last


def _wide() -> bool:
    """Tells whether costs are those of AVX-512, by which these layers compute from planes."""
    from hetconv_kernels import _cpu

    return str(_cpu.isas()[0]).startswith("avx512")


def grouped(channels: int, filters: int, stride: int = 1) -> nn.Module:
    """A 1×1 layer of few filters a group, which is computed with pixels in vectors."""
    generator = np.random.default_rng(channels + filters)
    groups = generator.integers(0, 20, filters)
    support = hk.Support.self_grouped(groups, generator.random((20, channels)) < 0.4, 1)
    conv = nn.Conv2d(channels, filters, 1, stride=stride)
    return hk.nn.SupportConv2d.from_conv2d(conv, support)


class Bottleneck(nn.Module):
    """As in a ResNet: few channels between two layers of many."""

    def __init__(self, channels: int, width: int, filters: int, stride: int = 1) -> None:
        super().__init__()
        self.reduce, self.expand = grouped(channels, width), grouped(width, filters)
        self.middle = nn.Conv2d(width, width, 3, padding=1, stride=stride)
        same = channels == filters and stride == 1
        self.shortcut = nn.Identity() if same else grouped(channels, filters, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.middle(torch.relu(self.reduce(x))))
        return torch.relu(self.expand(y) + self.shortcut(x))


def chain(*more: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    stem = nn.Conv2d(3, 64, 3, padding=1)
    return nn.Sequential(stem, Bottleneck(64, 64, 256), Bottleneck(256, 64, 256), *more)


class Both(nn.Module):
    """Returns what lies between two layers, too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = grouped(64, 256), grouped(256, 64)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.first(x)
        return y, self.second(y)


class Called(Both):
    """Calls torch between two layers; what comes of it depends on the image."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.first(x)
        found = torch.nonzero(x[:, 0, 0, 0] > 0)
        return self.second(y), found + 1


class Viewed(Both):
    """Reads a part of what lies between two layers."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.first(x)
        return self.second(y), y[:, :1].mean()


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Lists the steps of each recorded network whose results lie in planes."""
    found: list[list[str]] = []
    choose = program_builder.in_planes

    def noted(record: Sequence[Any], steps: Sequence[Any], inner: Any) -> Any:
        relaid, storages = choose(record, steps, inner)
        written = [record[n].node.name[:-2] for n, _, o in steps if o[-1].spec.storage in storages]
        found.append(written)
        return relaid, storages

    monkeypatch.setattr(program_builder, "in_planes", noted)
    return found


def optimized(model: nn.Module, x: Tensor) -> Any:
    return hk.optimize(model.eval(), x, leave_plain=False).model


def image(n: int, channels: int, size: int) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(n, channels, size, size).contiguous(memory_format=LAST)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("n", "size"), [(1, 14), (1, 7), (2, 12), (3, 16)])
def test_what_layers_of_planes_exchange_lies_in_planes(
    n: int, size: int, threads: int, chosen: list[list[str]]
) -> None:
    x, before = image(n, 3, size), torch.get_num_threads()
    fast = optimized(chain(Bottleneck(256, 64, 256, stride=2), nn.Conv2d(256, 8, 3)), x)
    torch.set_num_threads(threads)
    try:
        assert_equal_calls(fast, unplanned(fast), x)
    finally:
        torch.set_num_threads(before)
    (found,) = chosen
    if _wide():
        assert {"_1_expand", "_1_shortcut", "_2_expand"} <= set(found)
    assert not {"_0", "_1_reduce", "_1_middle", "_4"} & set(found)


@pytest.mark.parametrize("act", [nn.ReLU6, nn.SiLU, nn.Identity])
def test_every_activation_is_that_of_the_layers(
    act: Callable[[], nn.Module], chosen: list[list[str]]
) -> None:
    x = image(1, 64, 13)
    fast = optimized(nn.Sequential(grouped(64, 256), act(), grouped(256, 64), act()), x)
    assert_equal_calls(fast, unplanned(fast), x)
    assert len(chosen[0]) == 1 or not _wide()


@pytest.mark.parametrize("model", [Both, Called, Viewed])
def test_what_others_look_at_does_not(model: type[nn.Module], chosen: list[list[str]]) -> None:
    x = image(1, 64, 14)
    fast = optimized(model(), x)
    assert_equal_calls(fast, unplanned(fast), x)  # of both signs
    assert not any(chosen)


@pytest.mark.parametrize(
    ("n", "size", "dtype"), [(1, 3, None), (2, 9, None), (1, 14, torch.bfloat16)]
)
def test_small_planes_and_bfloat16_do_not(
    n: int, size: int, dtype: torch.dtype | None, chosen: list[list[str]]
) -> None:
    x = image(n, 64, size)
    model = nn.Sequential(grouped(64, 256), grouped(256, 64)).eval()
    fast = hk.optimize(model, x, dtype=dtype, leave_plain=False).model
    with torch.no_grad():
        torch.testing.assert_close(fast(x), fast(x), rtol=0, atol=0)
    assert all(not found for found in chosen)


def test_a_saved_program_has_planes_too(tmp_path: Path) -> None:
    from hetconv_kernels import _cpu

    x = image(1, 3, 14)
    saved = hk.export.program(chain(nn.Conv2d(256, 8, 3)).eval(), x, tmp_path / "network.hc")
    program = _cpu.SavedProgram(saved.path.read_bytes())
    with torch.no_grad():
        want = saved.network(x)
    y = torch.full_like(want, float("nan"))
    program.run([x.data_ptr()], [y.data_ptr()])
    assert torch.equal(y, want)


def test_only_layers_that_may_be_given_planes_are() -> None:
    from hetconv_kernels import _cpu

    step = _cpu.each_step("relu", "float32", 8)
    assert step.lying == "fixed"
    with pytest.raises(ValueError, match="lie as they were recorded"):
        step.in_planes((True, False, True), (1, 2, 2))
