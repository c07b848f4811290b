# SPDX-License-Identifier: Apache-2.0
"""The templates of the report, by jinja2, which comes with torch; every text is escaped."""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup


def asset(name: str) -> str:
    """Reads a file that stands beside this one."""
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


@cache
def _environment() -> Environment:
    return Environment(
        loader=FunctionLoader(asset),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(name: str, **values: Any) -> Markup:
    """Fills a template; what is missing is an error, and a text that is no markup is escaped."""
    return Markup(_environment().get_template(name).render(**values))
