# SPDX-License-Identifier: Apache-2.0
"""Factories of a user: ``module:function`` on the command line, as uvicorn and timm take them.

``timm:NAME`` and ``torchvision:NAME`` are networks of these packages, with random weights.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from .errors import ArgumentError, HetconvError, mismatch


def is_factory(text: str) -> bool:
    """Tells ``module:function`` from a name or a path."""
    module, colon, function = text.partition(":")
    return bool(colon) and os.sep not in module and not function.startswith(os.sep)


def call_factory(text: str, option: str) -> Any:
    """Imports ``module:function``, looked for in the current folder too, and calls the function.

    Args:
        text: such as ``mynets:resnet``, ``package.module:make`` or ``timm:resnet18``.
        option: what names it in an error.

    Returns:
        What the function returned.

    Raises:
        ArgumentError: it is not of this form, or there is no such function.
        HetconvError: the user's code raised something; the sentence says what and where.
    """
    name, _, attribute = text.partition(":")
    if name in _ZOOS:
        return _of_a_zoo(name, attribute, option)
    words = [*name.split("."), *attribute.split(".")]
    if name.endswith(".py") or not all(word.isidentifier() for word in words):
        hint = f"Write {name.removesuffix('.py')}:{attribute}." if name.endswith(".py") else ""
        raise ArgumentError(
            mismatch(option, repr(text), "module:function, such as mynets:resnet", hint)
        )
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            raise ArgumentError(
                mismatch(option, f"the module {name!r}, which is not there",
                         f"one in {here} or installed")
            ) from error  # fmt: skip
        raise _raised(option, f"importing {name!r}", error) from error
    except Exception as error:  # their code may raise anything
        raise _raised(option, f"importing {name!r}", error) from error
    for word in attribute.split("."):
        try:
            found = getattr(found, word)
        except AttributeError as error:
            raise ArgumentError(
                mismatch(option, f"{attribute!r}, which {name!r} has not", "a function of it")
            ) from error
    if not callable(found):
        raise ArgumentError(mismatch(option, f"{text}, a {type(found).__name__}", "a function"))
    try:
        return found()
    except HetconvError:
        raise
    except Exception as error:  # their code may raise anything
        raise _raised(option, f"{text}()", error) from error


# Packages of networks: the module that lists them, and how it makes one without pretrained weights.
_ZOOS: dict[str, tuple[str, Callable[[Any, str], Any]]] = {
    "timm": ("timm", lambda zoo, name: zoo.create_model(name, pretrained=False)),
    "torchvision": (
        "torchvision.models",
        lambda zoo, name: zoo.get_model(name, weights=None, **_no_backbone(zoo, name)),
    ),
}


def _of_a_zoo(package: str, name: str, option: str) -> Any:
    """Makes a network of timm or torchvision by its name there."""
    module, make = _ZOOS[package]
    try:
        zoo = importlib.import_module(module)
    except ImportError as error:
        raise HetconvError(
            f"{option}: {package}:{name} needs {package}: pip install {package}"
        ) from error
    except RuntimeError as error:  # torchvision, where it is built for another torch
        raise _raised(option, f"importing {package!r}", error) from error
    names = zoo.list_models()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3)
        raise ArgumentError(
            mismatch(option, f"{name!r}, which {package} has not",
                     f"one of its {len(names)} networks",
                     f"Did you mean {', '.join(near)}?" if near else "")
        )  # fmt: skip
    try:
        return make(zoo, name)
    except Exception as error:  # their code may raise anything
        raise _raised(option, f"{package}:{name}", error) from error


def _no_backbone(zoo: Any, name: str) -> dict[str, None]:
    """Keeps detectors and segmenters from loading weights for what they are built on."""
    parameters = inspect.signature(zoo.get_model_builder(name)).parameters
    return {"weights_backbone": None} if "weights_backbone" in parameters else {}


def _raised(option: str, what: str, error: Exception) -> HetconvError:
    """Says in one sentence what a user's code raised, and at which line."""
    own = [f for f in traceback.extract_tb(error.__traceback__) if "importlib" not in f.filename]
    place = f" at {os.path.basename(own[-1].filename)}:{own[-1].lineno}" if own[1:] else ""
    said = (str(error).splitlines() or [""])[0]
    return HetconvError(f"{option}: {what} raised {type(error).__name__}{place}: {said}")
