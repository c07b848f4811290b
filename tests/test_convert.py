# SPDX-License-Identifier: Apache-2.0
"""convert: swaps, carries over, keeps what it must not touch, and says so."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import hetconv_kernels as hk
from hetconv_kernels import models, rules, stats
from hetconv_kernels.errors import ArgumentError, InputTypeError, SupportError
from hetconv_kernels.graph.convert import ConversionReport


def two_convs() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1))


def masked(model: nn.Module, report: ConversionReport) -> nn.Module:
    """Applies the report's Supports to a copy of the dense network: what must come out."""
    model = copy.deepcopy(model)
    for swap in report.swapped:
        weight = model.get_parameter(f"{swap.name}.weight")
        weight.data *= torch.from_numpy(swap.after.support.mask.copy())
    return model


def test_report_lists_what_was_swapped_and_why_not():
    model = two_convs()
    first, last = model[0], model[2]
    report = hk.convert(model, rules.het(p=4), inplace=True)
    assert report.model is model
    assert [(s.name, s.before, s.after) for s in report.swapped] == [("0", first, model[0])]
    assert type(model[0]) is hk.nn.HetConv2d
    assert model[2] is last
    assert [tuple(k) for k in report.kept] == [
        ("2", "it is 1×1: it has nothing but the centre tap")
    ]


SMALL = {
    "resnet20": models.resnet20,
    "densenet": lambda: models.DenseNet((2, 2), growth=8),
    "mobilenet": lambda: models.mobilenet(width=0.25),
    "dncnn": lambda: models.dncnn(depth=4, channels=8, image_channels=3),
}


@pytest.mark.parametrize("name", SMALL)
def test_converted_networks_equal_the_masked_ones(name):
    torch.manual_seed(0)
    model = SMALL[name]().eval()
    rule = rules.first_of(rules.grouped(), rules.het(p=4))
    report = hk.convert(model, rule)
    assert report.swapped
    hets = [s for s in report.swapped if isinstance(s.after, hk.nn.HetConv2d)]
    expected = masked(model, ConversionReport(model, tuple(hets), ()))
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(report.model(x), expected(x), rtol=1e-4, atol=1e-5)


def test_the_given_network_is_left_alone_by_default():
    model = two_convs()
    twin = copy.deepcopy(model)
    report = hk.convert(model, rules.het(p=4))
    assert report.model is not model
    assert type(model[0]) is nn.Conv2d
    for new, old in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(new, old)


def test_a_converted_copy_may_be_trained_without_moving_the_given_one():
    model = two_convs()
    before = copy.deepcopy(model.state_dict())
    converted = hk.convert(model, rules.het(p=4)).model
    with torch.no_grad():
        for parameter in converted.parameters():
            parameter.add_(1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_in_place_leaves_the_old_weights_alone():
    conv = nn.Conv2d(8, 8, 3)
    weight = conv.weight.detach().clone()
    hk.convert(nn.Sequential(conv), rules.het(p=4), inplace=True)
    assert torch.equal(conv.weight, weight)


def test_the_network_itself_may_be_the_layer():
    conv = nn.Conv2d(8, 8, 3)
    report = hk.convert(conv, rules.het(p=4), inplace=True)
    assert type(report.model) is hk.nn.HetConv2d
    assert type(hk.convert(conv, rules.het(p=4)).model) is hk.nn.HetConv2d
    assert report.swapped == (("", conv, report.model),)
    assert "(the model)" in str(report)
    assert report.macs((8, 5, 5)) == (576 * 9, 192 * 9)


def test_a_shared_module_is_swapped_once_at_every_place():
    conv = nn.Conv2d(8, 8, 3, padding=1)
    model = nn.ModuleDict({"a": conv, "b": nn.ModuleList([conv]), "c": nn.Conv2d(8, 8, 3)})
    report = hk.convert(model, rules.het(p=4))
    model = report.model
    assert [s.name for s in report.swapped] == ["a", "b.0", "c"]
    assert model["a"] is model["b"][0]
    assert type(model["a"]) is hk.nn.HetConv2d
    assert model["c"] is not model["a"]
    before, after = report.parameters()
    assert before == 2 * (576 + 8)
    assert after == 2 * (192 + 8)


def test_a_shared_block_is_entered_once():
    block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1))
    model = nn.Sequential(block, block)
    report = hk.convert(model, rules.het(p=4))
    model = report.model
    assert [s.name for s in report.swapped] == ["0.0"]
    assert model[0] is model[1]
    assert report.macs((8, 5, 5)) == (2 * 576 * 25, 2 * 192 * 25)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_flags_and_layout_carry_over(training):
    conv = nn.Conv2d(8, 8, 3, dtype=torch.float64).to(memory_format=torch.channels_last)
    conv.weight.requires_grad_(False)
    conv.train(training)
    layer = hk.convert(nn.Sequential(conv), rules.het(p=4)).model[0]
    assert layer.training is training
    assert layer.weight.requires_grad is False
    assert layer.bias.requires_grad is True
    assert layer.weight.dtype == torch.float64
    assert layer.weight.is_contiguous(memory_format=torch.channels_last)
    assert layer(torch.randn(1, 8, 5, 5, dtype=torch.float64)).shape == (1, 8, 3, 3)


def test_networks_on_the_meta_device_convert():
    with torch.device("meta"):
        model = two_convs()
    report = hk.convert(model, rules.het(p=4))
    assert report.model[0].weight.device.type == "meta"
    assert report.macs((8, 6, 6))[1] == 192 * 36 + 64 * 36


def _hook(*args):
    return None


HOOKS = {
    "forward": lambda m: m.register_forward_hook(_hook),
    "forward_pre": lambda m: m.register_forward_pre_hook(_hook),
    "backward": lambda m: m.register_full_backward_hook(_hook),
    "backward_pre": lambda m: m.register_full_backward_pre_hook(_hook),
    "state_dict": lambda m: m.register_state_dict_post_hook(_hook),
    "load_state_dict": lambda m: m.register_load_state_dict_post_hook(_hook),
    "weight": lambda m: m.weight.register_hook(_hook),
    "accumulate": lambda m: m.weight.register_post_accumulate_grad_hook(_hook),
}


@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_are_never_lost(kind):
    model = two_convs()
    conv = model[0]
    HOOKS[kind](conv)
    report = hk.convert(model, rules.het(p=4), inplace=True)
    assert model[0] is conv
    assert not report.swapped
    assert "hooks, which a new" in report.kept[0].reason


def test_tied_weights_stay_tied():
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    model[1].weight = model[0].weight
    report = hk.convert(model, rules.het(p=4))
    model = report.model
    assert [s.name for s in report.swapped] == ["2"]
    assert [k.name for k in report.kept] == ["0", "1"]
    assert "its weight is shared with another module" in report.kept[0].reason
    assert model[1].weight is model[0].weight


def test_keep_stops_at_a_block():
    model = nn.Sequential(nn.Sequential(nn.Conv2d(8, 8, 3)), nn.Conv2d(8, 8, 3))
    het = rules.het(p=4)

    def rule(name, module):
        return rules.Keep("it is the neck") if name == "0" else het(name, module)

    report = hk.convert(model, rule)
    assert [s.name for s in report.swapped] == ["1"]
    assert [tuple(k) for k in report.kept] == [("0", "it is the neck")]


def test_a_rule_may_replace_a_whole_block():
    model = nn.Sequential(nn.Sequential(nn.Conv2d(8, 8, 3)), nn.ReLU()).eval()

    def rule(name, module):
        return nn.Sequential(nn.Identity()) if name == "0" else None

    report = hk.convert(model, rule)
    model = report.model
    assert isinstance(model[0][0], nn.Identity)
    assert not model[0].training
    assert not model[0][0].training
    assert report.parameters() == (584, 0)
    with pytest.raises(ArgumentError, match="one convolution or linear layer for another"):
        report.macs((8, 5, 5))


def test_a_rule_that_fails_leaves_the_network_as_it_was():
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    layers = list(model)
    chosen = {"0": hk.Support.het(8, 8, 3), "1": hk.Support.het(8, 4, 3)}
    with pytest.raises(SupportError):
        hk.convert(model, rules.supports(chosen), inplace=True)
    assert list(model) == layers


def test_names_that_do_not_exist_are_refused_with_a_hint():
    support = hk.Support.het(8, 8, 3)
    rule = rules.first_of(rules.grouped(), rules.supports({"layer1.conv": support}))
    model = nn.ModuleDict({"layer1": nn.ModuleDict({"conv1": nn.Conv2d(8, 8, 3)})})
    with pytest.raises(ArgumentError, match=r"\['layer1.conv'\].*Did you mean 'layer1.conv1'"):
        hk.convert(model, rule)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_bad_arguments_are_refused():
    conv = nn.Conv2d(8, 8, 3)
    with pytest.raises(InputTypeError, match="model: received function"):
        hk.convert(_hook, rules.het())
    with pytest.raises(InputTypeError, match="rule: received str"):
        hk.convert(conv, "het")
    with pytest.raises(InputTypeError, match="Convert before wrapping"):
        hk.convert(nn.DataParallel(conv), rules.het())
    with pytest.raises(InputTypeError, match="Convert before wrapping"):
        hk.convert(torch.jit.script(conv), rules.het())
    with pytest.raises(InputTypeError, match="answer of the rule for '': received int"):
        hk.convert(conv, lambda name, module: 3)


def test_a_module_given_back_unchanged_is_kept():
    model = two_convs()
    report = hk.convert(model, lambda name, m: m if isinstance(m, nn.ReLU) else None)
    assert [tuple(k) for k in report.kept] == [("1", "the rule gave it back unchanged")]


def test_there_and_back_again():
    model = two_convs()
    expected = masked(model, hk.convert(model, rules.het(p=4)))
    report = hk.convert(hk.convert(model, rules.het(p=4)).model, rules.dense())
    model = report.model
    assert type(model[0]) is nn.Conv2d
    assert report.parameters() == (200 + 72, 584 + 72)
    x = torch.randn(1, 8, 6, 6)
    torch.testing.assert_close(model(x), expected(x))


def test_conversion_trains_and_saves():
    model = hk.convert(two_convs(), rules.het(p=4)).model
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(2, 8, 6, 6)
    before = model(x).square().mean()
    before.backward()
    optimiser.step()
    assert model(x).square().mean() < before
    again = hk.convert(two_convs(), rules.het(p=4)).model
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again(x), model(x))


def test_counts_and_table():
    torch.manual_seed(0)
    dense = models.resnet20()
    macs = stats.macs(dense, (3, 32, 32), bias=True)
    report = hk.convert(dense, rules.het(p=4))
    assert report.macs((3, 32, 32), bias=True)[0] == macs
    assert report.macs((3, 32, 32), fc=False)[0] == 40_551_040 - 640
    before, after = report.parameters()
    assert before == 269_722
    text = str(report)
    assert text.startswith(f"18 swapped, 1 kept; live parameters 269,722 -> {after:,}")
    assert "layer1.0.conv1  Conv2d  HetConv2d" in text
    assert "it is a stem: it reads an image of 3 channels" in text
