# SPDX-License-Identifier: Apache-2.0
"""wgrad of wide groups in the CUDA engine: its tables, and its kernel on the CPU with them.

Out-of-bounds and uninitialised shared memory, races and forgotten waits are found on the way (see
tests/native/cuda); the layers are those of `test_cuda_wide`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shim
import torch
from wide_layers import LAYERS, PART

from benchmarks import predictions
from hetconv_kernels import Support, ops
from hetconv_kernels.backends.cuda import choice
from hetconv_kernels.backends.cuda.wide_lowering import wide_windows
from hetconv_kernels.backends.cuda.wide_wgrad_lowering import wide_jobs, wide_segments
from hetconv_kernels.backends.cuda.wide_wgrad_tiles import (
    PRODUCTS,
    WideWgradTiling,
    choose_wide_wgrad,
    lowered,
    wgrad_plans,
)
from hetconv_kernels.backends.triton import choice as triton_choice
from hetconv_kernels.backends.triton import wgrad_choice
from hetconv_kernels.errors import ArgumentError, BackendError
from hetconv_kernels.problem import Problem, make_geometry

needs_compiler = pytest.mark.skipif(shim.compiler() is None, reason="g++ is not installed here")
NAMES = [name for name in LAYERS if name != "no-weights"]
BATCH = 5


def tiled(name: str, batch: int = BATCH) -> tuple[list[WideWgradTiling], tuple[int, int]]:
    """Returns all tilings of a layer, the fastest predicted first, and which pixels are read."""
    geometry, size = LAYERS[name]
    (window,), every = wide_windows(geometry, size, False)
    image = -(-size[0] // every[0]), -(-size[1] // every[1])
    plans = wgrad_plans(geometry.support, window, image, batch, PART)
    return [lowered(p, window) for p in sorted(plans, key=lambda plan: plan.clocks)], every


def wgrad_case(
    name: str,
    tiling: WideWgradTiling,
    every: tuple[int, int],
    splits: int = 2,
    batch: int = BATCH,
    dtype: torch.dtype = torch.bfloat16,
    w_dtype: torch.dtype = torch.float32,
    form: str = "contiguous",
    exact: bool = False,
) -> shim.Case:
    """Makes a case; `exact` draws small integers, whose sums every order of adding leaves alike."""
    geometry, size = LAYERS[name]
    support, out = geometry.support, geometry.output_size(*size)
    plan, tables = tiling.plan, tiling.tables
    f, c = support.filters, support.channels

    def drawn(*shape: int) -> torch.Tensor:
        found = torch.randint(-2, 3, shape).float() if exact else torch.randn(shape)
        return found.to(dtype)

    x, dy = drawn(batch, c, *size), drawn(batch, f, *out)
    dw, most = (shim._wgrad(geometry, *pair) for pair in ((dy, x), (dy.abs(), x.abs())))
    bound = shim.error_bound(most, batch * out[0] * out[1], torch.float32)
    if w_dtype != torch.float32:
        bound = bound + torch.finfo(w_dtype).eps * dw.abs() + torch.finfo(w_dtype).tiny
    if exact:
        bound = torch.zeros_like(bound)
    mask = torch.as_tensor(np.array(support.mask))
    dw, zeros = torch.where(mask, dw, 0.0), None if form == "live" else ~mask
    if form == "live":
        dw, bound = dw[mask], bound[mask]
    numbers = {
        "kind": 4,
        "dtype": shim.CODES[dtype],
        "w_dtype": shim.CODES[w_dtype],
        "x_n": shim.height_width((c, *size)),
        "x_h": every[0] * size[1] * c,
        "x_w": every[1] * c,
        "dy_n": shim.height_width((f, *out)),
        "dy_h": out[1] * f,
        "dy_w": f,
        "batch": batch,
        "image_h": -(-size[0] // every[0]),
        "image_w": -(-size[1] // every[1]),
        "out_h": out[0],
        "out_w": out[1],
        "job_count": len(tables.jobs),
        "products": plan.products,
        "tile_rows": plan.rows,
        "most_blocks": tables.most_blocks,
        "x_pitch": plan.pitches[0],
        "dy_pitch": plan.pitches[1],
        "stages": plan.stages,
        "splits": splits,
        "shared": plan.shared_bytes,
        "dw_size": dw.numel(),
    }
    arrays: dict[str, Any] = {
        "x": shim.last(x),
        "dy": shim.last(dy),
        "targets": tables.targets(support, form),
        "result": torch.full(dw.shape, torch.nan).to(w_dtype),
        "classes": tiling.classes,
        **{n: getattr(tables, n) for n in ("jobs", "blocks", "places")},
    }
    title = f"{name} {plan.rows} rows, {plan.products} products, {plan.stages} stages {dtype}"
    return shim.Case(title, numbers, arrays, dw, bound, w_dtype, zeros)


def staged(tiling: WideWgradTiling, stages: int) -> WideWgradTiling:
    """Returns the same with so many tiles in shared memory."""
    return tiling._replace(plan=tiling.plan._replace(stages=stages))


# Tables ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["contiguous", "live"])
@pytest.mark.parametrize("name", NAMES)
def test_every_live_weight_is_computed_once(name: str, form: str) -> None:
    support = LAYERS[name][0].support
    places = np.flatnonzero(support.mask) if form == "contiguous" else np.arange(support.live)
    for tiling in tiled(name)[0][:: 1 if form == "live" else 8]:
        targets = tiling.tables.targets(support, form)
        assert len(targets) == tiling.tables.size
        assert np.array_equal(np.sort(targets[targets >= 0]), places)


@pytest.mark.parametrize("name", NAMES)
def test_tilings_fit_and_cover_every_pixel(name: str) -> None:
    geometry, size = LAYERS[name]
    found, _ = tiled(name)
    rows, cols = geometry.output_size(*size)
    for tiling in found:
        line, plan = tiling.classes[:18].tolist(), tiling.plan
        assert plan.shared_bytes <= PART.shared
        assert plan.products in PRODUCTS
        assert line[:2] == [rows, cols]
        assert line[3] * 8 >= cols
        images, pitch = line[4:6]
        assert line[2] == 1 or images == 1
        assert plan.rows * line[2] >= (images - 1) * pitch * (images > 1) + rows
        assert np.array_equal(tiling.classes[[18, 19, 20, 21, 22, 23]], line[:6])
        assert plan.pitches[0] >= line[10] * line[12]


def test_jobs_hold_what_they_may() -> None:
    geometry, size = LAYERS["ragged"]
    (window,), _ = wide_windows(geometry, size, False)
    for capacity, blocks in ((4, 2), (12, 4), (10, 12)):
        jobs = wide_jobs(wide_segments(geometry.support, window), capacity, blocks)
        assert all(0 < len(job.products) <= capacity for job in jobs)
        assert all(len(job.blocks) <= blocks for job in jobs)
        assert all({b for b, _ in job.products} == set(range(len(job.blocks))) for job in jobs)


def test_the_roof_is_near_where_groups_are_wide() -> None:
    """By the model: a dense layer multiplies at two thirds of the rate, partial sums included."""
    support = Support.dense(256, 256, 3)
    geometry = make_geometry(support, 1, 1)
    (window,), _ = wide_windows(geometry, (14, 14), False)
    how = choose_wide_wgrad(support, window, (14, 14), 128, PART).plan
    roof = 128 * 196 * support.live / PART.rate / PART.processors
    assert 1.2 * roof < how.clocks < 1.7 * roof
    assert how.products == 6
    assert how.stages > 1
    assert len(how.jobs) * how.splits <= PART.processors


def test_the_table_has_what_the_models_predict(monkeypatch: pytest.MonkeyPatch) -> None:
    """The documents' one, against the models' own functions."""
    for module in (triton_choice, wgrad_choice):
        monkeypatch.setattr(module, "has_tma", lambda device: True)
    lines = predictions.wgrad().split("\n")[2:]
    assert len(lines) == 11
    for line in lines:
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        size, channels, p = re.fullmatch(r"(\d+)²×(\d+), (?:p=(\d)|dense)", name).groups()
        c = int(channels)
        support = Support.het(c, c, 3, p=int(p)) if p else Support.dense(c, c, 3)
        problem = gradient(support, int(size))
        wide = choice._wide_wgrad(problem, PART)
        seconds = wide.how.plan.clocks / PART.clock
        macs = problem.macs / (PART.rate * PART.processors * PART.clock)
        floor = max(macs, problem.bytes_moved / PART.bandwidth)
        narrow = "–"
        if not choice._narrow_reason(problem):
            narrow = f"{choice._wgrad(problem, PART).seconds * 1e6:.1f}"
        triton = min(found.seconds for found in wgrad_choice.wgrad_choices(problem))
        assert cells == [
            f"{floor * 1e6:.1f}",
            narrow,
            f"{triton * 1e6:.1f}",
            f"{wide.seconds * 1e6:.1f}",
            f"{floor / seconds:.0%}".replace("%", " %"),
        ], name


def gradient(support: Support, size: int, batch: int = 128) -> Problem:
    """Describes wgrad of a layer in bf16, channels_last."""
    x = torch.empty(batch, support.channels, size, size, dtype=torch.bfloat16, device="meta")
    dy = torch.empty(batch, support.filters, size, size, dtype=torch.bfloat16, device="meta")
    x, dy = (t.to(memory_format=torch.channels_last) for t in (x, dy))
    w = torch.empty(support.shape, dtype=torch.bfloat16, device="meta")
    return ops.describe("wgrad", make_geometry(support, 1, 1), dy, x, w, (size, size))


def test_what_it_cannot_take_is_said() -> None:
    for support, kind, words in (
        (Support.dense(12, 16, 3), ArgumentError, "received 12"),
        (LAYERS["no-weights"][0].support, BackendError, "no tile of"),
    ):
        (window,), _ = wide_windows(make_geometry(support, 1, 1), (7, 7), False)
        with pytest.raises(kind, match=words):
            choose_wide_wgrad(support, window, (7, 7), 4, PART)


# The kernel on the CPU ---------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("name", NAMES)
def test_it_equals_the_oracle(name: str, tmp_path: Path) -> None:
    """The fastest predicted tiling, and for some layers one of other products and rows."""
    found, every = tiled(name)
    first, others = found[0], []
    if name in ("het4", "stride"):
        others = [t for t in found if t.plan.products != first.plan.products]
        others = [t for t in others if t.plan.rows != first.plan.rows][-1:]
        assert others
    shim.run([wgrad_case(name, t, every) for t in (first, *others)], tmp_path)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_integers_are_exact_in_every_form(dtype: torch.dtype, tmp_path: Path) -> None:
    """One tile at a time and several, one split and several, some without a tile."""
    found, every = tiled("het2", 3)
    fullest = next(tiling for tiling in found if tiling.plan.products == max(PRODUCTS))
    cases = []
    for splits, stages, form in ((1, 1, "contiguous"), (3, 2, "live"), (7, 4, "contiguous")):
        tiling = staged(fullest, stages)
        how: dict[str, Any] = {"splits": splits, "batch": 3, "dtype": dtype, "form": form}
        cases.append(wgrad_case("het2", tiling, every, exact=True, **how))
    shim.run(cases, tmp_path, seed=5)


@needs_compiler
def test_gradients_of_16_bits_are_rounded_once(tmp_path: Path) -> None:
    found, every = tiled("stride")
    how: dict[str, Any] = {"w_dtype": torch.bfloat16, "form": "live"}
    shim.run([wgrad_case("stride", found[0], every, **how)], tmp_path)


@needs_compiler
@pytest.mark.parametrize(
    ("mistake", "at", "words"),
    [
        ("skip-phase", 0, "race|nobody has written|copy is on its way"),
        ("skip-phase", 1, "race|nobody has written|copy is on its way"),
        ("skip-arrive", 0, "deadlock"),
        ("skip-warp", 0, "race"),
        ("skip-fence", 0, "without a fence"),
        ("skip-products-wait", 7, "race|differ"),
        ("skip-copy", 100, "nobody has written"),
        ("wrong-operand", 3, "nobody has written|outside of|not ordered|where a barrier lies"),
        ("wrong-address", 0, "outside of"),
    ],
)
def test_mistakes_are_found(mistake: str, at: int, words: str, tmp_path: Path) -> None:
    found, every = tiled("het2", 4)
    case = wgrad_case("het2", staged(found[0], 1), every, splits=1, batch=4)
    done = shim.execute([case], tmp_path, (mistake, str(at)))
    if "differ" in words and done.returncode == 0:
        with pytest.raises(AssertionError, match="differ"):
            case.check((tmp_path / "results").read_bytes())
    else:
        assert done.returncode != 0
        assert re.search(words, done.stderr), done.stderr


@needs_compiler
def test_a_mistake_in_the_tables_is_found(tmp_path: Path) -> None:
    found, every = tiled("het2")
    case = wgrad_case("het2", found[0], every)
    places = case.arrays["places"] = case.arrays["places"].copy()
    places[0, 0, :2] = places[0, 0, 1::-1].copy()  # two taps change places
    with pytest.raises(AssertionError, match="differ"):
        shim.run([case], tmp_path)
