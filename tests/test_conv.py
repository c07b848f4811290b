# SPDX-License-Identifier: Apache-2.0
"""Every convolution layer is a drop-in for ``nn.Conv2d``: arguments, numbers, layouts, refusals."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from layers import (
    BUILDERS,
    DTYPES,
    IRREGULAR,
    C,
    F,
    assert_equals_conv2d,
    build,
    image,
    random_mask,
    twin,
)
from torch import nn

import hetconv_kernels as hk
from hetconv_kernels.errors import ArgumentError, BackendError, InputTypeError, SupportError
from hetconv_kernels.nn import GroupedConv2d, HetConv2d, SelfGroupConv2d, SupportConv2d

GEOMETRIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "no-bias": {"bias": False},
    "pad": {"padding": 1},
    "pad-pair": {"padding": (2, 0)},
    "stride": {"stride": 2, "padding": 1},
    "stride-pair": {"stride": (1, 3), "padding": [0, 1]},
    "stride-over-kernel": {"stride": 4},
    "dilation": {"dilation": 2, "padding": 2},
    "dilation-pair": {"dilation": (1, 3), "padding": (0, 2)},
    "all": {"stride": (2, 1), "padding": (1, 3), "dilation": (2, 1), "bias": False},
    "same": {"padding": "same"},
    "same-dilated": {"padding": "same", "dilation": (2, 1)},
    "valid": {"padding": "valid", "stride": 2},
    "reflect": {"padding": (1, 2), "padding_mode": "reflect", "stride": 2},
    "replicate": {"padding": 1, "padding_mode": "replicate"},
    "circular": {"padding": (2, 1), "padding_mode": "circular"},
    "circular-same": {"padding": "same", "padding_mode": "circular"},
    "reflect-no-pads": {"padding_mode": "reflect"},
    "kernel-1": {"kernel": 1, "stride": 2},
    "kernel-3x1": {"kernel": (3, 1), "padding": (1, 0)},
    "kernel-1x5": {"kernel": (1, 5), "padding": "same"},
    "kernel-2-same": {"kernel": 2, "padding": "same"},
    "kernel-4x2-circular": {"kernel": (4, 2), "padding": "same", "padding_mode": "circular"},
}


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())
@pytest.mark.parametrize("kind", BUILDERS)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
def test_equals_conv2d(kind: str, geometry: dict[str, Any]) -> None:
    kernel = geometry.get("kernel", 3)
    if kind.startswith("het") and not np.all(np.array(kernel) % 2):
        with pytest.raises(SupportError, match="odd sizes"):
            build(kind, **geometry)
        return
    layer = build(kind, **geometry)
    assert_equals_conv2d(layer, image())
    # A batch of one and a single image without a batch dimension take other paths.
    assert_equals_conv2d(layer, image(C, 9, 7))


@pytest.mark.parametrize("backend", hk.available_backends("cpu"))
@pytest.mark.parametrize("kind", BUILDERS)
def test_equals_conv2d_on_every_backend(kind: str, backend: str) -> None:
    layer = build(kind, stride=(1, 2), padding=1, backend=backend)
    assert_equals_conv2d(layer, image())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", BUILDERS)
def test_equals_conv2d_in_every_dtype(kind: str, dtype: torch.dtype) -> None:
    layer = build(kind, padding=1, dtype=dtype)
    assert {p.dtype for p in layer.parameters()} == {dtype}
    assert_equals_conv2d(layer, image(dtype=dtype))


@pytest.mark.parametrize("kind", BUILDERS)
@pytest.mark.parametrize("shape", [(0, C, 9, 7), (1, C, 3, 3), (C, 3, 5)], ids=str)
def test_small_and_empty_batches(kind: str, shape: tuple[int, ...]) -> None:
    assert_equals_conv2d(build(kind), image(*shape))


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "every-other-pixel": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "expanded-batch": lambda x: x[:1].expand(2, -1, -1, -1),
    "one-pixel": lambda x: x[:, :, :3, :3],
}


@pytest.mark.parametrize("weight", ["contiguous", "channels_last"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", BUILDERS)
def test_layout_follows_conv2d(kind: str, layout: str, weight: str) -> None:
    layer = build(kind, bias=False)
    if weight == "channels_last":
        layer = layer.to(memory_format=torch.channels_last)
    assert_equals_conv2d(layer, LAYOUTS[layout](image()))


@pytest.mark.parametrize("kind", BUILDERS)
def test_autocast_is_conv2d_autocast(kind: str) -> None:
    layer = build(kind, padding=1)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = layer(image()), twin(layer)(image())
    assert y.dtype == expected.dtype == torch.bfloat16
    # An engine may cast the weight and the bias as it packs them, or use them as they are.
    torch.testing.assert_close(y, expected, rtol=2**-6, atol=2**-6)
    y.float().sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", BUILDERS)
def test_equals_conv2d_on_a_gpu(kind: str, dtype: torch.dtype, layout: str) -> None:
    layer = build(kind, padding=1, dtype=dtype, device="cuda")
    x = LAYOUTS[layout](image(dtype=dtype).cuda())
    for _ in range(3):  # the third time, engines know whether the weight is clean
        assert_equals_conv2d(layer, x)
    y = layer(x)
    torch.testing.assert_close(layer.freeze()(x), y)
    torch.testing.assert_close(layer.cpu()(x.cpu()), y.cpu(), rtol=2**-6, atol=2**-6)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", BUILDERS)
def test_a_mix_of_devices_is_refused(kind: str) -> None:
    layer = build(kind).cuda()
    layer(image().cuda())
    with pytest.raises(ArgumentError, match=r"received cpu, cuda:0, cuda:0, expected one device"):
        layer(image())
    layer.cpu()
    layer(image())
    with pytest.raises(ArgumentError, match=r"received cuda:0, cpu, cpu, expected one device"):
        layer(image().cuda())


# The constructor ---------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [SupportConv2d, HetConv2d, SelfGroupConv2d, GroupedConv2d])
def test_signature_begins_as_conv2d(layer: type[SupportConv2d]) -> None:
    ours = list(inspect.signature(layer).parameters.values())
    theirs = list(inspect.signature(nn.Conv2d).parameters.values())
    assert [(p.name, p.default) for p in ours[: len(theirs)]] == [
        (p.name, p.default) for p in theirs
    ]
    assert {p.kind for p in ours[len(theirs) :]} == {inspect.Parameter.KEYWORD_ONLY}


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())
def test_attributes_are_those_of_conv2d(geometry: dict[str, Any]) -> None:
    keywords = dict(geometry)
    layer = build("support", **geometry)
    conv = nn.Conv2d(C, F, keywords.pop("kernel", 3), **keywords)
    for name in (
        *("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation"),
        *("groups", "padding_mode"),
    ):
        ours, theirs = getattr(layer, name), getattr(conv, name)
        # nn.Conv2d keeps a list as it was given.
        assert ours == (tuple(theirs) if isinstance(theirs, list) else theirs), name
    assert (layer.bias is None) == (conv.bias is None)


def test_not_a_conv2d_so_that_pruners_and_quantisers_pass_it_by() -> None:
    assert not isinstance(build("het"), nn.Conv2d)


@pytest.mark.parametrize("kind", BUILDERS)
def test_meta_device(kind: str) -> None:
    layer = build(kind, stride=2, device="meta", dtype=torch.bfloat16)
    y = layer(torch.empty(2, C, 9, 7, device="meta", dtype=torch.bfloat16))
    assert (y.device.type, y.dtype, y.shape) == ("meta", torch.bfloat16, (2, F, 4, 3))
    assert layer.live_parameters() == layer.support.live + F
    filled = layer.to_empty(device="cpu")
    filled.reset_parameters()
    assert_equals_conv2d(filled, image(dtype=torch.bfloat16))


@pytest.mark.parametrize("kind", BUILDERS)
def test_skip_init(kind: str) -> None:
    template = build(kind)
    extra = {
        "support": {"support": template.support},
        "selfgroup": {"support": template.support},
        "grouped": {"groups": 2},
    }.get(kind, {"p": getattr(template, "p", 1), "order": getattr(template, "order", "")})
    layer = nn.utils.skip_init(type(template), C, F, 3, **extra)
    layer.load_state_dict(template.state_dict())
    torch.testing.assert_close(layer(image()), template(image()))


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"support": hk.Support.dense(C, F, 5)}, SupportError, r"received \(8, 12, 5, 5\)"),
        ({"support": hk.Support.dense(F, C, 3)}, SupportError, r"expected \(8, 12, 3, 3\)"),
        ({"support": IRREGULAR.mask}, InputTypeError, "received ndarray, expected a Support"),
        ({"groups": 2}, ArgumentError, "groups of SupportConv2d: received 2.*GroupedConv2d"),
        ({"padding_mode": "mirror"}, ArgumentError, "'mirror', expected one of zeros, reflect"),
        ({"padding": "full"}, ArgumentError, "'full', expected 'same', 'valid' or numbers"),
        ({"padding": "same", "stride": 2}, ArgumentError, r"stride=\(2, 2\), expected stride 1"),
        ({"padding": -1}, ArgumentError, "padding: received -1"),
        ({"padding": (0, 1, 0, 1)}, ArgumentError, "padding of a layer"),
        ({"stride": 0}, ArgumentError, "stride: received 0, expected one or two integers from 1"),
        ({"stride": (1, 1, 1)}, ArgumentError, "stride: received"),
        ({"stride": 1.5}, ArgumentError, "stride: received 1.5"),
        ({"dilation": 0}, ArgumentError, "dilation: received 0"),
        ({"stride": 2**31}, ArgumentError, "to 2147483647"),
        ({"backend": "hand"}, BackendError, "'hand' is unknown; expected one of auto, vendor"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_constructor_refuses(keywords: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SupportConv2d(C, F, 3, **{"support": IRREGULAR, **keywords})


@pytest.mark.parametrize("sizes", [(0, F, 3), (C, 0, 3), (C, F, 0), (C, F, (3, 3, 3))], ids=str)
def test_sizes_that_are_no_sizes(sizes: tuple[Any, ...]) -> None:
    with pytest.raises((SupportError, ArgumentError), match="received"):
        HetConv2d(*sizes)
    with pytest.raises((SupportError, ArgumentError), match="received"):
        SupportConv2d(*sizes, support=IRREGULAR)


@pytest.mark.parametrize("kind", BUILDERS)
def test_calls_that_are_refused(kind: str) -> None:
    layer = build(kind)
    for _ in range(2):  # the second call finds what the first one left
        with pytest.raises(InputTypeError, match=r"float64, expected the weight's, torch.float32"):
            layer(image().double())
        with pytest.raises(ArgumentError, match=r"input channels: received 11, expected 12"):
            layer(image(2, 11, 9, 7))
        with pytest.raises(ArgumentError, match=r"received 2x9, which gives a 0x7 output"):
            layer(image(2, C, 2, 9))
        with pytest.raises(ArgumentError, match=r"input shape: received \(9, 7\)"):
            layer(image(9, 7))
        layer(image())


@pytest.mark.parametrize("kind", BUILDERS)
@pytest.mark.parametrize("geometry", ["all", "same-dilated", "circular"])
def test_repr_says_what_conv2d_says_and_the_support(kind: str, geometry: str) -> None:
    layer = build(kind, **GEOMETRIES[geometry])
    inner = repr(twin(layer))[len("Conv2d(") : -1]
    for part in inner.split("=")[1:]:
        assert part.rsplit(", ", 1)[0] in repr(layer)
    assert repr(layer).startswith(f"{type(layer).__name__}({C}, {F}, kernel_size=(3, 3), stride=")
    assert f"support={layer.support.kind}" in repr(layer)
    assert f"density={layer.support.density:.3g}" in repr(layer)
    assert "frozen" not in repr(layer)
    assert repr(layer.freeze()).endswith(", frozen)")


# The engine of one layer --------------------------------------------------------------------------


def test_backend_of_a_layer_beats_the_global_one() -> None:
    layer = build("support", backend="vendor")
    with hk.use_backend("reference"):
        assert hk.explain(layer, image(), measure=False).chosen == "vendor"
        layer.backend = None
        assert hk.explain(layer, image(), measure=False).chosen == "reference"
        layer.backend = "auto"
        assert hk.explain(layer, image(), measure=False).forced is False
    assert "backend='auto'" in repr(layer)
    with pytest.raises(BackendError, match="unknown"):
        layer.backend = "hand"
    assert layer.backend == "auto"


# To and from nn.Conv2d ----------------------------------------------------------------------------


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())
def test_from_and_to_conv2d(geometry: dict[str, Any]) -> None:
    keywords = dict(geometry)
    kernel = keywords.pop("kernel", 3)
    conv = nn.Conv2d(C, F, kernel, **keywords)
    before = conv.weight.detach().clone()
    support = hk.Support.from_mask(random_mask(kernel))
    layer = SupportConv2d.from_conv2d(conv, support)
    assert torch.equal(conv.weight, before)
    masked = before.masked_fill(torch.tensor(~support.mask), 0)
    assert torch.equal(layer.weight, masked)
    back = layer.to_conv2d()
    assert torch.equal(back.weight, masked)
    assert back.weight.data_ptr() not in (layer.weight.data_ptr(), conv.weight.data_ptr())
    assert repr(back) == repr(conv)
    torch.testing.assert_close(layer(image()), back(image()))


@pytest.mark.parametrize("kind", BUILDERS)
def test_to_conv2d_computes_the_same_whatever_dead_entries_hold(kind: str) -> None:
    layer = build(kind, padding=1)
    with torch.no_grad():
        layer.weight.uniform_(-1, 1)
    torch.testing.assert_close(layer.to_conv2d()(image()), layer(image()))
    torch.testing.assert_close(layer.freeze().to_conv2d()(image()), layer(image()))


def test_from_conv2d_keeps_mode_flags_dtype_and_layout() -> None:
    conv = nn.Conv2d(C, F, 3, dtype=torch.bfloat16).to(memory_format=torch.channels_last).eval()
    conv.weight.requires_grad_(False)
    layer = SupportConv2d.from_conv2d(conv, IRREGULAR, backend="reference")
    assert not layer.training
    assert not layer.weight.requires_grad
    assert layer.bias is not None
    assert layer.bias.requires_grad
    assert layer.weight.dtype == torch.bfloat16
    assert layer.weight.is_contiguous(memory_format=torch.channels_last)
    assert layer.backend == "reference"
    back = layer.to_conv2d()
    assert (back.training, back.weight.requires_grad) == (False, False)
    assert back.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("groups", [2, 4])
def test_from_a_grouped_conv2d(groups: int) -> None:
    conv = nn.Conv2d(C, F, 3, padding=1, groups=groups)
    layer = SupportConv2d.from_conv2d(conv, hk.Support.dense(C, F, 3))
    assert layer.support.live == conv.weight.numel()
    torch.testing.assert_close(layer(image()), conv(image()))
    fewer = SupportConv2d.from_conv2d(conv, IRREGULAR)
    assert fewer.support == IRREGULAR & hk.Support.grouped(C, F, 3, groups)
    assert_equals_conv2d(fewer, image())


def test_from_conv2d_with_a_parametrised_weight() -> None:
    conv = torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(C, F, 3))
    layer = SupportConv2d.from_conv2d(conv, hk.Support.dense(C, F, 3))
    torch.testing.assert_close(layer(image()), conv(image()))


@pytest.mark.parametrize(
    ("conv", "support", "error", "message"),
    [
        (nn.Linear(C, F), IRREGULAR, InputTypeError, "received Linear, expected an nn.Conv2d"),
        (nn.Conv1d(C, F, 3), IRREGULAR, InputTypeError, "received Conv1d"),
        (nn.ConvTranspose2d(C, F, 3), IRREGULAR, InputTypeError, "received ConvTranspose2d"),
        (nn.Conv2d(C, F, 5), IRREGULAR, SupportError, r"expected \(8, 12, 5, 5\)"),
        (nn.Conv2d(C, F, 5, groups=2), IRREGULAR, SupportError, r"\(8, 12, 5, 5\)"),
        (nn.Conv2d(C, F, 3, groups=2), IRREGULAR.mask, InputTypeError, "received ndarray"),
        (nn.Conv2d(C, F, 3), None, InputTypeError, "received NoneType, expected a Support"),
    ],
    ids=["linear", "conv1d", "transposed", "kernel", "grouped-kernel", "grouped-mask", "none"],
)
def test_from_conv2d_refuses(conv: Any, support: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        SupportConv2d.from_conv2d(conv, support)
