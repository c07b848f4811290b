# SPDX-License-Identifier: Apache-2.0
"""The wide CUDA kernel on the CPU with the engine's own tables, against the oracle.

Out-of-bounds and uninitialised shared memory are found on the way (see tests/native/cuda); the
layers are those of `test_cuda_wide`, whose numpy runs the same tables.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shim
import torch
from wide_layers import LAYERS, tiled

from hetconv_kernels.backends.cuda.wide_tiles import WideTiling

needs_compiler = pytest.mark.skipif(shim.compiler() is None, reason="g++ is not installed here")


def wide_case(
    name: str,
    back: bool,
    tiling: WideTiling,
    every: tuple[int, int],
    batch: int = 5,
    dtype: torch.dtype = torch.bfloat16,
    act: str = "none",
    epilogue: tuple[str, ...] = (),
) -> shim.Case:
    """Makes a case of fprop or dgrad; `epilogue` out of scale, shift and residual."""
    geometry, size = LAYERS[name]
    support, out = geometry.support, geometry.output_size(*size)
    f, c = support.filters, support.channels
    read, written = ((f, *out), (c, *size)) if back else ((c, *size), (f, *out))
    x, w = torch.randn(batch, *read).to(dtype), torch.randn(support.shape).to(dtype)
    extras = {n: torch.randn(written[0]) for n in ("scale", "shift") if n in epilogue}
    if "residual" in epilogue:
        extras["residual"] = torch.randn(batch, *written).to(dtype)
    truths = []
    for values in ((x, w, extras), (x.abs(), w.abs(), {n: t.abs() for n, t in extras.items()})):
        truth = shim._apply(geometry, values[0], values[1], size, back)
        terms = {n: t.double() for n, t in values[2].items()}
        truth = truth * terms.get("scale", torch.ones(()))[..., None, None]
        truth = truth + terms.get("shift", torch.zeros(()))[..., None, None]
        truths.append(truth + terms.get("residual", 0.0))
    bound = 1.2 * shim.error_bound(truths[1], read[0] * int(np.prod(support.kernel)), dtype)
    expected = shim.activate(act, truths[0])
    dead = ~torch.tensor(np.array(support.mask))
    shape, tables = tiling.shape, tiling.tables
    numbers = {
        "kind": 2,
        "dtype": shim.CODES[dtype],
        "w_dtype": shim.CODES[dtype],
        "act": shim.ACTS.index(act),
        "x_n": shim.height_width(read),
        "x_h": every[0] * read[2] * read[0],
        "x_w": every[1] * read[0],
        "y_n": shim.height_width(written),
        "y_h": written[2] * written[0],
        "y_w": written[0],
        "batch": batch,
        "image_h": -(-read[1] // every[0]),
        "image_w": -(-read[2] // every[1]),
        "class_count": len(tiling.classes),
        "pairs": len(tables.rows),
        **shape._asdict(),
        "grid": 2,
        "shared": shape.shared_bytes,
    }
    arrays: dict[str, Any] = {
        "x": shim.last(x),
        "w": torch.where(dead, float("nan"), w.float()).to(dtype),  # dead entries are never read
        "source": tables.source(support, "contiguous"),
        "result": torch.full((batch, *written[1:], written[0]), torch.nan).to(dtype),
        "classes": tiling.classes,
        "steps": tiling.steps,
        **{n: getattr(tables, n) for n in ("heads", "blocks", "rows")},
        **{n: shim.last(t) if t.dim() == 4 else t for n, t in extras.items()},
    }
    title = f"{name} back={back} {shape} {dtype} {act} {epilogue}"
    return shim.Case(title, numbers, arrays, shim.last(expected), shim.last(bound), dtype)


@needs_compiler
@pytest.mark.parametrize("back", [False, True], ids=["fprop", "dgrad"])
@pytest.mark.parametrize("name", [n for n in LAYERS if n != "no-weights"])
def test_it_equals_the_oracle(name: str, back: bool, tmp_path: Path) -> None:
    """The largest tile, and for dgrad the smallest one in clusters of two; for some layers both."""
    both, every = tiled(name, back)
    found = [tiling for tiling in both if not tiling.shape.flat_pitch]
    chosen = found[0 :: len(found) - 1] if name in ("het4", "stride") else [found[-int(back)]]
    assert {t.shape.cluster for t in chosen} == ({1, 2} if len(chosen) == 2 else {1 + back})
    shim.run([wide_case(name, back, tiling, every) for tiling in chosen], tmp_path)


@needs_compiler
@pytest.mark.parametrize("back", [False, True], ids=["fprop", "dgrad"])
def test_flattened_rows_equal_the_oracle(back: bool, tmp_path: Path) -> None:
    """All layers that have them, one size of tiles for fprop, the other for dgrad."""
    cases = []
    for name in LAYERS:
        found, every = tiled(name, back)
        flat = [tiling for tiling in found if tiling.shape.flat_pitch]
        if flat and name != "no-weights":
            cases.append(wide_case(name, back, flat[-1 if back else 0], every))
    assert len(cases) >= 7
    shim.run(cases, tmp_path)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_its_epilogue_equals_the_oracle(dtype: torch.dtype, tmp_path: Path) -> None:
    cases = []
    for name, act in (("het4", "relu"), ("stride", "gelu")):
        found, every = tiled(name, False)
        for tiling, epilogue in (
            (found[0], ("scale", "shift", "residual")),
            (found[-1], ("shift",)),
        ):
            how: dict[str, Any] = {"dtype": dtype, "act": act, "epilogue": epilogue}
            cases.append(wide_case(name, False, tiling, every, **how))
    shim.run(cases, tmp_path, seed=7)


@needs_compiler
def test_a_layer_without_weights_is_zero_and_its_epilogue(tmp_path: Path) -> None:
    found, every = tiled("no-weights", False)
    case = wide_case("no-weights", False, found[0], every, epilogue=("shift",))
    case.bound = case.bound + 0.02 * case.expected.abs()
    shim.run([case], tmp_path)


@needs_compiler
def test_a_mistake_in_the_tables_is_found_here_too(tmp_path: Path) -> None:
    found, every = tiled("het2", False)
    case = wide_case("het2", False, found[0], every)
    steps = case.arrays["steps"] = case.arrays["steps"].copy()
    steps[3] += 1
    with pytest.raises(AssertionError, match="differ"):
        shim.run([case], tmp_path)
