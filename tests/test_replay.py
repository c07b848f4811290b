# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs of whole networks, on a stand-in that records operators and runs them again.

As a CUDA graph does, its replay reads and writes the very tensors of the capture.
"""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import hetconv_kernels as hk
from hetconv_kernels.errors import ArgumentError, BackendError, TraceError
from hetconv_kernels.graph import replay
from hetconv_kernels.graph.narrow import Narrow
from hetconv_kernels.graph.planned import PlannedNetwork

LAST = "6"  # of the layers below


class Graph(TorchDispatchMode):
    """Stands for ``torch.cuda.CUDAGraph``."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        result = func(*args, **(kwargs or {}))
        self.steps.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        for func, args, kwargs, result in self.steps:
            again = func(*args, **kwargs)
            read = {t.data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() not in read:
                    old.copy_(new)


class Gpu:
    """What the stand-in saw."""

    def __init__(self) -> None:
        self.captures, self.capturing = 0, False

    @contextlib.contextmanager
    def graph(self, graph: Graph) -> Iterator[None]:
        assert not self.capturing
        self.captures, self.capturing = self.captures + 1, True
        try:
            with graph:
                yield
        finally:
            self.capturing = False


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    made = Gpu()
    stream = SimpleNamespace(wait_stream=lambda _: None, wait_event=lambda _: None)
    stand_ins = {
        "is_available": lambda: True,
        "is_current_stream_capturing": lambda: made.capturing,
        "current_stream": lambda *_: stream,
        "Stream": lambda: stream,
        "stream": lambda _: contextlib.nullcontext(),
        "device": lambda _: contextlib.nullcontext(),
        "Event": lambda: SimpleNamespace(record=lambda _: None),
        "graph": made.graph,
        "CUDAGraph": Graph,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(replay, "on_gpu", lambda device: device.type == "cpu")
    return made


def network() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    layers = [
        hk.nn.HetConv2d(8, 8, 3, padding=1, p=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        hk.nn.HetConv2d(8, 16, 3, padding=1, p=4),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 4),
    ]
    return nn.Sequential(*layers).eval(), torch.randn(2, 8, 6, 6)


@pytest.fixture
def made(gpu: Gpu) -> Iterator[tuple[PlannedNetwork, nn.Module, Tensor]]:
    """A network that is captured, the original, and an input."""
    model, x = network()
    with hk.use_backend("reference"), torch.no_grad():
        report = hk.optimize(model, x, cuda_graph=True)
        assert report.cuda_graph
        assert "CUDA graphs" in str(report)
        assert isinstance(report.model, PlannedNetwork)
        assert gpu.captures == 1
        yield report.model, model, x


def test_a_replay_is_the_network_on_other_numbers(gpu: Gpu, made: Any) -> None:
    fast, model, x = made
    results = []
    for _ in range(3):
        given = torch.randn_like(x)
        results.append((fast(given), model(given)))
    for found, expected in results:  # all of them, so that no later call wrote over an earlier
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert gpu.captures == 1
    assert not torch.equal(results[0][0], results[1][0])


def test_each_signature_has_a_graph_and_the_latest_are_kept(gpu: Gpu, made: Any) -> None:
    fast, model, x = made
    for size in range(1, replay.MOST_GRAPHS + 2):
        given = torch.randn(size, 8, 6, 6)
        torch.testing.assert_close(fast(given), model(given), rtol=1e-5, atol=1e-5)
    assert gpu.captures == 1 + replay.MOST_GRAPHS
    assert len(fast.__dict__["_graphs"]._captured) == replay.MOST_GRAPHS
    fast(torch.randn(1, 8, 6, 6))  # the oldest but x's
    last = x.contiguous(memory_format=torch.channels_last)
    fast(last)
    assert gpu.captures == 3 + replay.MOST_GRAPHS
    assert hk.release_memory(fast) > 0
    assert hk.release_memory(fast) == 0


@pytest.mark.parametrize("change", ["weight", "data", "layer", "backend"])
def test_what_was_changed_is_captured_anew(gpu: Gpu, made: Any, change: str) -> None:
    fast, _, x = made
    before = fast(x)
    layer = fast.get_submodule(LAST)
    if change == "weight":
        layer.weight.mul_(2)
    elif change == "data":
        layer.weight.data = 2 * layer.weight
    elif change == "layer":
        twice = copy.deepcopy(layer)
        twice.weight.mul_(2)
        setattr(fast, LAST, twice)
    if change == "backend":
        with hk.use_backend("vendor"):
            torch.testing.assert_close(fast(x), before, rtol=1e-5, atol=1e-5)
    else:
        bias = layer.bias
        torch.testing.assert_close(fast(x) - bias, 2 * (before - bias), rtol=1e-5, atol=1e-5)
    assert gpu.captures == 2


@pytest.mark.parametrize("who", ["gradient", "training", "hook", "capture", "cpu", "keyword"])
def test_calls_that_are_not_captured_run_as_ever(
    gpu: Gpu, made: Any, who: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast, model, _ = made
    given, seen = torch.randn(3, 8, 6, 6), []
    context: Any = contextlib.nullcontext()
    if who == "gradient":
        given.requires_grad_()
        context = torch.enable_grad()
    elif who == "training":
        fast.get_submodule(LAST).train()
    elif who == "hook":
        fast.get_submodule(LAST).register_forward_hook(lambda *_: seen.append(1))
    elif who == "capture":
        gpu.capturing = True
    elif who == "cpu":
        monkeypatch.setattr(replay, "on_gpu", lambda device: False)
    with context:
        found = fast(input=given) if who == "keyword" else fast(given)
    torch.testing.assert_close(found.detach(), model(given).detach(), rtol=1e-5, atol=1e-5)
    assert gpu.captures == 1
    assert found.requires_grad == (who == "gradient")
    assert bool(seen) == (who == "hook")


def test_copies_begin_without_graphs(gpu: Gpu, made: Any) -> None:
    fast, _, x = made
    expected = fast(x)
    assert gpu.captures == 1
    torch.testing.assert_close(copy.deepcopy(fast)(x), expected)
    assert gpu.captures == 1
    torch.testing.assert_close(pickle.loads(pickle.dumps(fast))(x), expected)
    assert gpu.captures == 2
    fast.recompile()
    torch.testing.assert_close(fast(x), expected)
    assert gpu.captures == 3


def test_a_network_of_16_bits_is_captured_between_its_casts(gpu: Gpu) -> None:
    model, x = network()
    with hk.use_backend("reference"), torch.no_grad():
        fast = hk.optimize(model, x, dtype=torch.bfloat16, cuda_graph=True).model
        assert isinstance(fast, Narrow)
        before = gpu.captures
        torch.testing.assert_close(fast(x), model(x), rtol=5e-2, atol=5e-2)
        assert before == gpu.captures == 1


def test_without_a_gpu_it_is_refused() -> None:
    model, x = network()
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(BackendError, match=r"no GPU.*Leave cuda_graph out"):
        hk.optimize(model, x, cuda_graph=True)


def test_an_example_elsewhere_is_refused(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "on_gpu", lambda device: False)
    model, x = network()
    with pytest.raises(ArgumentError, match=r"received cpu, expected tensors on one NVIDIA GPU"):
        hk.optimize(model, x, cuda_graph=True)


class Branches(nn.Module):
    """Asks for a number, which a capture cannot give."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = hk.nn.HetConv2d(8, 8, 3, padding=1, p=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.sum() > 0 else self.layer(-x)


class Asks(nn.Module):
    """Is one step of a graph, and asks for a number inside."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x.sum().item()


def test_a_network_that_cannot_be_traced_is_refused(gpu: Gpu) -> None:
    with pytest.raises(TraceError, match=r"not traced.*Leave cuda_graph out"):
        hk.optimize(Branches().eval(), torch.randn(1, 8, 6, 6), cuda_graph=True)
    assert gpu.captures == 0


def test_a_step_that_cannot_be_captured_is_an_error(gpu: Gpu, made: Any) -> None:
    fast, _, x = made
    setattr(fast, LAST, Asks().eval())
    with pytest.raises(BackendError, match=r"cannot be captured.*not permitted"):
        fast(x)
