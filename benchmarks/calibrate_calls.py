# SPDX-License-Identifier: Apache-2.0
"""What the seconds of narrow groups, of masks and of small calls rest on, measured.

    python -m benchmarks.calibrate_calls [--out FILE]

Times, interleaved and without gradients, equal groupings of few channels beside the plain layer,
in both memory formats; what a weight that is not frozen costs beyond a frozen one, masked or
packed, per element; and what the smallest layers take around the convolution.
`hetconv_kernels.backends.cost_model` has the constants by name. Other than `benchmarks.calibrate`
it fits nothing: the few numbers are printed, and what they would be on the machine whose rates the
committed ones are. For that a prediction of `cpu` beside its measured time says how fast this
machine is.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import hetconv_kernels as hk
from benchmarks.record import environment
from hetconv_kernels import ops
from hetconv_kernels.backends import cost_model, get_backend, predict
from hetconv_kernels.backends.cpu_plans import chosen_plan
from hetconv_kernels.files import Json
from hetconv_kernels.measure import timing
from hetconv_kernels.packing import dense_weight, masked, watched_packings

# Images, channels, groups, side.
GROUPS = [
    (8, 128, 128, 14), (8, 32, 32, 56), (8, 512, 512, 7), (1, 128, 128, 28),  # of 1 channel
    (8, 64, 32, 28), (8, 128, 64, 14), (2, 96, 32, 28),  # of 2 and 3
    (8, 256, 64, 14), (8, 64, 16, 28), (2, 96, 16, 28),  # of 4 and 6
    (8, 128, 16, 14), (8, 64, 8, 28), (8, 256, 16, 14),  # of 8 and 16
]  # fmt: skip
WEIGHT_SIZES = [(64, 3), (128, 3), (256, 3), (512, 3), (1024, 1)]  # channels and kernel


def median_times(calls: dict[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """Times calls, interleaved: the median seconds of each."""
    found = timing.interleaved(
        calls, baseline=next(iter(calls)), rounds=30, min_time=3e-4, max_seconds=seconds
    )
    return {name: found.median(name) for name in calls}


def groups(n: int, c: int, g: int, side: int, last: bool, seconds: float) -> Json:
    """Times a frozen equal grouping on both engines beside the plain layer."""
    layout = torch.channels_last if last else torch.contiguous_format
    x = torch.randn(n, c, side, side).contiguous(memory_format=layout)
    layers = {
        name: hk.nn.GroupedConv2d(c, c, 3, padding=1, groups=g, backend=name).eval().freeze()
        for name in ("vendor", "cpu")
    }
    plain: nn.Module = layers["cpu"].to_conv2d().to(memory_format=layout)  # type: ignore[call-overload]
    calls: dict[str, Callable[[], Any]] = {"plain": lambda: plain(x)}
    calls |= {name: lambda layer=layer: layer(x) for name, layer in layers.items()}
    took = median_times(calls, seconds)
    layer = layers["cpu"]
    problem = ops.describe(
        "fprop", layer._geometry, x, x, layer.weight, (side, side), {"shift": layer.bias}
    )
    engines = {name: get_backend(name) for name in layers}
    macs = problem.dense_macs / g
    slower = took["cpu"] / predict(engines["cpu"], problem)
    rate = (took["plain"] / slower - cost_model.DENSE_RATES.call) / macs
    return {
        "layer": f"{n}x{c}x{side}^2, {g} groups, {'nhwc' if last else 'nchw'}",
        "width": c // g,
        "channels_last": last,
        **{f"{name}_s": value for name, value in took.items()},
        **{f"predicted_{name}_s": predict(e, problem) for name, e in engines.items()},
        "slower": slower,
        "per_mac": rate,
    }


def masks(c: int, k: int, seconds: float) -> Json:
    """Times what a weight costs a call that is not a frozen layer's, in seconds per element."""
    mask = np.random.default_rng(0).random((c, c, k, k)) < 0.3
    support = hk.Support.from_mask(mask)
    dense, live = torch.randn(c, c, k, k), torch.randn(support.live)
    took = median_times(
        {
            "mask": lambda: masked(support, dense, brief=True),
            "turn": lambda: masked(support, dense, brief=True, layout=torch.channels_last),
            "expand": lambda: dense_weight(support, live, torch.float32),
        },
        seconds,
    )
    each = {f"{name}_per_weight": value / dense.numel() for name, value in took.items()}
    return {"weights": dense.numel(), **each}


def packing(name: str, support: hk.Support, calls: int = 7) -> Json:
    """Times what `cpu` packs of a weight that is not frozen, in seconds per packed element."""
    f, c, kernel, _ = support.shape
    layer = hk.nn.SupportConv2d(c, f, kernel, padding=kernel // 2, support=support, backend="cpu")
    x = torch.randn(1, c, 7, 7).contiguous(memory_format=torch.channels_last)
    problem = ops.describe("fprop", layer._geometry, x, x, layer.weight, (7, 7), {})
    plan, found = chosen_plan(problem), []
    for _ in range(calls):
        with watched_packings() as seen:
            layer(x)
        found.append(sum(one.seconds for one in seen))
    share = torch.get_num_threads() if plan.packed_elements > cost_model.PACK_ALONE else 1
    each = statistics.median(found) * share / plan.packed_elements
    return {"support": name, "elements": plan.packed_elements, "per_element": each}


def packed_supports() -> dict[str, hk.Support]:
    """Names Supports of every kind that the engine packs in its own way."""
    drawn, found = np.random.default_rng(0), {}
    for c in (64, 256, 512):
        for share in (0.5, 0.1):
            mask = drawn.random((c, c, 3, 3)) < share
            found[f"{c} channels, irregular {share:.0%}"] = hk.Support.from_mask(mask)
        found[f"{c} channels, het 4"] = hk.Support.het(c, c, 3, 4)
        found[f"{c} channels, 8 groups"] = hk.Support.grouped(c, c, 3, 8)
    return found


def small(seconds: float) -> Json:
    """Times the smallest layers beside plain ones: microseconds of ours beyond them."""
    support = hk.Support.from_mask(np.random.default_rng(0).random((4, 4, 3, 3)) < 0.3)
    x, layers = torch.randn(1, 4, 8, 8), {}
    for name in ("not frozen", "frozen"):
        layers[name] = hk.nn.SupportConv2d(4, 4, 3, padding=1, support=support).eval()
    layers["frozen"].freeze()
    plain = layers["frozen"].to_conv2d()
    calls: dict[str, Callable[[], Any]] = {"plain": lambda: plain(x)}
    calls |= {name: lambda layer=layer: layer(x) for name, layer in layers.items()}
    took = median_times(calls, seconds)
    return {name: (value - took["plain"]) * 1e6 for name, value in took.items() if name != "plain"}


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints, and writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=0.7, help="for each row (0.7)")
    options = parser.parse_args(arguments)
    rows = []
    for last in (False, True):
        for shape in GROUPS:
            rows.append(groups(*shape, last, options.seconds))
            row = rows[-1]
            micros = [round(row[f"{name}_s"] * 1e6) for name in ("plain", "vendor", "cpu")]
            predicted = [round(row[f"predicted_{name}_s"] * 1e6) for name in ("vendor", "cpu")]
            print(f"{row['layer']:<36} plain, vendor, cpu {micros} us; predicted {predicted}; "
                  f"x{row['slower']:.2f}, {row['per_mac']:.1e} s a MAC", flush=True)  # fmt: skip
        for low, high in ((1, 1), (2, 3), (4, 6), (8, 16)):
            found = [r["per_mac"] for r in rows
                     if r["channels_last"] == last and low <= r["width"] <= high]  # fmt: skip
            print(f"  groups of {low} to {high}: {statistics.median(found):.1e} s a MAC")
    weights = [masks(c, k, options.seconds) for c, k in WEIGHT_SIZES]
    speed = math.exp(statistics.mean(math.log(r["slower"]) for r in rows))
    for row in weights:
        print(f"{row['weights']} weights: mask {row['mask_per_weight']:.1e} s each, into "
              f"channels_last {row['turn_per_weight']:.1e}, expand "
              f"{row['expand_per_weight']:.1e}")  # fmt: skip
    for name in ("mask", "turn", "expand"):
        each = statistics.median(row[f"{name}_per_weight"] for row in weights) / speed
        print(f"  {name}: {each:.1e} s for each weight on the machine of the fitted rates")
    packs = [packing(name, support) for name, support in packed_supports().items()]
    each = statistics.median(row["per_element"] for row in packs) / speed
    print(f"packing: {each:.1e} s for each element on the machine of the fitted rates")
    for row in packs:
        print(f"{row['support']}: {row['elements']} packed elements, "
              f"{row['per_element']:.1e} s each on one thread")  # fmt: skip
    tiny = small(options.seconds)
    print(f"smallest layers, us beyond the plain one: {tiny}; this machine takes x{speed:.2f}")
    if options.out:
        found = {"environment": environment(), "rows": rows, "weights": weights, "packing": packs,
                 "small": tiny}  # fmt: skip
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
