# SPDX-License-Identifier: Apache-2.0
"""Networks of timm, torchvision and segmentation_models_pytorch go the whole way, or are refused.

Each is converted, optimised, compressed by one quick step, saved, loaded and written as ONNX, and
what comes out is compared. What is refused is listed here, with the reason that the user reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from external import NETWORKS, External
from torch import Tensor, nn

import hetconv_kernels as hk
from hetconv_kernels.compression import ADMM, Het, Method, WeakSubnetwork
from hetconv_kernels.errors import ArgumentError, FileError

pytestmark = pytest.mark.slow  # minutes, and three packages that are not small

# Networks in which no filter can be removed, by the first reason that is given.
NO_FILTER_GOES = {
    "timm:vit_tiny_patch16_224": "may mix its channels",  # tokens
}
# How many times fewer MACs WSP at 70 % leaves, at least, where widths go through gates, shuffles,
# splits, parallel branches and normalisations that are functions, and in networks of segmentation.
FEWER = {
    "timm:mobilenetv3_small_100": 1.8,
    "timm:efficientnet_b0": 1.8,
    "timm:res2net50_26w_4s": 1.8,
    "timm:repvgg_a0": 1.8,
    "timm:resnetv2_50": 1.8,
    "torchvision:shufflenet_v2_x0_5": 1.8,
    "torchvision:lraspp_mobilenet_v3_large": 3.0,
    "smp:Unet:resnet18": 2.4,
    "smp:FPN:mobilenet_v2": 2.1,
    "smp:DeepLabV3Plus:resnet18": 3.4,
}
# Networks whose own code torch.fx cannot follow: a file of theirs needs the class, or an example.
NEEDS_THE_CLASS = {"smp:FPN:mobilenet_v2", "smp:DeepLabV3Plus:resnet18"}
# Relative to the largest value: float32 in another order of sums.
TOLERANCE = 1e-4


def leaves(y: Any) -> Iterator[Tensor]:
    """Lists the tensors of an output, in order."""
    if isinstance(y, Tensor):
        yield y
    else:
        for part in y.values() if isinstance(y, Mapping) else y:
            yield from leaves(part)


def apart(one: Any, two: Any) -> float:
    """Returns the largest difference of two outputs, relative to the largest value."""
    pairs = list(zip(leaves(one), leaves(two), strict=True))
    assert pairs
    assert all(a.shape == b.shape and b.isfinite().all() for a, b in pairs)
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-6)) for a, b in pairs)


def equal(one: nn.Module, two: nn.Module, x: Tensor) -> bool:
    """Tells whether two networks give the same, bit by bit."""
    pairs = zip(leaves(one(x)), leaves(two(x)), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def mean_square(model: nn.Module, images: Tensor) -> Tensor:
    """Stands for a loss: it reaches every output."""
    return torch.stack([y.square().mean() for y in leaves(model(images))]).sum()


def compressed(given: External, model: nn.Module, x: Tensor) -> nn.Module:
    """Compresses by one step: WSP; HetConv where no filter can go; ADMM without a kernel."""
    arguments: dict[str, Any] = {
        "data": [given.images(4)], "train_step": mean_square, "example": x, "measure": False,
        "progress": False,
    }  # fmt: skip
    if given.id in NO_FILTER_GOES:
        with pytest.raises(ArgumentError, match=NO_FILTER_GOES[given.id]):
            hk.compress(model, WeakSubnetwork(0.7, epochs=1), **arguments)
        method: Method = Het(p=2, epochs=1)
        if "vit" in given.id:  # all its layers but the first are fully connected
            with pytest.raises(ArgumentError, match="HetConv finds no layer to compress"):
                hk.compress(model, method, **arguments)
            method = ADMM(rates=(0.9,), updates=1, admm_epochs=1, retrain_epochs=1)
        report = hk.compress(model, method, **arguments)
    else:
        report = hk.compress(model, WeakSubnetwork(0.7, epochs=1), **arguments)
    least = FEWER.get(given.id, 1.001)
    assert report.macs[0] >= least * report.macs[1]
    assert report.difference < TOLERANCE
    return report.model.eval()


@pytest.mark.parametrize("given", NETWORKS, ids=[network.id for network in NETWORKS])
def test_a_network_of_another_package_goes_the_whole_way(given: External, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    model, x = given.create(), given.images()
    with torch.no_grad():
        het = hk.convert(model, hk.rules.het(p=4)).model.eval()
        assert apart(het(x), hk.export.plain(het)(x)) < TOLERANCE
        assert apart(hk.optimize(model, x).model(x), model(x)) < TOLERANCE
        fast = hk.optimize(het, x).model
        assert apart(fast(x), het(x)) < TOLERANCE
    small = compressed(given, model, x)
    for name, made in (("het", het), ("optimized", fast), ("compressed", small)):
        path = tmp_path / f"{name}.safetensors"
        hk.save(made, path)
        with torch.no_grad():
            if name == "het" and given.id in NEEDS_THE_CLASS:
                with pytest.raises(FileError, match=r"give load\(\.\.\., into=network\)"):
                    hk.load(path)
                hk.save(made, tmp_path / "graph.safetensors", example=x)
                assert apart(hk.load(tmp_path / "graph.safetensors")(x), made(x)) < TOLERANCE
            else:
                assert equal(hk.load(path), made, x)
        if name == "het":
            assert equal(hk.load(path, into=given.create()), het, x)
            continue
        hk.export.to_onnx(made, x, tmp_path / f"{name}.onnx")
        session = onnxruntime.InferenceSession(
            str(tmp_path / f"{name}.onnx"), providers=["CPUExecutionProvider"]
        )
        found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.no_grad():
            assert apart([torch.from_numpy(y) for y in found], made(x)) < TOLERANCE


def test_standardised_weights_are_computed_once_and_filters_go() -> None:
    given = External("timm", "resnetv2_50x1_bit")
    model, x = given.create(), given.images()
    plain = hk.convert(model, hk.rules.computed_weights()).model.eval()
    with torch.no_grad():
        assert apart(plain(x), model(x)) < TOLERANCE
        assert apart(hk.optimize(model, x).model(x), model(x)) < TOLERANCE
    report = hk.compress(
        plain, WeakSubnetwork(0.7, epochs=0), example=x, measure=False, progress=False
    )
    assert report.macs[0] >= 1.8 * report.macs[1]
    assert report.difference < TOLERANCE
    norm = report.model.get_submodule("stages.0.blocks.0.norm2")  # a GroupNormAct: groups are gone
    assert type(norm) is type(plain.get_submodule("stages.0.blocks.0.norm2"))
    assert norm.num_channels < 64


def test_what_is_listed_as_refused_is_there() -> None:
    names = {network.id for network in NETWORKS}
    assert len(names) == len(NETWORKS) >= 20
    assert names >= NO_FILTER_GOES.keys() | NEEDS_THE_CLASS
