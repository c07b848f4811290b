# SPDX-License-Identifier: Apache-2.0
"""What every test runs under: seeds, threads, exact float32, and what this machine can run."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import hypothesis
import pytest
import torch
from sampling import FILES, is_left, is_ours

from hetconv_kernels.measure.roofline import measure_roofs
from hetconv_kernels.measure.timing import interleaved

# The same examples on every run of CI, new ones on a developer's machine; slowness is no failure.
hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, print_blob=True)
hypothesis.settings.register_profile("dev", deadline=None)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "dev")

# A container often has fewer cores than the machine that torch counts.
torch.set_num_threads(max(1, min(8, len(os.sched_getaffinity(0)))))

# Inductor compiles here, not in helpers that would each import PyTorch first.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

# References are exact float32: TF32 would hide an error of the size that the bounds look for.
torch.backends.cuda.matmul.allow_tf32 = False
torch.backends.cudnn.allow_tf32 = False


# Files that take longest go first where processes share them, or one is left with the last alone.
_LONG = (
    "triton", "cuda_host", "session", "compose", "cuda_wide_host", "quantization_onnx_forms",
    "docs", "narrow", "peers_low_precision", "examples", "deploy", "peers", "methods", "typing",
    "made_networks", "quantization_quantize", "ranks", "alias_moves", "command", "cpu", "compact",
)  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")
    parser.addoption("--share", help="folder of processes that share the tests, file by file")
    for engine in FILES:
        parser.addoption(
            f"--{engine}-sample", type=int, help=f"run an eighth of the tests of {engine}'s code"
        )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skips, with the reason, the tests that this machine cannot run or that were not asked for."""
    reasons = {}
    if not config.getoption("--slow"):
        reasons["slow"] = "takes minutes or many GB; run it with --slow"
    if not torch.cuda.is_available():
        reasons["gpu"] = f"torch {torch.__version__} finds no CUDA device on this machine"
    for item in items:
        for marker, reason in reasons.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))

    for engine in FILES:
        day = config.getoption(f"--{engine}-sample")
        left = [item for item in items if day is not None and is_left(item, engine, day)]
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in set(left)]
    if config.getoption("--share"):
        place = {f"test_{name}": number for number, name in enumerate(_LONG)}
        items.sort(key=lambda item: place.get(item.path.stem, len(place)))


def pytest_collection() -> None:
    """Has the collector of garbage wait: in thousands of fresh tests it finds none, for seconds."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Has it leave alone what was there before the tests: that is looked at for 0.6 s."""
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # or bindings say at the end that it leaks


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    """Leaves the tests of a file to the process that came to it first, see `in_parts`."""
    folder = item.config.getoption("--share")
    if folder is None or is_ours(Path(folder), item.path.relative_to(item.config.rootpath)):
        return None
    return True


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Fails a run in which every selected test was skipped: it has shown nothing."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if exitstatus == pytest.ExitCode.OK and reporter and not session.config.option.collectonly:
        ran = any(reporter.stats.get(outcome) for outcome in ("passed", "xfailed", "xpassed"))
        if reporter.stats.get("skipped") and not ran:
            reporter.write_line("\nevery selected test was skipped: nothing was checked", red=True)
            session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def _a_machine_of_our_own(request: pytest.FixtureRequest) -> Iterator[None]:
    """No test's result depends on this machine, or on what else it does.

    What networks take, and a profile's ceilings, are measured for seconds, whose result no test
    looks at but test_timing's: here at a glance. Disturbance is of test_disturbance alone. A file
    marked ``one_thread`` does not test how an engine shares its work: there other threads would
    only spin between small operators.
    """
    name, threads = request.module.__name__, torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        glance = partial(measure_roofs, rounds=1, size=128)
        patch.setattr("hetconv_kernels.measure.roofline.measure_roofs", glance)
        if name != "test_timing":
            patch.setitem(interleaved.__kwdefaults__, "min_time", 0.0)
        if name != "test_disturbance":
            patch.setattr("hetconv_kernels.measure.disturbance.judged", lambda *_, **__: ())
        if request.node.get_closest_marker("one_thread"):
            torch.set_num_threads(1)
        yield
    torch.set_num_threads(threads)
