# SPDX-License-Identifier: Apache-2.0
"""The operators: opcheck on every schema, Supports found by digest, refusals."""

from __future__ import annotations

import gc
import tracemalloc

import numpy as np
import pytest
import torch

import hetconv_kernels as hk
from hetconv_kernels import geometries, ops
from hetconv_kernels.errors import ArgumentError, BackendError
from hetconv_kernels.packing import bits_on
from hetconv_kernels.problem import make_geometry
from hetconv_kernels.support import find_support
from hetconv_kernels.testing import oracle

CPU = torch.device("cpu")
SUPPORT = hk.Support.het(8, 12, 3, p=4)
BACKENDS = {name: hk.backends.CODES[name] for name in hk.available_backends("cpu")}


def operands(grad: bool, layout: torch.memory_format, stride: int = 2) -> dict[str, torch.Tensor]:
    geometry = make_geometry(SUPPORT, stride, (1, 0, 2, 1))
    shape = geometry.output_size(7, 9)
    tensors = {
        "x": torch.randn(2, 8, 7, 9).to(memory_format=layout),
        "w": torch.randn(12, 8, 3, 3),
        "scale": torch.rand(12) + 0.5,
        "shift": torch.randn(12),
        "residual": torch.randn(2, 12, *shape).to(memory_format=layout),
        "dy": torch.randn(2, 12, *shape).to(memory_format=layout),
    }
    return {name: t.requires_grad_(grad) for name, t in tensors.items()}


def arguments(op: str, grad: bool, layout: torch.memory_format, backend: int) -> tuple:
    geometry = make_geometry(SUPPORT, 2, (1, 0, 2, 1))
    t, bits, ints = operands(grad, layout), bits_on(SUPPORT, CPU), geometry.ints(7, 9)
    return {
        "fprop": (t["x"], t["w"], bits, None, None, None, "none", ints, backend),
        "fprop-bias": (t["x"], t["w"], bits, None, t["shift"], None, "relu", ints, backend),
        "fprop-all": (
            t["x"], t["w"], bits, t["scale"], t["shift"], t["residual"], "silu", ints, backend,
        ),
        "dgrad": (t["dy"], t["w"], bits, ints, backend),
        "wgrad": (t["dy"], t["x"], bits, [12, 8, 3, 3], torch.float32, ints, backend),
        "wgrad-live": (t["dy"], t["x"], bits, [SUPPORT.live], torch.float32, ints, backend),
    }[op]  # fmt: skip


OPS = ("fprop", "fprop-bias", "fprop-all", "dgrad", "wgrad", "wgrad-live")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("grad", [False, True], ids=["plain", "requires_grad"])
@pytest.mark.parametrize("op", OPS)
def test_opcheck(op: str, grad: bool, layout: torch.memory_format, backend: str) -> None:
    overload = getattr(torch.ops.hetconv, op.split("-")[0]).default
    torch.library.opcheck(overload, arguments(op, grad, layout, BACKENDS[backend]))


@pytest.mark.parametrize("act", ["none", "relu", "relu6", "silu", "gelu"])
def test_fprop_op_with_every_epilogue_equals_pytorch_in_value_and_gradient(act: str) -> None:
    geometry = make_geometry(SUPPORT, 2, (1, 0, 2, 1))
    t = {n: v.detach().double().requires_grad_() for n, v in
         operands(False, torch.contiguous_format).items()}  # fmt: skip
    acts = {
        "none": lambda z: z,
        "relu": torch.relu,
        "relu6": torch.nn.functional.relu6,
        "silu": torch.nn.functional.silu,
        "gelu": torch.nn.functional.gelu,
    }
    conv = oracle(t["x"], t["w"], geometry)
    truth = acts[act](conv * t["scale"][:, None, None] + t["shift"][:, None, None] + t["residual"])
    y = torch.ops.hetconv.fprop(
        t["x"], t["w"], bits_on(SUPPORT, CPU), t["scale"], t["shift"], t["residual"], act,
        geometry.ints(7, 9), 0,
    )  # fmt: skip
    torch.testing.assert_close(y, truth)
    leaves = [t[name] for name in ("x", "w", "scale", "shift", "residual")]
    expected = torch.autograd.grad(truth, leaves, t["dy"])
    for mine, theirs in zip(torch.autograd.grad(y, leaves, t["dy"]), expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_support_unknown_to_the_process_is_read_from_its_bits() -> None:
    support = hk.Support.from_mask(np.random.default_rng(5).random((4, 3, 3, 3)) < 0.5)
    mask, digest = torch.tensor(support.mask), support.digest
    bits, ints = bits_on(support, CPU).clone(), make_geometry(support, 1, 1).ints(5, 5)
    del support
    gc.collect()
    assert find_support(digest) is None, "something keeps every Support alive"
    x, w = torch.randn(1, 3, 5, 5), torch.randn(4, 3, 3, 3)
    y = torch.ops.hetconv.fprop(x, w, bits, None, None, None, "none", ints, 0)
    truth = torch.nn.functional.conv2d(x, w * mask, padding=1)
    torch.testing.assert_close(y, truth)


def test_bits_that_contradict_the_digest_are_refused() -> None:
    ints = make_geometry(SUPPORT, 1, 1).ints(5, 5)
    ints[-1] += 1
    x, w = torch.randn(1, 8, 5, 5), torch.randn(12, 8, 3, 3)
    with pytest.raises(ArgumentError, match="digest of the support tensor"):
        torch.ops.hetconv.fprop(x, w, bits_on(SUPPORT, CPU), None, None, None, "none", ints, 0)


def test_a_support_first_met_during_capture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class CudaBits:
        is_cuda = True

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(BackendError, match=r"hetconv_kernels\.warmup"):
        geometries._read_support(CudaBits(), (8, 3, 3))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"act": "tanh"}, "activation: received 'tanh'"),
        ({"scale": torch.ones(3)}, "scale shape"),
        ({"residual": torch.ones(1, 12, 5, 4)}, "residual"),
        ({"residual": torch.ones(1, 12, 5, 5).double()}, "residual"),
    ],
)
def test_epilogues_that_do_not_fit_are_refused(change: dict, message: str) -> None:
    geometry = make_geometry(SUPPORT, 1, 1)
    with pytest.raises(ArgumentError, match=message):
        ops.run_fprop(torch.randn(1, 8, 5, 5), torch.randn(12, 8, 3, 3), geometry, **change)


def test_gradients_of_another_shape_are_refused() -> None:
    geometry = make_geometry(SUPPORT, 1, 1)
    with pytest.raises(ArgumentError, match="dy shape"):
        ops.run_dgrad(torch.randn(1, 12, 4, 4), torch.randn(12, 8, 3, 3), geometry, (5, 5))
    with pytest.raises(ArgumentError, match="dy shape"):
        ops.run_wgrad(
            torch.randn(1, 12, 4, 4), torch.randn(1, 8, 5, 5), geometry, SUPPORT.shape,
            torch.float32,
        )  # fmt: skip


def test_the_cache_of_choices_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_MAX_SIGNATURES", 4)
    geometry, w = make_geometry(SUPPORT, 1, 1), torch.randn(12, 8, 3, 3)
    for size in range(3, 12):
        ops.run_fprop(torch.randn(1, 8, size, size), w, geometry)
    assert len(geometry.choices) == 4
    sizes = [key[0][2] for key in geometry.choices]
    assert sizes == [8, 9, 10, 11], "the latest ones stay"


def test_what_a_layer_remembers_of_changing_shapes_is_small() -> None:
    """Of 1,500 shapes that a server met, a layer kept 1,024, and a network megabytes a layer."""
    tracemalloc.start()
    try:
        layer, taken = hk.nn.HetConv2d(8, 8, 3, p=2).freeze(), []
        with torch.no_grad():
            for height in range(3, 403):
                layer(torch.zeros(1, 8, height, 4))
                if height in (203, 402):
                    gc.collect()
                    taken.append(tracemalloc.get_traced_memory()[0])
        assert len(layer._geometry.choices) <= 128
        assert taken[1] - taken[0] < 2**16
        assert taken[1] < 2**20
    finally:
        tracemalloc.stop()
