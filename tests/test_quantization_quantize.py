# SPDX-License-Identifier: Apache-2.0
"""quantize: whole networks in 8 bits, no float between, fall-backs, reports, refusals."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F_
from networks import Branches, live_norms
from torch import Tensor, nn

import hetconv_kernels as hk
from hetconv_kernels import models
from hetconv_kernels.errors import ArgumentError, InputTypeError, TraceError
from hetconv_kernels.models.resnet import BasicBlock, CifarResNet
from hetconv_kernels.nn import (
    Dequantize,
    FusedConv2d,
    Quantize,
    QuantizedAdd,
    QuantizedConv2d,
    QuantizedLinear,
    Requantize,
)


class Tiny(nn.Module):
    """A convolution, a ReLU and a fully connected layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F_.relu(self.conv(x)).mean((2, 3)))


class Joined(nn.Module):
    """Two branches of different sizes of numbers, concatenated; a sum; a split; a view."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1)
        self.c, self.d = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.fc = nn.Linear(4 * 16, 5)
        with torch.no_grad():
            self.b.weight.mul_(10)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([self.a(x), F_.relu6(self.b(x))], 1)
        y = F_.relu(self.c(F_.max_pool2d(y, 2)) + F_.max_pool2d(y, 2))
        first, second = y.chunk(2, 1)
        y = F_.pad(self.d(second), (0, 1, 0, 0))[:, :, :, 1:] + first
        return self.fc(y.view(y.size(0), -1))


NETWORKS = {
    "tiny": (Tiny, (3, 6, 6)),
    "digits": (lambda: models.digits_net(8), (1, 8, 8)),
    "dncnn": (lambda: models.dncnn(4, 8, 1), (1, 12, 12)),
    "resnet18": (lambda: models.ResNet(BasicBlock, (1, 1, 1, 1), 10), (3, 32, 32)),
    "cifar resnet": (lambda: CifarResNet(1), (3, 16, 16)),
    "densenet": (lambda: models.DenseNet((2, 2), growth=4, stem=8, num_classes=5), (3, 16, 16)),
    "mobilenet": (lambda: models.mobilenet(10, width=0.25), (3, 32, 32)),
    "joined": (Joined, (3, 8, 8)),
    "branches": (Branches, (3, 8, 8)),
}  # fmt: skip
# Networks that run with no float between, by the number of their conversions: one to enter, and
# one layer that gives float32.
ALL_INTEGER = {"tiny", "digits", "resnet18", "cifar resnet", "mobilenet", "joined", "dncnn"}


def network(name: str) -> tuple[nn.Module, list[Tensor]]:
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    model = make().eval()
    live_norms(model)
    return model, [torch.randn(4, *shape) for _ in range(2)]


def quantize(model: nn.Module, batches, **options) -> hk.quantization.QuantizeReport:
    return hk.quantize(model, batches, measure=False, **options)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_in_8_bits_computes_what_it_computed(name: str) -> None:
    model, batches = network(name)
    before = copy.deepcopy(model.state_dict())
    report = quantize(model, batches)
    assert all(row.integer for row in report.layers), str(report)
    assert report.sqnr_db > 25
    fresh = torch.randn(3, *batches[0].shape[1:], generator=torch.Generator().manual_seed(9))
    truth, result = model(fresh).detach(), report.model(fresh)
    assert result.dtype == torch.float32
    assert result.shape == truth.shape
    assert float((result - truth).square().mean()) < float(truth.square().mean()) / 100
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    if name in ALL_INTEGER:
        assert report.conversions == 2, str(report.model)


@pytest.mark.parametrize("name", sorted(ALL_INTEGER))
def test_all_that_flows_between_the_layers_is_integers(name: str) -> None:
    model, batches = network(name)
    made = quantize(model, batches).model
    layers = [m for m in made.modules() if isinstance(m, QuantizedConv2d | QuantizedLinear)]
    dtypes: list[torch.dtype] = []
    for layer in layers:
        layer.register_forward_hook(lambda m, args, y: dtypes.append(y.dtype))
    made(batches[0])
    assert dtypes[:-1] == [torch.uint8] * (len(layers) - 1)
    assert sum(isinstance(m, Quantize) for m in made.modules()) == 1
    assert not any(isinstance(m, Dequantize) for m in made.modules())


@pytest.mark.parametrize("rule", ["het", "self-grouped", "grouped"])
def test_compressed_networks_keep_their_supports(rule: str) -> None:
    model, batches = network("cifar resnet")
    chosen = {
        "het": hk.rules.het(p=4),
        "self-grouped": hk.rules.supports({
            "layer1.0.conv1": hk.Support.self_grouped(
                [0, 1] * 8, torch.rand(2, 16).gt(0.5).numpy(), 3),
        }),
        "grouped": lambda name, module: None,
    }  # fmt: skip
    if rule == "grouped":
        model.layer1[0].conv1 = nn.Conv2d(16, 16, 3, padding=1, groups=4, bias=False)
        model.eval()
    converted = hk.convert(model, chosen[rule]).model.eval()
    report = quantize(converted, batches)
    x = batches[0]
    assert hk.stats.macs(report.model, x) == hk.stats.macs(report.optimized, x)
    assert report.sqnr_db > 20
    live = {n: m.support.live for n, m in report.model.named_modules() if hasattr(m, "support")}
    assert live["layer1.0.conv1"] < 16 * 16 * 9
    weight = report.model.get_submodule("layer1.0.conv1").weight
    assert weight.dtype == torch.int8
    assert weight.shape == (live["layer1.0.conv1"],)


@pytest.mark.parametrize("observer", ["minmax", "percentile", "mse"])
@pytest.mark.parametrize("activations", [torch.uint8, torch.int8], ids=str)
def test_every_observer_and_activation_dtype(observer: str, activations: torch.dtype) -> None:
    model, batches = network("digits")
    report = quantize(model, batches, observer=observer, activations=activations)
    assert report.sqnr_db > 20
    dtypes = {m.x.dtype for m in report.model.modules() if isinstance(m, QuantizedConv2d)}
    assert dtypes == {activations}
    assert observer in str(report)


def test_layers_that_only_a_concatenation_reads_share_its_scale() -> None:
    model, batches = network("joined")
    made = quantize(model, batches).model
    assert made.a.y == made.b.y
    assert not any(isinstance(m, Requantize) for m in made.modules())


def test_a_residual_sum_is_part_of_the_convolution() -> None:
    model, batches = network("resnet18")
    made = quantize(model, batches).model
    assert not any(isinstance(m, QuantizedAdd) for m in made.modules())
    assert sum(m.residual is not None for m in made.modules() if hasattr(m, "residual")) == 4


def test_activations_that_are_no_clamp_stay_in_float_with_their_layer() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)
    ).eval()
    report = quantize(model, [torch.randn(2, 3, 9, 9)])
    first, *others = report.layers
    assert not first.integer
    assert "silu" in first.reason
    assert all(row.integer for row in others)
    assert isinstance(report.model.get_submodule("0"), FusedConv2d)


def test_a_layer_that_loses_too_much_stays_in_float() -> None:
    model, batches = network("tiny")
    with torch.no_grad():
        # One weight so large that the others of its filter become zero, on a channel that is zero.
        model.conv.weight[:, 0] = 1e4
    batches = [torch.cat([torch.zeros_like(x[:, :1]), x[:, 1:]], 1) for x in batches]
    report = quantize(model, batches)
    conv, fc = report.layers
    assert (conv.integer, fc.integer) == (False, True)
    assert conv.sqnr_db is not None
    assert conv.sqnr_db < 10
    assert "10 dB" in conv.reason
    assert report.sqnr_db > 25
    assert quantize(model, batches, min_sqnr=-100).layers[0].integer


def test_layers_in_skip_stay_in_float() -> None:
    model, batches = network("digits")
    report = quantize(model, batches, skip=["features.0"])
    assert [row.integer for row in report.layers].count(False) == 1
    assert isinstance(report.model.get_submodule("features.0"), FusedConv2d)
    assert report.layers[0].reason == "it is in skip"
    with pytest.raises(ArgumentError, match=r"features\.1"):
        quantize(model, batches, skip=["features.1"])


def test_an_overflowing_layer_stays_in_float_and_says_so() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU(), nn.Flatten(), nn.Linear(70000, 2)).eval()
    with torch.no_grad():
        model[3].weight.fill_(0.01)
    report = quantize(model, [torch.rand(1, 1, 1, 70000)])
    assert [row.integer for row in report.layers] == [True, False]
    assert "overflow" in report.layers[1].reason


def test_layers_go_back_to_float_until_the_accuracy_is_kept() -> None:
    model, batches = network("digits")

    def evaluate(net: nn.Module) -> float:
        integers = sum(isinstance(m, QuantizedConv2d) for m in net.modules())
        return 1.0 - 0.1 * integers

    report = quantize(model, batches, evaluate=evaluate, max_drop=0.25)
    assert report.accuracy == pytest.approx((1.0, 0.8))
    left = [row for row in report.layers if not row.integer]
    assert all("accuracy dropped" in row.reason for row in left)
    kept = [row.sqnr_db for row in report.layers if row.integer]
    assert max(row.sqnr_db for row in left) <= min(kept)
    hopeless = quantize(model, batches, evaluate=lambda net: -1.0 * (net is not report), max_drop=0)
    assert hopeless.accuracy == (-1.0, -1.0)


def test_the_report_has_all_that_was_measured() -> None:
    model, batches = network("digits")
    loader = [(x, torch.zeros(len(x))) for x in batches]  # labels are left out
    report = hk.quantize(model, loader, evaluate=lambda net: float(net(batches[0]).argmax(1)[0]))
    text = str(report)
    for part in ("features.0", "SQNR dB", "uint8", "accuracy", "bytes", "ms", "8 images"):
        assert part in text
    assert report.timings is not None
    before, after = report.bytes
    assert before / 4 < after < before / 3
    assert json.loads(json.dumps(report.to_dict()))["layers"][0]["name"] == "features.0"


def test_the_parts_that_can_be_traced_are_quantised() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))

        def forward(self, x: Tensor) -> Tensor:
            y = self.body(x)
            return y if float(y.detach().sum()) > 1e9 else -y

    report = quantize(Branching().eval(), [torch.randn(2, 3, 9, 9)])
    assert [(row.name, row.integer) for row in report.layers] == [
        ("body.0", True), ("body.2", True),
    ]  # fmt: skip
    assert report.sqnr_db > 25


# Tracing and compiling ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["digits", "joined"])
def test_the_integer_network_compiles_exports_and_copies(name: str) -> None:
    model, batches = network(name)
    made, x = quantize(model, batches).model, batches[0]
    truth = made(x)
    assert torch.equal(torch.compile(made, backend="aot_eager", fullgraph=True)(x), truth)
    assert torch.equal(torch.export.export(made, (x,)).module()(x), truth)
    assert torch.equal(copy.deepcopy(made)(x), truth)


def test_the_integer_network_compiles_with_inductor() -> None:
    model, batches = network("joined")
    made, x = quantize(model, batches).model, batches[0]
    torch._dynamo.reset()
    with torch.no_grad():
        assert torch.equal(torch.compile(made, fullgraph=True)(x), made(x))


def test_autocast_leaves_integers_alone() -> None:
    model, batches = network("digits")
    made, x = quantize(model, batches).model, batches[0]
    with torch.no_grad():
        expected = made(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(made(x), expected)


def test_layouts_of_the_input_do_not_matter() -> None:
    model, batches = network("joined")
    made, x = quantize(model, batches).model, batches[0]
    assert torch.equal(made(x.to(memory_format=torch.channels_last)), made(x))


# Refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("batches", [[], [torch.zeros(0, 3, 6, 6)]])
def test_without_images_nothing_can_be_calibrated(batches) -> None:
    with pytest.raises(ArgumentError, match="calibration batches"):
        quantize(Tiny().eval(), batches)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_images_that_are_not_finite_are_refused_by_name(bad: float) -> None:
    x = torch.randn(2, 3, 6, 6)
    x[1, 2, 3, 3] = bad
    with pytest.raises(ArgumentError, match=r"x: .*NaN or Inf"):
        quantize(Tiny().eval(), [torch.randn(2, 3, 6, 6), x])


def test_bad_arguments_are_refused_with_the_way_out() -> None:
    model, batches = Tiny().eval(), [torch.randn(2, 3, 6, 6)]
    with pytest.raises(ArgumentError, match=r"dtype.*'int8'.*hk\.optimize.*bfloat16"):
        quantize(model, batches, dtype="int4")
    with pytest.raises(ArgumentError, match="observer"):
        quantize(model, batches, observer="entropy")
    with pytest.raises(InputTypeError, match="activations"):
        quantize(model, batches, activations=torch.int16)
    with pytest.raises(ArgumentError, match="training mode"):
        quantize(Tiny(), batches)
    with pytest.raises(InputTypeError, match=r"float64.*\.float\(\)"):
        quantize(Tiny().double().eval(), batches)
    with pytest.raises(ArgumentError, match="evaluate"):
        quantize(model, batches, max_drop=0.1)
    with pytest.raises(ArgumentError, match="at least one convolution"):
        quantize(nn.Sequential(nn.ReLU()).eval(), batches)


def test_a_network_that_cannot_be_traced_says_why() -> None:
    class Opaque(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) if float(x.sum()) > 0 else x

    with pytest.raises(TraceError, match=r"Opaque.*traced"):
        quantize(Opaque().eval(), [torch.ones(1, 3, 4, 4)])


def test_a_network_in_8_bits_is_not_quantised_optimised_or_made_plain_again() -> None:
    model, batches = network("tiny")
    made = quantize(model, batches).model
    for again in (
        lambda: quantize(made, batches),
        lambda: hk.optimize(made, batches[0]),
        lambda: hk.export.plain(made),
    ):
        with pytest.raises(InputTypeError, match="8 bits"):
            again()
    assert hk.export.support_layers(made) == ["conv", "fc"]


def test_an_exported_network_takes_any_batch() -> None:
    model, batches = network("digits")
    made, x = quantize(model, batches).model, batches[0]
    dynamic = ({0: torch.export.Dim.AUTO},)
    program = torch.export.export(made, (x,), dynamic_shapes=dynamic).module()
    assert torch.equal(program(x[:3]), made(x[:3]))
