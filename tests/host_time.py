# SPDX-License-Identifier: Apache-2.0
"""What a call of the Triton engine takes on the host before the driver, without a GPU.

    python tests/host_time.py

Triton compiles and loads the real kernels and starts them by its real launcher, or by ours, on a
stand-in for the driver (``native/launch/driver.c``) that does nothing. Tensors are on the CPU. What
is missing is the driver's own time, the same either way but for what Triton asks it about each
pointer and descriptor; PyTorch's questions about devices and streams are Python functions here.
With ``--check`` nothing is timed: what both launchers hand to the driver is compared, byte by byte.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from building import alone

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "launch"
# Rounds, and calls of each variant in a round.
ROUNDS, CALLS = 40, 100


def build_driver() -> Path:
    """Compiles the stand-in; returns the folder that it lies in."""
    source, library = ROOT / "tests/native/launch/driver.c", FOLDER / "libcuda.so.1"
    with alone(FOLDER):
        if not library.exists() or library.stat().st_mtime < source.stat().st_mtime:
            flags = ["-O2", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"]
            subprocess.run(["gcc", *flags, str(source), "-o", str(library)], check=True)
    return FOLDER


def start(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs this file in a process that finds the stand-in."""
    folder = str(build_driver())
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": folder,
        "TRITON_LIBCUDA_PATH": folder,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    command = [sys.executable, __file__, "--here", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


class Driver:
    """What the stand-in kept of the latest launch."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL("libcuda.so.1")

    def number(self, name: str) -> Any:
        """A counter of the stand-in."""
        return ctypes.c_int.in_dll(self.library, f"kept_{name}")

    def expect(self, sizes: list[int]) -> None:
        """Says how many bytes each parameter of a kernel has."""
        kept = (ctypes.c_int64 * 256).in_dll(self.library, "kept_sizes")
        kept[: len(sizes)] = sizes
        self.number("count").value = len(sizes)

    def took(self) -> list[str]:
        """Lists, as text, how the latest launch was to run, and what it was given."""
        function = ctypes.c_uint64.in_dll(self.library, "kept_function").value
        config = bytes((ctypes.c_char * 56).in_dll(self.library, "kept_config"))
        params = (ctypes.c_char * 128 * 256).in_dll(self.library, "kept_params")
        sizes = (ctypes.c_int64 * 256).in_dll(self.library, "kept_sizes")
        count = self.number("count").value
        # Grid, block and shared memory; the stream; how many attributes, whose place is no matter.
        found = [hex(function), config[:28].hex(), config[32:40].hex(), config[48:52].hex()]
        return found + [bytes(params[i])[: sizes[i]].hex() for i in range(count)]


def sizes_of(compiled: Any, arguments: list[Any]) -> list[int]:
    """Lists how many bytes each parameter has, by the types that Triton gave them."""
    found: list[int] = []
    for kind, value in zip(list(compiled.src.signature.values()), arguments, strict=False):
        if kind.startswith("tensordesc"):
            rank = len(value.shape)
            found += [128, *[4] * rank, *[8] * rank]
        elif kind.startswith("*"):
            found.append(8)
        elif kind != "constexpr":
            found.append(int(kind[1:]) // 8)
    return [*found, 8, 8]


@contextlib.contextmanager
def pretended() -> Iterator[Driver]:
    """Pretends that there is a Hopper, with Triton's own connection to its driver."""
    import rehearsal
    from triton.backends.nvidia import driver as nvidia
    from triton.runtime import driver

    from hetconv_kernels.backends.gpu import capture

    with pytest.MonkeyPatch.context() as patch, rehearsal.rehearsal(patch):
        patch.setattr(capture, "_raw_stream", lambda _: 0)
        kept = Driver()
        # Triton 3.6 mends no maps of small tensors: for it, take a driver that needs none mended.
        if "1llu << 21" not in Path(nvidia.__file__).with_name("driver.c").read_text():
            kept.number("version").value = 13020
        made = nvidia.CudaDriver()
        made.get_current_stream = lambda _: 0
        driver.set_active(made)
        yield kept


def calls() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Makes calls of both fprop kernels and of wgrad's, with their operands."""
    import hetconv_kernels as hk
    from hetconv_kernels import ops
    from hetconv_kernels.backends.triton import choice, picking
    from hetconv_kernels.backends.triton.calls import GatherCall
    from hetconv_kernels.backends.triton.wgrad_calls import WgradCall
    from hetconv_kernels.problem import make_geometry

    found: dict[str, tuple[Any, tuple[Any, ...]]] = {}
    last = {"memory_format": torch.channels_last}
    for width, size, boxed in ((256, 14, False), (512, 7, True)):
        support = hk.Support.het(width, width, 3, p=4)
        x = torch.zeros(1, width, size, size, dtype=torch.bfloat16).to(**last)
        w = torch.zeros(support.shape, dtype=torch.bfloat16)
        shift, name = torch.zeros(width), f"{size}²×{width}, {'boxes' if boxed else 'pointers'}"
        for frozen in (True, False):
            geometry = make_geometry(support, 1, 1, frozen=frozen)
            extras = {"shift": shift, "residual": x}
            # A frozen layer keeps the live weights alone.
            given = w.new_zeros(support.live) if frozen else w
            problem = ops.describe("fprop", geometry, x, x, given, (size, size), extras)
            choice.ONLY_LAUNCH = "tma" if boxed else "gather"
            made: Any = picking.all_choices(problem)[0]
            assert (made.box is not None) == boxed
            operands = x, given, None, shift, x
            key = f"fprop {name}, {'frozen' if frozen else 'trained'}"
            found[key] = GatherCall(problem, made), operands
        problem = ops.describe("wgrad", geometry, x, x, w, (size, size))
        by = [c for c in picking.all_choices(problem) if (c.box is not None) == boxed]
        found[f"wgrad {name}"] = WgradCall(problem, by[0]), (x, x)
    choice.ONLY_LAUNCH = None
    return found


def check(driver: Driver) -> dict[str, Any]:
    """Compares what both launchers hand to the driver, for the last launch of each call."""
    from triton import knobs

    from hetconv_kernels.backends.triton import launch, prepared

    found: dict[str, Any] = {}
    original, begin = prepared.PreparedKernel.of, launch.Launch.__call__
    met: list[tuple[Any, Any]] = []
    known: dict[Any, tuple[Any, Any]] = {}  # of each launch what was compiled, and its arguments
    begun: list[tuple[Any, tuple[Any, ...]]] = []
    both: dict[str, list[str]] = {}

    def of(compiled: Any, grid: Any, arguments: Any, changing: Any) -> Any:
        met.append((compiled, arguments))
        return original(compiled, grid, arguments, changing)

    def spied(self: Any, *arguments: Any) -> None:
        begin(self, *arguments)
        begun.append((self, arguments))
        if met:
            known[self] = met.pop()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepared.PreparedKernel, "of", of)
        patch.setattr(launch.Launch, "__call__", spied)
        for name, (call, operands) in calls().items():
            begun.clear()
            driver.expect([])
            call.run(*operands)
            for nth, (start, given) in enumerate(list(begun)):
                compiled, arguments = known[start]
                driver.expect(sizes_of(compiled, arguments))
                both.clear()
                for launcher, hooks in (("triton", [print]), ("prepared", [])):
                    patch.setattr(launch, "_hooked", lambda hooks=hooks: bool(hooks))
                    before = driver.number("launches").value
                    begin(start, *given)
                    assert driver.number("launches").value == before + 1
                    both[launcher] = driver.took()
                encoded = driver.number("encodings").value
                begin(start, *given)
                found[f"{name}: {compiled.name} {nth}"] = {
                    "same": both["triton"] == both["prepared"],
                    "parameters": len(both["prepared"]) - 4,
                    "prepared": all(m.prepared is not None for m in start._met.values()),
                    "encoded again": driver.number("encodings").value - encoded,
                }
                driver.number("refusals").value = 1
                begin(start, *given)
                found[f"{name}: {compiled.name} {nth}"]["after a refusal"] = (
                    driver.took() == (both["triton"])
                )
    seen: list[Any] = []
    hook = knobs.runtime.launch_enter_hook
    hook.add(seen.append)
    begin(start, *given)
    hook.remove(seen.append)
    begin(start, *given)
    found["a profiler is told"] = len(seen)
    return found


def measure() -> dict[str, dict[str, float]]:
    """Times calls as a whole, and the launch of their kernel alone, in microseconds: medians."""
    from hetconv_kernels.backends.triton import launch

    found: dict[str, dict[str, float]] = {}
    with pytest.MonkeyPatch.context() as patch:
        for name, (call, operands) in calls().items():
            begun: list[Callable[[], None]] = []
            begin = launch.Launch.__call__

            def spied(self: Any, *given: Any, begin: Any = begin, begun: Any = begun) -> None:
                begin(self, *given)
                begun.append(lambda: begin(self, *given))

            patch.setattr(launch.Launch, "__call__", spied)
            call.run(*operands)
            patch.setattr(launch.Launch, "__call__", begin)
            variants = {"call": lambda c=call, o=operands: c.run(*o), "launch": begun[-1]}
            samples: dict[str, list[float]] = {}
            for _ in range(ROUNDS):
                for launcher in ("triton", "prepared"):
                    if launcher == "triton":
                        patch.setattr(launch, "_hooked", lambda: True)
                    for what, variant in variants.items():
                        with torch._C.DisableTorchFunction():
                            variant()
                            began = time.perf_counter()
                            for _ in range(CALLS):
                                variant()
                            spent = (time.perf_counter() - began) / CALLS * 1e6
                        samples.setdefault(f"{what}, {launcher}", []).append(spent)
                    patch.undo()
            found[name] = {key: statistics.median(values) for key, values in samples.items()}
    return found


def main() -> int:
    """Prints the table, or what `check` found, as JSON."""
    if "--here" not in sys.argv:
        done = start(*sys.argv[1:])
        print(done.stdout, end="")
        print(done.stderr, end="", file=sys.stderr)
        return done.returncode
    with pretended() as driver:
        if "--check" in sys.argv:
            print(json.dumps(check(driver)))
            return 0
        rows = measure()
    names = list(next(iter(rows.values())))
    print(f"µs on the host before the driver, medians of {ROUNDS} rounds of {CALLS} calls")
    print(f"{'':42s}" + "".join(f"{name:>18s}" for name in names))
    for row, values in rows.items():
        print(f"{row:42s}" + "".join(f"{values[name]:18.1f}" for name in names))
    return 0


if __name__ == "__main__":
    sys.exit(main())
