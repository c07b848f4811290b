# SPDX-License-Identifier: Apache-2.0
"""What is measured, as data: layers, their Supports, and what is expected of them.

A case says nothing of how it is run. `CPU_CASES` and `GPU_CASES` are all of them; the ones with
``quick`` make up the default run. Cases that are expected to lose against the dense convolution are
here on purpose: a table without them would mislead.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any, Literal

import numpy as np
import torch

import hetconv_kernels as hk
from benchmarks.shapes import _QUICK, NETWORK_SHAPES, ODD_SHAPES, SELF_GROUPED
from benchmarks.supports import self_grouped, trained

Kind = Literal[
    "dense", "het", "grouped", "self_group", "trained_group", "learned_groups", "irregular"
]
PYTORCH = "https://github.com/pytorch/pytorch/issues/"


@dataclass(frozen=True)
class SupportSpec:
    """Which Support a case has, in words; `build` makes it.

    Attributes:
        kind: ``dense``; ``het`` (value: p); ``grouped`` (value: groups); ``self_group`` (value:
            per cent pruned, by the steps of arXiv 2009.13803 on Gaussian weights);
            ``trained_group`` (value: the same, of the network of `benchmarks.train_masks`);
            ``learned_groups`` (value: groups, each reading its own 1/groups of the channels, drawn
            at random, as CondenseNet learns them); ``irregular`` (value: per cent of single weights
            that live).
        value: see kind.
        order: the channel order of a HetConv.
        seed: of the weights or the draw.
    """

    kind: Kind
    value: int = 1
    order: str = "blocked"
    seed: int = 0

    def build(self, channels: int, filters: int, kernel: int) -> hk.Support:
        """Makes the Support of this kind for a layer."""
        return _build(self, channels, filters, kernel)

    def __str__(self) -> str:
        short = {
            "self_group": "sg",
            "trained_group": "tsg",
            "learned_groups": "lg",
            "irregular": "live",
        }
        name = short.get(self.kind, self.kind)
        return name if self.kind == "dense" else f"{name}{self.value}"


@cache
def _build(spec: SupportSpec, channels: int, filters: int, kernel: int) -> hk.Support:
    generator = np.random.default_rng(spec.seed)
    if spec.kind == "dense":
        return hk.Support.dense(channels, filters, kernel)
    if spec.kind == "het":
        return hk.Support.het(channels, filters, kernel, p=spec.value, order=spec.order)
    if spec.kind == "grouped":
        return hk.Support.grouped(channels, filters, kernel, spec.value)
    if spec.kind == "learned_groups":
        labels = np.arange(filters) * spec.value // filters
        ranks = generator.permuted(np.tile(np.arange(channels), (spec.value, 1)), axis=1)
        return hk.Support.self_grouped(labels, ranks < channels // spec.value, kernel)
    if spec.kind == "irregular":
        shape = (filters, channels, kernel, kernel)
        return hk.Support.from_mask(generator.random(shape) < spec.value / 100)
    if spec.kind == "trained_group":
        return trained(spec.value, channels, filters)
    return self_grouped(spec.value, channels, filters, kernel, spec.seed)


@dataclass(frozen=True)
class Case:
    """One layer to measure.

    Attributes:
        name: unique; the id of the test.
        n: images.
        c: input channels.
        f: filters.
        h: input height, in pixels.
        w: input width, in pixels.
        k: kernel edge; the padding is ``k // 2``.
        support: which weights exist.
        stride: in pixels.
        dtype: of input and weight, as torch names it; ``int8`` has unsigned activations.
        memory_format: of the input of our layer (the dense baseline is measured in both).
        amp: whether the call runs under autocast to bfloat16.
        training: whether a sample is a training step (fprop, dgrad and wgrad).
        device: ``cpu`` or ``cuda``.
        expected: against the best dense convolution, once the engine for the device is there.
        quick: whether it is part of the default run.
        target: the speed-up over the best eager dense form that the engine is built to reach.
        target_float32: the speed-up over our own layer in float32 that is aimed at.
        issue: where a user reported the slowness that this case reproduces.
        note: how the case differs from the report, or why it is expected to lose.
    """

    name: str
    n: int
    c: int
    f: int
    h: int
    w: int
    k: int
    support: SupportSpec
    stride: int = 1
    dtype: str = "float32"
    memory_format: Literal["channels_last", "contiguous"] = "channels_last"
    amp: bool = False
    training: bool = False
    device: Literal["cpu", "cuda"] = "cpu"
    expected: Literal["win", "lose"] = "win"
    quick: bool = False
    target: float | None = None
    target_float32: float | None = None
    issue: str | None = None
    note: str = ""

    @property
    def output(self) -> tuple[int, int]:
        """Output height and width, in pixels."""
        pad = 2 * (self.k // 2)
        height, width = ((size + pad - self.k) // self.stride + 1 for size in (self.h, self.w))
        return height, width

    def build_support(self) -> hk.Support:
        """Makes the Support."""
        return self.support.build(self.c, self.f, self.k)

    def macs(self, live: int) -> int:
        """Counts the MACs of one sample when ``live`` weights exist; a training step is three."""
        height, width = self.output
        return live * self.n * height * width * (3 if self.training else 1)

    def bytes(self, live: int) -> int:
        """Counts the bytes that must move at least: input, output and weights, once a pass."""
        height, width = self.output
        item = 2 if self.amp else getattr(torch, self.dtype).itemsize
        once = self.n * (self.c * self.h * self.w + self.f * height * width) + live
        return item * once * (3 if self.training else 1)

    def to_dict(self) -> dict[str, Any]:
        """Returns all fields as plain data."""
        return asdict(self)


def _square(n: int, c: int, size: int, spec: SupportSpec, **more: Any) -> Case:
    """A 3×3 layer C -> C on a square image, named after its shape."""
    suffix = more.pop("suffix", "")
    k = more.pop("k", 3)
    kernel = "" if k == 3 else f"-k{k}"
    name = more.pop("name", f"{n}x{c}x{size}{kernel}-{spec}{suffix}")
    return Case(name, n, c, more.pop("f", c), size, size, k, spec, **more)


def het_case(p: int) -> SupportSpec:
    """A HetConv of part p."""
    return SupportSpec("het", p)


def sg(percent: int) -> SupportSpec:
    """A self-grouping convolution with that much pruned."""
    return SupportSpec("self_group", percent)


# --- CPU: the layers of the speed table, with what the engine is built to reach ------------------

_TABLE = {  # (channels, size): p=4, p=8, p=16, p=C, self-group 70 %, 90 %
    (64, 56): (2.6, 3.4, 4.0, 4.5, 2.6, 6.5),
    (128, 28): (2.75, 3.9, 4.8, 5.5, 3.0, 7.5),
    (256, 14): (2.8, 4.2, 5.2, 6.5, 2.9, 7.2),
    (512, 7): (3.0, 4.5, 6.0, 7.0, 2.9, 7.5),
}


def _table_cases() -> Iterator[Case]:
    for (c, size), targets in _TABLE.items():
        specs = (het_case(4), het_case(8), het_case(16), het_case(c), sg(70), sg(90))
        for spec, target in zip(specs, targets, strict=True):
            yield _square(8, c, size, spec, target=target)
        for percent, target in ((70, targets[4]), (90, targets[5])):
            yield _square(8, c, size, SupportSpec("trained_group", percent), target=target)
        for spec, target in ((het_case(4), targets[0]), (sg(70), targets[4])):
            yield _square(1, c, size, spec, target=round(0.9 * target, 2))
            yield _square(
                8, c, size, spec, suffix="-nchw", memory_format="contiguous",
                target=round(0.85 * target, 2),
            )  # fmt: skip
            yield _square(
                8, c, size, spec, suffix="-training", training=True, target=round(0.85 * target, 2)
            )


def _low_precision_cases() -> Iterator[Case]:
    """Layers in bfloat16 and int8; HetConv p=4 has a target over int8's dense form."""
    for c, size in _TABLE:
        for spec in (het_case(4), het_case(8), het_case(16), het_case(c), sg(70), sg(90)):
            yield _square(8, c, size, spec, suffix="-bf16", dtype="bfloat16", target_float32=1.7)
            yield _square(
                8, c, size, spec, suffix="-int8", dtype="int8", target_float32=3.3,
                target=2.6 if spec == het_case(4) else None,
            )  # fmt: skip


def _other_cases() -> Iterator[Case]:
    for spec in (het_case(4), het_case(8), sg(70), sg(90)):
        yield _square(8, 128, 28, spec, suffix="-stride2", stride=2)
        yield _square(8, 64, 28, spec, k=5)
        yield _square(8, 96, 28, spec)
        yield _square(8, 200, 14, spec)
    for spec, target in ((sg(70), 2.3), (sg(90), 5.0)):
        yield _square(8, 256, 56, spec, k=1, f=64, target=target)
        yield _square(8, 64, 56, spec, k=1, f=256, target=target)
        yield _square(8, 1024, 14, spec, k=1, f=256, target=target)
        yield _square(8, 256, 14, spec, k=1)
    for spec in (het_case(4), sg(70)):
        yield _square(8, 128, 28, spec, suffix="-amp", amp=True)
    yield _square(8, 100, 28, het_case(8), suffix="-uneven", f=90)
    yield _square(8, 128, 28, SupportSpec("het", 4, "interleaved"), suffix="-interleaved")
    yield _square(8, 512, 7, SupportSpec("irregular", 5), note="single weights, 95 % pruned")
    no_gain = "control: a dense layer should be no slower with this package"
    yield _square(8, 128, 28, SupportSpec("dense"), expected="lose", note=no_gain)
    yield Case(
        "lose-tiny",
        1,
        8,
        8,
        2,
        2,
        3,
        het_case(4),
        expected="lose",
        note="dominated by call overhead",
    )
    yield Case(
        "lose-stem", 8, 3, 64, 112, 112, 3, het_case(3), expected="lose",
        note="three channels: the memory traffic of the output decides",
    )  # fmt: skip
    yield _square(
        8, 128, 28, SupportSpec("irregular", 50), name="lose-irregular-50",
        expected="lose", note="half of the single weights, no structure",
    )  # fmt: skip


def _network_cases() -> Iterator[Case]:
    for name, (n, c, f, h, w, k, stride) in (NETWORK_SHAPES | ODD_SHAPES).items():
        for spec in (het_case(4), *([sg(70)] if name in SELF_GROUPED else [])):
            yield Case(f"{name}-{spec}", n, c, f, h, w, k, spec, stride=stride)
    yield Case("densenet-transition1-lg4", 8, 256, 128, 56, 56, 1, SupportSpec("learned_groups", 4))


def _reported_cases() -> Iterator[Case]:
    """One case for each report of a structured convolution that is slower than the dense one."""
    yield Case(
        "pytorch-73764", 1, 2560, 1280, 16, 16, 3, SupportSpec("grouped", 5),
        issue=PYTORCH + "73764", note="groups slower than separate convolutions; 16² for 32²",
    )  # fmt: skip
    yield Case(
        "pytorch-43544", 8, 128, 256, 24, 24, 3, SupportSpec("grouped", 4), stride=2, amp=True,
        issue=PYTORCH + "43544", note="one layer of the reported network",
    )  # fmt: skip
    yield Case(
        "pytorch-34977", 4, 2048, 2048, 14, 14, 3, SupportSpec("grouped", 32), stride=2,
        issue=PYTORCH + "34977", note="batch 4 for 100",
    )  # fmt: skip
    yield Case(
        "pytorch-70954", 1, 128, 128, 112, 112, 3, SupportSpec("grouped", 8), training=True,
        memory_format="contiguous", issue=PYTORCH + "70954", note="batch 1 for 16, 112² for 224²",
    )  # fmt: skip
    yield Case(
        "pytorch-53094", 4, 128, 128, 64, 64, 3, SupportSpec("grouped", 8), amp=True,
        memory_format="contiguous", issue=PYTORCH + "53094", note="batch 4 for 128",
    )  # fmt: skip
    yield Case(
        "nni-2225", 1, 20, 50, 12, 12, 5, SupportSpec("irregular", 50), memory_format="contiguous",
        expected="lose", issue="https://github.com/microsoft/nni/issues/2225",
        note="half of the single weights: no gain, but no loss either, unlike a mask per call",
    )  # fmt: skip
    repository = "irvinxav/Efficient-HetConv-Heterogeneous-Kernel-Based-Convolutions"
    yield Case(
        "hetconv-3", 32, 256, 256, 8, 8, 3, het_case(4),
        issue=f"https://github.com/{repository}/issues/3", note="VGG-16 on CIFAR-10, conv3",
    )  # fmt: skip
    yield Case(
        "sg-cnn-1", 8, 128, 128, 28, 28, 3, sg(70),
        issue="https://github.com/QingbeiGuo/SG-CNN/issues/1", note="ResNet-50 conv3, 3×3",
    )  # fmt: skip
    yield Case(
        "condensenet-3", 8, 512, 256, 14, 14, 1, SupportSpec("learned_groups", 4),
        issue="https://github.com/ShichenLiu/CondenseNet/issues/3", note="a learned group layer",
    )  # fmt: skip


# --- GPU: the shapes of ResNet-50 and VGG-16 -----------------------------------------------------

GPU_SHAPES = {  # name: channels, filters, input size, stride
    "r50-conv2": (64, 64, 56, 1),
    "r50-conv3s2": (128, 128, 56, 2),
    "r50-conv3": (128, 128, 28, 1),
    "r50-conv4s2": (256, 256, 28, 2),
    "r50-conv4": (256, 256, 14, 1),
    "r50-conv5s2": (512, 512, 14, 2),
    "r50-conv5": (512, 512, 7, 1),
    "vgg-conv1_2": (64, 64, 224, 1),
    "vgg-conv2_1": (64, 128, 112, 1),
    "vgg-conv2_2": (128, 128, 112, 1),
    "vgg-conv3_1": (128, 256, 56, 1),
    "vgg-conv3_2": (256, 256, 56, 1),
    "vgg-conv4_1": (256, 512, 28, 1),
    "vgg-conv4_2": (512, 512, 28, 1),
    "vgg-conv5": (512, 512, 14, 1),
}
GPU_TABLE_SHAPES = (
    "r50-conv2",
    "r50-conv3",
    "r50-conv4s2",
    "r50-conv4",
    "r50-conv5",
    "vgg-conv4_2",
)

# What the GPU engine is built to reach over cuDNN's dense convolution, on an H200 at batch 128.
GPU_TARGETS = {
    (f"gpu-{shape}-128-{spec}", "fprop"): target
    for shape in ("r50-conv3", "r50-conv4", "r50-conv5")
    for spec, target in ((het_case(4), 2.0), (het_case(8), 2.6))
} | {(f"gpu-{shape}-128-{het_case(4)}", "step"): 1.8 for shape in GPU_TABLE_SHAPES}


def _gpu_cases() -> Iterator[Case]:
    table = (SupportSpec("dense"), het_case(4), het_case(8), sg(70))
    more = (het_case(2), SupportSpec("grouped", 4), SupportSpec("grouped", 8), sg(90))
    for shape, (c, f, size, stride) in GPU_SHAPES.items():
        for n in (128, 32, 1):
            for spec in (*table, *more):
                yield Case(
                    f"gpu-{shape}-{n}-{spec}", n, c, f, size, size, 3, spec, stride=stride,
                    dtype="bfloat16", device="cuda",
                    expected="lose" if spec.kind == "dense" else "win",
                    quick=n == 128 and shape in GPU_TABLE_SHAPES and spec in table,
                )  # fmt: skip
    reported = {case.name: case for case in _reported_cases()}
    sizes: dict[str, dict[str, Any]] = {  # what was reported, in full
        "pytorch-73764": {"h": 32, "w": 32, "dtype": "float16"},
        "pytorch-43544": {},
        "pytorch-34977": {"n": 100, "dtype": "float16"},
        "pytorch-70954": {"n": 16, "h": 224, "w": 224},
        "pytorch-53094": {"n": 128},
    }
    for name, changes in sizes.items():
        whole: dict[str, Any] = {
            "name": f"gpu-{name}",
            "device": "cuda",
            "note": "",
            "quick": False,
            **changes,
        }
        yield replace(reported[name], **whole)


def _collect(cases: Iterator[Case]) -> tuple[Case, ...]:
    return tuple(replace(case, quick=case.quick or case.name in _QUICK) for case in cases)


CPU_CASES = _collect(
    iter(
        (
            *_table_cases(),
            *_low_precision_cases(),
            *_other_cases(),
            *_network_cases(),
            *_reported_cases(),
        )
    )
)
GPU_CASES = _collect(_gpu_cases())
