# SPDX-License-Identifier: Apache-2.0
"""hub: networks go to a folder in the Hub's layout and come back equal bit for bit; no network."""

# Annotations are real here: huggingface_hub reads those of a constructor.
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fresh
import pytest
import torch
from networks import interleaved, network
from torch import nn

import hetconv_kernels as hk
from hetconv_kernels import hub
from hetconv_kernels.errors import ArgumentError, FileError, HetconvError, InputTypeError

pytest.importorskip("safetensors", reason="the safetensors extra is not installed")
pytest.importorskip("huggingface_hub", reason="the hub extra is not installed")


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever asks the Hub is told at once that there is none, and its cache is empty."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


def as_it_is(model: nn.Module, x: torch.Tensor) -> nn.Module:
    return model


FORMS: dict[str, Callable[[nn.Module, torch.Tensor], nn.Module]] = {
    "dense": as_it_is,
    "converted": lambda model, x: hk.convert(model, hk.rules.het(p=4)).model,
    "compacted": lambda model, x: hk.compact(interleaved(model), x).model,
    "optimized": lambda model, x: hk.optimize(interleaved(model), x).model,
    "bfloat16": lambda model, x: hk.optimize(model, x, dtype=torch.bfloat16).model,
    "int8": lambda model, x: hk.quantize(interleaved(model), [x], measure=False).model,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["resnet20", "branches"])
def test_a_network_comes_back_equal_bit_for_bit(name: str, form: str, tmp_path: Path) -> None:
    model, x = network(name)
    made = FORMS[form](model, x)
    assert hub.save_pretrained(made, tmp_path / "net") == tmp_path / "net"
    again = hub.from_pretrained(tmp_path / "net")
    with torch.no_grad():
        assert torch.equal(again(x), made(x))
    assert not again.training


def test_the_folder_is_the_hubs_and_says_what_the_layers_are(tmp_path: Path) -> None:
    model, _ = network("resnet20")
    made = hk.convert(model, hk.rules.het(p=4)).model
    hub.save_pretrained(made, tmp_path, {"task": "images", "classes": 10}, repo_id="me/net")
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json", "model.safetensors", "README.md",
    }  # fmt: skip
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["task"], config["classes"]) == ("images", 10)
    ours = config["hetconv_kernels"]
    assert ours["version"] == hk.__version__
    assert ours["live_parameters"] == hk.stats.live_parameters(made)
    layers = {n for n, m in made.named_modules() if isinstance(m, hk.nn.HetConv2d)}
    assert {n for n, d in ours["layers"].items() if d["class"] == "HetConv2d"} == layers
    assert all("p=4" in ours["layers"][n]["settings"] for n in layers)
    card = (tmp_path / "README.md").read_text()
    assert "library_name: hetconv_kernels" in card
    assert 'hub.from_pretrained("me/net")' in card


def test_a_card_of_the_users_stays_and_weights_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    for name in ("resnet20", "branches"):
        model, x = network(name)
        hub.save_pretrained(model, tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    with torch.no_grad():
        assert torch.equal(hub.from_pretrained(tmp_path)(x), model(x))


class Net(nn.Module, hub.HubMixin):
    def __init__(self, width: int = 8, classes: int = 3, **more: Any) -> None:
        super().__init__()
        self.given, self.width = more, width
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.second = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.head = nn.Linear(2 * width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.first(x).relu()).relu().mean((2, 3)))


@dataclasses.dataclass
class Config:
    width: int = 8
    depth: int = 2


class Configured(nn.Module, hub.HubMixin):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.Sequential(
            *(nn.Conv2d(config.width, config.width, 3, padding=1) for _ in range(config.depth))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def test_a_class_with_the_mixin_gets_its_object_back_with_the_layers_it_had(tmp_path: Path) -> None:
    x = torch.rand(2, 3, 8, 8)
    net = hk.convert(Net(16, classes=5), hk.rules.het(p=4)).model.eval()
    assert isinstance(net, Net)
    net.save_pretrained(tmp_path)
    again = Net.from_pretrained(tmp_path)
    assert type(again) is Net
    assert again.width == 16
    assert again.given == {}, "what this package adds to config.json is no argument"
    assert isinstance(again.second, hk.nn.HetConv2d)
    with torch.no_grad():
        assert torch.equal(again(x), net(x))
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["width"], config["classes"]) == (16, 5)
    assert config["hetconv_kernels"]["layers"]["second"]["class"] == "HetConv2d"
    again.save_pretrained(tmp_path / "twice")
    assert json.loads((tmp_path / "twice" / "config.json").read_text()) == config


def test_compacted_widths_come_back_in_the_class(tmp_path: Path) -> None:
    net, x = Net(16).eval(), torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        net.first.weight[::2] = 0
        net.first.bias[::2] = 0
    small = hk.compact(net, x).model
    hub.save_pretrained(small, tmp_path)
    again = hub.from_pretrained(tmp_path, into=Net(16))
    assert type(again) is Net
    assert again.first.out_channels == 8
    with torch.no_grad():
        assert torch.equal(again(x), small(x))


def test_a_config_that_is_a_dataclass_comes_back_as_one(tmp_path: Path) -> None:
    x = torch.rand(1, 12, 5, 5)
    net = hk.convert(Configured(Config(12, 3)), hk.rules.het(p=3)).model.eval()
    net.save_pretrained(tmp_path)
    again = Configured.from_pretrained(tmp_path)
    assert again.config == Config(12, 3)
    with torch.no_grad():
        assert torch.equal(again(x), net(x))


def test_other_programs_read_the_weights(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    net = Net()
    net.save_pretrained(tmp_path)
    found = load_file(tmp_path / "model.safetensors")
    assert {name: tuple(t.shape) for name, t in found.items()} == {
        name: tuple(t.shape) for name, t in net.state_dict().items()
    }


def test_uploading_sends_the_folder_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import HfApi, RepoUrl

    sent: dict[str, Any] = {}

    def upload(self: Any, **said: Any) -> str:
        sent.update(said, files=sorted(p.name for p in Path(said["folder_path"]).iterdir()))
        return "a commit"

    monkeypatch.setattr(HfApi, "upload_folder", upload)
    monkeypatch.setattr(
        HfApi,
        "create_repo",
        lambda self, repo_id, **_: RepoUrl(f"https://huggingface.co/{repo_id}"),
    )
    hub.save_pretrained(Net(), tmp_path, repo_id="me/net", push_to_hub=True, private=True)
    assert sent["repo_id"] == "me/net"
    assert sent["files"] == ["README.md", "config.json", "model.safetensors"]


@pytest.mark.parametrize("name", ["no-such-folder", "some/network", "not a name at all"])
def test_what_is_not_there_is_an_error_with_a_way_out(name: str) -> None:
    with pytest.raises(FileError, match=r"Expected a folder that hub\.save_pretrained wrote"):
        hub.from_pretrained(name)


def test_a_folder_of_another_network_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"no model\.safetensors in it"):
        hub.from_pretrained(tmp_path)
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(FileError, match="another program wrote it"):
        hub.from_pretrained(tmp_path)
    with pytest.raises(FileError, match="another program wrote it"):
        Net.from_pretrained(tmp_path)


@pytest.mark.parametrize("config", [{"x": torch.zeros(1)}, "text", {1: {2}}])
def test_a_config_that_json_cannot_hold_is_refused_before_anything_is_written(
    config: Any, tmp_path: Path
) -> None:
    with pytest.raises(ArgumentError, match="config: received"):
        hub.save_pretrained(Net(), tmp_path / "net", config)
    assert not (tmp_path / "net").exists()


def test_what_is_no_network_and_a_folder_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(InputTypeError, match="model: received Tensor"):
        hub.save_pretrained(torch.zeros(2), tmp_path)  # type: ignore[arg-type]
    (tmp_path / "file").write_text("")
    with pytest.raises(HetconvError, match="cannot be written"):
        hub.save_pretrained(Net(), tmp_path / "file")


def test_without_the_library_a_sentence_says_how_to_get_it() -> None:
    code = (
        "import sys; sys.modules['huggingface_hub'] = None\n"
        "import hetconv_kernels.hub as hub\n"
        "try: hub.HubMixin\n"
        "except hub.HetconvError as error: print(error)"
    )
    done = fresh.python(code)
    assert done.returncode == 0, done.stderr
    assert "pip install 'hetconv-kernels[hub]'" in done.stdout
