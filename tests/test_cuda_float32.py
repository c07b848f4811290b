# SPDX-License-Identifier: Apache-2.0
"""float32 in the CUDA engine's calls, with the kernels on the CPU; `test_cuda_host` has those."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import cuda_host
import pretending
import pytest
import torch
from cuda_host import operands, run
from switches import convolutions_in

import hetconv_kernels as hk
from hetconv_kernels import backends, ops
from hetconv_kernels.backends import cuda as package
from hetconv_kernels.backends.cuda import Cuda, choice
from hetconv_kernels.backends.gpu import capture, devices
from hetconv_kernels.backends.triton import Triton
from hetconv_kernels.backends.vendor import Vendor
from hetconv_kernels.problem import make_geometry
from hetconv_kernels.testing import error_bound, oracle

GEOMETRY = make_geometry(hk.Support.het(16, 24, 3, p=2), 1, 1)


@pytest.mark.parametrize("allowed", ["tf32", "ieee"])
def test_float32_follows_the_switch_of_pytorch(
    allowed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each call, also of one that is prepared already."""
    cuda_host.install(monkeypatch)
    x, w, dy = operands(GEOMETRY, torch.float32)
    leaf = x.double().requires_grad_()
    exact = oracle(leaf, w.double(), GEOMETRY)
    (dx,) = torch.autograd.grad(exact, leaf, dy.double())
    most = oracle(x.double().abs(), w.double().abs(), GEOMETRY)
    problem = ops.describe("fprop", GEOMETRY, x, x, w, (6, 9))
    call = Cuda().fprop(problem)
    for now in ("ieee", "tf32", allowed):
        with convolutions_in(now):
            found = call(x, w, None, None, None)
    bound = error_bound(most, 144, torch.float32)
    err = (found.double() - exact).abs()
    assert bool((err <= bound + 2.0**-9 * most).all())
    assert bool((err <= bound).all()) == (allowed == "ieee")
    with convolutions_in(allowed):
        back = run("dgrad", GEOMETRY, dy, dy, w).double()
    assert float((back - dx).norm() / dx.norm()) < (1e-6 if allowed == "ieee" else 1e-3)
    assert not capture.CONVERSIONS


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lets problems claim to be on an H100 that both engines are built for."""
    made = pretending.pretended(monkeypatch)
    next(made)()
    pretending.build_for(monkeypatch, "90a")
    monkeypatch.setattr(choice, "spec_of", lambda *_: devices.GPU_SPECS[9, 0])
    package._build_reasons.cache_clear()
    engines = {"vendor": Vendor(), "cuda": Cuda(), "triton": Triton()}
    monkeypatch.setattr(backends, "_engines", lambda: engines)
    yield
    next(made, None)
    package._build_reasons.cache_clear()


@pytest.mark.parametrize(
    ("verb", "support", "name"),
    [
        ("fprop", hk.Support.het(64, 64, 3, p=4), "cuda"),
        ("dgrad", hk.Support.het(64, 64, 3, p=4), "cuda"),
        ("wgrad", hk.Support.het(64, 64, 3, p=4), "triton"),
        ("fprop", hk.Support.dense(256, 256, 3), "triton"),
    ],
    ids=["fprop", "dgrad", "wgrad", "wide"],
)
def test_float32_goes_to_the_engine_that_takes_it(
    on_gpu: None, monkeypatch: pytest.MonkeyPatch, verb: str, support: hk.Support, name: str
) -> None:
    """What the CUDA engine refuses, Triton runs, as TF32 or 3xTF32; and the refusal says so."""
    monkeypatch.setattr(Vendor, "estimate", lambda *_: 1.0)
    for engine in (Cuda, Triton):
        monkeypatch.setattr(engine, verb, lambda *_: None)
    problem = pretending.described(verb, support, dtype=torch.float32)
    problem = dataclasses.replace(problem, device=pretending.CUDA)
    assert Triton().unsupported_reasons(problem) == []
    reasons = Cuda().unsupported_reasons(problem)
    assert (reasons == []) == (name == "cuda")
    assert all("backend='triton' takes float32" in reason for reason in reasons)
    assert backends.choose(problem, 0).backend.name == name
