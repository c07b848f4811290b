# SPDX-License-Identifier: Apache-2.0
"""`functional.support_conv2d`: forms of its arguments, every bad input, and the forced backend."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from layers import DTYPES, IRREGULAR, C, F, assert_as_good, image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import hetconv_kernels as hk
from hetconv_kernels import functional
from hetconv_kernels.backends import CODES
from hetconv_kernels.errors import (
    ArgumentError,
    BackendError,
    HetconvError,
    InputTypeError,
    SupportError,
)
from hetconv_kernels.functional import fused_conv2d, support_conv2d
from hetconv_kernels.problem import make_geometry

GROUPED = hk.Support.grouped(C, F, 3, 4)
LIVE = torch.tensor(IRREGULAR.mask)
NOT_BUILT = [name for name in CODES if name not in ("auto", *hk.available_backends())]


def weight(dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(F, C, 3, 3, generator=generator).to(dtype)


def bias() -> Tensor:
    return torch.linspace(-1, 1, F)


def conv2d(x: Tensor, w: Tensor, *arguments: Any) -> Tensor:
    return torch.nn.functional.conv2d(x, w.masked_fill(~LIVE, 0), *arguments)


# Forms of the arguments ---------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [None, "auto", *hk.available_backends("cpu")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_conv2d_on_the_masked_weight(dtype: torch.dtype, backend: str | None) -> None:
    x, w, b = image(dtype=dtype), weight(dtype), bias().to(dtype)
    y = support_conv2d(x, w, IRREGULAR, b, 2, 1, backend=backend)
    truth = conv2d(x.double(), w.double(), b.double(), 2, 1)
    assert_as_good("y", y, conv2d(x, w, b, 2, 1), truth)


@pytest.mark.parametrize(
    ("given", "as_conv2d"),
    [
        ({"stride": 2}, (2, 0, 1)),
        ({"stride": [2, 1]}, ((2, 1), 0, 1)),
        ({"stride": (3,)}, (3, 0, 1)),
        ({"padding": 1, "dilation": (2, 1)}, (1, 1, (2, 1))),
        ({"padding": (1, 2)}, (1, (1, 2), 1)),
        ({"padding": "same"}, (1, "same", 1)),
        ({"padding": "valid", "dilation": 2}, (1, "valid", 2)),
        ({"stride": np.int64(2), "padding": torch.Size([1, 2])}, (2, (1, 2), 1)),
    ],
    ids=str,
)
def test_geometry_in_the_forms_of_conv2d(given: dict[str, Any], as_conv2d: Any) -> None:
    y = support_conv2d(image(), weight(), IRREGULAR, bias(), **given)
    torch.testing.assert_close(y, conv2d(image(), weight(), bias(), *as_conv2d))


def test_four_pads_are_top_bottom_left_right() -> None:
    y = support_conv2d(image(), weight(), IRREGULAR, padding=(0, 3, 2, 1))
    padded = torch.nn.functional.pad(image(), (2, 1, 0, 3))
    torch.testing.assert_close(y, conv2d(padded, weight()))


@pytest.mark.parametrize("backend", hk.available_backends("cpu"))
def test_weights_dense_and_live(backend: str) -> None:
    x, w = image(), weight()
    expected = conv2d(x, w, None, 1, 1)
    for form in (w, w[LIVE], w.to(memory_format=torch.channels_last), w.mT.contiguous().mT):
        form = form.clone(memory_format=torch.preserve_format).requires_grad_()
        y = support_conv2d(x, form, IRREGULAR, padding=1, backend=backend)
        torch.testing.assert_close(y, expected)
        (grad,) = torch.autograd.grad(y.sum(), form)
        assert grad.shape == form.shape
        assert (grad if form.dim() == 1 else grad[LIVE]).ne(0).all()
        assert form.dim() == 1 or grad[~LIVE].eq(0).all()


@pytest.mark.parametrize("backend", hk.available_backends("cpu"))
def test_grouped_weights_in_the_shape_of_conv2d(backend: str) -> None:
    w = weight()[:, : C // 4].requires_grad_()
    y = support_conv2d(image(), w, GROUPED, bias(), padding=1, backend=backend)
    torch.testing.assert_close(y, torch.nn.functional.conv2d(image(), w, bias(), 1, 1, groups=4))
    assert torch.autograd.grad(y.sum(), w)[0].shape == w.shape


def test_one_image_without_a_batch_dimension() -> None:
    x = image(C, 9, 7).requires_grad_()
    y = support_conv2d(x, weight(), IRREGULAR, bias())
    torch.testing.assert_close(y, conv2d(x, weight(), bias()))
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert grad.shape == x.shape


@pytest.mark.parametrize("backend", hk.available_backends("cpu"))
def test_no_image_at_all(backend: str) -> None:
    x, w = image(0, C, 9, 7).requires_grad_(), weight().requires_grad_()
    b = bias().requires_grad_()
    y = support_conv2d(x, w, IRREGULAR, b, padding=(0, 1), backend=backend)
    assert y.shape == (0, F, 7, 7)
    dx, dw, db = torch.autograd.grad(y.sum(), (x, w, b))
    assert dx.shape == x.shape
    assert dw.eq(0).all()
    assert db.eq(0).all()


@pytest.mark.parametrize("size", [(0, 7), (9, 0), (0, 0), (1, 0)], ids=str)
@pytest.mark.parametrize("padding", [0, 1, 2, (2, 0), (0, 3)], ids=str)
@pytest.mark.parametrize("backend", hk.available_backends("cpu"))
def test_no_images_of_no_pixels(backend: str, padding: Any, size: tuple[int, int]) -> None:
    """Where padding makes room for the kernel nn.Conv2d takes them; elsewhere both refuse."""
    x, w = torch.randn(0, C, *size, requires_grad=True), weight().requires_grad_()
    try:
        expected = conv2d(x, w, bias(), 1, padding)
    except RuntimeError:
        with pytest.raises(ArgumentError, match="input size"):
            support_conv2d(x, w, IRREGULAR, bias(), padding=padding, backend=backend)
        return
    y = support_conv2d(x, w, IRREGULAR, bias(), padding=padding, backend=backend)
    assert y.shape == expected.shape
    dx, dw = torch.autograd.grad(y.sum(), (x, w))
    assert dx.shape == x.shape
    assert dw.eq(0).all()
    with torch.no_grad():
        assert support_conv2d(x, w, IRREGULAR, padding=padding, backend=backend).shape == y.shape
    some = torch.randn(2, C, *size)
    with pytest.raises(ArgumentError, match="input size: received"):
        support_conv2d(some, w, IRREGULAR, bias(), padding=padding, backend=backend)


@pytest.mark.parametrize("backend", hk.available_backends("cpu"))
def test_supports_with_empty_groups(backend: str) -> None:
    """Filters that read nothing give their bias; so does a whole layer of them."""
    nothing = hk.Support.from_mask(np.zeros((F, C, 3, 3), bool))
    for w in (weight(), weight()[:0, 0, 0, 0]):
        x = image().requires_grad_()
        y = support_conv2d(x, w, nothing, bias(), backend=backend)
        torch.testing.assert_close(y, bias().view(-1, 1, 1).expand_as(y))
        assert torch.autograd.grad(y.sum(), x)[0].eq(0).all()


def test_non_contiguous_input_and_bias() -> None:
    x = image(2, 9, 7, 2 * C).permute(0, 3, 1, 2)[:, ::2]
    b = bias().repeat_interleave(3)[::3]
    torch.testing.assert_close(support_conv2d(x, weight(), IRREGULAR, b), conv2d(x, weight(), b))


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_dead_entries_hold_anything(grad: bool) -> None:
    w = weight().masked_fill(~LIVE, float("nan")).requires_grad_(grad)
    for _ in range(3):
        y = support_conv2d(image(), w, IRREGULAR)
        torch.testing.assert_close(y, conv2d(image(), w))


# Bad input ----------------------------------------------------------------------------------------


def put(**changes: Any) -> dict[str, Any]:
    """Names the arguments of a call that works, but for the changes."""
    return {"x": image(), "weight": weight(), "support": IRREGULAR, "bias": bias(), **changes}


BAD: dict[str, tuple[Any, type[HetconvError], str]] = {
    "input-float64": (
        lambda: {"x": image().double()},
        InputTypeError,
        r"received torch.float64, expected the weight's, torch.float32.*autocast",
    ),
    "weight-float64": (lambda: {"weight": weight().double()}, InputTypeError, "float64"),
    "bias-float64": (lambda: {"bias": bias().double()}, InputTypeError, "bias dtype: .*float64"),
    "input-int": (
        lambda: {"x": image().int(), "weight": weight().int()},
        InputTypeError,
        "received torch.int32, torch.strided, expected strided float32, float64, bfloat16",
    ),
    "input-complex": (lambda: {"x": image().to(torch.cfloat)}, InputTypeError, "complex64"),
    "input-sparse": (lambda: {"x": image().to_sparse()}, InputTypeError, "sparse_coo"),
    "weight-sparse": (lambda: {"weight": weight().to_sparse()}, InputTypeError, "sparse_coo"),
    "input-meta": (lambda: {"x": image().to("meta")}, ArgumentError, "one device"),
    "weight-meta": (
        lambda: {"weight": weight().to("meta")},
        ArgumentError,
        r"devices of input, weight and bias: received cpu, meta, cpu.*\.to\(device\)",
    ),
    "bias-meta": (lambda: {"bias": bias().to("meta")}, ArgumentError, "cpu, cpu, meta"),
    "rank-0": (lambda: {"x": torch.tensor(1.0)}, ArgumentError, r"received \(\), expected \[N, C"),
    "rank-2": (lambda: {"x": image(9, 7)}, ArgumentError, r"received \(9, 7\), expected \[N, C"),
    "rank-5": (lambda: {"x": image(1, 2, C, 9, 7)}, ArgumentError, "input shape: received"),
    "channels": (
        lambda: {"x": image(2, C - 1, 9, 7)},
        ArgumentError,
        r"received 11, expected 12, as in Support\(mask, C=12, F=8, kernel=3x3",
    ),
    "channels-unbatched": (lambda: {"x": image(C - 1, 9, 7)}, ArgumentError, "received 11"),
    "support-kernel": (
        lambda: {"support": hk.Support.dense(C, F, 5)},
        ArgumentError,
        r"weight shape: received \(8, 12, 3, 3\), expected \(8, 12, 5, 5\) or \(2400,\)",
    ),
    "support-transposed": (
        lambda: {"support": hk.Support.dense(F, C, 3)},
        ArgumentError,
        "input channels: received 12, expected 8",
    ),
    "support-array": (
        lambda: {"support": IRREGULAR.mask},
        InputTypeError,
        "received ndarray, expected a Support. See Support.from_mask",
    ),
    "support-tensor": (lambda: {"support": LIVE}, InputTypeError, "received Tensor, expected a Su"),
    "live-length": (
        lambda: {"weight": torch.zeros(IRREGULAR.live + 1)},
        ArgumentError,
        r"weight shape: received",
    ),
    "bias-shape": (lambda: {"bias": torch.zeros(F + 1)}, ArgumentError, r"\(9,\), expected \(8,\)"),
    "bias-2d": (lambda: {"bias": bias()[None]}, ArgumentError, r"bias shape: received \(1, 8\)"),
    "no-output": (
        lambda: {"x": image(2, C, 2, 7)},
        ArgumentError,
        r"received 2x7, which gives a 0x5 output.*Enlarge the image or the padding",
    ),
    "no-output-dilated": (lambda: {"dilation": 4}, ArgumentError, "9x7, which gives a 1x-1"),
    "no-pixels": (
        lambda: {"x": image(2, C, 0, 7), "padding": 1},
        ArgumentError,
        "input size: .*0x",
    ),
    "stride-0": (lambda: {"stride": 0}, ArgumentError, "stride: received 0, expected one or two"),
    "stride-float": (lambda: {"stride": 1.5}, ArgumentError, "stride: received 1.5"),
    "stride-three": (lambda: {"stride": (1, 1, 1)}, ArgumentError, "stride: received"),
    "stride-int32": (lambda: {"stride": 2**31}, ArgumentError, "from 1 to 2147483647"),
    "padding-negative": (lambda: {"padding": -1}, ArgumentError, "padding: received -1"),
    "padding-name": (lambda: {"padding": "full"}, ArgumentError, "'full', expected 'same', 'va"),
    "padding-same-stride": (
        lambda: {"padding": "same", "stride": 2},
        ArgumentError,
        "expected stride 1. Give numbers instead",
    ),
    "padding-int32": (lambda: {"padding": 2**31}, ArgumentError, "to 2147483647"),
    "padding-int64": (lambda: {"padding": (0, 2**64)}, ArgumentError, "to 2147483647"),
    "padding-sum-int32": (
        lambda: {"padding": (0, 2**31 - 1)},
        ArgumentError,
        "output size: received 7x42.*expected at most 2147483647",
    ),
    "dilation-0": (lambda: {"dilation": 0}, ArgumentError, "dilation: received 0"),
    "dilation-int32": (lambda: {"dilation": 2**31}, ArgumentError, "to 2147483647"),
    "dilation-sum": (lambda: {"dilation": 2**31 - 1}, ArgumentError, "which gives a -"),
    "backend-unknown": (
        lambda: {"backend": "hand"},
        BackendError,
        "'hand' is unknown; expected one of auto, vendor, .*reference",
    ),
    **{
        f"backend-{name}": (
            lambda name=name: {"backend": name},
            BackendError,
            f"'{name}' is not built here; expected one of auto, .*hetconv info",
        )
        for name in NOT_BUILT
    },
}


@pytest.mark.parametrize("after_a_good_call", [False, True], ids=["first", "after-a-good-call"])
@pytest.mark.parametrize(("changes", "error", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input(
    changes: Any, error: type[HetconvError], message: str, after_a_good_call: bool
) -> None:
    functional._geometries.clear()
    for grad in (False, True):
        if after_a_good_call:
            support_conv2d(**put())
        with torch.set_grad_enabled(grad), pytest.raises(error, match=message) as raised:
            support_conv2d(**put(**changes()))
        builtin = {InputTypeError: TypeError, BackendError: RuntimeError}.get(error, ValueError)
        assert isinstance(raised.value, builtin)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: hk.Support.het(C, F, 3, p=0), "received 0, expected an integer from 1 to C=12"),
        (lambda: hk.Support.het(C, F, 3, p=C + 1), "received 13"),
        (lambda: hk.Support.het(C, F, (3, 2)), "an even kernel has no centre tap"),
    ],
    ids=["p-0", "p-over-C", "even-kernel"],
)
def test_bad_supports(build: Any, message: str) -> None:
    with pytest.raises(SupportError, match=message):
        build()


def test_a_traced_call_refuses_too() -> None:
    """Dispatch modes, profilers and compilers see the operator: it has to refuse on its own."""
    bad = put(x=image(2, C - 1, 9, 7))
    with FlopCounterMode(display=False), pytest.raises(ArgumentError):
        support_conv2d(**bad)
    on_meta = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in bad.items()}
    with pytest.raises(ArgumentError):
        support_conv2d(**on_meta)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_traced_call_refuses_mixed_dtypes(device: str) -> None:
    mixed = put(x=image().bfloat16())
    mixed = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in mixed.items()}
    with FlopCounterMode(display=False), pytest.raises(InputTypeError, match="bfloat16"):
        support_conv2d(**mixed)


# Autocast -----------------------------------------------------------------------------------------


def test_autocast_casts_as_conv2d_does() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        y = support_conv2d(image(), weight(), IRREGULAR, bias(), padding=1)
        expected = conv2d(image(), weight(), bias(), 1, 1)
        assert y.dtype == expected.dtype == torch.bfloat16
        # An engine may cast the weight and the bias as it packs them, or use them as they are.
        size = conv2d(image().abs().float(), weight().abs().float(), bias().abs().float(), 1, 1)
        assert bool(((y - expected).abs() <= 2**-7 * size).all())
        double = support_conv2d(image().double(), weight().double(), IRREGULAR)
        assert double.dtype == torch.float64
        with torch.autocast("cpu", enabled=False):
            assert support_conv2d(image(), weight(), IRREGULAR).dtype == torch.float32


# The fused form -----------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_fused_is_the_sum_of_its_parts(grad: bool) -> None:
    x, w = image().requires_grad_(grad), weight()
    scale, shift, residual = bias() + 2, bias(), torch.randn(2, F, 7, 5)
    geometry = make_geometry(IRREGULAR)
    y = fused_conv2d(x, w, geometry, scale=scale, shift=shift, residual=residual, act="relu")
    per_filter = (slice(None), None, None)
    expected = conv2d(x, w) * scale[per_filter] + shift[per_filter] + residual
    torch.testing.assert_close(y, expected.relu())


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize(
    ("extras", "message"),
    [
        ({"act": "tanh"}, "'tanh', expected one of none, relu"),
        ({"scale": torch.ones(F + 1)}, r"scale shape.*: received \(9,\)"),
        ({"shift": torch.ones(F + 1)}, r"received \(9,\)"),
        ({"residual": torch.zeros(1, F, 7, 5)}, r"residual: received \(1, 8, 7, 5\)"),
    ],
    ids=["act", "scale", "shift", "residual"],
)
def test_fused_refuses(extras: dict[str, Any], message: str, grad: bool) -> None:
    x = image().requires_grad_(grad)
    with pytest.raises(ArgumentError, match=message):
        fused_conv2d(x, weight(), make_geometry(IRREGULAR), **extras)
