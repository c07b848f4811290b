# SPDX-License-Identifier: Apache-2.0
"""Problems that claim to be on a GPU, for what is decided before anything runs there."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import hetconv_kernels as hk
from hetconv_kernels import backends, ops
from hetconv_kernels.backends.gpu import devices
from hetconv_kernels.backends.triton import choice, wgrad_choice
from hetconv_kernels.problem import Problem, make_geometry

CUDA = torch.device("cuda", 0)
Pretend = Callable[..., None]


def described(verb: str = "fprop", support: hk.Support | None = None, **changes: Any) -> Problem:
    s = support or hk.Support.het(256, 256, 3, p=4)
    geometry = make_geometry(s, changes.pop("stride", 1), 1)
    last = {"memory_format": torch.channels_last}
    n = changes.pop("batch", 4)
    x = torch.empty(n, s.channels, 28, 28, dtype=torch.bfloat16, device="meta").to(**last)
    w = torch.empty(s.shape, dtype=torch.bfloat16, device="meta")
    dy = torch.empty(n, s.filters, *geometry.output_size(28, 28), device="meta").to(x.dtype)
    first = x if verb == "fprop" else dy.to(**last)
    return dataclasses.replace(ops.describe(verb, geometry, first, x, w, (28, 28)), **changes)


def build_for(monkeypatch: pytest.MonkeyPatch, architectures: str) -> None:
    """Puts a CUDA engine of some architectures in the place of what is built here, if anything."""
    backends._engines()  # looks for what is built, once
    fake = SimpleNamespace(
        architectures=lambda: architectures,
        versions=lambda: (13000, 13000),
        tma_unsupported=lambda: "",
    )
    monkeypatch.setitem(sys.modules, "hetconv_kernels._cuda", fake)
    monkeypatch.setattr(hk, "_cuda", fake, raising=False)


def pretended(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pretend]:
    """Gives a call that lets problems claim to be on a GPU of some capability."""

    def pretend(capability: tuple[int, int] = (9, 0)) -> None:
        devices.gpu_reasons.cache_clear()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        for module in (choice, wgrad_choice):
            monkeypatch.setattr(module, "spec_of", lambda *_: devices.GPU_SPECS[9, 0])
        build_for(monkeypatch, "80")
        # What a user has tuned on this machine is no part of the tests.
        monkeypatch.setattr("hetconv_kernels.measure.tuning.pick", lambda *_: None)

    yield pretend
    devices.gpu_reasons.cache_clear()
