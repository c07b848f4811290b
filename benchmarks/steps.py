# SPDX-License-Identifier: Apache-2.0
"""Training steps of whole networks: forward, backward and SGD, ours beside dense and compositions.

A step is checked before it is timed: output, input gradient and the gradient of every live weight
against the masked dense network in float64, with the error that PyTorch makes in float32 as the
measure, as for networks in inference.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import hetconv_kernels as hk
from benchmarks import gate
from benchmarks.cases import SupportSpec
from benchmarks.networks import NetworkCase, converted
from hetconv_kernels import export, models

STEP_CASES = (
    NetworkCase("train-resnet20-het4", "resnet20", SupportSpec("het", 4), n=32, size=32),
    NetworkCase("train-vgg16_cifar-het4", "vgg16_cifar", SupportSpec("het", 4), n=16, size=32),
    NetworkCase(
        "train-dncnn-het4", "dncnn", SupportSpec("het", 4), n=8, size=40, channels=1,
        note="the paper's patches",
    ),
)  # fmt: skip
_MARGIN = 16.0
_FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


def build_step_networks(case: NetworkCase) -> dict[str, nn.Module]:
    """Builds the network dense, ours and as a composition, on the same seeded weights."""
    torch.manual_seed(0)
    dense = models.create(case.network).train()
    ours = converted(case, copy.deepcopy(dense))  # in place otherwise
    return {"dense": dense, "ours": ours, "composition": export.plain(ours, "composition")}


def check(networks: dict[str, nn.Module], x: Tensor) -> gate.Agreement:
    """Compares ours and the composition with the masked dense network in float64."""
    masked = export.plain(networks["ours"])
    exact, own = (_passed(copy.deepcopy(masked), x, d) for d in (torch.float64, torch.float32))
    eps, matches = torch.finfo(torch.float32).eps, []
    for form in ("ours", "composition"):
        found = _passed(copy.deepcopy(networks[form]), x, torch.float32)
        if form == "composition":  # its weights have other shapes
            found = {name: found[name] for name in ("y", "dx")}
        for name, value in found.items():
            mask = _mask(networks["ours"], name)
            true, rounded = (values[name].double() * mask for values in (exact, own))
            allowed = _MARGIN * (rounded - true).abs().max() + 64 * eps * true.abs().max()
            error = (value.double() * mask - true).abs().max()
            worst = float((error / allowed).nan_to_num(nan=float("inf")))
            matches.append(gate.Agreement(worst <= 1, worst, float(error)))
    return max(matches, key=lambda match: match.worst)


def variants(networks: dict[str, nn.Module], x: Tensor) -> dict[str, Callable[[], object]]:
    """Makes the calls that are timed, each on a network of its own."""
    found = {"ours": step(networks["ours"], x, torch.channels_last)}
    for role in ("dense", "composition"):
        for form, memory_format in _FORMATS.items():
            found[f"{role}:{form}"] = step(networks[role], x, memory_format)
    return found


def step(network: nn.Module, x: Tensor, memory_format: torch.memory_format) -> Callable[[], Tensor]:
    """Makes a call that does one step of SGD with momentum on a copy of the network."""
    network = copy.deepcopy(network).to(memory_format=memory_format)  # type: ignore[call-overload]
    x = x.contiguous(memory_format=memory_format)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-5, momentum=0.9)

    def run() -> Tensor:
        optimizer.zero_grad()
        loss = network(x).square().mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return run


def _passed(network: Any, x: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    network = network.to(dtype)
    x = x.detach().to(dtype, copy=True).requires_grad_()
    y = network(x)
    y.square().mean().backward()
    return {"y": y.detach(), "dx": x.grad, **dict(_gradients(network))}


def _gradients(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in network.named_parameters():
        if parameter.grad is not None:
            yield name, parameter.grad


def _mask(network: nn.Module, name: str) -> Tensor:
    """Returns which entries of a gradient count: those of live weights."""
    layer = name.rpartition(".")[0]
    module = network.get_submodule(layer) if layer else network
    if name.endswith(".weight") and isinstance(module, hk.nn.SupportConv2d):
        return torch.as_tensor(module.support.mask.copy()).double()
    return torch.ones((), dtype=torch.float64)
