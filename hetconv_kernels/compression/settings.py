# SPDX-License-Identifier: Apache-2.0
"""The settings of a method, as its docstring describes them."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import textwrap
from typing import Any

from .method import Method


def settings(kind: type[Method]) -> dict[str, dict[str, Any]]:
    """Names a method's settings, each with its default and what it is."""
    text = inspect.cleandoc(kind.__doc__ or "").partition("Attributes:")[2]
    described = _described(text)
    return {
        field.name: {
            "default": field.default,
            "about": _plain(described.get(field.name, "")).rstrip("."),
        }
        for field in dataclasses.fields(kind)
    }


def listed(kind: type[Method]) -> str:
    """Lists a method's settings with their defaults and what they are, in plain text."""
    text = inspect.cleandoc(kind.__doc__ or "").partition("Attributes:")[0]
    lines = [_plain(text).strip(), "", "Settings, for --set NAME=VALUE:"]
    for name, setting in settings(kind).items():
        lines += textwrap.wrap(
            f"{name}={json.dumps(setting['default'])}  {setting['about']}",
            width=100, initial_indent="  ", subsequent_indent="      ",
        )  # fmt: skip
    return "\n".join(lines)


def _described(text: str) -> dict[str, str]:
    """Takes the section of a docstring that describes attributes apart."""
    described: dict[str, str] = {}
    name = ""
    for line in text.partition("\nRaises:")[0].splitlines():
        begins = re.match(r"    (\w+): (.*)", line)
        if begins:
            name, described[name] = begins[1], begins[2]
        elif name and line.strip():
            described[name] += f" {line.strip()}"
    return described


def _plain(text: str) -> str:
    """Takes the marks of documentation out of a text: ``code`` and `name` become what they mark."""
    return re.sub(r"`{1,2}([^`]+)`{1,2}", r"\1", text)
