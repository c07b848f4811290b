# SPDX-License-Identifier: Apache-2.0
"""Networks whose weights are computed: copied, optimised, compacted, converted."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.spectral_norm import spectral_norm
from torch.nn.utils.weight_norm import weight_norm

import hetconv_kernels as hk
from hetconv_kernels.compression.measure import for_inference
from hetconv_kernels.errors import InputTypeError
from hetconv_kernels.graph.copying import copied, settle
from hetconv_kernels.packing import watched_packings


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        hk.nn.HetConv2d(8, 8, 3, padding=1, p=4),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )


def each(change: Callable[[nn.Module], Any]) -> Callable[[nn.Sequential], None]:
    def apply(model: nn.Sequential) -> None:
        for place in (0, 3, 6):
            change(model[place])

    return apply


CHANGES: dict[str, Callable[[nn.Sequential], None]] = {
    "pruned": each(lambda m: prune.l1_unstructured(m, "weight", 0.3)),
    "pruned with its bias": each(
        lambda m: [prune.l1_unstructured(m, name, 0.3) for name in ("weight", "bias")]
    ),
    "pruned twice": each(lambda m: [prune.random_unstructured(m, "weight", 0.3) for _ in range(2)]),
    "pruned by channels": each(lambda m: prune.ln_structured(m, "weight", 0.3, 2, 0)),
    "weight norm": each(weight_norm),
    "spectral norm": each(spectral_norm),
    "parametrised weight norm": each(parametrizations.weight_norm),
    "parametrised spectral norm": each(parametrizations.spectral_norm),
}


def changed(how: str) -> tuple[nn.Sequential, Tensor]:
    """A network that ran with gradients, and was trained a step after that."""
    model, x = network(), torch.randn(2, 3, 12, 12)
    CHANGES[how](model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x).square().sum().backward()
    optimizer.step()  # what the hooks computed is of before
    model.eval()
    model(x)
    optimizer.step()
    return model, x


def check_same(ours: nn.Module, model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(ours(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", CHANGES)
def test_a_network_with_computed_weights_is_copied(how: str) -> None:
    model, x = changed(how)
    twin = copied(model)
    check_same(twin, model, x)
    assert twin.state_dict().keys() == model.state_dict().keys()
    for (name, ours), (_, theirs) in zip(
        twin.named_parameters(), model.named_parameters(), strict=True
    ):
        assert ours is not theirs
        assert ours.requires_grad == theirs.requires_grad, name
    twin.train()(x).sum().backward()  # it trains, with what computes the weights
    assert all(p.grad is not None for p in twin.parameters() if p.requires_grad)


@pytest.mark.parametrize("how", CHANGES)
def test_what_a_copys_layers_hold_is_computed_from_the_weights_as_they_are(how: str) -> None:
    model, x = changed(how)
    twin = copied(model)  # before the original has computed them again
    model(x)
    for ours, theirs in zip(twin.modules(), model.modules(), strict=True):
        for name in ("weight", "bias"):
            if isinstance(getattr(theirs, name, None), Tensor):
                torch.testing.assert_close(getattr(ours, name), getattr(theirs, name))


OPERATIONS: dict[str, Callable[[nn.Module, Tensor], nn.Module]] = {
    "optimize": lambda model, x: hk.optimize(model, x).model,
    "compact": lambda model, x: hk.compact(model, x).model,
    "convert": lambda model, x: hk.convert(model, hk.rules.dense(), inplace=False).model,
    "plain": lambda model, x: hk.export.plain(model),
    "for_inference": lambda model, x: for_inference(model),
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("how", CHANGES)
def test_a_network_with_computed_weights_is_taken_by_every_operation(
    how: str, operation: str
) -> None:
    model, x = changed(how)
    before = {key: v.clone() for key, v in model.state_dict().items() if isinstance(v, Tensor)}
    check_same(OPERATIONS[operation](model, x), model, x)
    for key, value in before.items():
        assert torch.equal(model.state_dict()[key], value), f"{key} of the original was changed"
    model(x).sum().backward()  # the original still trains


@pytest.mark.parametrize("how", CHANGES)
def test_an_optimized_network_computes_no_weights_and_packs_none(how: str) -> None:
    model, x = changed(how)
    report = hk.optimize(model, x)
    assert {"0.weight", "3.weight", "6.weight"} <= set(report.settled)
    assert "made ordinary, once and for all: 0." in str(report)
    with torch.inference_mode():
        report.model(x)
        with watched_packings() as seen:
            report.model(x)
    assert not seen
    assert not any(m._forward_pre_hooks for m in report.model.modules())


@pytest.mark.parametrize("how", CHANGES)
def test_settled_weights_are_ordinary_parameters(how: str) -> None:
    model, x = changed(how)
    twin = copied(model)
    names = settle(twin)
    assert set(names) <= dict(twin.named_parameters()).keys()
    check_same(twin, model, x)
    assert settle(twin) == ()
    check_same(copy.deepcopy(twin), model, x)


def test_a_tensor_with_a_history_in_any_attribute_is_copied_without_it() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    model.seen = {"last": [model[0](torch.ones(1, 3))]}
    twin = copied(model)
    assert torch.equal(twin.seen["last"][0], model.seen["last"][0])
    assert twin.seen["last"][0].is_leaf
    assert not model.seen["last"][0].is_leaf


def test_what_cannot_be_copied_is_one_sentence() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3)).eval()
    model.lock = threading.Lock()
    for operation in OPERATIONS.values():
        with pytest.raises(InputTypeError, match=r"copy.deepcopy refuses.*lock"):
            operation(model, torch.randn(1, 3, 6, 6))
