# SPDX-License-Identifier: Apache-2.0
"""What the tests of saved programs share: networks that can be saved, and files of them."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F_
from networks import network
from torch import Tensor, nn

import hetconv_kernels as hk

HEAD, DIGEST = 24, 16  # bytes of a file's head, and of the digest behind it


class Forked(nn.Module):
    """Two images in, three results out, and most steps that a program has."""

    def __init__(self) -> None:
        super().__init__()
        self.one = hk.nn.HetConv2d(4, 8, 3, padding=1, p=2)
        self.two = nn.Conv2d(3, 8, 3, padding=1)
        self.deep = hk.nn.HetConv2d(16, 16, 3, padding=1, p=4)
        self.up = nn.Upsample(scale_factor=2)
        self.head = nn.Linear(16, 5)

    def forward(self, a: Tensor, b: Tensor) -> Any:
        first = F_.leaky_relu(self.one(a), 0.1)
        second = F_.relu6(self.two(b) - first) * first
        both = torch.cat([first, second], 1)
        small = F_.relu(self.deep(F_.max_pool2d(both, 2)) + F_.avg_pool2d(both, 2))
        padded = F_.pad(small[:, :4, ::2], (1, 1, 0, 1), value=0.5)
        return self.up(small), padded, self.head(small.mean((2, 3)))


def saved_resnet18(size: int = 64) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return hk.models.resnet18(num_classes=10).eval(), torch.randn(2, 3, size, size)


def het(model: nn.Module) -> nn.Module:
    return hk.convert(model, hk.rules.het(p=4)).model.eval()


def small_chain() -> tuple[nn.Module, Tensor]:
    model, x = network("dncnn", share=0.0)
    return het(model), x


def forked() -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    images = torch.randn(2, 4, 8, 12), torch.randn(2, 3, 8, 12)
    return Forked().eval(), images


def _network(name: str) -> Callable[[], tuple[nn.Module, Any]]:
    def make() -> tuple[nn.Module, Any]:
        model, x = saved_resnet18() if name == "resnet18" else network(name, share=0.0)
        return het(model), x

    return make


def _bytes(name: str) -> Callable[[], tuple[nn.Module, Any]]:
    def make() -> tuple[nn.Module, Any]:
        model, x = _network(name)()
        return hk.quantize(model, [x, x * 0.5], measure=False).model, x

    return make


def _narrow() -> tuple[nn.Module, Any]:
    model, x = small_chain()
    return hk.optimize(model, x, torch.bfloat16).model, x


def _last() -> tuple[nn.Module, Any]:
    model, x = small_chain()
    return model, x.to(memory_format=torch.channels_last)


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    **{name: _network(name) for name in
       ("dncnn", "resnet18", "vgg16", "resnet20", "mobilenet", "lenet5")},
    **{f"int8 {name}": _bytes(name) for name in ("dncnn", "resnet18", "vgg16", "resnet20")},
    "bf16 dncnn": _narrow,
    "channels_last": _last,
    "forked": forked,
}  # fmt: skip


def raw(x: Tensor) -> bytes:
    """Returns the bytes of a tensor from its first element to its last."""
    extent = 1 + sum(s * (n - 1) for s, n in zip(x.stride(), x.shape, strict=True))
    return x.as_strided((extent,), (1,)).view(torch.uint8).numpy().tobytes()


def sealed(file: bytes) -> bytes:
    """Says a file's size and digest anew, as if it had been saved as it is."""
    head = file[:16] + struct.pack("<Q", len(file) - HEAD - DIGEST)
    rest = file[HEAD + DIGEST :]
    return head + hashlib.blake2b(head + rest, digest_size=DIGEST).digest() + rest
