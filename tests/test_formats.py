# SPDX-License-Identifier: Apache-2.0
"""Optimised networks compute in channels_last, whatever the memory format of their images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hetconv_kernels as hk
from hetconv_kernels.graph import formats, optimize
from hetconv_kernels.graph.planned import PlannedNetwork

ROWS, LAST = torch.contiguous_format, torch.channels_last


def layers(*others: nn.Module, channels: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    first = hk.nn.HetConv2d(channels, 16, 3, padding=1, p=min(4, channels))
    return nn.Sequential(first, nn.ReLU(), hk.nn.HetConv2d(16, 16, 3, padding=1, p=4), *others)


def image(channels: int = 4, layout: torch.memory_format = ROWS) -> Tensor:
    drawn = torch.randn(2, channels, 9, 8, generator=torch.Generator().manual_seed(1))
    return drawn.contiguous(memory_format=layout)


def optimized(model: nn.Module, x: Tensor) -> tuple[Any, tuple[str, ...]]:
    report = hk.optimize(model.eval(), x, leave_plain=False)
    (part,) = report.parts
    return report.model, part.brought


def formats_seen(network: nn.Module, x: Tensor) -> list[bool]:
    """Tells for each layer whether its input lay in channels_last, by the strides."""
    seen: list[bool] = []
    kinds = (hk.nn.FusedConv2d, hk.nn.SupportConv2d)
    handles = [
        m.register_forward_pre_hook(
            lambda m, given: seen.append(
                given[0].stride() == torch.empty_like(given[0], memory_format=LAST).stride()
            )
        )
        for m in network.modules()
        if isinstance(m, kinds)
    ]
    with torch.no_grad():
        network(x)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("layout", [ROWS, LAST])
def test_layers_compute_in_channels_last_and_outputs_are_as_before(
    layout: torch.memory_format, channels: int
) -> None:
    model, x = layers(channels=channels).eval(), image(channels, layout)
    if layout == LAST and channels == 1:  # contiguous() leaves the strides of one channel alone
        x = torch.empty_like(x, memory_format=LAST).copy_(x)
    fast, brought = optimized(model, x)
    assert brought == (("input_1",) if layout == ROWS else ())
    assert formats_seen(fast, x) == [True, True]
    with torch.no_grad():
        y, before = fast(x), model(x)
    torch.testing.assert_close(y, before, rtol=1e-5, atol=1e-5)
    assert y.stride() == before.stride()


def test_the_report_says_what_is_brought_in() -> None:
    report = hk.optimize(layers().eval(), image(), leave_plain=False)
    assert "  input_1 is brought into channels_last" in str(report).splitlines()


def test_views_after_the_layers_go_on_working() -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = layers(), nn.Linear(16 * 72, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            y = self.body(x)
            return self.head(y.view(y.size(0), -1)), {"features": y, "flat": y.view(2, 16, 72)}

    model, x = Views().eval(), image()
    fast, brought = optimized(model, x)
    assert brought == ("x",)
    with torch.no_grad():
        (y, more), (before, features) = fast(x), model(x)
    torch.testing.assert_close(y, before, rtol=1e-5, atol=1e-5)
    for name in features:
        torch.testing.assert_close(more[name], features[name], rtol=1e-5, atol=1e-5)
        assert more[name].is_contiguous()


def test_what_looks_at_strides_keeps_the_callers_format() -> None:
    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = layers()

        def forward(self, x: Tensor) -> Tensor:
            y = self.body(x)
            return torch.as_strided(y, (2, 4), (16 * 72, 1))

    model, x = Looks().eval(), image()
    fast, brought = optimized(model, x)
    assert brought == ()
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)


def test_a_network_without_layers_of_this_package_is_left_as_it_is() -> None:
    model = nn.Sequential(nn.AvgPool2d(2), nn.Sigmoid()).eval()
    fast, brought = optimized(model, image())
    assert brought == ()
    assert isinstance(fast, PlannedNetwork)
    assert not any(node.target is formats.channels_last for node in fast.graph.nodes)


def test_images_that_are_no_floats_and_other_tensors_stay() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = layers()

        def forward(self, x: Tensor, mask: Tensor, scale: Tensor) -> Tensor:
            return self.body(x) * mask * scale

    model = Two().eval()
    given = (image(), torch.ones(2, 1, 9, 8, dtype=torch.bool), torch.randn(8))
    report = optimize.optimize(model, given, leave_plain=False)
    assert report.parts[0].brought == ("x",)
    with torch.no_grad():
        torch.testing.assert_close(report.model(*given), model(*given), rtol=1e-5, atol=1e-5)


def test_bringing_in_twice_copies_once() -> None:
    traced = torch.fx.symbolic_trace(layers())
    assert formats.into_channels_last(traced, (image(),)) == ("input_1",)
    assert formats.into_channels_last(traced, (image(),)) == ("input_1",)
    assert [node.target for node in traced.graph.nodes].count(formats.channels_last) == 1


def test_maps_over_images_and_files_know_the_copy(tmp_path: Path) -> None:
    model, x = layers().eval(), image()
    fast, brought = optimized(model, x)
    assert brought == ("input_1",)
    hk.save(fast, tmp_path / "fast.safetensors")
    again = hk.load(tmp_path / "fast.safetensors")
    with torch.no_grad():
        expected = fast(x)
        torch.testing.assert_close(again(x), expected, rtol=0, atol=0)
        mapped = torch.func.vmap(fast)(torch.stack((x, 2 * x)))
        torch.testing.assert_close(mapped[0], expected, rtol=1e-5, atol=1e-5)
        compiled = torch.compile(fast, backend="eager")(x)
        torch.testing.assert_close(compiled, expected, rtol=1e-5, atol=1e-5)
