# SPDX-License-Identifier: Apache-2.0
"""Rules about modules: who imports whom, floor by floor, and that a name has one meaning."""

from __future__ import annotations

import ast
import importlib.util
import runpy

import pytest
from tree import ROOT, modules

BENCHMARKS = tuple(
    sorted(
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in (ROOT / "benchmarks").rglob("*.py")
        if path.stem != "__main__"
    )
)
# Names that several modules define because they mean the same there.
ALIKE = {
    "main": "what `python -m` runs",
    "run": "the face of a command: what it does",
    "add_arguments": "the face of a command: its options",
    "convert": "of `hk` and of `hk.quantization`: modules become others",
    "self_group": "the method of one layer, and the rule that is named after it",
    "to_onnx": "of `hk.export`, which calls that of `hk.quantization` for networks in 8 bits",
}
# Modules without Python in them, which import nothing.
COMPILED = {"_cpu", "_cuda"}
# The two engines that `quantization.engine` chooses from; a caller does not know which it has.
ENGINES_IN_8_BITS = {
    "hetconv_kernels.backends.cpu_int8",
    "hetconv_kernels.quantization.reference",
}


def test_no_module_imports_itself_by_way_of_others() -> None:
    """Not at import, and not when a function is called either; imports for types alone are none."""
    names = {"hetconv_kernels", *modules(), *BENCHMARKS}
    for deep in (False, True):
        arrows = {name: imports_of(name, names, deep) for name in names}
        assert sum(map(len, arrows.values())) > 2 * len(names)
        while free := {name for name, wanted in arrows.items() if not wanted & set(arrows)}:
            arrows = {name: wanted for name, wanted in arrows.items() if name not in free}
        assert arrows == {}, "these import one another"


def test_a_module_imports_from_its_floor_and_from_those_below() -> None:
    """In functions too. The picture in docs/design.md has the floors; every module is on one."""
    house = runpy.run_path(str(ROOT / "docs" / "rooms.py"))
    floors = {name: house["room_of"](name.partition(".")[2]) for name in modules()}
    assert set(floors.values()) == set(range(len(house["ROOMS"])))
    known = {name.partition(".")[2] for name in floors}
    for room in house["ROOMS"]:
        gone = [name for name in room.modules if name not in known and name != "__main__"]
        assert gone == [], room.title
    upwards = [
        f"{name} imports {other}"
        for name in floors
        for other in imports_of(name, set(floors), deep=True)
        if floors[other] < floors[name]
    ]
    assert upwards == []


@pytest.mark.parametrize(
    ("room", "never"),
    [
        ("hetconv_kernels.backends.cuda", "hetconv_kernels.backends.triton"),
        ("hetconv_kernels.backends.triton", "hetconv_kernels.backends.cuda"),
        ("hetconv_kernels.backends.gpu", "hetconv_kernels.backends.cuda"),
        ("hetconv_kernels.backends.gpu", "hetconv_kernels.backends.triton"),
        ("hetconv_kernels", "benchmarks"),
    ],
)
def test_a_room_does_not_import_another(room: str, never: str) -> None:
    names = {"hetconv_kernels", *modules(), *BENCHMARKS}
    inside = [name for name in names if f"{name}.".startswith(f"{room}.")]
    hits = [
        f"{name} imports {found}"
        for name in inside
        for found in imports_of(name, names, deep=True)
        if f"{found}.".startswith(f"{never}.")
    ]
    assert inside
    assert not hits, "\n".join(hits)


def imports_of(name: str, names: set[str], deep: bool) -> set[str]:
    """Lists what a module imports of `names`; the folders that it is in where it names them.

    Args:
        name: of the module.
        names: that are looked for.
        deep: whether in functions too, which import when they are called.
    """
    base = ROOT / name.replace(".", "/")
    path = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
    package = name if base.is_dir() else name.rpartition(".")[0]
    found: set[str] = set()
    tops = [top for top in ast.parse(path.read_text()).body if not _for_types(top)]
    for node in [inner for top in tops for inner in ast.walk(top)] if deep else tops:
        if isinstance(node, ast.Import):
            wanted = {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base_name = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            inner = {alias.name: f"{base_name}.{alias.name}" for alias in node.names}
            wanted = {
                full if full in names else base_name
                for alias, full in inner.items()
                if alias not in COMPILED
            }
        else:
            continue
        found |= wanted & names
    return found - {name}


def _for_types(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def test_a_public_name_has_one_meaning() -> None:
    """No name without an underscore stands at the top of two modules, but for those of ALIKE."""
    where: dict[str, set[str]] = {}
    for name in {"hetconv_kernels", *modules(), *BENCHMARKS}:
        base = ROOT / name.replace(".", "/")
        path = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
        for node in ast.parse(path.read_text()).body:
            for defined in _defined(node):
                where.setdefault(defined, set()).add(name)
    twice = {
        defined: sorted(places)
        for defined, places in where.items()
        if len(places) > 1 and not defined.startswith(("_", "pytest_"))
    }
    homonyms = {
        defined: places
        for defined, places in twice.items()
        if not (set(places) <= ENGINES_IN_8_BITS or defined in ALIKE)
    }
    assert homonyms == {}, "give each meaning a name of its own, or the reason in ALIKE"
    assert set(ALIKE) <= set(twice), "ALIKE names what stands in one module only"


def _defined(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else []
    targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
    parts = [part for target in targets for part in ast.walk(target)]  # of `A, B = 1, 2` too
    names = [part for part in parts if isinstance(part, ast.Name)]
    return [name.id for name in names if isinstance(name.ctx, ast.Store)]
