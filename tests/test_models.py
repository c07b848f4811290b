# SPDX-License-Identifier: Apache-2.0
"""The networks: sizes that the world knows, names that checkpoints use, shapes that come out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hetconv_kernels import models, stats
from hetconv_kernels.errors import ArgumentError
from hetconv_kernels.models.resnet import BasicBlock, Bottleneck

IMAGENET, CIFAR, MNIST = (3, 224, 224), (3, 32, 32), (1, 28, 28)

# name, arguments, input, parameters, multiply-accumulates in convolutions and linear layers.
# Parameters: torchvision's model pages; the Caffe pruning papers (LeNet-5); Keras, trainable
# (MobileNet); cszn/DnCNN; akamaster's CIFAR networks. MACs: torchvision's pages ("GFLOPS"), in
# units of a million there.
PUBLISHED = [
    ("lenet5", {}, MNIST, 431_080, 2.293),
    ("vgg16", {}, IMAGENET, 138_357_544, 15_470.264),
    ("vgg16", {"batch_norm": True}, IMAGENET, 138_365_992, 15_470.264),
    ("vgg16_cifar", {}, CIFAR, 14_990_922, 313.464),
    ("resnet18", {}, IMAGENET, 11_689_512, 1_814.073),
    ("resnet34", {}, IMAGENET, 21_797_672, 3_663.761),
    ("resnet50", {}, IMAGENET, 25_557_032, 4_089.184),
    ("resnet20", {}, CIFAR, 269_722, 40.551),
    ("resnet56", {}, CIFAR, 853_018, 125.486),
    ("resnet110", {}, CIFAR, 1_727_962, 252.888),
    ("densenet121", {}, IMAGENET, 7_978_856, 2_834.162),
    ("densenet201", {}, IMAGENET, 20_013_928, 4_291.366),
    ("mobilenet", {}, IMAGENET, 4_231_976, 568.740),
    ("dncnn", {}, (1, 40, 40), 556_096, 886.579),
]


@pytest.mark.parametrize(
    ("name", "arguments", "size", "parameters", "megamacs"),
    PUBLISHED,
    ids=[f"{row[0]}{'-bn' if row[1] else ''}" for row in PUBLISHED],
)
def test_sizes_are_the_published_ones(name, arguments, size, parameters, megamacs):
    with torch.device("meta"):
        model = getattr(models, name)(**arguments)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert stats.live_parameters(model) == parameters
    assert round(stats.macs(model, size) / 1e6, 3) == megamacs


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("vgg16", ("features.28.weight", "classifier.6.bias")),
        ("resnet18", ("layer2.0.downsample.0.weight", "layer4.1.bn2.running_var", "fc.weight")),
        ("resnet50", ("layer1.0.downsample.1.bias", "layer3.5.conv3.weight", "bn1.weight")),
        (
            "densenet121",
            (
                "features.conv0.weight",
                "features.denseblock4.denselayer16.norm2.bias",
                "features.transition3.conv.weight",
                "features.norm5.running_mean",
                "classifier.weight",
            ),
        ),
        ("dncnn", ("dncnn.0.bias", "dncnn.47.weight")),
    ],
)
def test_state_dict_has_the_names_of_public_checkpoints(name, keys):
    with torch.device("meta"):
        names = getattr(models, name)().state_dict().keys()
    assert set(keys) <= names


@pytest.mark.parametrize(
    ("name", "arguments", "size"),
    [
        ("lenet5", {"image_channels": 2}, (2, 28, 28)),
        ("vgg16", {}, IMAGENET),
        ("vgg16_cifar", {}, CIFAR),
        ("vgg16_cifar", {"image_channels": 1, "batch_norm": False}, (1, 32, 32)),
        ("resnet18", {}, (3, 63, 80)),
        ("resnet50", {"image_channels": 4}, (4, 32, 32)),
        ("resnet56", {"image_channels": 1}, (1, 33, 31)),
        ("densenet201", {}, IMAGENET),
        ("mobilenet", {"width": 0.25}, (3, 64, 64)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_classifiers_give_one_logit_for_each_class(name, arguments, size):
    with torch.device("meta"):
        model = getattr(models, name)(num_classes=7, **arguments)
        assert model(torch.empty(2, *size)).shape == (2, 7)


SMALL = {
    "lenet5": (models.lenet5, (1, 28, 28)),
    "resnet20": (models.resnet20, CIFAR),
    "basic": (lambda: models.ResNet(BasicBlock, (1, 1, 0, 0)), CIFAR),
    "bottleneck": (lambda: models.ResNet(Bottleneck, (1, 1, 0, 0)), CIFAR),
    "densenet": (lambda: models.DenseNet((2, 2), growth=8), CIFAR),
    "mobilenet": (lambda: models.mobilenet(width=0.25), (3, 32, 32)),
    "dncnn": (lambda: models.dncnn(depth=4, channels=8), (1, 9, 9)),
}


@pytest.mark.parametrize("name", SMALL)
def test_every_parameter_learns(name):
    torch.manual_seed(0)
    make, size = SMALL[name]
    model = make()
    out = model(torch.randn(3, *size))
    assert out.isfinite().all()
    out.square().sum().backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
        assert parameter.grad.any()


@pytest.mark.parametrize("image_channels", [1, 3])
def test_dncnn_returns_the_image_without_the_noise(image_channels):
    torch.manual_seed(0)
    model = models.dncnn(depth=4, channels=8, image_channels=image_channels).eval()
    x = torch.randn(2, image_channels, 13, 17)
    assert model(x).shape == x.shape
    torch.testing.assert_close(model(x) + model.noise(x), x)
    assert model.noise(x).abs().max() > 0


def test_dncnn_depth_counts_convolutions():
    model = models.dncnn(depth=6, channels=8)
    assert sum(isinstance(m, nn.Conv2d) for m in model.modules()) == 6
    with pytest.raises(ArgumentError, match=r"depth of a DnCNN: received 1, expected at least 2"):
        models.dncnn(depth=1)


def test_cifar_shortcut_subsamples_and_pads_with_zeros():
    shortcut = models.resnet20().layer2[0].downsample
    x = torch.arange(2 * 16 * 6 * 6, dtype=torch.float32).reshape(2, 16, 6, 6) + 1
    y = shortcut(x)
    assert y.shape == (2, 32, 3, 3)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert not y[:, :8].any()
    assert not y[:, 24:].any()


def test_every_network_is_made_by_its_name_and_takes_its_images():
    functions = {name for name in models.__all__ if name[0].islower()}
    assert set(models.names()) == functions - {"create", "input_size", "names"}
    for name in models.names():
        with torch.device("meta"):
            model, image = models.create(name), torch.empty(1, *models.input_size(name))
        assert type(model) is type(getattr(models, name)())
        assert model.eval()(image).shape[0] == 1


def test_settings_of_a_network_reach_it():
    assert models.create("resnet20", num_classes=7)(torch.zeros(1, 3, 32, 32)).shape == (1, 7)


@pytest.mark.parametrize("function", [models.create, models.input_size])
def test_a_network_that_is_not_there_is_refused(function):
    with pytest.raises(ArgumentError, match="network: received 'resnet19', expected one of lenet5"):
        function("resnet19")
