# SPDX-License-Identifier: Apache-2.0
"""The JSON Schema of a results file of the benchmarks, and the check of a value against it."""

from __future__ import annotations

from typing import Any

from hetconv_kernels.files import Json

SCHEMA_VERSION = 1

_NUMBER = {"type": "number"}
_MAYBE_NUMBER = {"anyOf": [_NUMBER, {"type": "null"}]}
_STRING = {"type": "string"}
_ESTIMATE = {
    "type": "object",
    "required": ["name", "median_s", "ratio", "low", "high", "confidence"],
    "properties": {
        "name": _STRING,
        "median_s": _NUMBER,
        "ratio": _NUMBER,
        "low": _NUMBER,
        "high": _NUMBER,
        "confidence": _NUMBER,
    },
}
_MAYBE_ESTIMATE = {"anyOf": [_ESTIMATE, {"type": "null"}]}
_MATCH = {
    "type": "object",
    "required": ["ok", "worst", "max_error"],
    "properties": {"ok": {"type": "boolean"}, "worst": _MAYBE_NUMBER, "max_error": _MAYBE_NUMBER},
}
_VARIANT = {
    "type": "object",
    "required": ["median_s", "p20_s", "p80_s", "n", "iterations", "samples_s"],
    "properties": {"samples_s": {"type": "array", "items": _NUMBER}, "n": {"type": "integer"}},
}
# What disturbed the measurement; absent where nothing did.
_REASONS = {"type": "array", "items": _STRING}
_TIMINGS = {
    "type": "object",
    "required": ["baseline", "device", "cold", "graph", "clock_resolution_s", "variants"],
    "properties": {"variants": {"type": "object", "additionalProperties": _VARIANT}},
}
LAYER_ROW = {
    "type": "object",
    "required": ["kind", "case", "backend", "support", "macs", "dense_macs", "bytes", "match"],
    "properties": {
        "kind": {"enum": ["layer"]},
        "case": {
            "type": "object",
            "required": ["name", "n", "c", "f", "h", "w", "k", "dtype", "expected", "issue"],
            "properties": {
                **dict.fromkeys(("name", "dtype", "expected"), _STRING),
                **{key: {"type": "integer"} for key in ("n", "c", "f", "h", "w", "k", "stride")},
                "target": _MAYBE_NUMBER,
                "issue": {"anyOf": [_STRING, {"type": "null"}]},
                "support": {
                    "type": "object",
                    "required": ["kind"],
                    "properties": {"kind": _STRING},
                },
            },
        },
        "backend": {
            "type": "object",
            "required": ["asked", "ran"],
            "properties": {"asked": _STRING, "ran": _STRING},
        },
        "support": {
            "type": "object",
            "required": ["kind", "digest", "groups", "live", "density"],
            "properties": {"digest": _STRING, "live": {"type": "integer"}},
        },
        "macs": {"type": "integer"},
        "dense_macs": {"type": "integer"},
        "bytes": {"type": "integer"},
        "match": _MATCH,
        # All below are absent when the match failed: nothing was timed.
        "median_s": _NUMBER,
        "floor_s": _NUMBER,
        "percent_of_roof": _NUMBER,
        "dense": _ESTIMATE,
        "composition": _MAYBE_ESTIMATE,
        "unfrozen": _MAYBE_ESTIMATE,
        "prepacked": _MAYBE_ESTIMATE,
        # Ours over ours in float32; null or absent where the case is that.
        "float32": _MAYBE_ESTIMATE,
        "verdict": {"enum": ["win", "even", "lose", "disturbed"]},
        "disturbed": _REASONS,
        "timings": _TIMINGS,
    },
}
DISPATCH_ROW = {
    "type": "object",
    "required": ["kind", "name", "backend", "extra_us", "low_us", "high_us", "target_us"],
    "properties": {
        "kind": {"enum": ["dispatch"]},
        "name": _STRING,
        "extra_us": _NUMBER,
        "low_us": _NUMBER,
        "high_us": _NUMBER,
        "target_us": _NUMBER,
        "disturbed": _REASONS,
        "timings": _TIMINGS,
    },
}
MODEL_ROW = {
    "type": "object",
    "required": ["kind", "case", "match", "absent"],
    "properties": {
        "kind": {"enum": ["model"]},
        "case": {
            "type": "object",
            "required": ["name", "network", "support", "n", "size"],
            "properties": {
                "name": _STRING,
                # Absent in files from before low precision was measured: float32.
                "dtype": _STRING,
                "target_dense": _MAYBE_NUMBER,
                "target_composition": _MAYBE_NUMBER,
            },
        },
        "match": _MATCH,
        # Peers that are not here, by the form that they would have run, with the reason.
        "absent": {"type": "object"},
        # All below are absent when the match failed: nothing was timed.
        "median_s": _NUMBER,
        "dense": _ESTIMATE,
        "composition": _ESTIMATE,
        # Ours over ours in float32; null or absent where the case is that.
        "float32": _MAYBE_ESTIMATE,
        # Absent too in other dtypes than float32.
        "bound": {
            "type": "object",
            # Rows of older files have another bound, without "over_best".
            "required": ["our_layers_s", "rest_s", "speedup"],
            "properties": {"speedup": _NUMBER, "over_best": _NUMBER},
        },
        # By name: the time in the eager dense network, if it is there, and in ours.
        "layers": {
            "type": "object",
            "additionalProperties": {"type": "array", "items": _MAYBE_NUMBER},
        },
        "disturbed": _REASONS,
        "timings": {"type": "object", "additionalProperties": _TIMINGS},
    },
}
TRAINING_ROW = {
    "type": "object",
    "required": ["kind", "case", "match"],
    "properties": {
        "kind": {"enum": ["training"]},
        "case": MODEL_ROW["properties"]["case"],  # type: ignore[index]
        "match": _MATCH,
        # All below are absent when the match failed: nothing was timed.
        "median_s": _NUMBER,
        "dense": _ESTIMATE,
        "composition": _ESTIMATE,
        "verdict": {"enum": ["win", "even", "lose", "disturbed"]},
        "disturbed": _REASONS,
        "timings": _TIMINGS,
    },
}
# The steps of an optimised network's program, each in its place.
PROGRAM_ROW = {
    "type": "object",
    "required": [
        "kind", "case", "clock", "rounds", "median_s", "floor_s", "counted_s", "steps", "timings"
    ],
    "properties": {
        "kind": {"enum": ["program"]},
        "case": MODEL_ROW["properties"]["case"],  # type: ignore[index]
        # Of all threads, or of the one that there is.
        "clock": {"enum": ["wall", "thread"]},
        "rounds": {"type": "integer"},
        # Sums over the steps.
        **dict.fromkeys(("median_s", "floor_s", "counted_s"), _NUMBER),
        "timings": _TIMINGS,
        "steps": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["name", "is", "median_s", "macs", "bytes", "floor_s", "counted_s"],
                "properties": {
                    **dict.fromkeys(("name", "is"), _STRING),
                    **dict.fromkeys(("median_s", "floor_s", "counted_s"), _NUMBER),
                    **{key: {"type": "integer"} for key in ("macs", "bytes")},
                },
            },
        },
    },
}  # fmt: skip
PRIMITIVE_ROW = {
    "type": "object",
    "required": ["kind", "case", "verb", "backend", "macs", "dense_macs", "bytes", "match"],
    "properties": {
        "kind": {"enum": ["primitive"]},
        "verb": {"enum": ["fprop", "dgrad", "wgrad", "step"]},
        "match": _MATCH,
        # As in a layer's row, absent when the match failed.
        **{
            name: LAYER_ROW["properties"][name]  # type: ignore[index]
            for name in (
                "case", "backend", "macs", "dense_macs", "bytes", "median_s", "floor_s",
                "percent_of_roof", "verdict", "timings",
            )
        },
        "efficiency": _NUMBER,
        "engines": {"type": "object", "additionalProperties": _NUMBER},
        # Variants that were wrong, failed or hung, with the reason; absent where none was.
        "left_out": {"type": "object", "additionalProperties": _STRING},
        # Times of the others where none of our engines was right.
        "rivals": {"type": "object", "additionalProperties": _NUMBER},
        "dense": _ESTIMATE,
        "composition": _MAYBE_ESTIMATE,
        "compiled": _MAYBE_ESTIMATE,
    },
}  # fmt: skip
SCHEMA = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "required": ["schema", "name", "started", "environment", "roofs", "rows"],
    "properties": {
        "schema": {"enum": [SCHEMA_VERSION]},
        "name": _STRING,
        "started": _STRING,
        # Absent in files that were written before it was kept.
        "command": _STRING,
        "environment": {
            "type": "object",
            "required": ["commit", "processor", "threads", "gpu", "torch", "python", "backends"],
        },
        "roofs": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["macs_per_s", "bytes_per_s", "device", "dtype"],
                "properties": {
                    "macs_per_s": _NUMBER,
                    "bytes_per_s": _NUMBER,
                    "device": _STRING,
                    "dtype": _STRING,
                },
            },
        },
        "rows": {
            "type": "array",
            "items": {
                "anyOf": [
                    LAYER_ROW, DISPATCH_ROW, MODEL_ROW, TRAINING_ROW, PRIMITIVE_ROW, PROGRAM_ROW
                ]
            },
        },
    },
}  # fmt: skip


_PAIR = {"type": "array", "items": _NUMBER}
METHODS_FORMAT = "hetconv_kernels.methods/1"
# One line of a part: what CompressionReport.to_dict gives, and what the part adds to it.
METHOD_ROW = {
    "type": "object",
    "required": ["name", "method", "settings", "live", "macs", "seconds", "speedup", "layers"],
    "properties": {
        "name": _STRING,
        "method": _STRING,
        "settings": {"type": "object"},
        # Each (dense, compressed).
        "live": _PAIR,
        "macs": _PAIR,
        "seconds": _PAIR,
        # The median of the paired ratios, and its interval.
        "speedup": _PAIR,
        # digits and psnr: whether it is the paper's form, (dense, compressed) on unseen data, what
        # may be lost, and whether it was kept with at most half of the MACs.
        "paper": {"type": "boolean"},
        "test_accuracy": _PAIR,
        "test_psnr": _PAIR,
        "tolerance": _NUMBER,
        "macs_saved": _NUMBER,
        "within": {"type": "boolean"},
        # psnr: (dense, compressed) on more photographs, by name.
        "elsewhere": {"type": "object"},
        # speed: which network.
        "network": _STRING,
        # How long the line took, with its training; and where and when it was measured.
        "took_s": _NUMBER,
        "environment": {"type": "object", "required": ["commit", "threads"]},
    },
}
_METHOD_ROWS = {"type": "array", "items": METHOD_ROW}
# methods-<part>.json: the lines stand under the name of the part.
METHODS_SCHEMA = {
    "type": "object",
    "required": ["format", "environment", "seconds"],
    "properties": {
        "format": {"enum": [METHODS_FORMAT]},
        "environment": {"type": "object", "required": ["commit", "threads"]},
        "seconds": _NUMBER,
        "digits": _METHOD_ROWS,
        "psnr": _METHOD_ROWS,
        "speed": _METHOD_ROWS,
    },
}
# methods.json: all parts side by side. A column is "digits", "psnr" or a network of the speed part;
# a cell has "macs_ratio" (dense / compressed), "seconds", "speedup", and where there is a quality
# "quality" (dense, compressed), "tolerance", "within".
METHODS_TABLE_SCHEMA = {
    "type": "object",
    "required": ["format", "columns", "rows"],
    "properties": {
        "columns": {"type": "array", "items": _STRING},
        "rows": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["name", "method", "form", "cells"],
                "properties": {
                    "form": {"enum": ["paper", "ours"]},
                    "cells": {
                        "type": "object",
                        "additionalProperties": {
                            "type": "object",
                            "required": ["macs_ratio", "seconds", "speedup"],
                            "properties": {"macs_ratio": _NUMBER, "quality": _PAIR},
                        },
                    },
                },
            },
        },
    },
}


def problems(value: Any, schema: Json = SCHEMA, where: str = "$") -> list[str]:
    """Lists how a value departs from a schema; empty when it does not.

    A run must be able to write its results on a machine that has torch and nothing else, hence
    these few lines; tests hold them to the library jsonschema, on the committed files and on
    damaged ones. What they know of JSON Schema is what the schemas here use: type, enum, required,
    properties, additionalProperties as a schema, items, anyOf.
    """
    if "anyOf" in schema:
        tries = [problems(value, choice, where) for choice in schema["anyOf"]]
        return [] if any(not found for found in tries) else min(tries, key=len)
    if "enum" in schema:
        known = value in schema["enum"]
        return [] if known else [f"{where}: {value!r} is none of {schema['enum']}"]
    if "type" in schema and not _is(value, schema["type"]):
        return [f"{where}: {type(value).__name__} is no {schema['type']}"]
    found = [
        f"{where}: {key!r} is missing" for key in schema.get("required", ()) if key not in value
    ]
    if isinstance(value, dict):
        for key, item in value.items():
            inner = schema.get("properties", {}).get(key, schema.get("additionalProperties", {}))
            found += problems(item, inner, f"{where}.{key}")
    if isinstance(value, list):
        for place, item in enumerate(value):
            found += problems(item, schema.get("items", {}), f"{where}[{place}]")
    return found


def _is(value: object, kind: str) -> bool:
    kinds: dict[str, Any] = {
        "object": dict,
        "array": list,
        "string": str,
        "boolean": bool,
        "null": type(None),
        "integer": int,
        "number": int | float,
    }
    if isinstance(value, bool) and kind != "boolean":
        return False
    # NaN and infinity are no JSON, and no measurement either.
    finite = not isinstance(value, float) or abs(value) < float("inf")
    return isinstance(value, kinds[kind]) and finite
