# SPDX-License-Identifier: Apache-2.0
"""Options, fixtures and the closing table of the benchmarks."""

from __future__ import annotations

import ctypes
import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import hetconv_kernels as hk
from benchmarks import table
from benchmarks.ceilings import ceilings
from benchmarks.record import Record
from benchmarks.report import shares
from hetconv_kernels.measure import timing
from hetconv_kernels.measure.roofline import Roofs

# A GPU machine without a network may lack it; our own clock and record work alone.
HAVE_PYTEST_BENCHMARK = importlib.util.find_spec("pytest_benchmark") is not None
_RESULTS = Path(__file__).parent / "results"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("hetconv")
    group.addoption("--full", action="store_true", help="all cases, not the quick subset")
    group.addoption(
        "--held-out",
        action="store_true",
        help="of layers, those that nothing was tuned for (benchmarks/held_out.py) and no others",
    )
    group.addoption(
        "--backend",
        action="append",
        help="measure this backend (repeatable; 'auto' lets it choose); default: every engine that "
        "is built, and 'vendor' where there is none",
    )
    group.addoption("--prepacked", action="store_true", help="compile a prepacked dense baseline")
    group.addoption("--cache", choices=("cold", "warm"), help="default: warm on CPU, cold on GPU")
    group.addoption("--results", type=Path, default=_RESULTS, help="folder of the JSON files")
    group.addoption("--name", help="name of the JSON file; default: what is run, quick or full")
    group.addoption(
        "--seconds",
        type=float,
        help="time per row; default 0.5, with --full or --held-out 4. Below 0.5 the ceilings are a "
        "glance too",
    )


@dataclass
class Session:
    """What the benchmarks of one run share.

    Attributes:
        config: of pytest.
        records: results files by topic.
        roofs: measured ceilings by device and dtype.
    """

    config: pytest.Config
    records: dict[str, Record] = field(default_factory=dict)
    roofs: dict[tuple[str, torch.dtype], Roofs] = field(default_factory=dict)

    @property
    def thorough(self) -> bool:
        """Whether rows get the time of a result that is committed."""
        return bool(self.config.getoption("--full") or self.config.getoption("--held-out"))

    @property
    def seconds(self) -> float:
        """The time that one row may take, in seconds."""
        given = self.config.getoption("--seconds")
        return float(given or (4.0 if self.thorough else 0.5))

    def record(self, topic: str) -> Record:
        """Returns the results file of a topic, opened at its first use."""
        if topic not in self.records:
            extent = "full" if self.config.getoption("--full") else "quick"
            if topic == "layers" and self.config.getoption("--held-out"):
                extent = "held-out"
            name = self.config.getoption("--name")
            full_name = f"{topic}-{name or extent}"
            self.records[topic] = Record(self.config.getoption("--results"), full_name)
        return self.records[topic]

    def measures(self, benchmark: Any) -> bool:
        """Whether to time: with ``--benchmark-disable`` results are checked and nothing else."""
        return benchmark is None or not benchmark.disabled

    def extra_info(self, benchmark: Any, topic: str, row: dict[str, Any]) -> None:
        """Gives pytest-benchmark a row, with hardware, versions and commit."""
        if benchmark is not None:
            benchmark.extra_info.update(row, environment=self.record(topic).data["environment"])

    def ceiling(self, topic: str, device: str, dtype: torch.dtype) -> Roofs:
        """Returns this machine's ceilings in a dtype, measured at their first use."""
        key = (device, dtype)
        if key not in self.roofs:
            self.roofs[key] = ceilings(device, dtype, 25 if self.seconds >= 0.5 else 3)
        roofs = self.roofs[key]
        known = self.record(topic).data["roofs"]
        if vars(roofs) not in known:
            self.record(topic).add_roofs(roofs)
        return roofs


_SESSION = pytest.StashKey[Session]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_SESSION] = Session(config)
    keep_freed_memory()
    torch.backends.cudnn.benchmark = True  # the dense baseline gets its best algorithm
    torch.backends.cudnn.allow_tf32 = False  # fp32 rows compute in fp32
    given = any(str(a).startswith("--benchmark-columns") for a in config.invocation_params.args)
    if HAVE_PYTEST_BENCHMARK and not given:
        config.option.benchmark_columns = ["median", "iqr", "rounds", "iterations"]


def keep_freed_memory() -> None:
    """Tells glibc to keep what is freed, so that no output is paid for in page faults.

    Whether a freed tensor's pages go back to the system depends on what else lies in the heap: the
    same call then takes 3 ms or 11 ms, whoever computes it. Other C libraries are left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX of malloc.h
    if mallopt is not None:
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)


def backends(config: pytest.Config) -> list[str]:
    """Names the backends to measure."""
    forced = config.getoption("--backend")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    built = (*hk.available_backends("cpu"), *hk.available_backends(device))
    engines = [name for name in dict.fromkeys(built) if name not in ("vendor", "reference")]
    return list(forced or engines or ["vendor"])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", backends(metafunc.config))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not HAVE_PYTEST_BENCHMARK:
        return
    for item in items:
        device = "cuda" if item.get_closest_marker("gpu") else "cpu"
        # pytest-benchmark's default timer would read the queue of a GPU, not its work.
        item.add_marker(pytest.mark.benchmark(timer=timing.clock(device), disable_gc=True))


if not HAVE_PYTEST_BENCHMARK:

    @pytest.fixture
    def benchmark() -> None:
        """Stands in for pytest-benchmark's fixture: nothing collects but our own record."""


@pytest.fixture
def session(pytestconfig: pytest.Config) -> Session:
    return pytestconfig.stash[_SESSION]


@pytest.hookimpl(trylast=True)  # after pytest-benchmark's own table
def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    for topic, record in config.stash[_SESSION].records.items():
        rows, roofs = record.data["rows"], record.data["roofs"]
        if not rows:
            continue
        terminalreporter.section(f"hetconv {topic}")
        environment = record.data["environment"]
        where = environment["gpu"] if topic == "gpu" else environment["processor"]
        terminalreporter.line(
            f"{where}, {environment['threads']} threads, torch {torch.__version__}"
        )
        load, cores = environment["load_before"], environment["cores"] or 1
        if load > cores / 4:
            terminalreporter.line(
                f"load {load:.1f} before the run: others were at work, look at the intervals"
            )
        for roof in roofs:
            terminalreporter.line(
                f"measured ceilings, {roof['dtype']} on {roof['device']}: "
                f"{roof['macs_per_s'] / 1e9:.0f} GMAC/s, {roof['bytes_per_s'] / 1e9:.0f} GB/s"
            )
        terminalreporter.line(
            "A ratio above 1 means that ours is faster than the baseline of that column."
            if topic != "dispatch"
            else "Extra time of a whole call over nn.Conv2d's, 1×8×2×2."
        )
        tables = {
            "dispatch": table.dispatch_table,
            "models": table.model_table,
            "training": table.training_table,
        }
        for line in tables.get(topic, table.layer_table)(rows):
            terminalreporter.line(line)
        for line in shares.share_report(record.data):
            terminalreporter.line(line)
        terminalreporter.line(f"written to {record.path}")
