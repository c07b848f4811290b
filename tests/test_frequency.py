# SPDX-License-Identifier: Apache-2.0
"""Frequencies: transform and thresholds by hand, the layer against its twin, the search."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from compressing import check_kills, run
from layers import through_file
from torch import nn

import hetconv_kernels as hk
from hetconv_kernels import masking
from hetconv_kernels.backends import cost_model
from hetconv_kernels.compression import FrequencyPruning
from hetconv_kernels.compression.methods import frequency as search
from hetconv_kernels.errors import ArgumentError, InputTypeError, SupportError
from hetconv_kernels.nn import frequency_cost
from hetconv_kernels.nn.dct import dct, dct_basis, idct
from hetconv_kernels.nn.frequency import FrequencyConv2d

# ½·(1 + 2 + 3 + 4), ½·(1 − 2 + 3 − 4), ½·(1 + 2 − 3 − 4), ½·(1 − 2 − 3 + 4).
KERNEL, COEFFICIENTS = [[1.0, 2], [3, 4]], [[5.0, -1], [-2, 0]]
SIZE = torch.tensor(COEFFICIENTS).abs().reshape(1, 1, 2, 2)
# Mean 2, variance (9 + 1 + 0 + 4) / 4 = 3.5.
STD = math.sqrt(3.5)


# The transform --------------------------------------------------------------------------------


def test_transform_of_a_2x2_kernel_by_hand() -> None:
    kernel = torch.tensor(KERNEL).reshape(1, 1, 2, 2)
    torch.testing.assert_close(dct(kernel), torch.tensor(COEFFICIENTS).reshape(1, 1, 2, 2))
    torch.testing.assert_close(idct(dct(kernel)), kernel)


@pytest.mark.parametrize("kernel", [(3, 3), (5, 5), (2, 3), (1, 4)])
def test_transform_is_orthonormal_and_scipys(kernel: tuple[int, int]) -> None:
    basis = dct_basis(kernel).flatten(1)
    torch.testing.assert_close(basis @ basis.T, torch.eye(len(basis), dtype=torch.float64))
    fft = pytest.importorskip("scipy.fft", reason="scipy has the same transform")
    weight = torch.randn(2, 3, *kernel, dtype=torch.float64)
    expected = fft.dctn(weight.numpy(), axes=(2, 3), norm="ortho")
    np.testing.assert_allclose(dct(weight).numpy(), expected, atol=1e-12)


# The search -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("c", "slope", "limits"),
    [
        (0.0, 0.0, [[2, 2], [2, 2]]),
        (1.0, 0.0, [[2 + STD] * 2] * 2),
        (-2.0, 0.0, [[0, 0], [0, 0]]),  # 2 − 3.74 is negative
        (0.0, 1.0, [[2, 3], [3, 4]]),  # u + v of 2 is twice the threshold
    ],
)
def test_golden_thresholds(c: float, slope: float, limits: list) -> None:
    found = search.thresholds(SIZE, c, slope)
    torch.testing.assert_close(found, torch.tensor(limits, dtype=torch.float64))


def test_golden_updates_with_hysteresis() -> None:
    limit = torch.full((2, 2), 2.0)
    dense = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    # 5 ≥ 2.2 lives; 1 and 0 are under 1.8; 2 is between and stays as it is.
    first = search.updated(dense, SIZE, limit)
    assert first.flatten().tolist() == [True, False, True, False]
    assert search.updated(~dense, SIZE, limit).flatten().tolist() == [True, False, False, False]
    # The second coefficient grows to 2.2 and comes back; the third falls to 1.7 and goes.
    later = torch.tensor([5, 2.2, 1.7, 0]).reshape(1, 1, 2, 2)
    assert search.updated(first, later, limit).flatten().tolist() == [True, True, False, False]
    # Exactly at the lower bound it stays.
    edge = torch.tensor([5, 1.8, 1.8, 0], dtype=torch.float64).reshape(1, 1, 2, 2)
    limit = limit.double()
    assert search.updated(first, edge, limit).flatten().tolist() == [True, False, True, False]


def test_dropped_coefficients_do_not_count_but_keep_their_gradient_while_searching() -> None:
    mask = search._Coefficients(torch.Size([1, 1, 2, 2]))
    mask.mask[0, 0, 0, 1] = False
    coefficients = torch.tensor(COEFFICIENTS).reshape(1, 1, 2, 2).requires_grad_()
    kept = torch.tensor([[5.0, 0], [-2, 0]]).reshape(1, 1, 2, 2)
    scale = torch.tensor([[1.0, 2], [3, 5]]).reshape(1, 1, 2, 2)
    for searching in (True, False):
        mask.searching = searching
        weight = mask(coefficients)
        torch.testing.assert_close(weight, idct(kept))
        (gradient,) = torch.autograd.grad((weight * scale).sum(), coefficients)
        expected = dct(scale) if searching else dct(scale) * mask.mask
        torch.testing.assert_close(gradient, expected)


def test_whole_bands_go_by_their_root_mean_square() -> None:
    coefficients = torch.zeros(4, 1, 1, 2)
    coefficients[:, 0, 0, 0] = torch.tensor([1.0, 1, 3, 3])
    coefficients[:, 0, 0, 1] = torch.tensor([0.0, 2, 0, 0])
    found = search.magnitudes(coefficients, 0)[:, 0, 0]
    torch.testing.assert_close(found, torch.tensor([[math.sqrt(5), 1.0]]).expand(4, 2))
    found = search.magnitudes(coefficients, 2)[:, 0, 0]
    expected = torch.tensor([[1, math.sqrt(2)]] * 2 + [[3.0, 0]] * 2)
    torch.testing.assert_close(found, expected)


def test_the_method_end_to_end() -> None:
    report = run(FrequencyPruning(search_epochs=2, epochs=2, stem=True))
    layer = report.model[3]
    assert isinstance(layer, FrequencyConv2d)
    rounds = {entry["what"]: entry["result"] for entry in report.history}
    assert layer.mix.support.live == rounds["freeze the mask"]["3"] < 432
    notes = {row.name: row.note for row in report.layers}
    assert "one frequency" in notes["8"]
    assert report.layers[1].live == (432, layer.mix.support.live)


def test_coefficients_come_back_when_they_grow() -> None:
    """The data asks for a filter whose coefficients begin at zero."""
    conv = nn.Conv2d(5, 1, 2, bias=False)
    with torch.no_grad():
        conv.weight.copy_(idct(torch.zeros(1, 5, 2, 2)))
        conv.weight[0, 0] = 1.0
    target = idct(torch.eye(2).reshape(1, 1, 2, 2).expand(1, 5, 2, 2) * 3.0)

    def train_step(model: nn.Module, batch: int) -> torch.Tensor:
        x = torch.randn(16, 5, 2, 2)
        return (model(x) - nn.functional.conv2d(x, target)).square().mean()

    report = run(
        FrequencyPruning(search_epochs=5, epochs=0, decay=0.0, band_slope=0.0),
        nn.Sequential(conv), data=range(40), train_step=train_step, eval_data=None,
        example=torch.randn(1, 5, 2, 2), optimizer=lambda p: torch.optim.SGD(p, lr=0.05),
    )  # fmt: skip
    live = report.model[0].mix.support.mask.reshape(5, -1).all(0)
    assert report.model[0].bands == ((0, 0), (1, 1))
    assert live.all()


@pytest.mark.parametrize("single", [False, True])
def test_killed_and_resumed(tmp_path: Path, single: bool) -> None:
    method = FrequencyPruning(search_epochs=3, epochs=2, stem=True, single=single)
    check_kills(method, tmp_path, seed=6)


@pytest.mark.parametrize(
    "settings",
    [
        {"c": float("inf")},
        {"band_slope": -1.0},
        {"decay": -1},
        {"filters": -1},
        {"path": "x"},
        {"target": 1.0},
        {"layer_rates": {"0": -0.1}},
        {"band_rates": ()},
        {"band_rates": (1.0,)},
        {"band_rates": (0.5,), "target": 0.5},
    ],
    ids=str,
)
def test_bad_settings(settings: dict) -> None:
    with pytest.raises(ArgumentError):
        FrequencyPruning(**settings)


# The layer ------------------------------------------------------------------------------------


def layer_and_twin(path: str = "auto", **keywords) -> tuple[FrequencyConv2d, nn.Conv2d]:
    conv = nn.Conv2d(6, 8, 3, **keywords)
    mask = np.random.default_rng(0).random((8, 6, 3, 3)) < 0.4
    mask[:, :, 2, 1:] = False
    with torch.no_grad():
        conv.weight.copy_(idct(dct(conv.weight) * torch.tensor(mask)))
    return FrequencyConv2d.from_conv2d(conv, mask, path=path), conv


@pytest.mark.parametrize("path", ["frequency", "spatial", "auto"])
@pytest.mark.parametrize(
    "keywords",
    [{}, {"padding": 1, "stride": 2}, {"padding": "same", "dilation": 2, "bias": False},
     {"padding": (1, 2), "stride": (2, 1)}],
    ids=str,
)  # fmt: skip
def test_layer_equals_its_dense_twin(path: str, keywords: dict) -> None:
    layer, twin = layer_and_twin(path, **keywords)
    x = torch.randn(2, 6, 9, 8, requires_grad=True)
    y, expected = layer(x), twin(x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer(x[0]), expected[0], rtol=1e-4, atol=1e-5)
    dy = torch.randn_like(y)
    ours = torch.autograd.grad(y, (x, layer.mix.weight), dy)
    theirs = torch.autograd.grad(expected, (x, twin.weight), dy)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-4, atol=1e-5)
    bands = list(layer.live_frequencies)
    coefficient = dct(theirs[1]).flatten(2)[:, :, bands].reshape(8, -1, 1, 1)
    live = torch.tensor(layer.mix.support.mask)
    torch.testing.assert_close(ours[1], coefficient * live, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.to_conv2d()(x), expected, rtol=1e-4, atol=1e-5)


def test_only_live_frequencies_are_computed_and_counted() -> None:
    layer, _ = layer_and_twin("frequency", padding=1)
    assert len(layer.live_frequencies) == 7
    assert (2, 1) not in layer.bands
    assert (2, 2) not in layer.bands
    transform, mixed = 6 * 7 * 9 * 20, layer.mix.support.live * 20
    assert hk.stats.macs(layer, (6, 4, 5)) == transform + mixed
    layer.path = "spatial"
    assert hk.stats.macs(layer, (6, 4, 5)) == 8 * 6 * 9 * 20


def test_auto_takes_what_is_predicted_faster() -> None:
    """One live frequency is a sure win; all of them, with a transform on top, a sure loss."""
    conv = nn.Conv2d(64, 64, 3, padding=1)
    x = torch.randn(1, 64, 28, 28)
    one = np.zeros((64, 64, 3, 3), bool)
    one[:, :, 0, 0] = True
    assert FrequencyConv2d.from_conv2d(conv, one).path_for(x) == "frequency"
    every = FrequencyConv2d.from_conv2d(conv, np.ones_like(one))
    every.mix.freeze()
    assert every.path_for(x) == "spatial"


def test_a_layer_that_transforms_its_kernels_at_each_call_counts_that() -> None:
    conv, x = nn.Conv2d(16, 16, 3, padding=1), torch.randn(1, 16, 8, 8)
    layer = FrequencyConv2d.from_conv2d(conv, np.ones((16, 16, 3, 3), bool))
    there, back = layer.predicted(x)
    layer.mix.freeze()
    frozen_there, frozen_back = layer.predicted(x)
    passes = 2 if masking.native_engine() is None else 1
    assert back > frozen_back + passes * cost_model.INVERSE_CALL
    assert there >= frozen_there


@pytest.mark.parametrize(("inverse", "path"), [(0.0, "spatial"), (1.0, "frequency")])
def test_the_way_back_decides_between_the_paths(
    inverse: float, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frequency_cost, "INVERSE_CALL", inverse)
    layer = FrequencyConv2d.from_conv2d(nn.Conv2d(16, 16, 3), np.ones((16, 16, 3, 3), bool))
    assert layer.path_for(torch.randn(1, 16, 8, 8)) == path


def test_freezing_asks_again_which_path_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frequency_cost, "INVERSE_CALL", 1.0)
    layer = FrequencyConv2d.from_conv2d(nn.Conv2d(16, 16, 3), np.ones((16, 16, 3, 3), bool))
    x = torch.randn(1, 16, 8, 8)
    assert layer.path_for(x) == "frequency"
    layer.mix.freeze()
    assert layer.path_for(x) == "spatial"


def test_spatial_weight_follows_the_coefficients() -> None:
    layer, _ = layer_and_twin("spatial")
    x = torch.randn(1, 6, 5, 5)
    with torch.no_grad():
        before = layer(x)
        layer.mix.weight.mul_(2)
        torch.testing.assert_close(
            layer(x) - layer.bias.view(1, -1, 1, 1), 2 * (before - layer.bias.view(1, -1, 1, 1))
        )
        double = copy.deepcopy(layer).double()
        assert double(x.double()).dtype == torch.float64


@pytest.mark.parametrize("path", ["frequency", "spatial"])
def test_frozen_parts_compute_the_same(path: str) -> None:
    layer, twin = layer_and_twin(path)
    layer.mix.freeze()
    x = torch.randn(1, 6, 5, 5)
    torch.testing.assert_close(layer(x), twin(x), rtol=1e-4, atol=1e-5)


def test_checkpoint_brings_its_frequencies() -> None:
    layer, _ = layer_and_twin()
    fresh = FrequencyConv2d(6, 8, 3)
    fresh.load_state_dict(through_file(layer.state_dict()))
    assert fresh.live_frequencies == layer.live_frequencies
    assert fresh.mix.support == layer.mix.support
    x = torch.randn(1, 6, 5, 5)
    assert torch.equal(fresh(x), layer(x))


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"groups": 2}, ArgumentError),
        ({"padding_mode": "reflect"}, ArgumentError),
        ({"path": "x"}, ArgumentError),
        ({"coefficients": np.ones((8, 6, 3, 3))}, SupportError),
        ({"coefficients": np.zeros((8, 6, 3, 3), bool)}, SupportError),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, dict) else "",
)
def test_refuses(arguments: dict, error: type[Exception]) -> None:
    with pytest.raises(error):
        FrequencyConv2d(6, 8, 3, **arguments)


def test_from_conv2d_wants_a_convolution() -> None:
    with pytest.raises(InputTypeError):
        FrequencyConv2d.from_conv2d(nn.Linear(2, 2), np.ones((2, 2, 1, 1), bool))  # type: ignore[arg-type]


def test_repr_tells_frequencies() -> None:
    assert "frequencies=7 of 9" in repr(layer_and_twin()[0])


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("path", ["frequency", "spatial"])
@pytest.mark.parametrize("held", [float("nan"), float("inf"), 7.0])
def test_dead_coefficients_may_hold_anything(path: str, frozen: bool, held: float) -> None:
    layer = FrequencyConv2d(6, 8, 3, padding=1, coefficients=some(8, 6, 3), path=path)
    x, wanted = torch.randn(2, 6, 5, 5), layer.to_conv2d()
    with torch.no_grad():
        layer.weight.masked_fill_(~torch.from_numpy(layer.mix.support.mask.copy()), held)
        if frozen:
            layer.mix.freeze()
        torch.testing.assert_close(layer(x), wanted(x))
        torch.testing.assert_close(layer.spatial_weight(), wanted.weight)


@pytest.mark.parametrize("at_once", [0, 2**30], ids=["one by one", "at once"])
def test_images_of_frequencies_are_summed_alike_one_by_one_and_at_once(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hetconv_kernels.nn.dct.AT_ONCE", at_once)
    layer = FrequencyConv2d(6, 8, 3, coefficients=some(8, 6, 3), path="spatial").double()
    twin = layer.to_conv2d()
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(layer(x), twin(x))
    layer(x).square().sum().backward()
    grad = layer.weight.grad.clone()
    layer.path, layer.weight.grad = "frequency", None
    layer(x).square().sum().backward()
    torch.testing.assert_close(grad, layer.weight.grad)


def some(filters: int, channels: int, kernel: int) -> np.ndarray:
    return np.random.default_rng(0).random((filters, channels, kernel, kernel)) < 0.4


def test_what_is_remembered_of_changing_shapes_is_bounded() -> None:
    layer = FrequencyConv2d(2, 2, 3, coefficients=np.ones((2, 2, 3, 3), bool), path="auto")
    for height in range(3, 303):
        layer.path_for(torch.empty(1, 2, height, 4))
    assert len(layer._paths) <= 128
