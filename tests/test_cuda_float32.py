# SPDX-License-Identifier: Apache-2.0
"""float32 in the CUDA engine's calls, with the kernels on the CPU; `test_cuda_host` has those."""

from __future__ import annotations

import cuda_host
import pytest
import torch
from cuda_host import operands, run
from switches import convolutions_in

import hetconv_kernels as hk
from hetconv_kernels import ops
from hetconv_kernels.backends.cuda import Cuda
from hetconv_kernels.backends.gpu import capture
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
