# SPDX-License-Identifier: Apache-2.0
"""Whole networks: what is measured, as data, and the forms in which everybody runs them.

(a) *dense* is the network before our layers came in. (b) *composition* computes what ours computes,
out of PyTorch's own operators: grouped K×K plus 1×1 for HetConv, a gather and a convolution per
group for self-grouping. Both have their batch normalisation folded and nothing that only training
needs, so that no rival is slower than its user would make it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

import hetconv_kernels as hk
from benchmarks.cases import SupportSpec
from benchmarks.supports import self_grouped
from hetconv_kernels import export, models


@dataclass(frozen=True)
class NetworkCase:
    """One network to measure.

    Attributes:
        name: unique; the id of the test.
        network: one of `hk.models.names`.
        support: ``het`` or ``self_group`` for all its 3×3 convolutions but the stem.
        n: images.
        size: their height and width, in pixels; of photographs that are not square the height.
        width: their width where it is another.
        threads: of everybody; None is as many as PyTorch takes.
        channels: of the images.
        dtype: what everybody computes in, ``float32``, ``bfloat16`` or ``int8``.
        target_dense: the speed-up over the best (a) in that dtype that is aimed at.
        target_composition: the same over the best (b).
        note: what else there is to know.
        pointwise: whether self-grouping takes the 1×1 convolutions too, the shortcuts among them.
    """

    name: str
    network: str
    support: SupportSpec
    n: int = 8
    size: int = 224
    channels: int = 3
    dtype: Literal["float32", "bfloat16", "int8"] = "float32"
    target_dense: float | None = None
    target_composition: float | None = None
    note: str = ""
    width: int | None = None
    threads: int | None = None
    pointwise: bool = False

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The images.  # (N, C, H, W)"""
        return self.n, self.channels, self.size, self.width or self.size

    def to_dict(self) -> dict[str, Any]:
        """Returns all fields as plain data."""
        return asdict(self)


NETWORKS = (
    NetworkCase(
        "vgg16-het4", "vgg16", SupportSpec("het", 4), target_dense=3.3, target_composition=1.5
    ),
    NetworkCase(
        "resnet18-het4", "resnet18", SupportSpec("het", 4),
        target_dense=3.0, target_composition=1.45,
    ),
    NetworkCase(
        "vgg16-sg70", "vgg16", SupportSpec("self_group", 70),
        target_dense=3.2, target_composition=3.6,
        note="convolutions only; the fully connected layers stay dense",
    ),
    NetworkCase("resnet50-het4", "resnet50", SupportSpec("het", 4)),
    NetworkCase("densenet121-het4", "densenet121", SupportSpec("het", 4)),
    NetworkCase("dncnn-het4", "dncnn", SupportSpec("het", 4), n=1, size=256, channels=1),
    NetworkCase(
        "resnet50-sg70", "resnet50", SupportSpec("self_group", 70), pointwise=True,
        target_dense=2.1, target_composition=2.0, note="1x1 layers too",
    ),
    NetworkCase(
        "resnet50-sg70-b1", "resnet50", SupportSpec("self_group", 70), n=1, pointwise=True,
        target_dense=2.1, target_composition=2.0, note="1x1 layers too",
    ),
    NetworkCase(
        "resnet18-het4-int8", "resnet18", SupportSpec("het", 4), dtype="int8",
        target_dense=2.5, target_composition=1.5,
    ),
    NetworkCase(
        "vgg16-het4-int8", "vgg16", SupportSpec("het", 4), dtype="int8",
        target_dense=2.6, target_composition=1.4,
    ),
    NetworkCase(
        "vgg16-sg70-int8", "vgg16", SupportSpec("self_group", 70), dtype="int8",
        target_dense=2.2, target_composition=2.5,
    ),
    NetworkCase(
        "resnet18-het4-bf16", "resnet18", SupportSpec("het", 4), dtype="bfloat16",
        target_dense=2.3, target_composition=1.4,
    ),
    NetworkCase("vgg16-het4-bf16", "vgg16", SupportSpec("het", 4), dtype="bfloat16"),
    NetworkCase(
        "vgg16-sg70-bf16", "vgg16", SupportSpec("self_group", 70), dtype="bfloat16",
        target_dense=2.4, target_composition=2.5,
    ),
    # Latency: one image, on all threads and on one.
    NetworkCase(
        "resnet18-het4-b1", "resnet18", SupportSpec("het", 4), n=1,
        target_dense=2.6, target_composition=1.4,
    ),
    NetworkCase("resnet18-het4-b1-t1", "resnet18", SupportSpec("het", 4), n=1, threads=1),
    NetworkCase("resnet18-het4-int8-b1", "resnet18", SupportSpec("het", 4), n=1, dtype="int8"),
    NetworkCase(
        "resnet18-het4-int8-b1-t1", "resnet18", SupportSpec("het", 4), n=1, dtype="int8", threads=1
    ),
    NetworkCase(
        "resnet18-het4-192", "resnet18", SupportSpec("het", 4), n=4, size=192,
        target_dense=3.0, target_composition=1.45,
    ),
    NetworkCase(
        "resnet56-het4", "resnet56", SupportSpec("het", 4), n=64, size=32,
        target_dense=2.3, note="images of 32² and layers of 16 to 64 channels",
    ),
    # Large images, whose fresh outputs are paid for in page faults.
    NetworkCase(
        "dncnn-het4-512", "dncnn", SupportSpec("het", 4), n=1, size=512, channels=1,
        target_dense=3.0, target_composition=1.6,
    ),
    NetworkCase(
        "dncnn-het4-photo", "dncnn", SupportSpec("het", 4), n=1, size=427, width=640, channels=1,
        target_dense=3.0, target_composition=1.6,
    ),
    NetworkCase("resnet20-het4", "resnet20", SupportSpec("het", 4), size=32,
                note="small enough for the default run"),
)  # fmt: skip

Form = Literal["ours", "dense", "composition"]


def build_network(case: NetworkCase, form: Form, x: Tensor) -> nn.Module:
    """Builds a case's network in one of its forms, on seeded weights, in evaluation mode.

    All forms are in float32; `benchmarks.low_precision` brings them to the case's dtype. Images
    will be in channels_last, and so the example is: none has to be brought there.
    """
    example = x[:1].contiguous(memory_format=torch.channels_last)
    if form == "dense":
        return export.plain(hk.optimize(seeded_network(case), example).model)
    sparse = hk.optimize(converted(case, seeded_network(case)), example).model
    return sparse if form == "ours" else export.plain(sparse, "composition")


def seeded_network(case: NetworkCase) -> nn.Module:
    """Builds a case's dense network on seeded weights, in evaluation mode."""
    torch.manual_seed(0)
    return models.create(case.network).eval()


def converted(case: NetworkCase, network: nn.Module) -> nn.Module:
    """Gives the network's 3×3 convolutions the case's Support, all but the stem."""
    if case.support.kind == "het":
        return hk.convert(network, hk.rules.het(case.support.value)).model
    chosen = {name: self_grouped(*shape) for name, shape in self_grouped_layers(case, network)}
    return hk.convert(network, hk.rules.supports(chosen)).model


def self_grouped_layers(
    case: NetworkCase, network: nn.Module
) -> list[tuple[str, tuple[int, int, int, int, int]]]:
    """Lists the layers that self-grouping changes, with the key of each one's Support."""
    return [
        (name, (case.support.value, m.in_channels, m.out_channels, m.kernel_size[0], 0))
        for name, m in network.named_modules()
        if isinstance(m, nn.Conv2d)
        and m.in_channels > 3
        and (m.kernel_size == (3, 3) or (case.pointwise and m.kernel_size == (1, 1)))
    ]
