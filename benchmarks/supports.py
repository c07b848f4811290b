# SPDX-License-Identifier: Apache-2.0
"""The self-grouped Supports of the cases, as committed data.

They are what self-grouping (arXiv 2009.13803) gives on seeded Gaussian weights, run in steps of ten
per cent to the target, and not masks made to suit an engine. k-means differs a little between
versions of its library, so the result is kept in self_grouped.json: the same everywhere, and there
without scikit-learn. ``python -m benchmarks.make_supports`` adds what the file lacks.

Weights that were trained have a structure that Gaussian ones lack: trained_masks.json holds what
self-grouping makes of a network that `benchmarks.train_masks` trained.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

import hetconv_kernels as hk

SELF_GROUPED_FILE = Path(__file__).with_name("self_grouped.json")
TRAINED_PATH = Path(__file__).with_name("trained_masks.json")
FILTER_CLUSTERS = 16
SMALL = (60, 16, 32, 3, 0)  # the layer that the tests of the benchmarks use


def self_grouped(percent: int, channels: int, filters: int, kernel: int, seed: int) -> hk.Support:
    """Returns the committed Support of a layer, or makes it where there is none.

    Raises:
        HetconvError: there is none, and scikit-learn is not installed.
        ValueError: the file was changed or damaged.
    """
    name = support_key(percent, channels, filters, kernel, seed)
    entry = _committed().get(name)
    if entry is None:
        return make_support(percent, channels, filters, kernel, seed)
    return _support_of(entry, f"{SELF_GROUPED_FILE.name}: {name}", channels, kernel)


def trained(percent: int, channels: int, filters: int) -> hk.Support:
    """Returns the committed 3×3 Support of a layer of the network that was trained here.

    Raises:
        ValueError: there is none, or the file was changed or damaged.
    """
    name = trained_key(percent, channels, filters)
    if name not in _committed_trained():
        raise ValueError(f"{TRAINED_PATH.name} has no {name}")
    where = f"{TRAINED_PATH.name}: {name}"
    return _support_of(_committed_trained()[name], where, channels, 3)


def make_support(percent: int, channels: int, filters: int, kernel: int, seed: int) -> hk.Support:
    """Runs self-grouping in steps of ten per cent to the target, on seeded Gaussian weights."""
    from hetconv_kernels.self_grouping import self_group

    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(filters, channels, kernel, kernel, generator=generator)
    support = hk.Support.dense(channels, filters, kernel)
    for step in range(10, percent + 1, 10):
        support = self_group(weight, step, clusters=FILTER_CLUSTERS, support=support, seed=seed)
    return support


def support_key(percent: int, channels: int, filters: int, kernel: int, seed: int) -> str:
    """Names a Support in the file."""
    return f"sg{percent}-{channels}x{filters}-k{kernel}-seed{seed}"


def trained_key(percent: int, channels: int, filters: int) -> str:
    """Names a Support in the file of the trained network."""
    return f"trained{percent}-{channels}x{filters}-k3"


def entry_of(support: hk.Support) -> dict[str, Any]:
    """Writes a Support of whole kernels as the group of each filter and the channels of each."""
    labels = np.empty(support.filters, int)
    keep = []
    for number, group in enumerate(support.groups):
        labels[group.filters] = number
        channels = group.mask.any(axis=(1, 2))
        keep.append(np.packbits(channels, bitorder="little").tobytes().hex())
    return {"digest": f"{support.digest:016x}", "labels": labels.tolist(), "keep": keep}


@cache
def _committed() -> dict[str, Any]:
    return dict(json.loads(SELF_GROUPED_FILE.read_text())) if SELF_GROUPED_FILE.exists() else {}


@cache
def _committed_trained() -> dict[str, Any]:
    return dict(json.loads(TRAINED_PATH.read_text()))


def _support_of(entry: dict[str, Any], where: str, channels: int, kernel: int) -> hk.Support:
    keep = np.stack([_bits(row, channels) for row in entry["keep"]])
    support = hk.Support.self_grouped(np.array(entry["labels"]), keep, kernel)
    if f"{support.digest:016x}" != entry["digest"]:
        raise ValueError(f"{where} has another digest than it says")
    return support


def _bits(text: str, count: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    packed = np.frombuffer(bytes.fromhex(text), np.uint8)
    return np.unpackbits(packed, count=count, bitorder="little").astype(bool)
