# SPDX-License-Identifier: Apache-2.0
"""The life of a quantised layer: loaded, moved, copied, written to and saved in files."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from quantized_layers import POOL, R, X, Y, image, quantized
from torch import nn

import hetconv_kernels as hk
from hetconv_kernels.errors import FileError, SupportError
from hetconv_kernels.file_tensors import text_digest
from hetconv_kernels.nn import QuantizedConv2d, QuantizedLinear


def test_a_state_dict_brings_weights_and_scales_to_a_layer_that_has_none() -> None:
    layer = quantized(residual=R)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert state["_extra_state"].dtype == torch.uint8
    fresh = QuantizedConv2d(layer._geometry, act="relu")
    fresh.load_state_dict(state)
    x, r = image(), image(R, (2, 12, 6, 5))
    assert (fresh.x, fresh.y, fresh.residual) == (X, Y, R)
    assert torch.equal(fresh(x, r), layer(x, r))


def test_loading_makes_the_packed_form_anew() -> None:
    layer, other, x = quantized(), quantized(), image()
    before = layer(x)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), other(x))
    assert not torch.equal(layer(x), before)


def test_a_write_in_place_is_seen() -> None:
    layer, x = quantized(), image()
    before = layer(x)
    layer.weight.neg_()
    assert not torch.equal(layer(x), before)


@pytest.mark.parametrize("name", ["weight", "weight_scale", "bias"])
def test_a_buffer_that_is_replaced_or_written_to_is_seen(name: str) -> None:
    layer, x = quantized(), image()
    before = layer(x)
    old = getattr(layer, name)
    setattr(layer, name, (old * 2).to(old.dtype))
    changed = layer(x)
    assert not torch.equal(changed, before)
    getattr(layer, name).copy_(old)
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize(("name", "value"), [("y", None), ("act", "none"), ("pool", POOL)])
def test_a_scale_or_activation_that_is_changed_is_seen(name: str, value) -> None:
    layer, x = quantized(), image()
    before = layer(x)
    setattr(layer, name, value)
    after = layer(x)
    assert after.shape != before.shape or not torch.equal(after.float(), before.float())


def test_another_engine_packs_for_itself() -> None:
    layer, x = quantized(), image()
    truth = layer(x)
    with hk.use_backend("reference"):
        assert torch.equal(layer(x), truth)
    layer.backend = "reference"
    assert torch.equal(layer(x), truth)


def test_a_checkpoint_of_another_support_is_refused() -> None:
    layer = quantized()
    other = hk.nn.HetConv2d(8, 12, 3, stride=2, padding=1, p=4, order="interleaved")
    wrong = QuantizedConv2d.from_float(other, X, Y)
    with pytest.raises(SupportError, match="Support of the checkpoint"):
        layer.load_state_dict(wrong.state_dict())


@pytest.mark.parametrize(
    "state", [torch.zeros(3, dtype=torch.uint8), torch.zeros(0, dtype=torch.uint8), {"x": 1}, None]
)
def test_a_foreign_extra_state_is_refused(state: object) -> None:
    with pytest.raises(SupportError, match="get_extra_state"):
        quantized().set_extra_state(state)


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        lambda layer: pickle.loads(pickle.dumps(layer)),
        lambda layer: layer.to("cpu"),
        lambda layer: copy.deepcopy(layer).half(),
        lambda layer: copy.deepcopy(layer).double(),
    ],
    ids=["deepcopy", "pickle", "to", "half", "double"],
)
def test_copies_and_moves_compute_the_same(copied) -> None:
    layer, x = quantized(), image()
    truth = layer(x)
    other = copied(layer)
    assert torch.equal(other(x), truth)
    assert other.weight_scale.dtype == torch.float32
    assert other.weight.dtype == torch.int8


def test_a_copy_shares_nothing_with_its_original() -> None:
    layer, x = quantized(), image()
    truth = layer(x)
    other = copy.deepcopy(layer)
    other.weight.neg_()
    assert torch.equal(layer(x), truth)
    assert not torch.equal(other(x), truth)


def test_the_repr_says_scales_and_support() -> None:
    text = repr(quantized(pool=POOL, residual=R))
    for part in ("8, 12", "uint8(0.02, 128)", "act=relu", "het(p=4", "pool=", "residual="):
        assert part in text
    assert "in_features=24" in repr(QuantizedLinear.from_float(nn.Linear(24, 4), X))


# Files -------------------------------------------------------------------------------------------


def network() -> nn.Module:
    """Has every step that a file can describe."""
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3, padding=1)
            self.left, self.right = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(3, 8, 1)
            self.fc = nn.Linear(16, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = nn.functional.max_pool2d(torch.relu(self.stem(x)), 2)
            z = nn.functional.pad(self.right(x), (0, 1, 0, 0))[:, :, :, 1:]
            y = torch.cat([self.left(y), nn.functional.max_pool2d(z, 2)], 1)
            y = torch.relu(y + y.tanh())
            return self.fc(y.mean((2, 3)))

    batch = torch.randn(4, 3, 8, 8)
    return hk.quantize(Net().eval(), [batch], measure=False).model


@pytest.mark.parametrize("into", [False, True], ids=["without the class", "into a network"])
def test_networks_in_8_bits_come_back_from_a_file(into: bool, tmp_path) -> None:
    pytest.importorskip("safetensors", reason="the safetensors extra is not installed")
    model, x = network(), torch.randn(2, 3, 8, 8)
    hk.save(model, tmp_path / "net")
    target = copy.deepcopy(model) if into else None
    if target is not None:
        target.get_submodule("stem").weight.neg_()
        target(x)
    loaded = hk.load(tmp_path / "net", into=target)
    assert torch.equal(loaded(x), model(x))
    kinds = [type(m) for m in loaded.modules()]
    assert kinds.count(QuantizedConv2d) == 3
    assert kinds.count(QuantizedLinear) == 1
    size = (tmp_path / "net").stat().st_size
    weights = hk.stats.weight_bytes(model)
    assert weights < size < weights + 20000, "weights are saved in 8 bits, once"


@pytest.mark.parametrize(
    ("part", "value"), [("scale", 0.0), ("zero_point", 300), ("dtype", "int16")]
)
def test_a_file_with_a_scale_that_is_none_is_refused(part: str, value, tmp_path) -> None:
    import json

    safetensors = pytest.importorskip("safetensors", reason="the extra is not installed")
    from safetensors.torch import load_file, save_file

    hk.save(network(), tmp_path / "net")
    with safetensors.safe_open(str(tmp_path / "net"), "pt") as file:
        text = json.loads(file.metadata()["hetconv_kernels"])
    text["layers"]["stem"]["scales"]["x"][part] = value
    save_file(
        load_file(tmp_path / "net"),
        tmp_path / "net",
        metadata={
            "hetconv_kernels": json.dumps(text),
            "hetconv_kernels.digest": text_digest(json.dumps(text)),
        },
    )
    with pytest.raises(FileError, match="description of a layer"):
        hk.load(tmp_path / "net")
