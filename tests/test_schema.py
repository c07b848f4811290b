# SPDX-License-Identifier: Apache-2.0
"""The schemas of results: real JSON Schema, which every committed file fits, checked by jsonschema.

Our own few lines of check, which need no library, must say the same as the library.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.report.schema import METHODS_SCHEMA, METHODS_TABLE_SCHEMA, SCHEMA, problems

jsonschema = pytest.importorskip("jsonschema", reason="the dev extra is not installed")
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SCHEMAS = {"results": SCHEMA, "methods-part": METHODS_SCHEMA, "methods": METHODS_TABLE_SCHEMA}
FILES = {
    **{path.name: (path, "results") for path in sorted((BENCHMARKS / "results").glob("*.json"))},
    **{path.name: (path, "methods-part") for path in sorted(BENCHMARKS.glob("methods-*.json"))},
    "methods.json": (BENCHMARKS / "methods.json", "methods"),
}


def faults(value: Any, schema: Any) -> list[str]:
    """What the library says."""
    validator = jsonschema.Draft202012Validator(schema)
    return [error.message for error in validator.iter_errors(value)]


@pytest.mark.parametrize("name", SCHEMAS)
def test_it_is_a_json_schema_without_a_word_that_would_be_ignored(name: str) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMAS[name])
    known = {"$schema", "type", "enum", "required", "properties", "additionalProperties", "items",
             "anyOf"}  # fmt: skip

    def words(schema: Any) -> Iterator[str]:
        yield from schema
        inner = [schema[key] for key in ("items", "additionalProperties") if key in schema]
        for each in (*inner, *schema.get("anyOf", ()), *schema.get("properties", {}).values()):
            yield from words(each)

    assert set(words(SCHEMAS[name])) <= known


@pytest.mark.parametrize("name", FILES)
def test_every_committed_file_fits(name: str) -> None:
    path, schema = FILES[name]
    data = json.loads(path.read_text())
    assert faults(data, SCHEMAS[schema]) == []
    assert problems(data, SCHEMAS[schema]) == []


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yields the way to everything in a document."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        yield (*path, key)
        if isinstance(item, dict | list):
            yield from places(item, (*path, key))


def short(value: Any) -> Any:
    """Keeps the first three of every list."""
    if isinstance(value, dict):
        return {key: short(item) for key, item in value.items()}
    return [short(item) for item in value[:3]] if isinstance(value, list) else value


@pytest.mark.parametrize("name", FILES)
def test_damage_is_found_by_the_library_and_by_us_or_by_neither(name: str) -> None:
    path, schema = FILES[name]
    data = short(json.loads(path.read_text()))
    draw = random.Random(name)
    ways = sorted(places(data), key=repr)
    found = 0
    for _ in range(100):
        damaged, way = copy.deepcopy(data), draw.choice(ways)
        inner = damaged
        for key in way[:-1]:
            inner = inner[key]
        if isinstance(inner, dict) and draw.random() < 0.3:
            del inner[way[-1]]
        else:
            inner[way[-1]] = draw.choice([None, True, "text", 1.5, -1, [], {}])
        theirs, ours = faults(damaged, SCHEMAS[schema]), problems(damaged, SCHEMAS[schema])
        assert bool(theirs) == bool(ours), (way, theirs, ours)
        found += bool(ours)
    assert found > 3
