# SPDX-License-Identifier: Apache-2.0
"""One OpenMP in a process: our engine runs on that of torch, whatever its file is called."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import hetconv_kernels as hk
from hetconv_kernels import openmp

pytest.importorskip("hetconv_kernels._cpu", reason="the native engine is not built here")
LIBRARY = next(Path(openmp.__file__).parent.glob("_cpu*.so"))


def said(code: str) -> str:
    """Runs code in a process of its own."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_compiled_part_is_linked_to_no_openmp() -> None:
    if shutil.which("objdump") is None:
        pytest.skip("no objdump to look into it")
    listing = subprocess.run(
        ["objdump", "-p", LIBRARY], capture_output=True, text=True, check=True
    ).stdout
    if "asan" in listing:
        pytest.skip("this build has sanitizers in it")
    assert not re.findall(r"NEEDED\s+lib(?:gomp|omp|iomp)\S*", listing)


def test_a_process_that_computed_has_one_openmp_which_is_torchs() -> None:
    code = """
import torch, hetconv_kernels as hk
from hetconv_kernels import openmp
torch.set_num_threads(2)
layer = hk.nn.HetConv2d(64, 64, 3, padding=1, p=4, backend="cpu")
layer(torch.randn(4, 64, 32, 32))
torch.nn.functional.conv2d(torch.randn(4, 8, 32, 32), torch.randn(8, 8, 3, 3))
print(*openmp.loaded())
print(torch.__file__)
"""
    runtimes, torch_file = said(code).splitlines()
    (runtime,) = runtimes.split()
    assert openmp.share_openmp() is None
    own = Path(torch_file).resolve().parent
    if list(own.glob("lib/lib*omp*.so*")):
        assert Path(runtime).resolve().is_relative_to(own)


def test_as_many_threads_run_as_torch_was_given() -> None:
    code = """
import os, torch, hetconv_kernels as hk
torch.set_num_threads(3)
before = len(os.listdir("/proc/self/task"))
layer = hk.nn.HetConv2d(64, 64, 3, padding=1, p=4, backend="cpu")
with torch.no_grad():
    for _ in range(3):
        layer(torch.randn(4, 64, 32, 32))
print(len(os.listdir("/proc/self/task")) - before)
"""
    assert int(said(code)) == 2, "one team of three, for torch and for us"


def test_threads_calls_and_a_fork_give_the_same_bits() -> None:
    code = """
import os, threading, torch, hetconv_kernels as hk
torch.manual_seed(0)
torch.set_num_threads(2)
layer = hk.nn.HetConv2d(64, 64, 3, padding=1, p=4, backend="cpu").requires_grad_(False)
x = torch.randn(4, 64, 32, 32)
truth, found = layer(x), []
threads = [threading.Thread(target=lambda: found.append(layer(x))) for _ in range(4)]
[t.start() for t in threads]
[t.join() for t in threads]
assert len(found) == 4 and all(torch.equal(y, truth) for y in found)
wanted = truth.numpy().tobytes()
child = os.fork()
if child == 0:  # PyTorch's own parallel operators would wait for ever here
    os._exit(0 if layer(x).numpy().tobytes() == wanted else 1)
assert os.waitpid(child, 0)[1] == 0
assert torch.equal(layer(x), truth)
print("same")
"""
    assert said(code) == "same\n"


def test_a_runtime_that_nobody_shares_is_shared() -> None:
    # As with a torch that keeps it to itself, under a name of its own: loaded, and not visible.
    (runtime, *_) = openmp.loaded()
    code = f"""
import ctypes, os, shutil, sys, tempfile
from importlib.util import module_from_spec, spec_from_file_location
place = os.path.join(tempfile.mkdtemp(), "libgomp-a1b2c3d4.so.1.0.0")
shutil.copy({runtime!r}, place)
ctypes.CDLL(place)  # local
spec = spec_from_file_location("openmp", {openmp.__file__!r})
module = module_from_spec(spec)
spec.loader.exec_module(module)
assert not module._visible()
assert module.loaded() == [place]
assert module.share_openmp() is None
assert module._visible()
print("shared")
"""
    assert said(code) == "shared\n"


def test_without_any_runtime_the_engine_is_left_out_with_a_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(openmp, "_visible", lambda: False)
    monkeypatch.setattr(openmp, "loaded", list)

    def absent(name: object, **_: object) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", absent)
    openmp.share_openmp.cache_clear()
    try:
        assert "install libgomp1" in str(openmp.share_openmp())
    finally:
        openmp.share_openmp.cache_clear()


@pytest.mark.parametrize(
    ("path", "is_one"),
    [
        ("/x/torch/lib/libgomp.so.1", True),
        ("/x/torch/lib/libgomp-a34b3233.so.1", True),
        ("/x/lib/libiomp5.so", True),
        ("/usr/lib/libomp.so.5", True),
        ("/usr/lib/libompl.so", False),
        ("/x/torch/lib/libtorch_cpu.so", False),
    ],
)
def test_runtimes_are_known_by_their_names(path: str, is_one: bool) -> None:
    assert bool(openmp._RUNTIME.search(path)) == is_one


def test_the_instruction_sets_are_those_that_the_system_says() -> None:
    from hetconv_kernels import _cpu

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next((set(line.split()) for line in lines if line.startswith("flags")), None)
    if flags is None:
        pytest.skip("no x86 processor")
    needs = {
        "avx512bf16": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16"},
        "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
        "avx2": {"avx2", "fma", "f16c"},
        "generic": set(),
    }
    if "HETCONV_ISA" not in hk.info()["environment"]:
        assert _cpu.isas() == [name for name, needed in needs.items() if needed <= flags]
    vnni = {"avx512vnni": needs["avx512"] | {"avx512_vnni"}, "avxvnni": {"avx_vnni"}}
    for name, needed in vnni.items():
        assert (name in _cpu.int8_isas()) == (needed <= flags) or "HETCONV_ISA" in hk.info()[
            "environment"
        ]
