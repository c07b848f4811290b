# SPDX-License-Identifier: Apache-2.0
"""What a file cannot hold is refused by name; what it can, ties and modes too, comes back."""

from __future__ import annotations

import types

import pytest
import torch
from networks import equal
from torch import nn
from torch.nn.utils import prune

import hetconv_kernels as hk
from hetconv_kernels.errors import ArgumentError, FileError

pytest.importorskip("safetensors", reason="the safetensors extra is not installed")


def doubles(module, args, output):
    return output * 2


def halves(module, args):
    return args[0] / 2


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), hk.nn.HetConv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()
    ).eval()


def own_forward(model: nn.Module) -> None:
    model[0].forward = types.MethodType(lambda self, x: nn.Conv2d.forward(self, x) * 2, model[0])


CARRIED = {
    "pruned": (lambda m: prune.l1_unstructured(m[0], "weight", 0.5), r"0 with .*'weight_mask' as"),
    "pruned-het": (lambda m: prune.random_unstructured(m[1], "weight", 3), r"1 with .*RandomUnst"),
    "pruned-bias": (lambda m: prune.l1_unstructured(m[0], "bias", 1), "'bias_mask' as float32"),
    "weight-norm": (lambda m: nn.utils.weight_norm(m[0]), "'weight_g' as float32"),
    "spectral-norm": (lambda m: nn.utils.spectral_norm(m[0]), "pre-hook SpectralNorm"),
    "buffer": (lambda m: m[2].register_buffer("count", torch.ones(2)), r"2 with 'count' as float"),
    "parameter": (lambda m: m[1].register_parameter("s", nn.Parameter(torch.ones(1))), "1 with"),
    "dtype": (lambda m: setattr(m[2], "num_batches_tracked", torch.tensor(1).int()), "as int32"),
    "hook": (lambda m: m[0].register_forward_hook(doubles), "0 with the forward hook doubles"),
    "pre-hook": (lambda m: m[3].register_forward_pre_hook(halves), "3 with the forward pre-hook"),
    "hook-of-the-whole": (lambda m: m.register_forward_hook(doubles), "the network itself with"),
    "backward-hook": (lambda m: m[0].register_full_backward_hook(doubles), "the backward hook"),
    "own-forward": (own_forward, "0 with a forward of its own"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("add", "message"), CARRIED.values(), ids=CARRIED.keys())
def test_what_a_file_cannot_hold_is_refused(add, message: str, tmp_path) -> None:
    model = small()
    add(model)
    with pytest.raises(ArgumentError, match=message) as raised:
        hk.save(model, tmp_path / "net")
    assert "into=network" in str(raised.value)
    assert list(tmp_path.iterdir()) == []
    # A network that lacks the same is no way out; one that has it is.
    with pytest.raises(ArgumentError, match=message):
        hk.save(model, tmp_path / "net", into=small())
    twin = small()
    add(twin)
    for tensor in (*twin.parameters(), *twin.buffers()):
        if tensor.is_floating_point():
            tensor.detach().zero_()
    hk.save(model, tmp_path / "net", into=twin)
    loaded = hk.load(tmp_path / "net", into=twin)
    x = torch.randn(2, 3, 7, 7)
    equal(loaded, model, x)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_was_made_permanent_is_saved(tmp_path) -> None:
    model = small()
    prune.l1_unstructured(model[0], "weight", 0.5)
    prune.remove(model[0], "weight")
    nn.utils.weight_norm(model[1])
    nn.utils.remove_weight_norm(model[1])
    model[2].register_forward_hook(doubles).remove()
    hk.save(model, tmp_path / "net")
    x = torch.randn(2, 3, 7, 7)
    with torch.no_grad():
        assert torch.equal(hk.load(tmp_path / "net")(x), model(x))


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize(
    "layer",
    [
        lambda: hk.nn.HetConv2d(8, 8, 3, p=2),
        lambda: hk.nn.HetConv2d(9, 8, 3, p=4, order="interleaved"),
        lambda: hk.nn.GroupedConv2d(8, 8, 3, groups=4),
    ],
    ids=["het", "het-interleaved", "grouped"],
)
def test_a_support_of_the_same_weights_by_another_name_is_the_same(
    layer, frozen: bool, tmp_path
) -> None:
    # So compressors leave it: a mask that happens to be that of the class.
    model = nn.Sequential(layer())
    named = model[0].support
    model[0].set_support(hk.Support.from_mask(named.mask.copy()))
    assert str(model[0].support.kind) != str(named.kind)
    if frozen:
        model[0].freeze()
    hk.save(model, tmp_path / "net")
    (loaded,) = (m for m in hk.load(tmp_path / "net").modules() if type(m) is type(model[0]))
    assert loaded.support == named
    assert torch.equal(loaded.weight, model[0].weight)


class NormAct(nn.BatchNorm2d):
    """A batch norm with a forward of its own, as timm has: its steps are traced, no count."""

    def forward(self, x):
        return torch.relu(
            nn.functional.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.1, self.eps
            )
        )


def test_the_count_of_a_batch_norm_comes_back_where_no_step_reads_it(tmp_path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sequential(NormAct(8)), NormAct(8)).eval()
    model[1][0].num_batches_tracked += 7
    hk.save(model, tmp_path / "net")
    loaded, x = hk.load(tmp_path / "net"), torch.randn(2, 3, 7, 7)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    hk.save(loaded, tmp_path / "again")
    assert hk.load(tmp_path / "again").state_dict().keys() == state.keys()


def test_tensors_that_no_step_reads_need_the_class(tmp_path) -> None:
    model = small()
    model.register_buffer("mean", torch.ones(2))
    hk.save(model, tmp_path / "net")
    with pytest.raises(FileError, match=r"holds no steps: no step reads mean.*into=network"):
        hk.load(tmp_path / "net")
    twin = small()
    twin.register_buffer("mean", torch.zeros(2))
    assert hk.load(tmp_path / "net", into=twin).mean.eq(1).all()


class Shared(nn.Module):
    """One module at two names, tied weights, a buffer of floats, and a frozen normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 4, 1)
        self.again = self.first
        self.norm = nn.BatchNorm2d(4)
        self.tied = nn.Conv2d(4, 4, 1, bias=False)
        self.tied.weight = self.first.weight
        self.register_buffer("scale", torch.full((1, 4, 1, 1), 0.5))

    def forward(self, x):
        return self.tied(self.norm(self.again(self.first(x)))) * self.scale


@pytest.mark.parametrize("way", ["without", "into"])
def test_ties_buffers_and_modes_come_back(way: str, tmp_path) -> None:
    model = Shared().train()
    model.norm.eval()
    model.norm.running_mean.normal_()
    hk.save(model, tmp_path / "net")
    loaded = hk.load(tmp_path / "net", into=None if way == "without" else Shared())
    assert loaded.get_submodule("tied").weight is loaded.get_submodule("first").weight
    assert loaded.training
    assert not loaded.get_submodule("norm").training
    assert [n for n, _ in loaded.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert "scale" in dict(loaded.named_buffers())
    x = torch.randn(2, 4, 3, 3)
    assert torch.equal(loaded(x), model(x))
