# SPDX-License-Identifier: Apache-2.0
"""Scores that no method's own golden trace covers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hetconv_kernels.compression import scores
from hetconv_kernels.errors import ArgumentError

WEIGHT = torch.tensor([[[[1.0, -2]], [[0, 3]]], [[[-4, 0]], [[0.5, 0.5]]]])


def test_outgoing_and_incoming_sum_absolute_weights() -> None:
    assert scores.outgoing(WEIGHT).tolist() == [6, 5]
    assert scores.incoming(WEIGHT).tolist() == [7, 4]


def test_incoming_of_a_flattened_layer_sums_runs() -> None:
    weight = torch.tensor([[1.0, -1, 2, 0, 3, 3], [0, 0, 1, 1, 0, -1]])
    assert scores.incoming(weight, 2).tolist() == [2, 4, 7]
    assert scores.incoming(weight, 3).tolist() == [5, 8]
    with pytest.raises(ArgumentError, match="repeat"):
        scores.incoming(weight, 4)


def test_correlation_is_numpys() -> None:
    weight = torch.randn(5, 3, 3, 3)
    expected = np.abs(np.corrcoef(weight.reshape(5, -1).numpy()))
    np.fill_diagonal(expected, 0)
    np.testing.assert_allclose(scores.correlation(weight), expected, atol=1e-6)
