# SPDX-License-Identifier: Apache-2.0
"""The choice of tiles and lowerings: predictions, boxes, the table, tuning, notes."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pretending import CUDA, described, pretended
from shipped import configurations

import hetconv_kernels as hk
from hetconv_kernels.backends.gpu import devices, parts
from hetconv_kernels.backends.gpu.precision import precision
from hetconv_kernels.backends.triton import (
    Triton,
    choice,
    picking,
    table,
    tiles,
    wgrad_choice,
)


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Lets problems claim to be on a GPU of some capability."""
    yield from pretended(monkeypatch)


@pytest.mark.parametrize("verb", ["fprop", "dgrad", "wgrad"])
def test_structure_is_predicted_to_pay(on_gpu, verb: str) -> None:
    on_gpu()
    engine = Triton()
    sparse = described(verb, batch=128, device=CUDA)
    dense = described(verb, hk.Support.dense(256, 256, 3), batch=128, device=CUDA)
    assert engine.estimate(sparse) < 0.7 * engine.estimate(dense)
    assert 0.3 < engine.efficiency(sparse) <= engine.efficiency(dense) == 1
    assert not engine.measured(sparse)


def test_hopper_takes_boxes_and_others_pointers(on_gpu) -> None:
    for capability, boxed in (((9, 0), True), ((8, 0), False), ((12, 0), False)):
        on_gpu(capability)
        found = choice.gather_choices(described(batch=128, device=CUDA))
        assert any(c.box is not None for c in found) == boxed


def test_wgrad_takes_boxes_on_hopper_that_divide_the_image(on_gpu) -> None:
    for capability, boxed in (((9, 0), True), ((8, 0), False)):
        on_gpu(capability)
        p = described("wgrad", batch=128, device=CUDA)
        found = {c.box for c in wgrad_choice.wgrad_choices(p)}
        assert (found != {None}) == boxed
        for box in found - {None}:
            assert box.images * box.rows * box.cols == 64
            assert 28 % box.rows == 28 % box.cols == 0
    on_gpu()
    p = described("wgrad", batch=128, device=CUDA, stride=2)
    assert {c.box for c in wgrad_choice.wgrad_choices(p)} == {None, tiles.Box(64, 1, 1)}


def test_wgrad_of_interleaved_channels_is_reordered(on_gpu) -> None:
    on_gpu()
    interleaved = hk.Support.het(256, 256, 3, p=4, order="interleaved")
    p = described("wgrad", interleaved, batch=128, device=CUDA)
    picked = picking.pick_choice(p)
    assert picked.name.endswith("reordered")
    own = [c for c in wgrad_choice.wgrad_choices(p) if "reordered" not in c.name]
    assert picked.seconds < min(c.seconds for c in own)
    # It pays for its two gathers out of what it saves.
    size = picked.lowering.size
    assert size < 0.5 * min(c.lowering.size for c in own)


def test_a_prediction_counts_the_gather_of_interleaved_channels(on_gpu) -> None:
    on_gpu()
    interleaved = hk.Support.het(256, 256, 3, p=4, order="interleaved")
    blocked = described(batch=128, device=CUDA)
    other = described("fprop", interleaved, batch=128, device=CUDA)
    assert Triton().estimate(other) > Triton().estimate(blocked)


@pytest.mark.parametrize("verb", ["fprop", "wgrad"])
def test_notes_say_what_an_order_costs(on_gpu, verb: str) -> None:
    on_gpu()
    interleaved = hk.Support.het(256, 256, 3, p=4, order="interleaved")
    notes = Triton().notes(described(verb, interleaved, batch=128, device=CUDA))
    assert "reordered" in notes[0]
    assert "copies them together at every call" in notes[1]
    (only,) = Triton().notes(described(verb, batch=128, device=CUDA))
    assert "reordered" not in only
    odd = Triton().notes(described("fprop", hk.Support.dense(36, 32, 3), device=CUDA))
    assert any("Without TMA: 36 channels are not a multiple of 16 bytes" in n for n in odd)


@pytest.mark.parametrize("capability", devices.GPU_SPECS)
def test_shipped_tiles_fit_every_part(capability: tuple[int, int]) -> None:
    part = devices.GPU_SPECS[capability]
    for tile in tiles.HALF_TILES:
        buffers = tiles.stages(tile, 2, part) - (not part.waits)
        assert buffers * (tile.pixels + tile.filters) * tile.channels * 2 <= part.shared


@pytest.mark.parametrize("verb", ["fprop", "wgrad"])
def test_an_entry_of_the_table_decides(on_gpu, verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu()
    p = described(verb, batch=64, device=CUDA)
    choices = choice.gather_choices(p) if verb == "fprop" else wgrad_choice.wgrad_choices(p)
    assert len({c.name for c in choices}) == len(choices)
    slow = max(choices, key=lambda c: c.seconds)
    assert not Triton().measured(p)
    entry = {table.table_key(p, (9, 0)): {"name": slow.name, "seconds": 1.0}}
    monkeypatch.setattr(table, "table_entries", lambda: entry)
    assert Triton().measured(p)
    assert picking.pick_choice(p).name == slow.name


@pytest.mark.parametrize("verb", ["dgrad", "wgrad"])
def test_tuning_is_offered_the_best_predictions(
    on_gpu, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_gpu()
    offered = {}

    def pick(key: str, candidates: Any, device: Any) -> str:
        offered[key] = list(candidates)
        return offered[key][-1]

    monkeypatch.setattr("hetconv_kernels.measure.tuning.pick", pick)
    p = described(verb, batch=48, device=CUDA)
    picked = picking.pick_choice(p)
    ((key, names),) = offered.items()
    assert key.startswith(verb)
    assert picked.name == names[-1]
    assert 2 <= len(names) <= picking.MOST_TUNED


SIZE = r"\d+x\d+x\d+"
NAME = re.compile(rf"({SIZE})(?: and ({SIZE}))?( box {SIZE})?( reordered)?( coarse)?")


def test_names_follow_one_grammar(on_gpu) -> None:
    on_gpu()
    interleaved = hk.Support.het(256, 256, 3, p=4, order="interleaved")
    for verb in ("fprop", "wgrad"):
        p = described(verb, interleaved, batch=128, device=CUDA)
        find = choice.gather_choices if verb == "fprop" else wgrad_choice.wgrad_choices
        for found in find(p):
            match = NAME.fullmatch(found.name)
            assert match
            assert (match[2] is not None) == (verb == "wgrad")
            assert (match[3] is None) == (found.box is None)


def test_the_table_names_choices_that_exist() -> None:
    """It is empty until a GPU has measured it; what is written there later is held to this."""
    shipped = {"x".join(map(str, c.tile[:3])) for c in configurations()}
    for key, entry in table.table_entries().items():
        match = NAME.fullmatch(entry["name"])
        assert match, key
        assert {match[1], match[2] or match[1]} <= shipped, key


def test_operands_of_any_strides_are_drawn() -> None:
    """The gradient of a sum is expanded: strides of zero."""
    for strides in ((0, 0, 0, 0), (96, 1, 48, 16), (0, 1, 48, 16)):
        made = picking.random_operand(described(), (2, 16, 2, 3), strides)
        assert made.shape == (2, 16, 2, 3)
        assert made.stride() == strides


@pytest.mark.parametrize("switch", ["old", "new"])
def test_both_switches_of_tf32_are_read(switch: str) -> None:
    convolutions: Any = torch.backends.cudnn.conv
    before = convolutions.fp32_precision
    try:
        for allowed in (True, False):
            if switch == "old":
                torch.backends.cudnn.allow_tf32 = allowed
            else:  # after which reading the old one is an error
                convolutions.fp32_precision = "tf32" if allowed else "ieee"
            assert precision(torch.float32) == ("tf32" if allowed else "tf32x3")
            assert precision(torch.bfloat16) == "tf32"
    finally:
        convolutions.fp32_precision = before


@pytest.mark.parametrize(
    ("built", "without", "tma"),
    [("80_90a", "", False), ("80", "", True), (None, "", True), ("90a", "cuda-wide", True)],
    ids=["built", "for others", "absent", "left out"],
)
def test_boxes_of_fprop_are_for_where_no_cuda_engine_was_built(
    on_gpu, monkeypatch: pytest.MonkeyPatch, built: str | None, without: str, tma: bool
) -> None:
    on_gpu()
    fake = None if built is None else SimpleNamespace(architectures=lambda: built)
    monkeypatch.setitem(sys.modules, "hetconv_kernels._cuda", fake)
    if fake is None:
        monkeypatch.delattr(hk, "_cuda", raising=False)
    else:
        monkeypatch.setattr(hk, "_cuda", fake, raising=False)
    monkeypatch.setattr(parts, "WITHOUT", parts.named(without))
    support = hk.Support.het(256, 256, 3, p=4)
    for verb in ("fprop", "dgrad"):
        problem = described(verb, support, batch=64, device=CUDA)
        assert any(c.box is not None for c in choice.gather_choices(problem)) == tma
    wgrad = described("wgrad", support, batch=64, device=CUDA)
    assert any(c.box is not None for c in wgrad_choice.wgrad_choices(wgrad))
    # Asked for, they are there: for tests and for measurements.
    monkeypatch.setattr(choice, "ONLY_LAUNCH", "tma")
    assert all(c.box is not None for c in choice.gather_choices(described(device=CUDA)))


@pytest.mark.parametrize(
    ("name", "verb"),
    [("triton-gather", "fprop"), ("triton-tma", "dgrad"), ("triton-wgrad", "wgrad"),
     ("triton-wgrad-tma", "wgrad")],
)  # fmt: skip
def test_a_part_that_is_left_out_is_not_chosen(
    on_gpu, monkeypatch: pytest.MonkeyPatch, name: str, verb: str
) -> None:
    on_gpu()
    support = hk.Support.het(256, 256, 3, p=4)
    problem = described(verb, support, batch=64, device=CUDA)
    find = wgrad_choice.wgrad_choices if verb == "wgrad" else choice.gather_choices
    boxed = name.endswith("tma")
    monkeypatch.setattr(choice, "_tma_wanted", lambda _: True)
    assert {c.box is not None for c in find(problem)} == {True, False}
    monkeypatch.setattr(parts, "WITHOUT", frozenset({name}))
    assert {c.box is not None for c in find(problem)} == {not boxed}
    assert Triton().unsupported_reasons(problem) == []
    pair = {name, f"{name}-tma" if verb == "wgrad" else "triton-tma"}
    pair |= {"triton-gather"} if name == "triton-tma" else set()
    pair |= {"triton-wgrad"} if name == "triton-wgrad-tma" else set()
    monkeypatch.setattr(parts, "WITHOUT", frozenset(pair & parts.PARTS.keys()))
    (reason,) = Triton().unsupported_reasons(problem)
    assert "are left out by HETCONV_WITHOUT" in reason
