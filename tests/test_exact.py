# SPDX-License-Identifier: Apache-2.0
"""Every backend, primitive and dtype, bit for bit: small integers, whose sums are exact.

A bound derived from the depth of a bfloat16 sum lets a whole missing channel pass on nearly every
element. Here operands are integers of magnitude one to three, so that float32 accumulators hold
every sum exactly, the one rounding at the end is the same for all, and one missing product shows.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import hetconv_kernels as hk
from hetconv_kernels import ops
from hetconv_kernels.backends import get_backend
from hetconv_kernels.problem import Geometry, make_geometry
from hetconv_kernels.testing import oracle

BACKENDS = ("auto", *hk.available_backends("cpu"))
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
SUPPORTS = {
    "dense": hk.Support.dense(12, 10, 3),
    "het": hk.Support.het(32, 32, 3, p=4),
    "grouped": hk.Support.grouped(16, 24, 3, 4),
    "pointwise": hk.Support.dense(24, 20, 1),
    "irregular": hk.Support.from_mask(np.random.default_rng(2).random((9, 11, 3, 3)) < 0.4),
}
GEOMETRIES = {"same": {"padding": 1}, "strided": {"stride": 2, "padding": (1, 0, 2, 1)}}
SIZE = 7, 9

Operands = dict[str, torch.Tensor]


def draw(geometry: Geometry) -> Operands:
    """Draws x, w and dy in float64: no element is zero, so that each product counts."""
    generator = torch.Generator().manual_seed(3)

    def signed(*shape: int) -> torch.Tensor:
        size = torch.randint(1, 3, shape, generator=generator)
        return (size * (2 * torch.randint(0, 2, shape, generator=generator) - 1)).double()

    support = geometry.support
    return {
        "x": signed(2, support.channels, *SIZE),
        "w": signed(*support.shape),
        "dy": signed(2, support.filters, *geometry.output_size(*SIZE)),
    }


def exact(geometry: Geometry, given: Operands) -> Operands:
    """Computes the truth in float64."""
    x, w = (given[name].clone().requires_grad_() for name in ("x", "w"))
    y = oracle(x, w, geometry)
    dx, dw = torch.autograd.grad(y, (x, w), given["dy"])
    return {"fprop": y.detach(), "dgrad": dx, "wgrad": dw}


def computed(
    verb: str, geometry: Geometry, given: Operands, dtype: torch.dtype, layout: str, backend: str
) -> torch.Tensor:
    code = hk.backends.CODES[backend]
    x, w, dy = (
        given[name].to(dtype).contiguous(memory_format=LAYOUTS[layout]) for name in ("x", "w", "dy")
    )
    if verb == "fprop":
        return ops.run_fprop(x, w, geometry, backend=code)
    if verb == "dgrad":
        return ops.run_dgrad(dy, w, geometry, SIZE, code)
    return ops.run_wgrad(dy, x, geometry, geometry.support.shape, dtype, code)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("verb", ["fprop", "dgrad", "wgrad"])
@pytest.mark.parametrize("place", GEOMETRIES)
@pytest.mark.parametrize("name", SUPPORTS)
def test_sums_of_small_integers_are_exact(
    name: str, place: str, verb: str, dtype: torch.dtype, backend: str
) -> None:
    geometry = make_geometry(SUPPORTS[name], **GEOMETRIES[place])
    given = draw(geometry)
    truth = exact(geometry, given)[verb].to(dtype)
    for layout in LAYOUTS:
        x = given["x" if verb == "fprop" else "dy"].to(dtype)
        problem = ops.describe(verb, geometry, x, x, given["w"].to(dtype), SIZE)
        if backend not in ("auto",):
            reasons = get_backend(backend).unsupported_reasons(problem)
            if reasons:
                pytest.skip(" ".join(reasons))
        assert torch.equal(computed(verb, geometry, given, dtype, layout, backend), truth), layout


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SUPPORTS)
def test_one_missing_channel_or_pixel_changes_nearly_every_result(
    name: str, dtype: torch.dtype
) -> None:
    """What the test above compares can tell: otherwise it would pass whatever a kernel left out."""
    geometry = make_geometry(SUPPORTS[name], padding=1)
    given = draw(geometry)
    truth = exact(geometry, given)
    read = torch.tensor(geometry.support.mask.any((2, 3)))  # [F, C]
    channel = int(read.sum(0).argmax())
    filters = read[:, channel]
    without = {**given, "x": given["x"].clone()}
    without["x"][:, channel] = 0
    missed = exact(geometry, without)
    differ = missed["fprop"].to(dtype) != truth["fprop"].to(dtype)
    assert differ[:, filters].double().mean() > 0.6
    assert not differ[:, ~filters].any()
    for image in ("x", "dy"):  # a pixel of every channel
        without = {**given, image: given[image].clone()}
        without[image][0, :, 3, 4] = 0
        missed = exact(geometry, without)
        live = torch.tensor(geometry.support.mask)
        differ = missed["wgrad"].to(dtype) != truth["wgrad"].to(dtype)
        assert differ[live].double().mean() > 0.6
