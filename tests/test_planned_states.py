# SPDX-License-Identifier: Apache-2.0
"""Planned memory that is given back, switched off, copied, saved, compiled and exported; networks
that change their dtype or their mode between calls, and machines that have no memory left.
"""

from __future__ import annotations

import copy
import pickle
import sys
from typing import Any

import fresh
import pytest
import torch
from planning import (  # noqa: F401 (fixtures are asked for by name)
    arenas,
    engine,
    large,
    needs_engine,
    optimized,
    poisoned,
    small,
    unplanned,
)
from programs import program_of
from torch import Tensor, nn

import hetconv_kernels as hk
from hetconv_kernels import io
from hetconv_kernels.errors import InputTypeError
from hetconv_kernels.graph.planned import plan_memory, release_memory

pytestmark = needs_engine


def test_memory_is_given_back_on_request_and_taken_again() -> None:
    fast, x = large()
    with torch.no_grad():
        first = fast(x), fast(x)
        assert release_memory(fast) == 2 * x.numel() * 4
        assert release_memory(fast) == 0
        assert torch.equal(fast(x), first[1])
    assert len(arenas(fast)) == 1


class Residual(nn.Module):
    """Two layers and a sum, a layer of stride 2, an average and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.last = nn.Conv2d(4, 16, 3, padding=1), nn.Conv2d(16, 32, 3, 2, 1)
        self.a, self.b = (nn.Conv2d(16, 16, 3, padding=1) for _ in "ab")
        self.linear = nn.Linear(32, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.b(torch.relu(self.a(x))) + x)
        return self.linear(torch.relu(self.last(x)).mean((2, 3)))


def test_the_arena_in_8_bits_is_a_quarter_and_in_bfloat16_a_half() -> None:
    torch.manual_seed(0)
    network = hk.convert(Residual().eval(), hk.rules.het(4)).model
    x = torch.randn(2, 4, 32, 32).to(memory_format=torch.channels_last)
    with torch.no_grad(), hk.use_backend("cpu"):
        made = [
            hk.optimize(network, x).model,
            hk.optimize(network, x, dtype=torch.bfloat16).model,
            hk.quantize(network, [x], measure=False).model,
        ]
        sizes = []
        for each in made:
            each(x), each(x)
            sizes.append(release_memory(each))
    # Three activations of 16 channels are alive at the second layer of the block.
    assert sizes == [4 * sizes[2], 2 * sizes[2], 3 * 2 * 16 * 32 * 32]


def test_planning_can_be_switched_off_and_on() -> None:
    fast, x = large()
    assert plan_memory(fast, False) == 1
    with torch.no_grad():
        fast(x), fast(x)
        assert release_memory(fast) == 0
        assert plan_memory(fast) == 1
        fast(x), fast(x)
    assert len(arenas(fast)) == 1


def test_a_copy_or_an_unpickled_network_has_no_part_in_the_arena() -> None:
    fast, x = large()
    with torch.no_grad():
        truth = fast(x)
        fast(x)
        for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
            assert other is not fast
            assert torch.equal(other(x), truth)
            assert torch.equal(other(x), truth)


def test_a_saved_network_computes_the_same(tmp_path: Any) -> None:
    pytest.importorskip("safetensors")
    fast, x = large()
    io.save(fast, tmp_path / "network.safetensors")
    loaded = io.load(tmp_path / "network.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), fast(x))


def test_compiled_and_exported_networks_take_no_place_in_the_arena() -> None:
    model, x = small()
    fast = optimized(model, x)
    with torch.no_grad():
        truth = fast(x)
        fast(x)
        compiled = torch.compile(fast, backend="eager", fullgraph=True)
        exported = torch.export.export(fast, (x,)).module()
        for form in (compiled, exported):
            first, second = form(x), form(2 * x)
            torch.testing.assert_close(first, truth)
            assert not torch.equal(first, second)
    assert len(arenas(fast)) == 1


@pytest.mark.usefixtures("poisoned")
def test_a_network_that_is_cast_between_calls_computes_in_its_new_dtype() -> None:
    fast = optimized(*small())
    plain = unplanned(fast)
    x = torch.randn(2, 4, 6, 6)
    dtypes = (torch.float32, torch.float64, torch.float32, torch.bfloat16, torch.float16)
    with torch.no_grad():
        for dtype in (*dtypes, torch.float32):
            fast.to(dtype), plain.to(dtype)
            given = x.to(dtype)
            for factor in (1, 2):
                found = fast(factor * given)
                assert found.dtype == dtype
                assert torch.equal(found, plain(factor * given))


def test_an_input_of_another_dtype_is_refused_and_changes_nothing() -> None:
    fast = optimized(*small())
    x = torch.randn(2, 4, 6, 6)
    with torch.no_grad():
        expected = unplanned(fast)(x)
        for _ in range(3):
            with pytest.raises(InputTypeError) as planned:
                fast(x.double())
            with pytest.raises(InputTypeError) as layers:
                unplanned(fast)(x.double())
            assert str(planned.value) == str(layers.value)
            assert "torch.float64" in str(planned.value)
            assert torch.equal(fast(x), expected)


def test_a_network_that_trains_between_calls_is_neither_planned_then_nor_stale_afterwards() -> None:
    """A step in training writes running means, and drops some activations."""
    layers = (nn.Sigmoid(), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1), nn.Dropout(0.5))
    model, x = small(nn.ReLU(), *layers)
    fast = optimized(model, x)
    for kept in (nn.BatchNorm2d(8), nn.Dropout(0.5)):  # what optimize folds away or leaves out
        name = type(kept).__name__.lower()
        fast.add_submodule(name, kept.eval())
        (output,) = (n for n in fast.graph.nodes if n.op == "output")
        with fast.graph.inserting_before(output):
            output.args = (fast.graph.call_module(name, (output.args[0],)),)
    fast.recompile()
    plain = unplanned(fast)
    with torch.no_grad():
        before = fast(x), fast(x)[0]
        assert program_of(fast) is not None
        plans = dict(fast.__dict__["_memory"]._plans)
        for number in range(4):
            fast.train(number % 2 == 0), plain.train(number % 2 == 0)
            for factor in (1.0, 2.0):
                torch.manual_seed(number)
                found = fast(factor * x)
                torch.manual_seed(number)
                assert torch.equal(found, plain(factor * x))
            if number % 2 == 0:
                assert (found == 0).any(), "nothing was dropped"
                assert dict(fast.__dict__["_memory"]._plans) == plans, "training was planned"
            else:
                assert not torch.equal(fast(x), before[0]), "the old means were used"
            plans = dict(fast.__dict__["_memory"]._plans)


# Of 64 MiB each are the results of this network's layers; its input and its truth are there before.
_SHORT_OF_MEMORY = """
import resource
from pathlib import Path
import torch
from torch import nn
import hetconv_kernels as hk
from hetconv_kernels.errors import MemoryShortageError

def limit(room):
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + room * 2**20 if room else resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))

torch.manual_seed(0)
torch.set_num_threads(1)
layers = [hk.nn.HetConv2d(16, 16, 3, padding=1, p=4) for _ in range(3)]
small = torch.randn(1, 16, 16, 16).to(memory_format=torch.channels_last)
large = torch.randn(1, 16, 1024, 1024).to(memory_format=torch.channels_last)
with torch.no_grad(), hk.use_backend("cpu"):
    fast = hk.optimize(nn.Sequential(*layers).eval(), small).model
    expected = fast(small).clone()
    truth = fast(large).clone()
    states = ("arena", 40, True), ("result", 160, True), ("recording", 40, False)
    for name, room, planned in states:
        hk.plan_memory(fast)
        if planned:
            fast(large), fast(small)
            hk.release_memory(fast)
        limit(room)
        try:
            fast(large)
        except MemoryShortageError as error:
            limit(0)
            print(name, error)
            assert "tried to allocate" in str(error.__cause__)
        limit(0)
        for _ in range(2):
            assert torch.equal(fast(small), expected), name
            assert torch.equal(fast(large), truth), name
        assert hk.release_memory(fast) > 2**27
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it limits memory as Linux does")
def test_without_memory_a_call_says_how_much_it_wanted_and_the_next_is_right() -> None:
    done = fresh.python(_SHORT_OF_MEMORY)
    assert done.returncode == 0, done.stdout + done.stderr
    said = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert list(said) == ["arena", "result", "recording"]
    image = 16 * 1024 * 1024 * 4
    assert f"expected {2 * image + (2 << 20):,} bytes" in said["arena"]  # it begins at a huge page
    assert "hk.release_memory(network)" in said["arena"]
    for name in ("result", "recording"):
        assert f"expected {image:,} bytes" in said[name]
        assert "fewer or smaller images" in said[name]
