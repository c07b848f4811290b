# SPDX-License-Identifier: Apache-2.0
"""libhetconv: programs that Python saved, run by hosts in C++ and in C, bit for bit the same."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import random
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import fresh
import pytest
import torch
from building import alone
from deployed import DIGEST, HEAD, NETWORKS, raw, sealed, small_chain
from pages import PAGES, blocks
from planning import needs_engine
from torch import nn
from torch.utils import _pytree as pytree

import hetconv_kernels as hk

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "build" / "library"
HOSTS = ROOT / "tests" / "native" / "deploy"
pytestmark = [
    needs_engine,
    pytest.mark.skipif(
        not shutil.which("make") or not shutil.which(os.environ.get("CXX", "g++")),
        reason="there is nothing here to build the library with",
    ),
]


def run(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=1200,
    )


@pytest.fixture(scope="module")
def library() -> Path:
    """Builds the library as users do."""
    with alone(OUT):
        made = run("make", "library")
    assert made.returncode == 0, made.stdout + made.stderr
    return OUT / "libhetconv.so"


@pytest.fixture(scope="module")
def server(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(library, HOSTS / "server.cpp", tmp_path_factory.mktemp("server"))


def compiled(library: Path, source: Path, folder: Path) -> Path:
    host = folder / source.stem
    cxx = source.suffix == ".cpp"
    tool = os.environ.get("CXX", "g++") if cxx else os.environ.get("CC", "gcc")
    flags = ["-std=c++17", "-O1"] if cxx else ["-std=c99", "-pedantic"]
    where = [f"-I{library.parent}", f"-L{library.parent}", f"-Wl,-rpath,{library.parent}"]
    warnings = ["-Wall", "-Wextra", "-Werror"]
    made = run(tool, *flags, *warnings, source, *where, "-lhetconv", "-ldl", "-pthread", "-o", host)
    assert made.returncode == 0, made.stderr
    return host


def saved(name: str, folder: Path) -> tuple[Path, list[Path]]:
    """Saves a network; returns the program, and files of its inputs and of its outputs."""
    model, x = NETWORKS[name]()
    inputs = x if isinstance(x, tuple) else (x,)
    program = folder / "network.hc"
    found = hk.export.program(model, inputs, program)
    with torch.no_grad():
        outputs = pytree.tree_leaves(found.network(*inputs))
        again = pytree.tree_leaves(found.network(*(x * 1 for x in inputs)))
    assert all(torch.equal(a, b) for a, b in zip(outputs, again, strict=True))
    files = []
    for number, tensor in enumerate((*inputs, *outputs)):
        files.append(folder / f"{number}.raw")
        files[-1].write_bytes(raw(tensor))
    return program, files


@pytest.mark.parametrize("name", NETWORKS)
def test_a_host_in_cpp_computes_what_python_does(name: str, server: Path, tmp_path: Path) -> None:
    program, files = saved(name, tmp_path)
    done = run(server, program, *files)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "equal on" in done.stdout


def test_a_host_in_c99_computes_what_python_does(library: Path, tmp_path: Path) -> None:
    client = compiled(library, HOSTS / "client.c", tmp_path)
    program, (x, y) = saved("dncnn", tmp_path)
    done = run(client, program, x, y)
    assert done.returncode == 0, done.stderr
    y.write_bytes(y.read_bytes()[:-1] + b"\x55")
    assert run(client, program, x, y).returncode == 1


def test_the_c_of_the_page_compiles_and_runs(library: Path, tmp_path: Path) -> None:
    (block,) = (b for page in PAGES for b in blocks(page) if b.language == "c")
    (tmp_path / "main.c").write_text(block.text)
    host = compiled(library, tmp_path / "main.c", tmp_path)
    network = hk.models.digits_net(16).eval()
    said = subprocess.run([host], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert said.returncode == 1
    assert "digits.hc cannot be read" in said.stderr
    saved = hk.export.program(network, torch.randn(4, 1, 8, 8), tmp_path / "digits.hc")
    said = subprocess.run([host], cwd=tmp_path, capture_output=True, text=True, check=False)
    with torch.no_grad():
        expected = saved.network(torch.zeros(4, 1, 8, 8))[0, 0]
    assert said.stdout == f"{expected:g}\n"


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512", "avx512bf16"])
def test_one_file_serves_every_instruction_set(isa: str, server: Path, tmp_path: Path) -> None:
    """Sums of small integers are exact in any order, and those of 8 bits always."""
    torch.manual_seed(0)
    layers = [hk.nn.HetConv2d(16, 16, 3, padding=1, p=4, bias=False) for _ in range(3)]
    model = nn.Sequential(*layers, nn.MaxPool2d(2), nn.AvgPool2d(2)).eval()
    with torch.no_grad():
        for layer in layers:
            layer.weight.copy_(torch.randint(-2, 3, layer.weight.shape))
            layer.project_()
    x = torch.randint(-3, 4, (2, 16, 20, 24)).float()
    program = tmp_path / "exact.hc"
    y = hk.export.program(model, x, program).network(x)
    assert y.abs().max() > 100
    (tmp_path / "x").write_bytes(raw(x))
    (tmp_path / "y").write_bytes(raw(y))
    done = run(server, program, tmp_path / "x", tmp_path / "y", HETCONV_ISA=isa)
    if "this machine cannot run" in done.stderr:
        pytest.skip(f"this machine has no {isa}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"equal on {isa};" in done.stdout
    program, files = saved("int8 resnet20", tmp_path)
    assert run(server, program, *files, HETCONV_ISA=isa).returncode == 0


def test_the_library_shows_c_functions_and_needs_no_python(library: Path) -> None:
    shown = run("nm", "-D", "--defined-only", library)
    names = {line.split()[-1] for line in shown.stdout.splitlines()}
    header = (ROOT / "csrc" / "include" / "hetconv.h").read_text()
    declared = {w for w in header.replace("(", " ").split() if w.startswith("hc_")}
    assert names
    assert all(name.startswith("hc_") for name in names)
    assert {n for n in names if n in declared} == names
    needed = run("ldd", library).stdout
    assert "python" not in needed
    assert "torch" not in needed


class Api:
    """The C functions, in this process."""

    def __init__(self, library: Path) -> None:
        self.library: Any = ctypes.CDLL(str(library))
        self.library.hc_error.restype = ctypes.c_char_p

    def load(self, file: bytes) -> tuple[int, str]:
        program = ctypes.c_void_p(1)
        status = self.library.hc_load_memory(
            file, ctypes.c_size_t(len(file)), ctypes.byref(program)
        )
        assert bool(program.value) == (status == 0)
        self.library.hc_free(program)
        return status, "" if status == 0 else self.library.hc_error().decode()


@pytest.fixture(scope="module")
def api(library: Path) -> Api:
    return Api(library)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("file") / "network.hc"
    hk.export.program(*small_chain(), path)
    return path.read_bytes()


def test_every_flipped_bit_is_noticed(api: Api, file: bytes) -> None:
    assert api.load(file) == (0, "")
    draw = random.Random(0)
    for place in [*range(64), *(draw.randrange(len(file)) for _ in range(300))]:
        damaged = bytearray(file)
        damaged[place] ^= 1 << draw.randrange(8)
        status, said = api.load(bytes(damaged))
        assert status == 2
        assert said.startswith("the program cannot be loaded: ")


def test_every_cut_is_noticed_sealed_or_not(api: Api, file: bytes) -> None:
    draw = random.Random(1)
    for length in [*range(HEAD + 20), *(draw.randrange(len(file)) for _ in range(200))]:
        assert api.load(file[:length])[0] == 2
        if length >= HEAD + 16:
            assert api.load(sealed(file[:length]))[0] == 2
    assert api.load(file + b"\x00")[0] == 2
    assert api.load(sealed(file + b"\x00")) == (
        2,
        "the program cannot be loaded: something follows its last step",
    )
    assert api.load(sealed(file)) == (0, "")


def test_a_later_version_and_another_kind_of_file_are_named(api: Api, file: bytes) -> None:
    later = sealed(file[:8] + struct.pack("<I", 2) + file[12:])
    assert api.load(later)[1].endswith("its format is version 2, and this library reads 1")
    assert "it is no program" in api.load(b"PK\x03\x04" + bytes(100))[1]
    assert api.load(b"")[0] == 2


def test_an_arena_beyond_this_machines_memory_is_refused_when_it_is_loaded(
    api: Api, file: bytes
) -> None:
    place = HEAD + DIGEST
    for _ in range(2):  # what made it, and the network's name
        (length,) = struct.unpack_from("<I", file, place)
        place += 4 + length
    (arena,) = struct.unpack_from("<q", file, place)
    assert 0 < arena < 2**30
    wanted = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") + 2**20
    larger = sealed(file[:place] + struct.pack("<q", wanted) + file[place + 8 :])
    assert api.load(larger) == (3, "this machine has not enough memory")


# A host that has no memory left for some calls.
_WITHOUT_MEMORY = """
import ctypes, resource, sys
from pathlib import Path

library = ctypes.CDLL(sys.argv[1])
library.hc_error.restype = ctypes.c_char_p
library.hc_release.restype = ctypes.c_size_t
file, x, y = (Path(name).read_bytes() for name in sys.argv[2:])
program, found = ctypes.c_void_p(), ctypes.create_string_buffer(len(y))
given = ctypes.create_string_buffer(x, len(x))

def addresses(buffer):
    return (ctypes.c_void_p * 1)(ctypes.addressof(buffer))

def run():
    ctypes.memset(found, 0xFF, len(y))
    return library.hc_run(program, addresses(given), addresses(found), 1)

def limit(most):
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))

def load():
    return library.hc_load_memory(file, ctypes.c_size_t(len(file)), ctypes.byref(program))

assert load() == 0
assert run() == 0 and found.raw == y
assert library.hc_release(program) > 2**22
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit(pages * resource.getpagesize() + 2**20)
for _ in range(2):
    assert run() == 3
    print(library.hc_error().decode())
limit(resource.RLIM_INFINITY)
for _ in range(2):
    assert run() == 0 and found.raw == y
library.hc_free(program)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it limits memory as Linux does")
def test_without_memory_a_call_says_so_and_the_next_is_right(library: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = [hk.nn.HetConv2d(16, 16, 3, padding=1, p=4) for _ in range(4)]
    x = torch.randn(1, 16, 256, 256)  # 4 MiB, of which the arena has two
    network = hk.export.program(nn.Sequential(*layers).eval(), x, tmp_path / "network.hc").network
    with torch.no_grad():
        (tmp_path / "y").write_bytes(raw(network(x)))
    (tmp_path / "x").write_bytes(raw(x))
    files = [str(tmp_path / name) for name in ("network.hc", "x", "y")]
    done = fresh.python(_WITHOUT_MEMORY, str(library), *files)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines() == ["this machine has not enough memory"] * 2


def test_a_path_that_is_no_file_is_said(server: Path, tmp_path: Path) -> None:
    done = run(server, "--load", tmp_path / "missing.hc")
    assert done.stdout.startswith("2 ")
    assert "missing.hc cannot be read" in done.stdout
    assert run(server, "--load", tmp_path).stdout.startswith("2 ")
    (tmp_path / "empty").write_bytes(b"")
    assert run(server, "--load", tmp_path / "empty").stdout.startswith("2 ")


def test_setup_and_make_compile_the_engine_alike() -> None:
    """Or the bits of a host could be others than Python's."""
    pytest.importorskip("setuptools")
    spec = importlib.util.spec_from_file_location("setup_of_the_tree", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    setup = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = setup  # dataclasses look there
    spec.loader.exec_module(setup)
    part = next(part for part in setup.PARTS if part.module == "_cpu")
    command = run("make", "-n", "-B", "-f", "csrc/Makefile").stdout.splitlines()
    compiled = {
        Path(line.split(" -c ")[1].split()[0]).stem: line for line in command if " -c " in line
    }
    sources = [p for p in part.sources() if not p.stem.endswith("bindings")]
    assert {p.stem for p in sources} | {"hetconv"} == set(compiled)
    matters = ("-m", "-f", "-O", "-std")
    for source in sources:
        mine = compiled[source.stem].split(" -c ")[0].split()
        ours = [*part.flags.split(), *part.extra_flags(source).split(), "-fPIC"]
        for flags in (mine, ours):
            flags[:] = [f for f in flags if f.startswith(matters)]
        contract = [flags for flags in (mine, ours) if flags.count("-ffp-contract=off")]
        assert len(contract) in (0, 2), source
        assert set(mine) == set(ours), source
