# SPDX-License-Identifier: Apache-2.0
"""What the cost models predict for a GPU, as tables: arithmetic, **nothing of it is measured**.

    python -m benchmarks.predictions

Of the data sheet of an H100, bf16 unless it says otherwise, batch 128, in µs with launches. The
documentation shows the same tables, made when it is built.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch

from benchmarks.supports import self_grouped
from hetconv_kernels import Support, ops
from hetconv_kernels.backends.cuda import choice
from hetconv_kernels.backends.cuda.wide_lowering import lower_wide, wide_windows
from hetconv_kernels.backends.cuda.wide_tiles import WideTiling, tile_counts, tilings
from hetconv_kernels.backends.dense_cost import dense_gpu_prediction
from hetconv_kernels.backends.gpu.constants import constants_of
from hetconv_kernels.backends.gpu.devices import GPU_SPECS
from hetconv_kernels.backends.protocol import UNMEASURED_MARGIN
from hetconv_kernels.backends.triton import choice as triton_choice
from hetconv_kernels.backends.triton import wgrad_choice
from hetconv_kernels.backends.triton.picking import all_choices
from hetconv_kernels.measure.tables import markdown_table
from hetconv_kernels.problem import Problem, make_geometry
from hetconv_kernels.self_grouping import self_group

SPEC = GPU_SPECS[9, 0]
LAYERS = ((64, 56), (128, 28), (256, 14), (512, 7))  # channels, and the edge of their images
_BATCH = 128
# Of the models before the changes that docs/backends/cuda.md tells of, which are not there now:
# self-grouped layers by the kernel for wide groups, matched and not; cuDNN and ours with the margin
# of `auto`; and the kernel for wide groups by its machine code then.
_BEFORE_GROUPED = {128: 47.8, 256: 53.0, 512: 56.6}
_BEFORE_AUTO = {
    (64, 4): (49.7, 96.3), (64, 8): (49.7, 89.5), (128, 4): (49.7, 67.8), (128, 8): (49.7, 64.0),
    (256, 4): (49.7, 51.9), (256, 8): (49.7, 51.9), (512, 4): (49.7, 53.5), (512, 8): (49.7, 41.9),
}  # fmt: skip
_BEFORE_WIDE = {
    (64, 4): 67.9, (64, 8): 67.9, (128, 4): 36.6, (128, 8): 36.6,
    (256, 4): 27.0, (256, 8): 27.0, (512, 4): 26.2, (512, 8): 20.9,
}  # fmt: skip
# What memory or the matrix unit needs at least, of an engine's 2048 products a clock.
_FLOAT32_SPEED = 0.5


def problem_of(
    verb: str, channels: int, size: int, support: Support, dtype: str = "bfloat16"
) -> Problem:
    """Describes a verb of a 3×3 layer, for a GPU that is not there."""
    geometry = make_geometry(support, 1, support.kernel[0] // 2)
    like = torch.empty(_BATCH, channels, size, size, dtype=getattr(torch, dtype), device="meta")
    x = like.to(memory_format=torch.channels_last)
    w = torch.empty(support.shape, dtype=x.dtype, device="meta")
    return ops.describe(verb, geometry, x, x, w, (size, size))


def only(kernel: str | None, problem: Problem) -> Any:
    """Returns how a kernel of the CUDA engine runs a problem, or why it cannot."""
    before = choice.ONLY_KERNEL
    choice.ONLY_KERNEL = kernel
    try:
        return choice.best(problem)
    finally:
        choice.ONLY_KERNEL = before


def seconds(kernel: str, problem: Problem) -> float | None:
    """Predicts a kernel of the CUDA engine; None where it cannot run a problem."""
    found = only(kernel, problem)
    return None if isinstance(found, str) else float(found.seconds)


def fastest(problem: Problem) -> float:
    """Predicts the fastest kernel of the CUDA engine."""
    return float(only(None, problem).seconds)


def triton_seconds(problem: Problem) -> float:
    """Predicts Triton's kernels on Hopper, boxes too, as where the wide kernel is not built."""
    with ExitStack() as stack:
        for module, name in (
            *((triton_choice, "has_tma"), (triton_choice, "_tma_wanted")),
            (wgrad_choice, "has_tma"),
        ):
            stack.enter_context(mock.patch.object(module, name, return_value=True))
        return all_choices(problem)[0].seconds


def floor(problem: Problem) -> float:
    """Returns what memory or the matrix unit needs at least, in seconds."""
    speed = _FLOAT32_SPEED if problem.dtype == torch.float32 else 1.0
    unit = problem.macs / (SPEC.processors * SPEC.clock * SPEC.rate * speed)
    return max(unit, problem.bytes_moved / SPEC.bandwidth)


def useful_share(problem: Problem) -> float:
    """Returns the share of live weights among those that the plan for wide groups multiplies."""
    return problem.support.live / int(only("wide", problem).how.tables.size)


def matched_support(channels: int) -> Support:
    """Groups as ``SelfGrouping.matched("cuda")`` sets it, in steps to 70 %, Gaussian weights."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(channels, channels, 3, 3, generator=generator)
    support = Support.dense(channels, channels, 3)
    for percent in range(10, 71, 10):
        support = self_group(
            weight, percent, 16, support, granularity=8, tile=64, adjacent=8, fill=64
        )
    return support


# The tables ---------------------------------------------------------------------------------------


def matched() -> str:
    """Lays out self-grouped layers whose groups are formed for the kernel."""
    lines = []
    for channels, size in LAYERS[1:]:
        support = matched_support(channels)
        problem = problem_of("fprop", channels, size, support)
        back = problem_of("dgrad", channels, size, support)
        line = [layer(channels, size), f"{_BEFORE_GROUPED[channels]}"]
        for one in (problem, back):
            line += [us(seconds("wide", one)), f"30 % → {100 * useful_share(one):.0f} %"]
        lines.append(line)
    header = [
        *("self-grouped 70 %", "fprop before: paper, and matched", "fprop, matched"),
        *("live products of the plan", "dgrad, matched", "live products of its plan"),
    ]
    return markdown_table(header, lines)


def grouped_as_published(verb: str) -> str:
    """Lays out self-grouped layers as the paper forms them, by both kernels that can run them."""
    lines = []
    for percent in (70, 90):
        for channels, size in LAYERS[1 if percent == 90 else 0 :]:
            support = self_grouped(percent, channels, channels, 3, seed=0)
            problem = problem_of(verb, channels, size, support)
            times = [us(seconds(kernel, problem)) for kernel in ("wide", "scattered")]
            own = only("scattered", problem)
            share = f"{100 - percent} % → {100 * own.how.tables.useful(support):.0f} %"
            lines.append([f"{layer(channels, size)}, {percent} %", *times, share])
    return markdown_table(
        [f"self-grouped, {verb}", "wide", "scattered", "live products of the plan"], lines
    )


def float32() -> str:
    """Lays out HetConv in float32, with products of TF32."""
    lines = []
    for channels, size, p in het_layers(LAYERS[:2]):
        problem = problem_of("fprop", channels, size, het_layer(channels, p), "float32")
        vendor = dense_gpu_prediction(problem, SPEC, constants_of())
        times = floor(problem), vendor, triton_seconds(problem), seconds("narrow", problem)
        lines.append([f"{layer(channels, size)}, p={p}", *map(us, times)])
    return markdown_table(["float32, fprop", "floor", "cuDNN", "Triton", "narrow"], lines)


def wgrad() -> str:
    """Lays out wgrad of HetConv and of dense layers, by each kernel that can run it."""
    lines = []
    for channels, size, p in [*het_layers(LAYERS), *((c, size, 1) for c, size in LAYERS[1:])]:
        problem = problem_of("wgrad", channels, size, het_layer(channels, p))
        wide, least = seconds("wide", problem), floor(problem)
        times = least, seconds("narrow", problem), triton_seconds(problem), wide
        launches = constants_of().launch + 2 * choice._NEXT_LAUNCH
        share = f"{100 * least / (wide - launches):.0f} %" if wide else "–"
        name = "dense" if p == 1 else f"p={p}"
        lines.append([f"{layer(channels, size)}, {name}", *map(us, times), share])
    return markdown_table(["wgrad", "floor", "narrow", "Triton", "wide", "floor of wide"], lines)


def auto() -> str:
    """Lays out what `auto` compares for HetConv, before and after its constants changed."""
    lines = []
    for channels, size, p in het_layers(LAYERS):
        problem = problem_of("fprop", channels, size, het_layer(channels, p))
        vendor = dense_gpu_prediction(problem, SPEC, constants_of())
        ours = fastest(problem) / constants_of().ours["cuda"] * UNMEASURED_MARGIN
        before = [f"{one}" for one in _BEFORE_AUTO[channels, p]]
        lines.append([f"{layer(channels, size)}, p={p}", *before, us(vendor), us(ours)])
    header = [
        *("HetConv, fprop", "cuDNN before", "ours before, with `auto`'s margin"),
        *("cuDNN after", "ours after, with it"),
    ]
    return markdown_table(header, lines)


def wide() -> str:
    """Lays out the kernel for wide groups, by eights of columns and with flattened rows."""
    lines = []
    for channels, size, p in het_layers(LAYERS):
        problem = problem_of("fprop", channels, size, het_layer(channels, p))
        kinds = wide_seconds(problem)
        shares = [f"{100 * one:.0f} %" for one in pixels_of_tiles(problem)]
        times = [us(kind) for kind in kinds]
        before = f"{_BEFORE_WIDE[channels, p]}"
        lines.append([f"{layer(channels, size)}, p={p}", before, *times, *shares])
    header = [
        *("HetConv, fprop", "by its machine code before", "eights of columns"),
        *("flattened rows", "pixels of tiles, eights", "flattened"),
    ]
    return markdown_table(header, lines)


def wide_tilings(problem: Problem) -> list[WideTiling]:
    """Returns the fastest tiles of eights of columns, and the fastest of flattened rows."""
    back, size = problem.verb == "dgrad", (problem.height, problem.width)
    classes, _ = wide_windows(problem.geometry, size, back)
    tables = lower_wide(problem.support, classes, back)
    listed = list(tilings(tables, classes, size, problem.batch, SPEC))
    kinds = ([t for t in listed if bool(t.shape.flat_pitch) == flat] for flat in (False, True))
    return [min(kind, key=lambda t: t.clocks) for kind in kinds]


def wide_seconds(problem: Problem) -> list[float]:
    """Predicts the kernel for wide groups with each kind of tiles."""
    return [
        choice._whole(problem, tiling.clocks, tiling.tables.size, SPEC)
        for tiling in wide_tilings(problem)
    ]


def pixels_of_tiles(problem: Problem) -> list[float]:
    """Returns the share of places in tiles of each kind that are pixels of y."""
    rows, cols = problem.output_size
    found = []
    for tiling in wide_tilings(problem):
        (count,) = tile_counts(tiling.classes, problem.batch)
        found.append(problem.batch * rows * cols / (count * tiling.shape.pixels))
    return found


def het_layer(channels: int, p: int) -> Support:
    """Returns a layer of HetConv; dense for p=1."""
    return (
        Support.het(channels, channels, 3, p=p) if p > 1 else Support.dense(channels, channels, 3)
    )


def het_layers(layers: Sequence[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """Lists layers with p=4 and p=8 each."""
    return [(channels, size, p) for channels, size in layers for p in (4, 8)]


def layer(channels: int, size: int) -> str:
    """Names a layer."""
    return f"{size}²×{channels}"


def us(seconds: float | None) -> str:
    """Writes a time in µs."""
    return "–" if seconds is None else f"{1e6 * seconds:.1f}"


TABLES = {
    "matched": matched,
    "grouped-fprop": lambda: grouped_as_published("fprop"),
    "grouped-dgrad": lambda: grouped_as_published("dgrad"),
    "float32": float32,
    "wgrad": wgrad,
    "auto": auto,
    "wide": wide,
}


def main() -> int:
    """Prints all tables."""
    print(__doc__)
    for name, make in TABLES.items():
        print(f"{name}\n\n{make()}\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
