# SPDX-License-Identifier: Apache-2.0
"""`info`: the facts that a bug report needs, as data."""

from __future__ import annotations

import json
import os
import platform

import numpy as np
import pytest
import torch

import hetconv_kernels as hk


def test_it_is_json_with_the_promised_keys() -> None:
    facts = hk.info()
    assert json.loads(json.dumps(facts)) == facts
    assert set(facts) == {
        *("version", "python", "platform", "libc", "torch", "torch_cuda", "libraries", "cpu"),
        *(
            "cuda",
            "backends",
            "forced_backend",
            "strict_accuracy",
            "extensions",
            "build",
            "environment",
        ),
    }
    assert set(facts) <= set((hk.info.__doc__ or "").replace(",", " ").replace(".", " ").split())


def test_it_tells_the_truth() -> None:
    facts = hk.info()
    assert facts["version"] == hk.__version__
    assert facts["python"] == platform.python_version()
    assert facts["torch"] == torch.__version__
    assert facts["libraries"]["numpy"] == np.__version__
    assert facts["cpu"]["cores"] == os.cpu_count()
    assert facts["cpu"]["torch_threads"] == torch.get_num_threads()
    assert facts["backends"] == list(hk.available_backends())
    assert {"vendor", "reference"} <= set(facts["backends"])
    assert len(facts["cuda"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    for name, built in facts["extensions"].items():
        assert not (name.lstrip("_") in facts["backends"] and not built)


def test_it_says_which_instructions_the_engine_takes() -> None:
    isas = hk.info()["cpu"]["engine_isas"]
    assert bool(isas) == hk.info()["extensions"]["_cpu"]
    assert set(isas) <= {"avx512bf16", "avx512", "avx2", "generic"}


def test_it_names_the_compiler_of_what_was_built() -> None:
    build = hk.info()["build"]
    for part in (build or {"parts": {}})["parts"].values():
        assert part["compiler"] if part["built"] else part["reason"]


def test_it_shows_the_variables_that_matter_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HETCONV_CACHE", "elsewhere")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("SECRET_TOKEN", "hidden")
    shown = hk.info()["environment"]
    assert shown["HETCONV_CACHE"] == "elsewhere"
    assert shown["OMP_NUM_THREADS"] == "3"
    assert "hidden" not in shown.values()


def test_it_follows_use_backend() -> None:
    assert hk.info()["forced_backend"] == "auto"
    with hk.use_backend("reference"):
        assert hk.info()["forced_backend"] == "reference"


def test_it_says_what_was_built_and_why_the_rest_was_not() -> None:
    build = hk.info()["build"]
    if build is None:
        pytest.skip("nothing was built here (HETCONV_BUILD=none)")
    built = sorted(name[1:] for name, facts in build["parts"].items() if facts["built"])
    assert build["state"] == (" and ".join(built) or "nothing compiled")
    for facts in build["parts"].values():
        assert facts["compiler"] if facts["built"] else facts["reason"].strip()
