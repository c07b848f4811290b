# SPDX-License-Identifier: Apache-2.0
"""Planned networks over many calls: memory, threads that change, forks, results fed back in."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest
import torch
from planning import engine, needs_engine, optimized, small, unplanned  # noqa: F401
from programs import program_of
from torch import nn

import hetconv_kernels as hk

pytestmark = needs_engine
LAST = torch.channels_last


def resident() -> int:
    """Returns the bytes of this process that are in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="this system has no /proc")
def test_memory_is_flat_over_ten_thousand_calls_of_changing_shapes() -> None:
    layers = [hk.nn.HetConv2d(8, 8, 3, padding=1, p=2), nn.ReLU(), nn.Conv2d(8, 8, 1)]
    inputs = [torch.randn(1, 8, size, 40).to(memory_format=LAST) for size in range(20, 34)]
    fast = optimized(nn.Sequential(*layers), inputs[0])
    draw = random.Random(0)
    most = 0
    with torch.no_grad():
        for call in range(10_000):
            # Mostly few shapes; now and then one that drives another's plan out.
            last = 13 if call % 50 == 0 else 5
            fast(inputs[draw.randint(0, last)])
            if call == 2_000:
                most = resident()
    # A result that is kept is 25 KB at least, an arena more, and 160 plans were driven out.
    assert resident() - most < 3 * 2**20
    assert len(fast.__dict__["_memory"]._plans) <= 8


def test_threads_that_change_between_calls_change_no_number() -> None:
    fast = optimized(*small())
    x, before = torch.randn(2, 4, 40, 40), torch.get_num_threads()
    try:
        with torch.no_grad():
            expected = unplanned(fast)(x)
            for threads in (1, 2, 3, 1, 2, 2, 1):
                torch.set_num_threads(threads)
                assert torch.equal(fast(x), expected)
                assert torch.equal(fast(x), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_computes_the_same() -> None:
    fast = optimized(*small())
    x = torch.randn(2, 4, 40, 40)
    with torch.no_grad():
        fast(x)
        expected = fast(x)
        program = program_of(fast)
        assert program is not None
        assert "call" not in program.kinds
        child = os.fork()
        if child == 0:
            status = 1
            try:
                status = 0 if torch.equal(fast(x), expected) else 2
            finally:
                os._exit(status)
        end = time.monotonic() + 120
        done, status = os.waitpid(child, os.WNOHANG)
        while not done and time.monotonic() < end:
            time.sleep(0.05)
            done, status = os.waitpid(child, os.WNOHANG)
        if not done:
            os.kill(child, 9)
            os.waitpid(child, 0)
        assert done, "the child never came back"
        assert status == 0
        assert torch.equal(fast(x), expected)


def test_a_result_and_a_view_of_it_may_be_the_next_input() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
    x = torch.randn(2, 4, 8, 8).to(memory_format=LAST)
    fast = optimized(model, x)
    plain = unplanned(fast)
    with torch.no_grad():
        y, truth = x, x
        for _ in range(6):
            y, truth = fast(y), plain(truth)
            assert torch.equal(y, truth)
        for _ in range(3):
            assert torch.equal(fast(y[:1]), plain(y[:1]))
            assert torch.equal(fast(y[:, :, 1:7, 1:]), plain(y[:, :, 1:7, 1:]))
