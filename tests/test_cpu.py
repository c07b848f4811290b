# SPDX-License-Identifier: Apache-2.0
"""The native engine beyond the oracle: instruction sets, threads, fork, memory, what it keeps."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import hetconv_kernels as hk
from hetconv_kernels import ops
from hetconv_kernels.backends import get_backend
from hetconv_kernels.packing import FrozenCache
from hetconv_kernels.problem import make_geometry

pytestmark = pytest.mark.skipif(
    "cpu" not in hk.available_backends(), reason="the native engine is not built here"
)

KEEP = torch.rand(5, 32, generator=torch.Generator().manual_seed(1)) < 0.3
SUPPORTS = {
    "het": hk.Support.het(32, 48, 3, p=4),
    "depthwise-like": hk.Support.het(32, 32, 3, p=32),
    "ragged": hk.Support.self_grouped(torch.arange(48) % 5, KEEP.numpy(), 3),
}


def layer(support: str, **options: object) -> hk.nn.SupportConv2d:
    s = SUPPORTS[support]
    return hk.nn.SupportConv2d(
        s.channels, s.filters, s.kernel, padding=1, support=s, backend="cpu", **options
    )


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def in_children(imports: str, body: str, cases: list[Any]) -> list[str]:
    """Runs code for each ``case`` in a fresh child of one process that has imported all it needs.

    Returns:
        The line that each of them printed.
    """
    code = [textwrap.dedent(imports), "import os, sys", f"for case in {cases!r}:"]
    code += ["    if os.fork() == 0:", textwrap.indent(textwrap.dedent(body), " " * 8)]
    code += ["        sys.stdout.flush()", "        os._exit(0)"]
    code += ["    assert os.wait()[1] == 0"]
    done = run("\n".join(code))
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("support", SUPPORTS)
def test_thread_counts_agree(support: str) -> None:
    conv, x = layer(support), torch.randn(1, 32, 20, 21)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(conv(x).detach())
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert torch.equal(result, results[0])


@pytest.mark.parametrize("support", SUPPORTS)
def test_gradients_are_the_same_bits_at_every_run(support: str) -> None:
    conv, x = layer(support), torch.randn(3, 32, 17, 15, requires_grad=True)
    runs = [torch.autograd.grad(conv(x).square().sum(), (x, conv.weight)) for _ in range(3)]
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_several_python_threads_at_once() -> None:
    conv = layer("het").eval()
    inputs = [torch.randn(2, 32, 9 + i % 3, 11) for i in range(24)]
    with torch.no_grad():
        expected = [conv(x) for x in inputs]

        def call(x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                return conv(x)

        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(call, inputs))
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_a_forked_child_can_use_it() -> None:
    done = run(
        """
        import os, torch, hetconv_kernels as hk
        torch.set_num_threads(2)
        layer = hk.nn.HetConv2d(32, 32, 3, padding=1, backend="cpu").eval()
        x = torch.randn(2, 32, 16, 16)
        with torch.no_grad():
            expected = layer(x)
            child = os.fork()
            if child == 0:
                os._exit(0 if torch.equal(layer(x), expected) else 3)
            _, status = os.waitpid(child, 0)
        print("child", os.waitstatus_to_exitcode(status))
        """
    )
    assert done.stdout.strip() == "child 0", done.stderr


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs Linux's /proc")
def test_one_openmp_runtime_is_mapped_and_it_is_torchs() -> None:
    done = run(
        """
        import torch, hetconv_kernels as hk
        hk.nn.HetConv2d(32, 32, 3, backend="cpu")(torch.randn(1, 32, 8, 8))
        print(open("/proc/self/maps").read())
        """
    )
    assert done.returncode == 0, done.stderr
    mapped = set(re.findall(r"/\S*lib(?:gomp|iomp5|omp)\S*\.so\S*", done.stdout))
    assert len(mapped) == 1, mapped


def test_the_environment_forces_an_instruction_set() -> None:
    from hetconv_kernels import _cpu

    asked = ["avx512bf16", "avx512", "avx2", "generic", "sse9"]
    said = in_children(
        """
        import numpy as np
        from hetconv_kernels import _cpu
        """,
        """
        os.environ["HETCONV_ISA"] = case
        try:
            print(_cpu.Plan(np.ones((4, 4, 3, 3), np.uint8)).isa)
        except ValueError as refusal:
            print("refused:", refusal)
        """,
        asked,
    )
    for isa, answer in zip(asked, said, strict=True):
        if isa in _cpu.isas():
            assert answer == isa
        else:
            assert answer.startswith("refused:"), answer
            assert isa in answer, "an instruction set that cannot run is refused by name"


def test_generic_vectors_are_always_there() -> None:
    from hetconv_kernels import _cpu

    assert _cpu.isas()[-1] == "generic"


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's /proc")
def test_a_forward_takes_no_more_memory_than_its_output_and_a_cache() -> None:
    """Peak ≤ output + packed weights + 2 MiB a thread, whatever the image."""
    cases = [(p, layout) for p in (4, 64) for layout in ("contiguous_format", "channels_last")]
    said = in_children(
        "import torch, hetconv_kernels as hk",
        """
        torch.set_num_threads(2)
        p, layout = case
        layout, support = getattr(torch, layout), hk.Support.het(64, 64, 3, p=p)
        layer = hk.nn.SupportConv2d(64, 64, 3, padding=1, support=support, backend="cpu").freeze()
        x = torch.randn(1, 64, 640, 640).contiguous(memory_format=layout)
        def peak():
            lines = open("/proc/self/status").read().splitlines()
            return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
        with torch.no_grad():
            layer(x[:, :, :32, :32].contiguous(memory_format=layout))
            open("/proc/self/clear_refs", "w").write("5")
            before = peak()
            y = layer(x)
        print((peak() - before) * 1024 - y.nbytes)
        """,
        cases,
    )
    packed, workspaces, noise = 64 * 64 * 9 * 4, 2 * 2 * 2**20, 2**20
    beyond = dict(zip(cases, map(int, said), strict=True))
    assert {c: b for c, b in beyond.items() if b > packed + workspaces + noise} == {}


def test_a_frozen_weight_is_packed_once_and_a_trained_one_at_each_call() -> None:
    conv, x = layer("het").eval(), torch.randn(1, 32, 9, 9)
    with torch.no_grad():
        trained = conv(x)
        conv.weight.data.mul_(2)  # a write that leaves no trace
        assert torch.allclose(
            conv(x) - conv.bias[:, None, None],
            2 * (trained - conv.bias[:, None, None]),
            atol=1e-5,
        )
        conv.freeze()
        conv(x)
        caches = [c for c in conv.support.derived.values() if isinstance(c, FrozenCache)]
        kept = [c(conv.weight) for c in caches if c._entries]
        assert kept
        conv(x)
        assert [c(conv.weight) for c in caches if c._entries] == kept


def test_refusals_name_the_device_and_the_kernel() -> None:
    engine = get_backend("cpu")
    geometry = make_geometry(hk.Support.dense(1, 1, (65, 1)), 1, (32, 32, 0, 0))
    x, w = torch.randn(1, 1, 65, 2), torch.randn(1, 1, 65, 1)
    reasons = engine.unsupported_reasons(ops.describe("fprop", geometry, x, x, w, (65, 2)))
    assert any("64 taps" in reason for reason in reasons)
    x, w = x.to("meta"), w.to("meta")
    reasons = engine.unsupported_reasons(ops.describe("fprop", geometry, x, x, w, (65, 2)))
    assert any("not on the CPU" in reason for reason in reasons)


def test_a_lazily_negated_view_is_read_as_its_value() -> None:
    x = torch.randn(1, 32, 6, 6, dtype=torch.complex64).conj().imag
    assert x.is_neg()
    conv = layer("het")
    torch.testing.assert_close(conv(x), conv(x.resolve_neg()))


@pytest.mark.parametrize("act", ["none", "relu", "relu6", "silu", "gelu"])
@pytest.mark.parametrize("support", SUPPORTS)
def test_fused_epilogue(support: str, act: str) -> None:
    s = SUPPORTS[support]
    geometry = make_geometry(s, 1, 1)
    x, w = torch.randn(2, s.channels, 9, 10), torch.randn(*s.shape)
    scale, shift = torch.rand(s.filters) + 0.5, torch.randn(s.filters)
    residual = torch.randn(2, s.filters, 9, 10).contiguous(memory_format=torch.channels_last)
    results = [
        ops.run_fprop(x, w, geometry, shift, hk.backends.CODES[name], True, scale, residual, act)
        for name in ("cpu", "reference")
    ]
    torch.testing.assert_close(*results, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("sliced", [False, True], ids=["whole", "slice"])
@pytest.mark.parametrize("size", [(1, 1), (1, 6), (5, 6)])
def test_images_of_a_pointwise_layer_are_read_as_one_row_of_pixels(
    size: tuple[int, int], sliced: bool
) -> None:
    torch.manual_seed(0)
    support = hk.Support.self_grouped(torch.arange(40) % 5, KEEP.numpy(), 1)
    geometry, weight = make_geometry(support), torch.randn(support.live)
    # What is not dense in memory has no such row, and is read image by image.
    x, residual = (
        torch.randn(7, 2 * c, *size).to(memory_format=torch.channels_last)[:, ::2]
        if sliced
        else torch.randn(7, c, *size).to(memory_format=torch.channels_last)
        for c in (32, 40)
    )
    results = []
    for name in ("cpu", "reference"):
        with hk.use_backend(name):
            y = hk.functional.fused_conv2d(
                x, weight, geometry, hk.backends.forced_code(), residual=residual, act="relu"
            )
        assert y.is_contiguous(memory_format=torch.channels_last)
        leaf, dense = x.detach().requires_grad_(), torch.ones(support.shape, requires_grad=True)
        z = hk.functional.support_conv2d(leaf, dense, support, backend=name)
        results.append([y, *torch.autograd.grad(z, (leaf, dense), residual)])
    torch.testing.assert_close(*results)


def test_a_product_wider_than_a_cores_cache_puts_filters_in_vectors() -> None:
    from hetconv_kernels.backends.cpu_plans import direct_plan

    forms = []
    for channels in (1024, 32768):
        mask = torch.rand(64, channels, 1, 1, generator=torch.Generator().manual_seed(0)) < 0.1
        geometry = make_geometry(hk.Support.from_mask(mask.numpy()))
        x, w = torch.empty(8, channels, 1, 1), torch.empty(64, channels, 1, 1)
        problem = ops.describe("fprop", geometry, x, x, w, (1, 1))
        forms.append(direct_plan(problem).form)
    assert forms == ["pixels", "filters"]
