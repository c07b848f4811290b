# SPDX-License-Identifier: Apache-2.0
"""io: networks come back, with their class and without; what is no such file is told apart."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from networks import NETWORKS, Forks, equal, interleaved, network
from torch import nn

import hetconv_kernels as hk
from hetconv_kernels import io
from hetconv_kernels.errors import ArgumentError, FileError, InputTypeError
from hetconv_kernels.file_tensors import tensors_digest, text_digest

safetensors = pytest.importorskip("safetensors", reason="the safetensors extra is not installed")
from safetensors.torch import load_file, save_file  # noqa: E402

KEY, DIGEST_KEY = "hetconv_kernels", "hetconv_kernels.digest"


@pytest.mark.parametrize("form", ["as-it-is", "compact", "het", "optimized"])
@pytest.mark.parametrize("name", ["resnet20", "densenet", "mobilenet", "branches"])
def test_without_the_class(name: str, form: str, tmp_path) -> None:
    model, x = network(name)
    if form == "compact":
        model = hk.compact(model, x).model
    elif form == "het":
        model = interleaved(model)
    elif form == "optimized":
        model = hk.optimize(interleaved(model), x).model
    hk.save(model, tmp_path / "net")
    loaded = hk.load(tmp_path / "net")
    equal(loaded, model, x)
    assert not loaded.training
    assert {name: p.requires_grad for name, p in loaded.named_parameters()} == {
        name: p.requires_grad for name, p in model.named_parameters()
    }


def test_into_the_class(tmp_path) -> None:
    model, x = network("vgg16")
    smaller = hk.compact(interleaved(model), x).model
    hk.save(smaller, tmp_path / "net")
    fresh = NETWORKS["vgg16"][0]()
    loaded = hk.load(tmp_path / "net", into=fresh)
    assert loaded is fresh
    assert type(loaded) is type(model)
    equal(loaded, smaller, x)
    loaded.train()(x).sum().backward()  # it is an ordinary network


def frequency_layer(path: str = "auto", **keywords) -> hk.nn.FrequencyConv2d:
    """A layer of three frequencies, of which filters have one, two or all."""
    torch.manual_seed(3)
    chosen = np.zeros((6, 4, 3, 3), bool)
    chosen[:, :, 0, 0] = chosen[::2, :3, 1, 0] = chosen[1, 2, 2, 2] = True
    conv = nn.Conv2d(4, 6, 3, 2, 1).train(False)
    layer = hk.nn.FrequencyConv2d.from_conv2d(conv, chosen, path=path, **keywords)
    layer.bias.data.normal_()
    return layer


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("way", ["without", "into-conv", "into-frequency"])
@pytest.mark.parametrize("path", ["auto", "frequency", "spatial"])
def test_a_frequency_layer_comes_back_exactly(path: str, way: str, frozen: bool, tmp_path) -> None:
    layer = frequency_layer(path, backend="reference")
    layer.mix.backend = "vendor"
    if frozen:
        layer.mix.freeze()
    model = nn.Sequential(nn.ReLU(), layer, nn.BatchNorm2d(6)).eval()
    hk.save(model, tmp_path / "net")
    into = {
        "without": lambda: None,
        "into-conv": lambda: nn.Sequential(nn.ReLU(), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)),
        # Of other frequencies than the saved one.
        "into-frequency": lambda: nn.Sequential(
            nn.ReLU(), hk.nn.FrequencyConv2d(4, 6, 3, 2, 1), nn.BatchNorm2d(6)
        ),
    }[way]()
    loaded = hk.load(tmp_path / "net", into=into)
    found = loaded.get_submodule("1")
    assert type(found) is hk.nn.FrequencyConv2d
    assert found.live_frequencies == layer.live_frequencies == (0, 3, 8)
    assert found.mix.support == layer.mix.support
    assert (found.path, found.backend, found.mix.backend) == (path, "reference", "vendor")
    assert (found.mix.frozen, found.stride, found.padding) == (frozen, (2, 2), layer.padding)
    for key, value in layer.state_dict().items():
        same = found.state_dict()[key]
        assert torch.equal(value, same) if isinstance(value, torch.Tensor) else value == same
    assert torch.equal(found.basis, layer.basis)
    x = torch.randn(2, 4, 7, 8)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
    if not frozen:
        loaded.train()(x).sum().backward()
        assert found.mix.weight.grad is not None


def test_a_pruned_and_a_changed_frequency_layer_come_back(tmp_path) -> None:
    layer = frequency_layer()
    fewer = layer.mix.support.mask.copy()
    fewer[:, ::3] = False  # no coefficient is left at the first frequency; its map stays
    layer.mix.set_support(hk.Support.from_mask(fewer))
    model = nn.Sequential(layer.double()).eval()
    hk.save(model, tmp_path / "net")
    found = hk.load(tmp_path / "net").get_submodule("0")
    assert found.live_frequencies == (0, 3, 8)
    assert found.mix.support == layer.mix.support
    x = torch.randn(1, 4, 6, 6, dtype=torch.float64)
    assert torch.equal(found(x), layer(x))


def test_what_cannot_be_traced_needs_its_class(tmp_path) -> None:
    model = Forks().train()
    hk.save(model, tmp_path / "net")
    with pytest.raises(FileError, match=r"holds no steps: .*into=network"):
        hk.load(tmp_path / "net")
    x = torch.rand(1, 3, 2, 2)
    loaded = hk.load(tmp_path / "net", into=Forks().eval())
    equal(loaded, model, x)
    assert loaded.training


def test_a_module_that_has_no_description_needs_its_class(tmp_path) -> None:
    hk.save(nn.Sequential(nn.Conv2d(3, 4, 1), nn.LSTM(4, 4)), tmp_path / "net")
    with pytest.raises(FileError, match="the module 1 is a LSTM"):
        hk.load(tmp_path / "net")


def test_frozen_layers_layouts_dtypes_and_ties(tmp_path) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, 3, padding=1).to(memory_format=torch.channels_last)
    het = hk.nn.HetConv2d(8, 8, 3, padding=1, backend="vendor").freeze()
    twin = nn.Conv2d(8, 8, 3, padding=1, bias=False)
    twin.weight = conv.weight
    model = nn.Sequential(conv, het, twin).double().eval()
    model[0].bias.requires_grad_(False)
    hk.save(model, tmp_path / "net")
    loaded = hk.load(tmp_path / "net")
    first, second = loaded.get_submodule("0"), loaded.get_submodule("1")
    assert first.weight.is_contiguous(memory_format=torch.channels_last)
    assert not first.bias.requires_grad
    assert (second.frozen, second.backend, second.weight.dim()) == (True, "vendor", 1)
    assert second.weight.dtype == torch.float64
    equal(loaded, model, torch.randn(1, 8, 4, 4, dtype=torch.float64))


def test_a_file_is_replaced_only_when_it_is_whole(tmp_path) -> None:
    path = tmp_path / "net"
    hk.save(nn.Sequential(nn.Linear(2, 2)), path)
    before = path.read_bytes()
    with pytest.raises(ArgumentError, match=r"values of '0.weight': received none"):
        hk.save(nn.Sequential(nn.Linear(2, 2, device="meta")), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["net"]


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "net.safetensors"
    torch.manual_seed(0)
    hk.save(nn.Sequential(hk.nn.HetConv2d(8, 8, 3), nn.ReLU()).eval(), path)
    return path


def rewrite(path, change) -> None:
    """Changes a file's description and weights, as a careful attacker would."""
    with safetensors.safe_open(str(path), "pt") as file:
        description = json.loads(file.metadata()[KEY])
    tensors = load_file(str(path))
    change(description, tensors)
    text = json.dumps(description)
    save_file(tensors, str(path), metadata={KEY: text, DIGEST_KEY: text_digest(text)})


@pytest.mark.parametrize("kept", [0, 1, 7, 100, 0.5, 0.99, -1])
def test_truncated_files(saved, kept: float) -> None:
    raw = saved.read_bytes()
    saved.write_bytes(raw[: int(kept * len(raw)) if 0 < kept < 1 else int(kept)])
    with pytest.raises(FileError, match=r"net.safetensors cannot be loaded: .*expected a file of"):
        hk.load(saved)


def header_end(raw: bytes) -> int:
    return 8 + int.from_bytes(raw[:8], "little")


def test_any_flipped_bit_is_found_or_harmless(saved) -> None:
    """Whatever loads is what was saved: every argument, every step, every weight."""
    raw = saved.read_bytes()
    good = hk.load(saved)
    said = [(str(m), m.training) for m in good.modules()], str(good.graph)
    end = header_end(raw)
    generator = np.random.default_rng(0)
    places = np.concatenate(
        [
            generator.choice(8 * end, 500, replace=False),
            generator.integers(8 * end, 8 * len(raw), 50),
        ]
    )
    loads = 0
    for place in places.tolist():
        damaged = bytearray(raw)
        damaged[place // 8] ^= 1 << place % 8
        saved.write_bytes(bytes(damaged))
        try:
            loaded = hk.load(saved)
        except FileError:
            continue
        loads += 1
        assert ([(str(m), m.training) for m in loaded.modules()], str(loaded.graph)) == said
        for key, value in good.state_dict().items():
            assert torch.equal(loaded.state_dict()[key], value)
    assert loads < 50  # spaces that pad the header, and no more


def test_every_bit_of_the_description_is_covered(saved) -> None:
    """A flip that leaves safetensors content and JSON valid is found by the digest alone."""
    raw = saved.read_bytes()
    start = raw.index(b'"{\\"format')
    stop = raw.index(b'"', raw.index(b'digest\\": \\"') + 14)
    for place in range(start + 1, stop, 7):
        damaged = bytearray(raw)
        damaged[place] ^= 1 << place % 8
        saved.write_bytes(bytes(damaged))
        with pytest.raises(FileError):
            hk.load(saved)


def test_foreign_files(saved, tmp_path) -> None:
    save_file({"a": torch.ones(2)}, str(tmp_path / "other"))
    with pytest.raises(FileError, match="another program wrote it"):
        hk.load(tmp_path / "other")
    torch.save({"a": torch.ones(2)}, tmp_path / "pickled")
    with pytest.raises(FileError, match="no whole safetensors file"):
        hk.load(tmp_path / "pickled")
    with pytest.raises(FileNotFoundError):
        hk.load(tmp_path / "nothing")
    rewrite(saved, lambda d, t: d.update(format="hetconv_kernels.Network/9"))
    with pytest.raises(FileError, match=r"received hetconv_kernels.Network/9, expected .*/2"):
        hk.load(saved)


def _graph(index: int, **change):
    def apply(description, tensors):
        description["graph"][index].update(change)

    return apply


@pytest.mark.parametrize(
    "change",
    [
        _graph(1, op="call_function", target="os.system", args=["true"]),
        _graph(1, op="call_function", target="builtins.eval"),
        _graph(1, op="call_function", target="aten::from_file.default"),
        _graph(1, op="call_method", target="__reduce__"),
        _graph(1, op="call_function", target="getattr", args=[{"node": "input_1"}, "__class__"]),
        _graph(1, name="x); import os; (y"),
        _graph(0, target="x=__import__('os')"),
        _graph(1, target="0); import os #"),
        _graph(1, args=[{"node": "nobody"}]),
        _graph(1, args=[{"dtype": "load"}]),
        _graph(1, target="absent"),
        lambda d, t: d["layers"]["0"].update(kind="Popen"),
        lambda d, t: d["layers"]["0"].update(support="{}"),
        lambda d, t: d["layers"]["0"]["arguments"].update(in_channels=-1),
        lambda d, t: d["layers"]["1"]["arguments"].update(evil=1),
        lambda d, t: d["layers"]["0"].update(dtype="nn"),
        lambda d, t: d.pop("layers"),
        lambda d, t: d.update(layers=[]),
        lambda d, t: d.update(graph=[3]),
        lambda d, t: t.update(more=torch.ones(1)),
        lambda d, t: d["layers"]["0"].update(dtype="complex64"),
        lambda d, t: d["layers"]["0"].update(dtype="quint8"),
        lambda d, t: d["layers"]["0"].update(dtype="int32"),
        lambda d, t: d["layers"]["0"]["arguments"].update(padding_mode="none such"),
        lambda d, t: d["layers"]["0"]["arguments"].update(kernel_size=[10**400, 3]),
        lambda d, t: d["layers"]["0"]["arguments"].update(kernel_size=3),
        lambda d, t: d["layers"]["0"]["arguments"].update(backend="none such"),
        lambda d, t: d.update(fixed=3),
        lambda d, t: d.update(tied=[1]),
        lambda d, t: d.update(other_mode=1),
        lambda d, t: d.update(buffers=7),
        _graph(1, kwargs=3),
        _graph(1, op="no_such_op"),
        lambda d, t: t.pop("0.bias"),
    ],
)
def test_changed_files_run_nothing(saved, change) -> None:
    def with_digest(description, tensors):
        change(description, tensors)
        description["digest"] = tensors_digest(tensors)

    rewrite(saved, with_digest)
    with pytest.raises(FileError):
        hk.load(saved)


@pytest.mark.parametrize(
    "change",
    [
        {"live_frequencies": [0, 3]},
        {"live_frequencies": [0, 3, 9]},
        {"live_frequencies": [-9, 3, 8]},
        {"live_frequencies": "all"},
        {"mix_backend": "none such"},
        {"support": hk.Support.dense(4, 6, 1).to_json()},
    ],
    ids=str,
)
def test_a_changed_frequency_layer_is_refused(change, tmp_path) -> None:
    path = tmp_path / "net"
    hk.save(nn.Sequential(frequency_layer()), path)
    rewrite(path, lambda d, t: d["layers"]["0"].update(change))
    with pytest.raises(FileError):
        hk.load(path)


def test_the_wrong_network(saved) -> None:
    with pytest.raises(ArgumentError, match=r"without the modules \['0', '1'\].*load\(path\)"):
        hk.load(saved, into=nn.ModuleDict({"a": nn.ReLU()}))
    with pytest.raises(InputTypeError, match="model: received function"):
        hk.save(lambda x: x, saved)


@pytest.mark.parametrize("device", ["cuda", "none such", "cuda:99", 3.5], ids=str)
def test_devices_that_are_not_there(saved, device) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(ArgumentError, match="device: received"):
        hk.load(saved, device=device)


def enormous(description, tensors) -> None:
    layer = description["layers"]["0"]
    support = json.loads(layer["support"])
    support["shape"] = [200_000, 200_000, 3, 3]
    layer["support"] = json.dumps(support)
    layer["arguments"].update(in_channels=200_000, out_channels=200_000)


def enormous_arguments(description, tensors) -> None:
    description["layers"]["0"]["arguments"].update(in_channels=2**20, out_channels=2**20)


@pytest.mark.parametrize("change", [enormous, enormous_arguments])
def test_sizes_are_checked_before_memory_is_taken(saved, change, monkeypatch) -> None:
    rewrite(saved, change)

    def fail(*_, **__):
        raise AssertionError("a layer was built")

    monkeypatch.setattr(io, "layer_from_json", fail)
    with pytest.raises(
        FileError, match=r"declares masks of [\d,]+ entries, where its weights allow"
    ):
        hk.load(saved)


def test_a_file_of_the_version_before_loads(saved) -> None:
    model = hk.load(saved)
    with safetensors.safe_open(str(saved), "pt") as file:
        description = json.loads(file.metadata()[KEY])
    for key in ("buffers", "tied", "other_mode"):
        del description[key]
    description["format"] = "hetconv_kernels.Network/1"
    save_file(load_file(str(saved)), str(saved), metadata={KEY: json.dumps(description)})
    x = torch.randn(1, 8, 5, 5)
    with torch.no_grad():
        assert torch.equal(hk.load(saved)(x), model(x))
