# SPDX-License-Identifier: Apache-2.0
"""Networks in the layout of the Hugging Face Hub: a folder with config.json and model.safetensors.

    class Net(nn.Module, hub.HubMixin):  # save_pretrained, from_pretrained and push_to_hub
        ...

    hub.save_pretrained(fast, "folder")  # any network: converted, optimised, quantised
    fast = hub.from_pretrained("folder")  # or "owner/name" of the Hub

The weights are a file of `hetconv_kernels.io`, so that a network comes back with its Supports, its
fused and its quantised layers, equal bit for bit, and without the class that it once had.
Needs the ``hub`` extra.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from . import io
from ._version import __version__
from .errors import ArgumentError, FileError, HetconvError, mismatch
from .graph.narrow import Narrow
from .graph.trace import check_plain
from .measure import stats
from .nn import FrequencyConv2d
from .nn.base import ForcedBackend

if TYPE_CHECKING:
    # At run time the library is imported when the class is asked for: see __getattr__.
    from huggingface_hub import ModelHubMixin as HubMixin

__all__ = ["HubMixin", "from_pretrained", "save_pretrained"]

CONFIG, WEIGHTS = "config.json", "model.safetensors"
# What this package adds to config.json, under its own name.
KEY = "hetconv_kernels"
_TAGS = ["hetconv_kernels", "structured-sparsity"]
_CARD = """---
{{ card_data }}
---

A network with structured-sparse convolutions, saved by hetconv_kernels. `config.json` lists its
layers. It is loaded without the code of its class:

```python
from hetconv_kernels import hub

model = hub.from_pretrained("{{ repo_id | default('a folder, or owner/name', true) }}")
```
"""
_made: dict[str, Any] = {}


def save_pretrained(
    model: nn.Module,
    folder: str | os.PathLike[str],
    config: dict[str, Any] | None = None,
    *,
    repo_id: str | None = None,
    push_to_hub: bool = False,
    **upload: Any,
) -> Path:
    """Writes any network to a folder that the Hub understands.

    The folder holds ``model.safetensors`` (see `io.save`), ``config.json``, which says in plain
    words what every layer is, and a model card, unless one is there.

    Args:
        model: the network, also a converted, compressed, optimised or quantised one.
        folder: is made if it is not there; what it holds under these names is replaced.
        config: more for config.json: plain data.
        repo_id: ``owner/name`` of the Hub, for ``push_to_hub`` and the card.
        push_to_hub: whether to upload the folder too.
        upload: for `huggingface_hub.ModelHubMixin.push_to_hub`, such as ``private=True``.

    Returns:
        The folder.

    Raises:
        InputTypeError, ArgumentError: as `io.save`; or ``config`` is no plain data.
        HetconvError: huggingface_hub or safetensors is not installed, or the folder cannot be
            written.
    """
    check_plain(model)
    _check_config(config)
    holder = _class("_Holder")(model)
    folder = Path(folder)
    try:
        holder.save_pretrained(
            folder,
            config=config,
            repo_id=repo_id,
            push_to_hub=push_to_hub,
            model_card_kwargs={"repo_id": repo_id},
            **upload,
        )
    except OSError as error:
        raise HetconvError(f"{folder} cannot be written: {error.strerror or error}") from error
    return folder


def from_pretrained(
    name: str | os.PathLike[str],
    into: nn.Module | None = None,
    *,
    device: torch.device | str = "cpu",
    **download: Any,
) -> nn.Module:
    """Reads a network from a folder or from the Hub, in evaluation mode as the Hub has it.

    Args:
        name: a folder that `save_pretrained` wrote, or ``owner/name`` of the Hub.
        into: see `io.load`.
        device: where the weights go.
        download: for `huggingface_hub.hf_hub_download`, such as ``revision="v1"``.

    Raises:
        FileError: there is no such network, or its file is none of ours; `io.load` lists more.
        ArgumentError: ``into`` does not fit, or there is no such device.
        HetconvError: huggingface_hub or safetensors is not installed.
    """
    return io.load(_weights(os.fspath(name), download), into, device).eval()


def _described(model: nn.Module) -> dict[str, Any]:
    """Describes a network in plain words, as config.json has it: classes, sizes and Supports."""
    layers: dict[str, dict[str, str]] = {}
    for name, module in (model.body if isinstance(model, Narrow) else model).named_modules():
        part = any(name.startswith(f"{whole}.") for whole in layers)
        if isinstance(module, ForcedBackend | FrequencyConv2d) and not part:
            layers[name] = {"class": type(module).__name__, "settings": module.extra_repr()}
    return {
        "version": __version__,
        "class": type(model).__qualname__,
        "live_parameters": stats.live_parameters(model),
        "weight_bytes": stats.weight_bytes(model),
        "layers": layers,
    }


def __getattr__(name: str) -> Any:
    if name != "HubMixin":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _class(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _class(name: str) -> Any:
    """Makes the classes that stand on huggingface_hub's, once."""
    if not _made:
        _made.update(_make(_library()))
    return _made[name]


def _library() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise HetconvError(
            "the Hub's layout needs huggingface_hub: pip install 'hetconv-kernels[hub]'"
        ) from error
    return huggingface_hub


def _make(library: Any) -> dict[str, Any]:
    about = {"library_name": KEY, "tags": _TAGS, "model_card_template": _CARD}

    class HubMixin(library.ModelHubMixin, **about):
        """Gives a network's class ``save_pretrained``, ``from_pretrained`` and ``push_to_hub``.

        As huggingface_hub's ``PyTorchModelHubMixin``: the constructor's arguments go to
        config.json. But the layers may be others than the constructor makes: converted, compacted
        and pruned ones come back as they were, in an object of the class.
        """

        def save_pretrained(self, save_directory: Any, *, config: Any = None, **more: Any) -> Any:
            given = self._hub_mixin_config if config is None else config
            if dataclasses.is_dataclass(given) and not isinstance(given, type):
                given = dataclasses.asdict(given)
            whole = {**(given or {}), KEY: _described(_inside(self))}
            return super().save_pretrained(save_directory, config=whole, **more)

        def _save_pretrained(self, save_directory: Path) -> None:
            io.save(_inside(self), save_directory / WEIGHTS)

        @classmethod
        def _from_pretrained(
            cls, *, model_id: str, device: Any = "cpu", hetconv_kernels: Any = None, **rest: Any
        ) -> Any:
            download = {key: rest.pop(key) for key in _DOWNLOAD if key in rest}
            if isinstance(rest.get("config"), dict):
                rest["config"] = {k: v for k, v in rest["config"].items() if k != KEY}
            return io.load(_weights(model_id, download), into=cls(**rest), device=device).eval()

    class _Holder(HubMixin):
        """Any network, while it is saved."""

        def __init__(self, network: nn.Module) -> None:
            self.network = network

    return {"HubMixin": HubMixin, "_Holder": _Holder}


_DOWNLOAD = ("revision", "cache_dir", "force_download", "local_files_only", "token")


def _inside(model: Any) -> nn.Module:
    """Returns the network that is to be saved: the object itself, or what a holder holds."""
    return model if isinstance(model, nn.Module) else model.network


def _check_config(config: Any) -> None:
    """Refuses what config.json cannot hold, before anything is written."""
    try:
        if not isinstance(config, dict | None):
            raise TypeError(f"a {type(config).__name__}")
        json.dumps(config)
    except (TypeError, ValueError) as error:
        raise ArgumentError(mismatch("config", error, "a dict of plain data for JSON")) from error


def _weights(name: str, download: dict[str, Any]) -> Path:
    """Finds the file with the weights, in a folder or on the Hub."""
    folder = Path(name)
    if folder.is_dir():
        path = folder / WEIGHTS
        if not path.is_file():
            raise FileError(
                mismatch(f"folder {folder.name}", f"no {WEIGHTS} in it",
                         "what hub.save_pretrained wrote")
            )  # fmt: skip
        return path
    library = _library()
    try:
        return Path(library.hf_hub_download(name, WEIGHTS, **download))
    except (OSError, ValueError, library.errors.HfHubHTTPError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise FileError(
            f"{name} is no folder here, and the Hub does not give it: {said} Expected a folder "
            "that hub.save_pretrained wrote, or owner/name of one on the Hub."
        ) from error
