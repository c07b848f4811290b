# SPDX-License-Identifier: Apache-2.0
"""Batches in parts: each thread takes a few images through all layers, one part after another.

Layer by layer, the activations of a large batch go to main memory and back between any two layers,
and all threads wait for each other after each. A part's stay in the cache; but each part reads the
weights anew. So a batch is cut where its activations exceed the cache, and where the steps of a
part read and write far more of them than of weights. The numbers are the same, bit for bit: a step
of a part runs the plan that was chosen for the whole, and an image is computed alike however many
are beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import fx

from .program import Program
from .seen import Operand, Seen, Spec

try:
    from .. import _cpu
except ImportError:  # nothing is compiled here
    _cpu = None  # type: ignore[assignment]

# Bytes of a part's activations to one of weights from which on it is worth to read those again.
_ACTIVATIONS_PER_WEIGHT = 2.0


class Built(NamedTuple):
    """A program that was made of a record.

    Attributes:
        program: None where no step would be native.
        operand_bytes: what its native steps read and write of activations.
        weight_bytes: what they read of weights.
    """

    program: Program | None
    operand_bytes: int
    weight_bytes: int


def in_parts(
    whole: Program, record: Sequence[Seen], build: Callable[[Sequence[Seen]], Built]
) -> Program | None:
    """Makes a program that takes a batch in parts.

    Args:
        whole: the program of the batch.
        record: what that was made of.
        build: makes a program of another record.

    Returns:
        None where steps are called, or where the batch is better left whole.
    """
    batch, threads = batch_of(record), torch.get_num_threads()
    images = images_of_part(batch, threads, whole.arena_bytes, _cpu.non_temporal_bytes())
    if images is None or whole.native is None:
        return None
    part = record_of_part(record, batch // images)
    if part is None:
        return None
    program, operand_bytes, weight_bytes = build(part)
    native = None if program is None else program.native
    if program is None or native is None:
        return None
    if operand_bytes < _ACTIVATIONS_PER_WEIGHT * weight_bytes:
        return None
    outside = [record[number].spec for number in native.outside]
    strides = [spec.stride[0] * spec.dtype.itemsize * images for spec in outside if spec]
    return program.in_parts(batch // images, strides, threads)


def batch_of(record: Sequence[Seen]) -> int:
    """Returns the number of images of a recorded batch; 1 where it is not known how to cut it.

    All tensors of the graph must have the batch outermost, and lie densely in it.
    """
    given = [seen.spec for seen in record if seen.node.op == "placeholder"]
    first = given[0] if given else None
    if first is None or not first.shape:
        return 1
    batch = first.shape[0]
    specs = ((seen.node, spec) for seen in record for spec in seen.specs if spec is not None)
    return batch if all(_is_batch(node, spec, batch) for node, spec in specs) else 1


def _is_batch(node: fx.Node, spec: Spec, batch: int) -> bool:
    if node.op == "get_attr" or not spec.numel or spec.shape[:1] != (batch,):
        return False
    each = math.prod(spec.shape[1:])
    if node.op == "placeholder":  # may be a part of something larger
        return spec.stride[0] >= each
    return spec.offset == 0 and spec.stride[0] == each


def images_of_part(batch: int, threads: int, arena: int, cache: int) -> int | None:
    """Returns how many images a part has: as many as fit the cache, one of each thread at a time.

    Example: images of 7 MB, on two threads with 32 MB of cache. Eight of them are cut by two, of
    which both threads have 28 MB at a time; four stay together:

        >>> images_of_part(8, 2, 8 * 7, 32), images_of_part(4, 2, 4 * 7, 32)
        (2, None)

    Args:
        batch: the number of images.
        threads: take parts at the same time, as many each.
        arena: bytes of the activations of the whole batch.
        cache: bytes of the last-level cache.

    Returns:
        None where the batch fits as it is, where one image for each thread does not, and where
        threads would have different numbers of parts.
    """
    if arena <= cache or batch % threads:
        return None
    own = batch // threads
    fit = [n for n in range(1, own + 1) if own % n == 0 and n * threads * arena <= cache * batch]
    return max(fit, default=None)


def record_of_part(record: Sequence[Seen], parts: int) -> list[Seen] | None:
    """Returns what would have been recorded of one of so many equal parts of a batch.

    Args:
        record: of the whole, of which `batch_of` knows the number of images.
        parts: divides that.

    Returns:
        None where a call of the engine cannot be cut.
    """

    def cut(spec: Spec | None) -> Spec | None:
        if spec is None:
            return None
        return spec._replace(shape=(spec.shape[0] // parts, *spec.shape[1:]))

    found = []
    for seen in record:
        calls = []
        for step, operands in seen.calls:
            part = step.of_part(parts)
            if part is None:
                return None
            own = (None if o is None else Operand(o.step, cut(o.spec)) for o in operands)
            calls.append((part, tuple(own)))
        found.append(seen._replace(specs=tuple(map(cut, seen.specs)), calls=tuple(calls)))
    return found
