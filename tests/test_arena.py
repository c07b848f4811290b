# SPDX-License-Identifier: Apache-2.0
"""The arena: places that do not overlap while they are needed, and who gets them."""

from __future__ import annotations

import doctest
import re
import threading
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from hetconv_kernels import arena
from hetconv_kernels.arena import (
    ALIGNMENT,
    Arena,
    Lifetime,
    Recorder,
    allocate,
    assign_offsets,
    placing,
)

PLAIN = torch.contiguous_format
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
HUGE_PAGES = _SETTING.read_text() if _SETTING.exists() else ""
CPU = torch.device("cpu")


def life(born: int, dies: int, elements: int = 16, escapes: bool = False) -> Lifetime:
    return Lifetime("owner", (elements,), torch.float32, PLAIN, born, dies, escapes)


@pytest.mark.parametrize("elements", [16, 1 << 20, (1 << 20) + 7])
def test_a_large_buffer_begins_at_a_huge_page(elements: int) -> None:
    planned = Arena([life(0, 1, elements), life(1, 2, elements)])
    begin = planned.memory.data_ptr() + planned.first
    large = planned.bytes >= 2 << 20
    assert begin % (2 << 20 if large else ALIGNMENT) == 0
    assert planned.first + planned.bytes <= planned.memory.nbytes


@pytest.mark.skipif(
    "never" not in HUGE_PAGES or "[never]" in HUGE_PAGES, reason="this system has no huge pages"
)
def test_a_large_buffer_asks_for_huge_pages() -> None:
    planned = Arena([life(0, 1, 16 << 20)])  # 64 MiB
    begin = planned.memory.data_ptr() + planned.first
    regions = re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
    spans = [(re.match(r"([0-9a-f]+)-([0-9a-f]+) ", region), region) for region in regions]
    (flags,) = (
        re.search(r"VmFlags:(.*)", region)
        for span, region in spans
        if span and int(span[1], 16) <= begin < int(span[2], 16)
    )
    assert flags is not None
    assert "hg" in flags[1].split()


lifetimes = st.lists(
    st.builds(
        lambda born, length, elements, escapes: life(born, born + length, elements, escapes),
        st.integers(0, 12),
        st.integers(0, 6),
        st.integers(0, 400),
        st.booleans(),
    ),
    max_size=24,
)


@given(lifetimes)
def test_what_lives_at_the_same_time_does_not_overlap(lives: list[Lifetime]) -> None:
    places, size = assign_offsets(lives)
    assert [at < 0 for at in places] == [one.escapes for one in lives]
    for i, one in enumerate(lives):
        if one.escapes:
            continue
        assert places[i] % ALIGNMENT == 0
        assert places[i] + one.bytes <= size
        for j in range(i):
            other = lives[j]
            together = one.born <= other.dies and other.born <= one.dies
            if together and not other.escapes:
                assert places[i] + one.bytes <= places[j] or places[j] + other.bytes <= places[i]


@given(lifetimes)
def test_an_arena_is_never_larger_than_all_results_together(lives: list[Lifetime]) -> None:
    whole = sum(-(-one.bytes // ALIGNMENT) * ALIGNMENT for one in lives if not one.escapes)
    assert assign_offsets(lives)[1] <= whole


def test_a_chain_takes_turns_in_two_places() -> None:
    assert doctest.testmod(arena).attempted > 0
    places, size = assign_offsets([life(i, i + 1, 1000) for i in range(20)])
    assert len(set(places)) == 2
    assert size == 2 * 4032  # 4000 bytes each, in cache lines


def test_a_result_keeps_its_place_until_its_last_reader() -> None:
    shortcut, first, second = life(0, 3), life(1, 2), life(2, 3)
    places, _ = assign_offsets([shortcut, first, second])
    assert len(set(places)) == 3  # 1 is read in step 2, where 2 is computed


@pytest.mark.parametrize("layout", [PLAIN, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_places_have_the_shape_and_the_layout_that_are_asked_for(
    dtype: torch.dtype, layout: torch.memory_format
) -> None:
    shape = (2, 3, 5, 4)
    owner = object()
    ready = Arena([Lifetime(owner, shape, dtype, layout, 0, 1, False)])
    ready.start()
    with placing(ready):
        found = allocate(owner, shape, dtype, CPU, layout)
    assert found.shape == shape
    assert found.dtype == dtype
    assert found.stride() == torch.empty(shape, memory_format=layout).stride()
    assert found.data_ptr() % ALIGNMENT == 0
    assert ready.whole


def test_another_owner_shape_or_number_of_results_gets_fresh_memory() -> None:
    owner, other = object(), object()
    planned = Lifetime(owner, (4,), torch.float32, PLAIN, 0, 1, False)
    for asked in ([(other, (4,))], [(owner, (5,))], [(owner, (4,)), (owner, (4,))], []):
        ready = Arena([planned])
        ready.start()
        first = ready._tensors[0]
        with placing(ready):
            found = [allocate(who, shape, torch.float32, CPU, PLAIN) for who, shape in asked]
        assert not ready.whole
        for result, (who, shape) in zip(found, asked, strict=True):
            fits = who is owner and shape == (4,) and result is found[0]
            assert (result.data_ptr() == first.data_ptr()) is fits
            assert result.shape == shape


def test_after_a_surprise_no_place_of_the_arena_is_given() -> None:
    owner = object()
    one = Lifetime(owner, (4,), torch.float32, PLAIN, 0, 9, False)
    ready = Arena([one, one])
    ready.start()
    with placing(ready):
        allocate(object(), (4,), torch.float32, CPU, PLAIN)
        second = allocate(owner, (4,), torch.float32, CPU, PLAIN)
    assert second.data_ptr() not in {t.data_ptr() for t in ready._tensors}


def test_results_that_escape_are_the_callers_own() -> None:
    owner = object()
    ready = Arena([Lifetime(owner, (4,), torch.float32, PLAIN, 0, 1, True)])
    assert ready.bytes == 0
    addresses = set()
    kept = []
    for _ in range(3):
        ready.start()
        with placing(ready):
            kept.append(allocate(owner, (4,), torch.float32, CPU, PLAIN))
        addresses.add(kept[-1].data_ptr())
        assert ready.whole
    assert len(addresses) == 3


def test_a_placement_is_that_of_one_thread_and_ends_with_its_block() -> None:
    recorder, seen = Recorder(), []

    def elsewhere() -> None:
        seen.append(allocate("thread", (4,), torch.float32, CPU, PLAIN))

    with placing(recorder):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        with placing(None):
            allocate("inner", (4,), torch.float32, CPU, PLAIN)
        allocate("outer", (4,), torch.float32, CPU, PLAIN)
    with pytest.raises(ZeroDivisionError), placing(recorder):
        _ = 1 / 0
    allocate("after", (4,), torch.float32, CPU, PLAIN)
    assert len(seen) == 1
    assert [asked.owner for asked in recorder.asked] == ["outer"]


def test_only_memory_of_the_cpu_is_planned() -> None:
    recorder = Recorder()
    with placing(recorder):
        found = allocate("owner", (4,), torch.float32, torch.device("meta"), PLAIN)
    assert found.is_meta
    assert not recorder.asked
