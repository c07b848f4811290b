# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: of nn.Conv2d, of layers with their Support, in conflict, damaged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layers import (
    BUILDERS,
    IRREGULAR,
    NARROWER,
    C,
    F,
    assert_equals_conv2d,
    assert_projected,
    build,
    dead,
    image,
    self_grouped,
    through_file,
)
from torch import Tensor, nn

import hetconv_kernels as hk
from hetconv_kernels.errors import SupportError
from hetconv_kernels.nn import GroupedConv2d, HetConv2d, SelfGroupConv2d, SupportConv2d


@pytest.mark.parametrize("frozen", [False, True], ids=["dense", "frozen"])
@pytest.mark.parametrize("kind", BUILDERS)
def test_conv2d_checkpoints_load_strictly(kind: str, frozen: bool) -> None:
    layer = build(kind)
    conv = nn.Conv2d(C, F, 3, groups=layer.groups)
    state = conv.state_dict()
    before = state["weight"].clone()
    layer = layer.freeze() if frozen else layer
    assert str(layer.load_state_dict(state)) == "<All keys matched successfully>"
    assert torch.equal(state["weight"], before)
    expected = layer.thaw()
    assert_projected(expected)
    assert torch.equal(expected.weight, before.masked_fill(dead(layer), 0))
    assert_equals_conv2d(layer, image())


SAVED = {
    "support": lambda: SupportConv2d(C, F, 3, support=NARROWER),
    "selfgroup": lambda: SelfGroupConv2d(C, F, 3, support=NARROWER),
    "het": lambda: build("het"),
    "het-uneven-interleaved": lambda: build("het-uneven-interleaved"),
    "grouped": lambda: build("grouped"),
}


# Copying into a meta tensor does nothing, in nn.Conv2d too.
@pytest.mark.parametrize(
    ("target", "assign"),
    [("dense", False), ("dense", True), ("frozen", False), ("frozen", True), ("meta", True)],
    ids=["dense-copy", "dense-assign", "frozen-copy", "frozen-assign", "meta-assign"],
)
@pytest.mark.parametrize("source", ["dense", "frozen"])
@pytest.mark.parametrize("kind", BUILDERS)
def test_checkpoints_carry_the_support(kind: str, source: str, target: str, assign: bool) -> None:
    saved = SAVED[kind]()
    y = saved(image())
    state = through_file((saved.freeze() if source == "frozen" else saved).state_dict())
    layer = build(kind, device="meta" if target == "meta" else None)
    if target == "frozen":
        layer.freeze()
    given = state["weight"].clone()
    assert str(layer.load_state_dict(state, assign=assign)) == "<All keys matched successfully>"
    assert layer.support == saved.support
    assert layer.frozen == (target == "frozen")
    torch.testing.assert_close(layer(image()), y)
    torch.testing.assert_close(layer.thaw()(image()), y)
    assert layer.weight.requires_grad
    assert_equals_conv2d(layer, image())
    assert torch.equal(state["weight"], given)


def test_assign_takes_the_dtype_and_leaves_the_given_tensor_alone() -> None:
    layer = build("support")
    given = torch.randn(F, C, 3, 3, dtype=torch.float64).to(memory_format=torch.channels_last)
    before = given.clone()
    bias = torch.randn(F, dtype=torch.float64)
    layer.load_state_dict({"weight": given, "bias": bias}, assign=True)
    assert layer.weight.dtype == torch.float64
    assert layer.weight.stride() == given.stride()
    assert_projected(layer)
    with torch.no_grad():
        layer.weight.zero_()
    assert torch.equal(given, before)


def test_a_model_of_layers_goes_through_a_file() -> None:
    def model() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, C, 3), build("het"), nn.BatchNorm2d(F), nn.Sequential(nn.ReLU())
        )

    first, second = model(), model()
    state = first.state_dict()
    keys = [key for key in state if "extra" in key]
    assert keys == ["1._extra_state"]
    second.load_state_dict(through_file(state))
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(second.eval()(x), first.eval()(x))
    assert list(state) == list(first.state_dict())  # loading left the given dictionary alone


def test_state_dict_of_parameters_with_gradients() -> None:
    source, layer = build("support"), build("support")
    state = source.state_dict(keep_vars=True)
    layer.load_state_dict(state, assign=True)
    assert layer.weight.is_leaf
    layer(image()).sum().backward()
    assert layer.weight.grad is not None
    assert source.weight.grad is None


def test_a_support_without_weights_projects_the_present_ones() -> None:
    layer = build("support")
    state = SAVED["support"]().state_dict()
    del state["weight"]
    result = layer.load_state_dict(state, strict=False)
    assert result.missing_keys == ["weight"]
    assert layer.support == NARROWER
    assert_projected(layer)


@pytest.mark.parametrize("frozen", [False, True], ids=["dense", "frozen"])
@pytest.mark.parametrize(
    ("layer", "saved", "message"),
    [
        (
            lambda: HetConv2d(C, F, 3),
            lambda: HetConv2d(C, F, 3, order="interleaved"),
            r"received Support.het.p=4, interleaved.*expected weights within Support.het.p=4, block"
            r".*order and p that a checkpoint was trained with",
        ),
        (
            lambda: HetConv2d(C, F, 3, p=4),
            lambda: HetConv2d(C, F, 3, p=2),
            r"received Support.het.p=2",
        ),
        (
            lambda: SupportConv2d(C, F, 3, support=IRREGULAR),
            lambda: SupportConv2d(F, C, 3, support=hk.Support.dense(F, C, 3)),
            r"shape of a Support: received \(12, 8, 3, 3\), expected \(8, 12, 3, 3\)",
        ),
        (
            lambda: SelfGroupConv2d(C, F, 3, support=self_grouped()),
            lambda: SelfGroupConv2d(C, F, 5, support=self_grouped(5)),
            r"received \(8, 12, 5, 5\)",
        ),
        (
            lambda: GroupedConv2d(C, F, 3, groups=2),
            lambda: GroupedConv2d(C, F, 3, groups=4),
            r"received Support.grouped.groups=4",
        ),
    ],
    ids=["order", "p", "shape", "kernel", "groups"],
)
def test_conflicting_checkpoints(layer: Any, saved: Any, message: str, frozen: bool) -> None:
    target, source = layer(), saved()
    before, support = target.weight.detach().clone(), target.support
    state = (source.freeze() if frozen else source).state_dict()
    with pytest.raises(SupportError, match=message):
        target.load_state_dict(state)
    assert target.support is support
    assert torch.equal(target.weight, before)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"support": "{"}, "Support JSON cannot be read"),
        ({"support": IRREGULAR.to_json().replace('"digest": "', '"digest": "0')}, "digest"),
        ({"mask": 1}, "extra state: received dict, expected what get_extra_state saved"),
        ("text", "received str"),
        (torch.tensor([7, 8], dtype=torch.uint8), "extra state: received JSONDecodeError"),
        (torch.full((9,), float("nan")), "extra state"),
        (torch.full((2, 3), 255, dtype=torch.uint8), "extra state"),
    ],
    ids=["not-json", "digest", "other-keys", "not-a-dict", "tensor", "nan", "ones"],
)
def test_damaged_checkpoints(extra: Any, message: str) -> None:
    layer = build("support")
    state = layer.state_dict()
    state["_extra_state"] = extra
    with pytest.raises(SupportError, match=message):
        layer.load_state_dict(state)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(F, C, 5, 5), "size mismatch for weight"),
        (torch.zeros(IRREGULAR.live + 1), "size mismatch for weight"),
        (None, "expected torch.Tensor"),
    ],
    ids=["kernel", "live", "none"],
)
def test_weights_that_do_not_fit_are_reported_by_module(weight: Any, message: str) -> None:
    layer = build("support")
    state = {**layer.state_dict(), "weight": weight}
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(state)


def test_missing_and_unexpected_keys_are_still_reported() -> None:
    layer = build("support")
    state: dict[str, Tensor] = {"bias": torch.zeros(F), "other": torch.zeros(1)}
    with pytest.raises(RuntimeError, match=r"(?s)Unexpected.*\"other\"|Missing.*\"weight\""):
        layer.load_state_dict(state)
    result = layer.load_state_dict(state, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == (["weight"], ["other"])
