# SPDX-License-Identifier: Apache-2.0
"""Forcing an engine: as a block, as a call, by the environment, and what is refused."""

from __future__ import annotations

import fresh
import pytest
import torch
from layers import IRREGULAR, C, F, image

import hetconv_kernels as hk
from hetconv_kernels.backends import CODES
from hetconv_kernels.errors import BackendError
from hetconv_kernels.functional import support_conv2d

NOT_BUILT = [name for name in CODES if name not in ("auto", *hk.available_backends())]


def forced() -> str:
    return str(hk.info()["forced_backend"])


def chosen() -> str:
    layer = hk.nn.SupportConv2d(C, F, 3, support=IRREGULAR)
    return hk.explain(layer, image(), measure=False).chosen


def test_use_backend_as_a_block() -> None:
    with hk.use_backend("reference"):
        assert (forced(), chosen()) == ("reference", "reference")
        with hk.use_backend("vendor"):
            assert (forced(), chosen()) == ("vendor", "vendor")
            with hk.use_backend("auto"):
                assert forced() == "auto"
            assert forced() == "vendor"
        assert forced() == "reference"
    assert forced() == "auto"


def test_use_backend_as_a_call() -> None:
    try:
        hk.use_backend("reference")
        assert (forced(), chosen()) == ("reference", "reference")
        with hk.use_backend("vendor"):
            assert forced() == "vendor"
        assert forced() == "reference"
    finally:
        hk.use_backend("auto")
    assert forced() == "auto"


def test_use_backend_ends_with_an_exception() -> None:
    with pytest.raises(ZeroDivisionError), hk.use_backend("reference"):
        raise ZeroDivisionError
    assert forced() == "auto"


@pytest.mark.parametrize("name", ["hand", "", *NOT_BUILT])
def test_use_backend_refuses_and_changes_nothing(name: str) -> None:
    with pytest.raises(BackendError, match=f"'{name}' is .*expected one of auto"):
        hk.use_backend(name)
    assert forced() == "auto"


def test_a_named_backend_beats_use_backend() -> None:
    call = image(), torch.randn(F, C, 3, 3), IRREGULAR
    with hk.use_backend("reference"), pytest.raises(BackendError, match="unknown"):
        support_conv2d(*call, backend="hand")
    y = support_conv2d(*call, backend="vendor")
    with hk.use_backend("reference"):
        torch.testing.assert_close(support_conv2d(*call, backend="vendor"), y, rtol=0, atol=0)


def test_the_environment_forces_a_backend() -> None:
    code = (
        "import torch, hetconv_kernels as hk;"
        "layer = hk.nn.HetConv2d(4, 4, 3); y = layer(torch.randn(2, 4, 5, 5));"
        "chosen, = layer._geometry.choices.values();"
        "print(len(y), chosen.backend.name, hk.info()['forced_backend'])"
    )
    done = fresh.python(code, environment={"HETCONV_BACKEND": "reference"})
    assert (done.stdout.split(), done.returncode) == (["2", "reference", "reference"], 0), done


def test_the_environment_names_an_unknown_backend() -> None:
    done = fresh.python("import hetconv_kernels", environment={"HETCONV_BACKEND": "hand"})
    assert done.returncode != 0
    assert "BackendError: HETCONV_BACKEND: received 'hand', expected one of auto" in done.stderr
