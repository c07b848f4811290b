# SPDX-License-Identifier: Apache-2.0
"""The public face: small, with a page, and each module behind it says what is meant for users."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
from collections.abc import Iterator

from pages import PAGES, blocks
from tree import modules, read

import hetconv_kernels as hk


def names_of_users() -> Iterator[tuple[str, str]]:
    """Lists what users import: the module, and the name in it."""
    texts = [(read("hetconv_kernels/__init__.py"), "hetconv_kernels")]
    texts += [(b.text, "") for page in PAGES for b in blocks(page) if b.language == "python"]
    for text, package in texts:
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.ImportFrom) or (node.level and not package):
                continue
            name = "." * node.level + (node.module or "")
            home = importlib.util.resolve_name(name, package) if node.level else name
            public = [a.name for a in node.names if not package or a.name in hk.__all__]
            public = [each for each in public if not each.startswith("_")]
            if home.partition(".")[0] == "hetconv_kernels":
                yield from ((home, each) for each in public)
    for path in re.findall(r"^::: (\S+)$", read("docs/api.md"), re.M):
        home, _, name = path.rpartition(".")
        yield home, name


def test_every_name_in_all_exists() -> None:
    missing = [
        f"{module_name}.{name}"
        for module_name in ["hetconv_kernels", *modules()]
        for name in getattr(importlib.import_module(module_name), "__all__", [])
        if not hasattr(importlib.import_module(module_name), name)
    ]
    assert not missing, "\n".join(missing)


def test_what_users_import_from_and_nothing_else_says_what_is_public() -> None:
    """Such are the modules behind `hk`, and those that the pages list or import from."""
    wanted: dict[str, set[str]] = {}
    for home, name in names_of_users():
        value = getattr(importlib.import_module(home), name, None)
        if inspect.ismodule(value):
            wanted.setdefault(value.__name__, set())
        else:
            wanted.setdefault(home, set()).add(name)
    assert wanted.pop("hetconv_kernels", set()) <= {*hk.__all__, "__version__"}
    public = {
        name: set(found)
        for name in modules()
        if (found := getattr(importlib.import_module(name), "__all__", None)) is not None
    }
    assert len(wanted) > 30
    assert set(public) == set(wanted), "only what users import from has an `__all__`"
    lacking = {home: names - public[home] for home, names in wanted.items() if names - public[home]}
    assert lacking == {}


def test_the_face_of_the_package_is_small_and_nothing_else_shows() -> None:
    assert 24 <= len(hk.__all__) <= 28
    assert sorted(hk.__all__) == sorted(set(hk.__all__))
    assert set(dir(hk)) == {*hk.__all__, "__version__"}


def test_what_pages_call_hk_s_is_public() -> None:
    named = {name for page in PAGES for name in re.findall(r"\bhk\.(\w+)", page.read_text())}
    assert len(named) > 10
    assert named <= {*hk.__all__, "__version__"}


def test_the_page_of_the_api_lists_the_whole_face_by_public_names() -> None:
    """A module stands there by the names in its `__all__`, or whole."""
    page = read("docs/api.md")
    listed = re.findall(r"^::: (\S+)$", page, re.M)
    assert len(listed) == len(set(listed)) > 50
    found = []
    for path in listed:
        home, _, name = path.rpartition(".")
        value = getattr(importlib.import_module(home), name)
        assert inspect.ismodule(value) or name in importlib.import_module(home).__all__, path
        found.append(value)
    table = page[: page.index("## Support")]
    rows = "".join(row for row in table.splitlines() if row.startswith("|"))
    shown = set(re.findall(r"`(\w+)`", rows))
    assert shown == set(hk.__all__)
    for name in hk.__all__:
        value = getattr(hk, name)
        if inspect.ismodule(value):
            public = [getattr(value, each) for each in value.__all__]
            assert any(value is each or each in public for each in found), name
        else:
            assert any(value is each for each in found), name
