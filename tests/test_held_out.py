# SPDX-License-Identifier: Apache-2.0
"""The held-out layers: spread over every axis, apart from the committed table, run by an option."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import fresh
import pytest

from benchmarks.cases import CPU_CASES
from benchmarks.conftest import Session
from benchmarks.held_out import (
    HELD_OUT_BATCHES,
    HELD_OUT_CASES,
    HELD_OUT_CHANNELS,
    HELD_OUT_SIZES,
    HELD_OUT_SUPPORTS,
)


@pytest.mark.parametrize(
    ("axis", "values", "times"),
    [
        ("n", HELD_OUT_BATCHES, 13),
        ("c", HELD_OUT_CHANNELS, 11),
        ("h", HELD_OUT_SIZES, 11),
        ("support", HELD_OUT_SUPPORTS, 8),
    ],
)
def test_every_value_of_an_axis_is_there_as_often(
    axis: str, values: tuple[object, ...], times: int
) -> None:
    found = Counter(getattr(case, axis) for case in HELD_OUT_CASES)
    assert set(found) == set(values)
    assert times <= min(found.values()) <= max(found.values()) <= times + 2


def test_each_support_meets_every_size_and_every_number_of_channels() -> None:
    for spec in HELD_OUT_SUPPORTS:
        mine = [case for case in HELD_OUT_CASES if (case.support, case.k) == (spec, 3)]
        assert Counter(case.h for case in mine) == dict.fromkeys(HELD_OUT_SIZES, 2)
        assert Counter(case.c for case in mine) == dict.fromkeys(HELD_OUT_CHANNELS, 2)
        assert len({(case.h, case.c) for case in mine}) == 8


def test_they_are_plain_layers_that_the_committed_table_lacks() -> None:
    tuned = {(case.n, case.c, case.h, case.k, case.support) for case in CPU_CASES}
    for case in HELD_OUT_CASES:
        assert (case.n, case.c, case.h, case.k, case.support) not in tuned
        assert (case.c, case.h) == (case.f, case.w)
        assert (case.dtype, case.memory_format) == ("float32", "channels_last")
        assert (case.training, case.amp, case.expected) == (False, False, "win")
        assert case.target is None
    assert sum(case.k == 1 for case in HELD_OUT_CASES) == 4


def test_the_option_chooses_them_and_no_others() -> None:
    done = fresh.python(
        "", "benchmarks/test_layers.py", "--held-out", "--collect-only", "-q", "--backend",
        "vendor", module="pytest",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.findall(r"^benchmarks/test_layers.py::test_layer\[(.+)\]$", done.stdout, re.M)
    assert sorted(found) == sorted(f"{case.name}-vendor" for case in HELD_OUT_CASES)


@pytest.mark.parametrize(
    ("given", "seconds", "names"),
    [
        ((), 0.5, ("layers-quick", "models-quick")),
        (("full",), 4.0, ("layers-full", "models-full")),
        (("held-out",), 4.0, ("layers-held-out", "models-quick")),
        (("full", "held-out"), 4.0, ("layers-held-out", "models-full")),
    ],
    ids=str,
)
def test_the_option_has_a_file_of_its_own_and_the_time_of_a_result(
    given: tuple[str, ...], seconds: float, names: tuple[str, str], tmp_path: Path
) -> None:
    options = {f"--{name}": True for name in given} | {"--results": tmp_path}
    session = Session(SimpleNamespace(getoption=options.get))  # type: ignore[arg-type]
    assert session.seconds == seconds
    found = [session.record(topic).path for topic in ("layers", "models")]
    assert found == [tmp_path / f"{name}.json" for name in names]
