# SPDX-License-Identifier: Apache-2.0
"""Sharded networks: what a plain copy takes over; test_ranks has those that are really sharded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressing import assert_same_network, tiny

from hetconv_kernels.compression.sharded import gathered, is_sharded
from hetconv_kernels.errors import InputTypeError


def test_a_plain_network_is_copied() -> None:
    model = tiny()
    assert not is_sharded(model)
    twin = gathered(model)
    assert_same_network(twin, model)
    with torch.no_grad():
        twin[0].weight.zero_()
    assert model[0].weight.any()


def hook_of(home: str, calls: list[str]) -> Any:
    def hook(module: Any, args: Any, *more: Any, **kwargs: Any) -> None:
        calls.append(home)

    hook.__module__ = home
    return hook


def test_hooks_of_fsdp_go_and_those_of_users_stay() -> None:
    model, calls = tiny(), []
    for home in ("torch.distributed.fsdp.somewhere", "mine"):
        model[0].register_forward_pre_hook(hook_of(home, calls), with_kwargs=True)
        model[0].register_forward_hook(hook_of(home, calls), always_call=True)
        model[3].register_state_dict_pre_hook(hook_of(home, calls))
    twin = gathered(model)
    twin(torch.randn(1, 5, 6, 6))
    twin.state_dict()
    assert calls == ["mine"] * 3
    assert [len(v) for k, v in vars(twin[0]).items() if "with_kwargs" in k] == [0, 1]
    calls.clear()
    model(torch.randn(1, 5, 6, 6))
    assert len(calls) == 4  # the given one is as it was


def test_other_ways_of_sharding_are_refused() -> None:
    model = tiny()
    model[8].register_forward_hook(hook_of("torch.distributed.tensor.parallel", []))
    with pytest.raises(InputTypeError, match=r"not FSDP2's alone.*Compress before sharding"):
        gathered(model)
