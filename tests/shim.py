# SPDX-License-Identifier: Apache-2.0
"""The kernels of csrc/cuda on the CPU: builds tests/native/cuda and runs cases through it.

The very sources of the kernels are compiled by g++ against a header that gives their instructions
a meaning here (see tests/native/cuda/machine.h).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from building import alone
from torch import Tensor

from hetconv_kernels import Support
from hetconv_kernels.backends.cuda.narrow_lowering import BlockShape, Tables, lower_narrow
from hetconv_kernels.backends.cuda.narrow_tiles import choose_narrow, choose_wgrad, shared_bytes
from hetconv_kernels.backends.cuda.narrow_wgrad_lowering import UNIT_VALUES
from hetconv_kernels.backends.cuda.windows import windows
from hetconv_kernels.backends.gpu.devices import GPU_SPECS
from hetconv_kernels.problem import Geometry
from hetconv_kernels.testing import error_bound, oracle

ROOT = Path(__file__).resolve().parents[1]
CODES = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3}
# What a product of numbers rounded to TF32 errs by, 11 bits of each; and one of 3xTF32, of which
# the product of what is left is missing, and each of those has 11 bits too.
TF32, TF32X3 = 2 * 2.0**-11, 3 * 2.0**-22
ACTS = ("none", "relu", "relu6", "silu", "gelu")
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=undefined"]
SANITIZE += ["--param", "asan-stack=0"]  # stacks of fibers are not what it expects of a stack
WARN = ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-psabi"]
FLAGS = ["-std=c++17", "-O1", "-g1", "-DHETCONV_HOST", *SANITIZE, *WARN]


def compiler() -> str | None:
    """Returns the GCC that builds the shim; None where there is none."""
    return shutil.which("g++")


def build() -> Path:
    """Builds the driver once for each state of its sources; returns its path.

    Raises:
        subprocess.CalledProcessError: the compiler refuses; its words go to the terminal.
    """
    native = ROOT / "tests" / "native" / "cuda"
    kernels = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    sources = [*kernels, *sorted(native.glob("*.cpp"))]
    csrc = ROOT / "csrc"
    folders = (csrc, csrc / "cuda", native)
    headers = [path for folder in folders for path in sorted(folder.glob("*.h"))]
    key = hashlib.sha256(" ".join(FLAGS).encode())
    for path in [*sources, *headers]:
        key.update(path.read_bytes())
    folder = ROOT / "build" / "native" / f"cuda-{key.hexdigest()[:16]}"
    driver = folder / "driver"
    with alone(folder):
        if driver.exists():
            return driver
        include = [f"-I{native}", f"-I{ROOT / 'csrc' / 'cuda'}"]
        objects = []
        for source in sources:
            objects.append(folder / f"{source.name}.o")
            command = ["g++", *FLAGS, *include, "-x", "c++", "-c", source, "-o", objects[-1]]
            subprocess.run(command, check=True)
        # Linked under another name: a half-written driver is never found.
        subprocess.run(["g++", *FLAGS, *objects, "-o", folder / "linking"], check=True)
        os.replace(folder / "linking", driver)
    return driver


@dataclass
class Case:
    """One call: what the driver reads, and what must come back.

    Attributes:
        name: for messages.
        numbers: of the launch.
        arrays: operands and tables; ``result`` is written.
        expected: the truth, in float64, in the order of the result's memory.
        bound: the error that is allowed, alike.
        dtype: of the result.
        zeros: where the result must be zero.
    """

    name: str
    numbers: dict[str, int]
    arrays: dict[str, Any]
    expected: Tensor
    bound: Tensor
    dtype: torch.dtype
    zeros: Tensor | None = field(default=None)

    def text(self) -> bytes:
        """Returns the case in the format of the driver."""
        parts = [struct.pack("<q", len(self.numbers))]
        for name, number in self.numbers.items():
            parts.append(struct.pack("<24sq", name.encode(), int(number)))
        parts.append(struct.pack("<q", len(self.arrays)))
        for name, array in self.arrays.items():
            if isinstance(array, Tensor):
                array = array.contiguous().view(torch.uint8).numpy()
            data = np.ascontiguousarray(array).tobytes()
            parts += [struct.pack("<24sq", name.encode(), len(data)), data]
        return b"".join(parts)

    def check(self, data: bytes) -> None:
        """Compares what came back with the truth."""
        got = torch.frombuffer(bytearray(data), dtype=self.dtype).double()
        expected = self.expected.reshape(-1)
        bad = ~((got - expected).abs() <= self.bound.reshape(-1))
        assert not bad.any(), (
            f"{self.name}: {int(bad.sum())} of {bad.numel()} differ, "
            f"first at {int(bad.nonzero()[0])}: {got[bad][:4]} for {expected[bad][:4]}"
        )
        if self.zeros is not None:
            assert not got[self.zeros.reshape(-1)].any(), f"{self.name}: dead entries are not zero"


def run(cases: Sequence[Case], folder: Path, seed: int = 0) -> None:
    """Runs cases in one process and checks all results."""
    done = execute(cases, folder, seed=seed)
    assert done.returncode == 0, done.stderr
    data = (folder / "results").read_bytes()
    for case in cases:
        size = case.expected.numel() * case.dtype.itemsize
        case.check(data[:size])
        data = data[size:]
    assert not data


def execute(
    cases: Sequence[Case], folder: Path, mistake: Sequence[str] = (), seed: int = 0
) -> subprocess.CompletedProcess[str]:
    """Runs the driver on cases, with a mistake made on purpose or none; `seed` orders threads."""
    (folder / "cases").write_bytes(b"".join(case.text() for case in cases))
    command = [build(), folder / "cases", folder / "results", str(seed), *mistake]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def activate(name: str, v: Tensor) -> Tensor:
    """Applies an activation of PyTorch."""
    functions = {
        "none": lambda t: t,
        "relu": torch.relu,
        "relu6": torch.nn.functional.relu6,
        "silu": torch.nn.functional.silu,
        "gelu": torch.nn.functional.gelu,
    }
    return functions[name](v)


def fprop_case(
    support: Support,
    geometry: Geometry,
    size: tuple[int, int],
    batch: int = 2,
    dtype: torch.dtype = torch.bfloat16,
    back: bool = False,
    act: str = "none",
    epilogue: Sequence[str] = (),
    shape: BlockShape | None = None,
    buffers: int | None = None,
    resident: bool | None = None,
    boxes: bool = False,
    vectors: bool = True,
    live: bool = False,
    split: bool = False,
    integers: bool = False,
) -> Case:
    """Makes a case of fprop or dgrad; what is not given is chosen as for a call.

    Halos are brought by cp.async, or with `boxes` by TMA where the tables allow it. Numbers of
    float32 are rounded to TF32, or with `split` multiplied as the sum of two. Of `integers` the
    result is to be exact.
    """
    height, width = size
    out = geometry.output_size(height, width)
    f, c = support.filters, support.channels
    read, written = ((f, *out), (c, *size)) if back else ((c, *size), (f, *out))
    window = windows(geometry, size, back)
    part = GPU_SPECS[9, 0]
    if shape is None:
        choice = choose_narrow(support, window, batch, back, part, item=dtype.itemsize)
        tables = choice.tables
        buffers = choice.buffers if buffers is None else buffers
        resident = choice.resident if resident is None else resident
    else:
        tables = lower_narrow(support, window, shape, back, dtype.itemsize)
    buffers, resident = buffers or 1, bool(resident)
    boxes = boxes and not tables.no_tma
    x, w = (_drawn(shape, dtype, integers) for shape in ((batch, *read), support.shape))
    extras = {name: torch.randn(written[0]) for name in ("scale", "shift") if name in epilogue}
    if "residual" in epilogue:
        extras["residual"] = torch.randn(batch, *written).to(dtype)
    exact, most = (_apply(geometry, t[0], t[1], size, back) for t in ((x, w), (x.abs(), w.abs())))
    if "scale" in extras:
        scale = extras["scale"].double()[:, None, None]
        exact, most = exact * scale, most * scale.abs()
    if "shift" in extras:
        shift = extras["shift"].double()[:, None, None]
        exact, most = exact + shift, most + shift.abs()
    if "residual" in extras:
        exact, most = exact + extras["residual"].double(), most + extras["residual"].double().abs()
    # No activation is steeper than 1.13.
    bound = error_bound(most, read[0] * int(np.prod(support.kernel)), dtype)
    if dtype == torch.float32:  # of each product, by its operands
        bound += most * (TF32X3 if split else TF32)
    bound *= 0.0 if integers else 1.2
    assert not integers or exact.abs().max() <= 256, "not exact in bfloat16"
    expected = activate(act, exact)
    weight = w[torch.as_tensor(np.array(support.mask))] if live else w
    form = "live" if live else "contiguous"
    numbers = {
        "kind": 0,
        "dtype": CODES[dtype],
        "w_dtype": CODES[weight.dtype],
        "act": ACTS.index(act),
        "x_n": height_width(read),
        "x_h": read[2] * read[0],
        "x_w": read[0],
        "y_n": height_width(written),
        "y_h": written[2] * written[0],
        "y_w": written[0],
        "batch": batch,
        "image_h": read[1],
        "image_w": read[2],
        "vector_stores": int(vectors and written[0] * dtype.itemsize % 16 == 0),
        "item": dtype.itemsize,
        "split": int(split),
        "blocks": 2,
        "channels": read[0],
        "shared": shared_bytes(tables, buffers, resident, boxes),
        "buffers": buffers,
        "resident": int(resident),
        "tma": int(boxes),
        **table_numbers(tables),
    }
    arrays: dict[str, Any] = {
        "x": last(x),
        "w": weight,
        "source": tables.source(support, form),
        "result": torch.full((batch, *written), torch.nan).to(dtype),
        "halos": tables.halos,
        **{name: getattr(tables, name) for name in TABLES},
        **{name: last(t) if t.dim() == 4 else t for name, t in extras.items()},
    }
    name = f"{'dgrad' if back else 'fprop'} {support} {geometry} {size} {dtype} {tables.shape}"
    title = f"{name} {act} {epilogue}"
    return Case(title, numbers, arrays, last(expected), last(bound), dtype)


WGRAD_TABLES = ("geometry", "heads", "units", "chunks", "slots")
TABLES = ("classes", "heads", "rounds", "lists", "words", "chunks", "slots", "rows")


def table_numbers(tables: Tables) -> Mapping[str, int]:
    """Lists the numbers of a launch that the tables decide."""
    shape = tables.shape
    return {
        "class_count": tables.heads.shape[0],
        "parts": tables.heads.shape[1],
        "round_count": tables.rounds.shape[2],
        "tile_h": shape.height,
        "tile_w": shape.width,
        "warps_m": shape.warps_m,
        "warps_n": shape.warps_n,
        "raw_pitch": tables.raw_pitch,
        "slot_pitch": tables.slot_pitch,
        "halo_pixels": tables.halo_pixels,
        "max_words": tables.max_words,
        "max_fragments": tables.max_fragments,
    }


def wgrad_case(
    support: Support,
    geometry: Geometry,
    size: tuple[int, int],
    batch: int = 2,
    dtype: torch.dtype = torch.bfloat16,
    w_dtype: torch.dtype = torch.float32,
    live: bool = False,
    buffers: int | None = None,
    boxes: bool = False,
    integers: bool = False,
) -> Case:
    """Makes a case of wgrad; `boxes` and `integers` as of fprop."""
    (window,) = windows(geometry, size, False)
    out = geometry.output_size(*size)
    f, c = support.filters, support.channels
    tables, chosen, _ = choose_wgrad(support, window, GPU_SPECS[9, 0])
    buffers, boxes = buffers or chosen, boxes and not tables.no_tma
    x, dy = (_drawn((batch, *one), dtype, integers) for one in ((c, *size), (f, *out)))
    exact, most = (_wgrad(geometry, *pair) for pair in ((dy, x), (dy.abs(), x.abs())))
    depth = batch * out[0] * out[1]
    # Sums are float32, and rounded to the weight's dtype once.
    bound = error_bound(most, depth, torch.float32)
    if w_dtype != torch.float32:
        bound = bound + torch.finfo(w_dtype).eps * exact.abs() + torch.finfo(w_dtype).tiny
    bound = bound * (not integers)
    mask = torch.as_tensor(np.array(support.mask))
    numbers = {
        "kind": 1,
        "dtype": CODES[dtype],
        "w_dtype": CODES[w_dtype],
        "x_n": height_width((c, *size)),
        "x_h": size[1] * c,
        "x_w": c,
        "y_n": height_width((f, *out)),
        "y_h": out[1] * f,
        "y_w": f,
        "batch": batch,
        "image_h": size[0],
        "image_w": size[1],
        "parts": len(tables.heads),
        "unit_count": len(tables.units),
        "tile_h": tables.height,
        "tile_w": tables.width,
        "warps": tables.warps,
        "x_pitch": tables.pitches[0],
        "x_slot_pitch": tables.pitches[1],
        "dy_pitch": tables.pitches[2],
        "dy_slot_pitch": tables.pitches[3],
        "halo_pixels": tables.halo_pixels,
        "buffers": buffers,
        "blocks": 2,
        "shared": tables.shared_bytes(buffers, boxes),
        "tma": int(boxes),
        "channels": c,
        "filters": f,
        "dy_h": out[0],
        "dy_w": out[1],
        "halo_h": int(tables.geometry[8]),
        "halo_w": int(tables.geometry[9]),
        "dw_size": support.live if live else mask.numel(),
    }
    if live:
        exact, bound = exact[mask], bound[mask]
    targets = tables.targets(support, "live" if live else "contiguous")
    assert len(targets) == len(tables.units) * UNIT_VALUES
    arrays = {
        "x": last(x),
        "dy": last(dy),
        "targets": targets,
        "result": torch.full(exact.shape, torch.nan).to(w_dtype),
        **{
            name: getattr(tables, name)
            for name in ("geometry", "heads", "units", "chunks", "slots")
        },
    }
    name = f"wgrad {support} {geometry} {size} {dtype} -> {w_dtype}"
    return Case(name, numbers, arrays, exact, bound, w_dtype, None if live else ~mask)


def last(t: Tensor) -> Tensor:
    """Returns a tensor in the order of channels_last memory.  # [N, C, H, W] -> [N, H, W, C]"""
    return t.permute(0, 2, 3, 1).contiguous()


def height_width(shape: Sequence[int]) -> int:
    """Returns the elements of one image."""
    return int(np.prod(shape))


def _drawn(shape: Sequence[int], dtype: torch.dtype, integers: bool) -> Tensor:
    return (torch.randint(-2, 3, tuple(shape)) if integers else torch.randn(*shape)).to(dtype)


def _apply(geometry: Geometry, x: Tensor, w: Tensor, size: tuple[int, int], back: bool) -> Tensor:
    x, w = x.double(), w.double()
    if not back:
        return oracle(x, w, geometry)
    image = torch.zeros(len(x), geometry.support.channels, *size, dtype=torch.float64)
    image.requires_grad_()
    (dx,) = torch.autograd.grad(oracle(image, w, geometry), image, x)
    return dx


def _wgrad(geometry: Geometry, dy: Tensor, x: Tensor) -> Tensor:
    w = torch.zeros(geometry.support.shape, dtype=torch.float64, requires_grad=True)
    (dw,) = torch.autograd.grad(oracle(x.double(), w, geometry), w, dy.double())
    return dw
