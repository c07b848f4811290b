# SPDX-License-Identifier: Apache-2.0
"""Every raw operator refuses operands that its kernel would index beyond their end."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hetconv_kernels as hk
from hetconv_kernels import ops
from hetconv_kernels.errors import ArgumentError, InputTypeError
from hetconv_kernels.operands import check_ints
from hetconv_kernels.packing import bits_on
from hetconv_kernels.problem import make_geometry

SUPPORT = hk.Support.het(8, 12, 3, p=4)
GEOMETRY = make_geometry(SUPPORT, 1, 1)
BACKENDS = ("auto", *hk.available_backends("cpu"))
SHAPES = {"x": (2, 8, 5, 6), "dy": (2, 12, 5, 6), "w": SUPPORT.shape}


def call(verb: str, backend: str, **changes: Any) -> torch.Tensor:
    """Calls one raw operator on operands that fit, but for the changes."""
    given = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    given |= {
        "ints": GEOMETRY.ints(5, 6),
        "weight_shape": SUPPORT.shape,
        "dtype": torch.float32,
        "scale": None,
        "shift": None,
        "residual": None,
    }
    assert set(changes) <= set(given)
    given |= changes
    x, dy, w, ints, shape, dtype, scale, shift, residual = given.values()
    bits, code = bits_on(SUPPORT, torch.device("cpu")), hk.backends.CODES[backend]
    raw = torch.ops.hetconv
    if verb == "fprop":
        return raw.fprop(x, w, bits, scale, shift, residual, "none", ints, code)
    if verb == "dgrad":
        return raw.dgrad(dy, w, bits, ints, code)
    return raw.wgrad(dy, x, bits, list(shape), dtype, ints, code)


VERBS = ("fprop", "dgrad", "wgrad")
LIVE = SUPPORT.live
# Each case: the operator, the one operand that does not fit, and what the error names.
MISFITS = {
    "wgrad-batch-short": ("wgrad", {"x": torch.zeros(1, 8, 5, 6)}, "batch of dy: received 2"),
    "wgrad-batch-long": ("wgrad", {"dy": torch.zeros(5, 12, 5, 6)}, "batch of dy: received 5"),
    "wgrad-x-channels": ("wgrad", {"x": torch.zeros(2, 4, 5, 6)}, "x shape"),
    "wgrad-x-rank": ("wgrad", {"x": torch.zeros(8, 5, 6)}, "x shape"),
    "wgrad-x-image": ("wgrad", {"x": torch.zeros(2, 8, 4, 6)}, "dy shape"),
    "wgrad-dy-filters": ("wgrad", {"dy": torch.zeros(2, 11, 5, 6)}, "dy shape"),
    "wgrad-dy-image": ("wgrad", {"dy": torch.zeros(2, 12, 4, 6)}, "dy shape"),
    "wgrad-x-dtype": ("wgrad", {"x": torch.zeros(2, 8, 5, 6).double()}, "x dtype"),
    "wgrad-dy-dtype": ("wgrad", {"dy": torch.zeros(2, 12, 5, 6).bfloat16()}, "x dtype"),
    "wgrad-integers": ("wgrad", {"x": torch.zeros(2, 8, 5, 6).long()}, "input dtype"),
    "wgrad-shape": ("wgrad", {"weight_shape": (12, 8, 3, 1)}, "weight shape"),
    "wgrad-live-long": ("wgrad", {"weight_shape": (LIVE + 1,)}, "weight shape"),
    "wgrad-integer-result": ("wgrad", {"dtype": torch.int32}, "dtype of dw"),
    "dgrad-live-long": ("dgrad", {"w": torch.zeros(LIVE + 7)}, "weight shape"),
    "dgrad-live-short": ("dgrad", {"w": torch.zeros(LIVE - 1)}, "weight shape"),
    "dgrad-w-shape": ("dgrad", {"w": torch.zeros(12, 4, 3, 3)}, "weight shape"),
    "dgrad-w-integers": ("dgrad", {"w": torch.zeros(SUPPORT.shape).int()}, "weight dtype"),
    "dgrad-dy-filters": ("dgrad", {"dy": torch.zeros(2, 8, 5, 6)}, "dy shape"),
    "dgrad-dy-rank": ("dgrad", {"dy": torch.zeros(12, 5, 6)}, "dy shape"),
    "fprop-live-long": ("fprop", {"w": torch.zeros(LIVE + 7)}, "weight shape"),
    "fprop-x-channels": ("fprop", {"x": torch.zeros(2, 7, 5, 6)}, "input channels"),
    "fprop-shift": ("fprop", {"shift": torch.zeros(3)}, "bias shape"),
    "fprop-scale": ("fprop", {"scale": torch.zeros(3)}, "scale shape"),
    "fprop-scale-integers": ("fprop", {"scale": torch.ones(12).long()}, "scale dtype"),
    "fprop-residual": ("fprop", {"residual": torch.zeros(1, 12, 5, 6)}, "residual"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MISFITS)
def test_an_operand_that_does_not_fit_is_refused_by_name(name: str, backend: str) -> None:
    verb, changes, message = MISFITS[name]
    call(verb, backend)  # and not because of anything else
    with pytest.raises((ArgumentError, InputTypeError), match=message):
        call(verb, backend, **changes)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (2, 4, "channels and kernel in geometry"),
        (5, 0, "stride in geometry"),
        (6, -1, "stride in geometry"),
        (6, 2**31, "stride in geometry"),
        (7, -1, "padding in geometry"),
        (10, 2**31, "padding in geometry"),
        (11, 0, "dilation in geometry"),
        (12, 2**40, "dilation in geometry"),
    ],
)
def test_integers_that_no_layer_has_are_refused(
    verb: str, at: int, value: int, message: str
) -> None:
    ints = GEOMETRY.ints(5, 6)
    ints[at] = value
    with pytest.raises(ArgumentError, match=message):
        call(verb, "auto", ints=ints)


def test_a_list_of_another_length_is_refused() -> None:
    with pytest.raises(ArgumentError, match="received 13 integers"):
        check_ints(GEOMETRY.ints(5, 6)[:-1])


def test_the_integers_of_a_layer_are_named() -> None:
    named = check_ints(GEOMETRY.ints(5, 6))
    assert (named.height, named.width, named.columns) == (5, 6, (8, 3, 3))
    assert (named.stride, named.pads, named.dilation) == ((1, 1), (1, 1, 1, 1), (1, 1))


def test_gradients_of_operands_that_fit_are_not_refused() -> None:
    """Autocast's wider weight, live vectors, an empty batch."""
    dy, x = torch.zeros(2, 12, 5, 6).bfloat16(), torch.zeros(2, 8, 5, 6).bfloat16()
    assert ops.run_dgrad(dy, torch.zeros(SUPPORT.shape), GEOMETRY, (5, 6)).dtype == dy.dtype
    assert ops.run_dgrad(dy, torch.zeros(LIVE), GEOMETRY, (5, 6)).shape == x.shape
    assert ops.run_wgrad(dy, x, GEOMETRY, (LIVE,), torch.float32).dtype == torch.float32
    assert ops.run_wgrad(dy[:0], x[:0], GEOMETRY, SUPPORT.shape, torch.float32).abs().sum() == 0
