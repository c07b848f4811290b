# SPDX-License-Identifier: Apache-2.0
"""The quantised layers: near float, equal to the reference, saved, moved, refused."""

from __future__ import annotations

import io

import pytest
import torch
import torch.nn.functional as F_
from quantized_layers import POOL, R, X, Y, conv_layer, image, quantized
from torch import nn

import hetconv_kernels as hk
from hetconv_kernels.errors import ArgumentError, InputTypeError
from hetconv_kernels.nn import QuantizedConv2d, QuantizedLinear, fuse
from hetconv_kernels.quantization import reference
from hetconv_kernels.quantization.checks import Output
from hetconv_kernels.quantization.scheme import Scale


def numbers(q: torch.Tensor, scale: Scale) -> torch.Tensor:
    return (q.float() - scale.zero_point) * scale.scale


@pytest.mark.parametrize("act", ["none", "relu", "relu6"])
@pytest.mark.parametrize("y", [Y, None], ids=["uint8", "float32"])
@pytest.mark.parametrize("residual", [None, R], ids=["alone", "residual"])
@pytest.mark.parametrize("pool", [None, POOL], ids=["whole", "pooled"])
def test_a_layer_is_its_float_original_up_to_its_steps(act, y, residual, pool) -> None:
    original = fuse(conv_layer(), None, act, pool)
    layer = QuantizedConv2d.from_float(original, X, y, residual)
    x, r = image(), image(R, (2, 12, 6, 5)) if residual else None
    truth = original(numbers(x, X), None if r is None else numbers(r, R))
    result = layer(x, r) if y is None else numbers(layer(x, r), Y)
    assert result.dtype == torch.float32
    # Half a step of each weight on at most 8·9 inputs of up to 2.56, of a bias, and of the output.
    live = torch.as_tensor(layer.support.mask.sum((1, 2, 3)))
    bound = 0.5 * layer.weight_scale * live * 128 * X.scale + layer.weight_scale * X.scale
    bound = bound[:, None, None] + (0 if y is None else 0.501 * Y.scale)
    clipped = truth if y is None else truth.clamp(Y.low, Y.high)
    assert bool(((result - clipped).abs() <= bound + 1e-4).all())
    assert float((result - clipped).abs().max()) > 0, "nothing was quantised"


def test_a_layer_gives_the_integers_of_the_reference() -> None:
    layer, x = quantized(), image()
    truth = reference.fprop(
        x, layer.weight, layer.support, layer._geometry, multiplier=layer._multiplier,
        bias=layer.bias, x_zero_point=128, output=Output(10, 10, 255, torch.uint8),
    )  # fmt: skip
    assert torch.equal(layer(x), truth)


def test_the_multiplier_is_rounded_once() -> None:
    layer = quantized()
    exact = layer.weight_scale.double() * X.scale / Y.scale
    assert torch.equal(layer._multiplier, exact.float())


@pytest.mark.parametrize("shape", [(5, 24), (2, 3, 24), (24,)], ids=str)
def test_a_linear_layer_takes_leading_dimensions_like_torch(shape) -> None:
    original = nn.Linear(24, 10)
    layer = QuantizedLinear.from_float(original, X, None)
    x = image(X, shape)
    truth = F_.linear(numbers(x, X), original.weight, original.bias).detach()
    assert layer(x).shape == truth.shape
    assert float((layer(x) - truth).abs().max()) < 24 * 2.56 * float(layer.weight_scale.max())


def test_a_pruned_linear_layer_keeps_its_support() -> None:
    mask = torch.rand(10, 24, 1, 1) < 0.4
    linear = hk.nn.SupportLinear(24, 10, support=hk.Support.from_mask(mask.numpy()))
    layer = QuantizedLinear.from_float(linear, X, Y, "relu")
    assert layer.weight.shape == (int(mask.sum()),)
    x = image(X, (3, 24))
    truth = torch.relu(linear(numbers(x, X))).clamp(Y.low, Y.high).detach()
    assert float((numbers(layer(x), Y) - truth).abs().max()) < 0.1


def test_weights_take_all_of_their_range_and_no_more() -> None:
    layer = quantized()
    filters = torch.repeat_interleave(
        torch.arange(12), torch.as_tensor(layer.support.mask.sum((1, 2, 3)))
    )
    for f in range(12):
        assert int(layer.weight[filters == f].abs().max()) == 127


def test_a_filter_of_zeros_keeps_its_bias() -> None:
    conv = conv_layer()
    with torch.no_grad():
        conv.weight[3] = 0
        conv.bias[3] = 1.234
    layer = QuantizedConv2d.from_float(conv, X, None)
    assert float((layer(image())[:, 3] - 1.234).abs().max()) < 1e-6


# Refusals ----------------------------------------------------------------------------------------


def test_a_layer_that_was_not_calibrated_refuses_to_run_and_to_take_weights() -> None:
    geometry = conv_layer()._geometry
    layer = QuantizedConv2d(geometry)
    for call in (lambda: layer(image()), lambda: layer.set_float_(layer.weight.float(), Y)):
        with pytest.raises(ArgumentError, match=r"not calibrated.*hetconv_kernels\.quantize"):
            call()
    with pytest.raises(ArgumentError, match="not calibrated"):
        layer.dequantized()


def test_other_dtypes_than_the_scale_says_are_refused() -> None:
    with pytest.raises(InputTypeError, match=r"float32.*uint8.*Quantize"):
        quantized()(torch.randn(2, 8, 11, 9))
    with pytest.raises(InputTypeError, match=r"int8.*uint8"):
        quantized()(image().to(torch.int8))
    with pytest.raises(InputTypeError, match="residual"):
        quantized(residual=R)(image(), torch.zeros(2, 12, 6, 5, dtype=torch.int8))


def test_a_residual_is_there_when_its_scale_is_and_only_then() -> None:
    residual = image(R, (2, 12, 6, 5))
    with pytest.raises(ArgumentError, match="residual"):
        quantized()(image(), residual)
    with pytest.raises(ArgumentError, match="residual"):
        quantized(residual=R)(image())
    with pytest.raises(ArgumentError, match="residual"):
        quantized(residual=R)(image(), residual[:, :, 1:])


@pytest.mark.parametrize("act", ["silu", "gelu", "tanh"])
def test_activations_that_are_no_clamp_are_refused(act: str) -> None:
    with pytest.raises(ArgumentError, match=f"{act}.*in float"):
        QuantizedConv2d(conv_layer()._geometry, x=X, y=Y, act=act)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_weights_and_biases_that_are_not_finite_are_refused(name: str, bad: float) -> None:
    conv = conv_layer()
    with torch.no_grad():
        getattr(conv, name).view(-1)[0] = bad  # the first weight is live
    with pytest.raises(ArgumentError, match=f"{name}.*finite"):
        QuantizedConv2d.from_float(conv, X, Y)


def test_a_dead_weight_may_hold_anything() -> None:
    conv, clean = conv_layer(), None
    clean = QuantizedConv2d.from_float(conv, X, Y)
    with torch.no_grad():
        conv.weight.masked_fill_(~torch.tensor(conv.support.mask), float("nan"))
    assert torch.equal(QuantizedConv2d.from_float(conv, X, Y).weight, clean.weight)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("weight_scale", torch.zeros(12)),
        ("weight_scale", torch.full((12,), float("nan"))),
        ("weight_scale", torch.full((12,), float("inf"))),
        ("weight_scale", -torch.ones(12)),
        ("weight_scale", torch.ones(11)),
        ("bias", torch.zeros(12)),
        ("bias", torch.zeros(11, dtype=torch.int32)),
        ("weight", torch.zeros(7, dtype=torch.int8)),
    ],
)
def test_integers_and_scales_that_do_not_fit_are_refused(name: str, value: torch.Tensor) -> None:
    layer = quantized()
    given = {n: getattr(layer, n) for n in ("weight", "weight_scale", "bias")} | {name: value}
    with pytest.raises(ArgumentError):
        layer.set_(**given)


def test_an_accumulator_that_could_overflow_is_refused_before_it_runs() -> None:
    support = hk.Support.dense(70000, 1, 1)
    linear = hk.nn.SupportLinear(70000, 1, support=support)
    with torch.no_grad():
        linear.weight.fill_(1.0)
    with pytest.raises(ArgumentError, match=r"overflow.*float"):
        QuantizedLinear.from_float(linear, X, None)
    layer = quantized()
    huge = torch.full((12,), 2**31 - 1, dtype=torch.int32)
    with pytest.raises(ArgumentError, match="overflow"):
        layer.set_(layer.weight, layer.weight_scale, huge)(image())


# Tracing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [quantized, lambda: quantized(pool=POOL, y=None)])
def test_torch_compile_gives_the_same_integers_in_one_graph(layer) -> None:
    layer, x = layer(), image()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x))


def test_an_exported_layer_is_self_contained() -> None:
    layer, x = quantized(), image()
    program = torch.export.export(layer, (x,))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    assert torch.equal(torch.export.load(file).module()(x), layer(x))


def test_fake_tensors_say_shape_dtype_and_layout() -> None:
    layer = quantized(pool=POOL)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        y = layer(torch.empty(2, 8, 11, 9, dtype=torch.uint8))
    truth = layer(image())
    assert (y.shape, y.dtype, y.stride()) == (truth.shape, truth.dtype, truth.stride())


def test_a_layer_counts_its_work_as_its_original_does() -> None:
    conv = conv_layer()
    layer = QuantizedConv2d.from_float(fuse(conv, None, "relu", POOL), X, Y)
    assert hk.stats.macs(layer, image()) == hk.stats.macs(conv, torch.randn(2, 8, 11, 9))
    assert hk.stats.live_parameters(layer) == hk.stats.live_parameters(conv)
