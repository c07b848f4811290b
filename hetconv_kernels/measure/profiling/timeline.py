# SPDX-License-Identifier: Apache-2.0
"""Timelines of a network for other tools: Chrome's trace, Triton's proton, Nsight Compute."""

from __future__ import annotations

import importlib.util
import os
import shlex
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd.profiler import record_function

from ... import ranges
from ...errors import HetconvError
from ...files import writing
from ...graph.hooks import LayerCall, hooked
from .compiled import original
from .measure import layers_of

_WARM_UP = 2
# What ncu keeps: everything, or only how far a kernel is from the ceilings.
_SECTIONS = (
    ("all sections, with the source", "--set full --import-source yes"),
    ("roofline and memory alone, faster", "--section SpeedOfLight --section "
     "SpeedOfLight_RooflineChart --section MemoryWorkloadAnalysis --section LaunchStats"),
)  # fmt: skip
_KERNELS = {"triton": "regex:fprop_kernel", "cuda": "regex:fprop"}


def write_trace(
    model: nn.Module, example: Tensor, path: str | os.PathLike[str], passes: int = 3
) -> Path:
    """Writes a Chrome trace (chrome://tracing, ui.perfetto.dev) of a network's forward pass.

    Layers stand under their names (but not those of a compiled network), primitives as `ranges`
    names them, operators and kernels below.

    Args:
        model: any network.
        example: its input.
        path: of the JSON file.
        passes: forward passes in the trace, after two that are not.

    Returns:
        The path.

    Raises:
        HetconvError: the file cannot be written.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if example.is_cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    path = Path(path)
    with torch.no_grad(), ranges.enabled(nvtx=False):
        for _ in range(_WARM_UP):
            model(example)
        with torch.profiler.profile(activities=activities) as profiler, _named(model):
            for _ in range(passes):
                model(example)
    with writing(path, folders=True) as beside:
        beside.touch()
        profiler.export_chrome_trace(str(beside))
        with open(beside, "rb") as file:  # the profiler says nothing when the disk is full
            file.seek(max(0, os.fstat(file.fileno()).st_size - 16))
            if not file.read().rstrip().endswith(b"}"):
                raise OSError("it breaks off")
    return path


def write_proton(
    model: nn.Module, example: Tensor, path: str | os.PathLike[str], passes: int = 3
) -> Path:
    """Profiles the kernels of a forward pass with Triton's proton.

    Args:
        model: any network on a GPU.
        example: its input.
        path: of the profile; proton adds .hatchet, which ``proton-viewer`` reads.
        passes: forward passes.

    Returns:
        The path of the profile.

    Raises:
        HetconvError: Triton or its proton is not installed, or there is no GPU for it.
    """
    if importlib.util.find_spec("triton") is None:
        raise HetconvError(
            "proton is a part of Triton, which is not installed: "
            "pip install 'hetconv-kernels[triton]'"
        )
    if importlib.util.find_spec("triton.profiler") is None:
        raise HetconvError("this build of Triton has no proton (triton.profiler).")
    if not example.is_cuda:
        raise HetconvError(
            f"proton looks at GPU kernels, and the input is on {example.device}: expected a CUDA "
            "device. Use --trace on a CPU."
        )
    import triton.profiler as proton

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    name = str(path.with_suffix("")) if path.suffix == ".hatchet" else str(path)
    run_passes(model, example, 0)
    session = proton.start(name, context="shadow", hook="triton")
    try:
        with torch.no_grad():
            for number in range(passes):
                with proton.scope(f"pass {number}"):
                    model(example)
        torch.cuda.synchronize()
    finally:
        proton.finalize(session)
    return Path(f"{name}.hatchet")


def run_passes(model: nn.Module, example: Tensor, passes: int) -> None:
    """Runs two passes to warm up and then ``passes`` between cudaProfilerStart and Stop."""
    with torch.no_grad():
        for _ in range(_WARM_UP):
            model(example)
        if not example.is_cuda:
            for _ in range(passes):
                model(example)
            return
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        for _ in range(passes):
            model(example)
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def ncu_commands(arguments: Sequence[str], backends: Sequence[str]) -> list[str]:
    """Makes command lines that profile the kernels of ``hetconv profile ARGUMENTS`` with ncu.

    Only what runs between cudaProfilerStart and Stop is looked at: one forward pass, warm.

    Args:
        arguments: of ``hetconv profile``, those that describe the network or layer.
        backends: what runs its layers; a single engine with kernels of its own narrows the search.
    """
    program = f"python -m hetconv_kernels profile {shlex.join(arguments)} --passes 1"
    names = {_KERNELS.get(backend) for backend in backends if backend != "torch"}
    kernel = names.pop() if len(names) == 1 else None
    narrow = f" --kernel-name {shlex.quote(kernel)}" if kernel else ""
    return [
        f"# {what}\nHETCONV_RANGES=nvtx ncu --nvtx --profile-from-start off{narrow} {sections} "
        f"-f -o hetconv-{number} {program}"
        for number, (what, sections) in enumerate(_SECTIONS)
    ]


def _named(model: nn.Module, prefix: str = "") -> AbstractContextManager[None]:
    """Puts each layer with weights in a range of its name; a compiled network has no layers."""
    opened: list[record_function] = []

    def enter(name: str, _: LayerCall) -> None:
        opened.append(record_function(prefix + (name or type(model).__name__)))
        opened[-1].__enter__()

    def leave(_: str, __: LayerCall, ___: object) -> None:
        opened.pop().__exit__(None, None, None)

    layers = {} if original(model) else layers_of(model)
    return hooked(layers, enter, leave, always=True)
