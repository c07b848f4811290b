# SPDX-License-Identifier: Apache-2.0
"""Training under fake quantisation gives the integer network; and what 8 bits cost, in accuracy."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F_
from compressing import tiny
from networks import live_norms
from torch import Tensor, nn

import hetconv_kernels as hk
from hetconv_kernels import models
from hetconv_kernels.errors import ArgumentError
from hetconv_kernels.nn import Dequantize, Quantize, QuantizedConv2d
from hetconv_kernels.nn.quantized_layer import QuantizedLayer
from hetconv_kernels.quantization import Scale, convert, prepare
from hetconv_kernels.quantization.fake import FakeQuantizedLayer, fake_quantize

SCALE = Scale(0.1, 20)


def test_fake_quantisation_gives_the_numbers_of_the_integers() -> None:
    x = torch.randn(2, 3, 20, 20) * 20
    assert torch.allclose(fake_quantize(x, SCALE), Dequantize(SCALE)(Quantize(SCALE)(x)))


def test_gradients_go_straight_through_where_nothing_saturates() -> None:
    x = torch.tensor([-3.0, -1.96, 0.0, 5.03, 23.4, 24.0], requires_grad=True)
    fake_quantize(x, SCALE).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 1, 0]


class Small(nn.Module):
    """A residual sum, pooling, a concatenation and a fully connected layer, with normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.left = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.right = nn.Conv2d(8, 4, 1)
        self.last = nn.Conv2d(12, 8, 3, padding=1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F_.max_pool2d(self.stem(x), 2)
        y = torch.cat([F_.relu(self.left(x) + x), self.right(x)], 1)
        return self.fc(F_.relu6(self.last(y)).mean((2, 3)))


def small() -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    model = Small().eval()
    live_norms(model)
    return hk.convert(model, hk.rules.het(p=2)).model.eval(), [torch.randn(8, 3, 8, 8)]


def assert_the_same_within_a_step(fake: nn.Module, integers: nn.Module, x: Tensor) -> None:
    """Compares the outputs of every layer, each from the inputs that the integer network has."""
    seen: dict[str, tuple[tuple[Tensor, ...], Tensor]] = {}
    hooks = [
        m.register_forward_hook(lambda m, args, y, name=n: seen.update({name: (args, y)}))
        for n, m in integers.named_modules()
        if hasattr(m, "weight_scale")
    ]
    integers(x)
    for hook in hooks:
        hook.remove()
    assert seen
    layers = dict(integers.named_modules())
    for name, (given, y) in seen.items():
        layer = layers[name]
        scales = (layer.x, layer.residual)
        numbers = [
            (q.float() - s.zero_point) * s.scale
            for q, s in zip(given, scales, strict=False)
            if s is not None
        ]
        result = fake.get_submodule(name)(*numbers)
        if layer.y is None:
            assert torch.allclose(result, y, rtol=1e-4, atol=1e-5), name
            continue
        steps = ((result / layer.y.scale + layer.y.zero_point).round() - y.float()).abs()
        assert int(steps.max()) <= 1, name
        # More than rare ties that float32 breaks the other way would be another computation.
        assert float((steps > 0).float().mean()) < 0.01, name


@torch.no_grad()
def test_the_fake_network_is_the_integer_network_within_a_step() -> None:
    model, batches = small()
    fake = prepare(model, batches).eval()
    integers = convert(fake)
    assert_the_same_within_a_step(fake, integers, batches[0])
    report = hk.quantize(model, batches, measure=False)
    assert torch.equal(integers(batches[0]), report.model(batches[0]))


def train(model: nn.Module, x: Tensor, target: Tensor, steps: int = 30) -> list[float]:
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(steps):
        loss = F_.mse_loss(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_training_lowers_the_loss_of_the_integer_network() -> None:
    model, batches = small()
    x, target = batches[0], torch.randn(8, 5)
    fake = prepare(model, batches)
    with torch.no_grad():
        before = float(F_.mse_loss(convert(fake)(x), target))
    losses = train(fake, x, target)
    integers = convert(fake)
    with torch.no_grad():
        after = float(F_.mse_loss(integers(x), target))
        assert_the_same_within_a_step(fake.eval(), integers, x)
    assert losses[-1] < 0.9 * losses[0]
    assert after < 0.9 * before


def test_training_keeps_the_supports_and_moves_every_layer() -> None:
    model, batches = small()
    fake = prepare(model, batches)
    before = copy.deepcopy(fake.state_dict())
    train(fake, batches[0], torch.randn(8, 5), 3)
    layers = {n: m for n, m in fake.named_modules() if isinstance(m, FakeQuantizedLayer)}
    assert len(layers) == 5
    made = convert(fake)
    for name, layer in layers.items():
        assert not torch.equal(layer.weight.detach(), before[f"{name}.weight"]), name
        assert made.get_submodule(name).support == layer.support
        assert made.get_submodule(name).weight.shape == (layer.support.live,)
    assert hk.stats.macs(made, batches[0]) == hk.stats.macs(model, batches[0])


def test_a_prepared_network_saves_its_state_and_deep_copies() -> None:
    model, batches = small()
    fake, other = prepare(model, batches), prepare(model, batches)
    train(fake, batches[0], torch.randn(8, 5), 2)
    other.load_state_dict(fake.state_dict())
    twin = copy.deepcopy(fake)
    with torch.no_grad():
        truth = convert(fake)(batches[0])
        assert torch.equal(convert(other)(batches[0]), truth)
        assert torch.equal(convert(twin)(batches[0]), truth)


def test_prepare_is_in_training_mode_and_convert_is_not() -> None:
    model, batches = small()
    fake = prepare(model, batches)
    assert fake.training
    made = convert(fake)
    assert not any(m.training for m in made.modules())
    assert fake.training
    assert not any(isinstance(m, FakeQuantizedLayer) for m in made.modules())


def test_weights_that_became_nan_are_refused_by_name() -> None:
    model, batches = small()
    fake = prepare(model, batches)
    with torch.no_grad():
        fake.get_submodule("fc").weight[3] = float("nan")
    with pytest.raises(ArgumentError, match=r"layer 'fc'.*NaN"):
        convert(fake)


# What 8 bits cost: digits and a denoiser ---------------------------------------------------------


@pytest.fixture(scope="module")
def digits() -> tuple[nn.Module, Tensor, Tensor, Tensor, Tensor]:
    """A network that is compressed (HetConv, p = 4), trained for some seconds, and its data."""
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    from hetconv_kernels.datasets import digits as load

    data = load()
    torch.manual_seed(0)
    model = hk.convert(models.digits_net(16), hk.rules.het(p=4)).model
    images, labels = data.train.images, data.train.labels
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    model.train()
    for epoch in range(8):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(epoch))
        for part in order.split(64):
            loss = F_.cross_entropy(model(images[part]), labels[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval(), images, labels, data.test.images, data.test.labels


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return float((model(images).argmax(1) == labels).double().mean())


@pytest.mark.parametrize("observer", ["minmax", "percentile", "mse"])
def test_digits_lose_at_most_three_tenths_of_a_point_after_calibration(digits, observer) -> None:
    model, images, _, unseen, labels = digits
    report = hk.quantize(model, images[:256].split(64), observer=observer, measure=False)
    assert all(row.integer for row in report.layers)
    before, after = accuracy(model, unseen, labels), accuracy(report.model, unseen, labels)
    assert before > 0.95, "a network that knows nothing has nothing to lose"
    assert before - after <= 0.003


def test_digits_lose_at_most_a_tenth_of_a_point_after_training(digits) -> None:
    model, images, labels, unseen, truth = digits
    fake = prepare(model, images[:256].split(64))
    optimizer = torch.optim.SGD(fake.parameters(), 1e-3, momentum=0.9)
    for part in torch.arange(len(images)).split(64):
        loss = F_.cross_entropy(fake(images[part]), labels[part])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    before, after = accuracy(model, unseen, truth), accuracy(convert(fake), unseen, truth)
    assert before - after <= 0.001


@pytest.fixture(scope="module")
def denoiser() -> tuple[nn.Module, Tensor, Tensor]:
    """A small HetConv denoiser of smooth images, trained for some seconds."""
    torch.manual_seed(0)
    model = hk.convert(models.dncnn(4, 16, 1, batch_norm=False), hk.rules.het(p=4)).model
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for step in range(120):
        clean, noisy = scenes(8, 24, step)
        loss = F_.mse_loss(model(noisy), clean)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), *scenes(8, 48, 10**6)


def scenes(count: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draws smooth images from 0 to 1, and the same with noise of a tenth."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 1, 5, 5, generator=generator)
    clean = F_.interpolate(coarse, size=size, mode="bicubic", align_corners=True).clamp(0, 1)
    return clean, clean + 0.1 * torch.randn(clean.shape, generator=generator)


@torch.no_grad()
def psnr(model: nn.Module, clean: Tensor, noisy: Tensor) -> float:
    return -10 * float(torch.log10(F_.mse_loss(model(noisy), clean)))


def test_a_denoiser_loses_at_most_two_tenths_of_a_decibel_after_calibration(denoiser) -> None:
    model, clean, noisy = denoiser
    batches = [scenes(8, 24, seed)[1] for seed in range(4)]
    report = hk.quantize(model, batches, measure=False)
    assert all(row.integer for row in report.layers)
    before = psnr(model, clean, noisy)
    assert before > 20 + 3, "the network denoises"
    assert before - psnr(report.model, clean, noisy) <= 0.2


def test_a_denoiser_loses_at_most_a_tenth_of_a_decibel_after_training(denoiser) -> None:
    model, clean, noisy = denoiser
    fake = prepare(model, [scenes(8, 24, seed)[1] for seed in range(4)])
    optimizer = torch.optim.Adam(fake.parameters(), 1e-4)
    for step in range(30):
        truth, given = scenes(8, 24, 1000 + step)
        loss = F_.mse_loss(fake(given), truth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert psnr(model, clean, noisy) - psnr(convert(fake), clean, noisy) <= 0.1


def test_a_compressor_comes_first_and_its_network_is_quantised(digits) -> None:
    model, images, labels = digits[:3]
    report = hk.compress(
        copy.deepcopy(model), hk.methods.SelfGrouping(target=0.5, epochs=0), example=images[:8],
        data=lambda epoch: [(images[:64], labels[:64])], measure=False, leave_plain=False,
    )  # fmt: skip
    made = hk.quantize(report.model.eval(), images[:128].split(64), measure=False)
    layers = [m for m in made.model.modules() if isinstance(m, QuantizedConv2d)]
    assert min(m.support.density for m in layers) < 0.7
    assert made.sqnr_db > 20


def test_a_network_is_compressed_then_trained_in_8_bits_then_converted() -> None:
    """One flow: the Supports that the compressor chose are those of the integers; dead is dead."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(16, 5, 6, 6, generator=generator)
    labels = torch.randint(0, 3, (16,), generator=generator)
    made = hk.compress(
        tiny(), hk.methods.SelfGrouping(target=0.4, epochs=0), example=x,
        data=lambda epoch: [(x, labels)], measure=False, compact=False, leave_plain=False,
    ).model  # fmt: skip
    chosen = [m.support for m in made.modules() if hasattr(m, "support")]
    assert min(support.density for support in chosen) < 0.7
    fake = prepare(made.eval(), [x])
    optimizer = torch.optim.SGD(fake.parameters(), 0.05)
    losses = []
    for _ in range(20):
        loss = F_.cross_entropy(fake(x), labels)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    integers = convert(fake)
    layers = [m for m in integers.modules() if isinstance(m, QuantizedLayer)]
    # Filters are put in order, and what nobody reads goes: here a number between the linear layers.
    assert [m.support.live for m in layers[:2]] == [support.live for support in chosen[:2]]
    assert [m.support.density < 0.9 for m in layers] == [s.density < 0.9 for s in chosen]
    for layer in layers:
        dead = torch.from_numpy(~layer.support.mask)
        assert not layer.dequantized()[0][dead].any()
    with torch.no_grad():
        trained, before = integers(x), hk.quantize(made, [x], measure=False).model(x)
        assert F_.cross_entropy(trained, labels) < F_.cross_entropy(before, labels)
        assert_the_same_within_a_step(fake, integers, x)
