# SPDX-License-Identifier: Apache-2.0
"""Support as a value: its digest, equality, copies, and the JSON that carries it."""

from __future__ import annotations

import base64
import contextlib
import copy
import gc
import hashlib
import json
import os
import pickle
import subprocess
import sys
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import masks, random_mask

from hetconv_kernels import Support
from hetconv_kernels.errors import SupportError
from hetconv_kernels.support import find_support, support_from_bits


def _digest(mask: Any) -> int:
    """The digest as exported programs and files carry it: it can never change."""
    f, c, kh, kw = mask.shape
    text = bytearray(f"({f}, {c}, {kh}, {kw})".encode())
    for columns in mask.reshape(f, c * kh * kw):
        number = sum(1 << i for i, live in enumerate(columns) if live)
        text += number.to_bytes(-(-len(columns) // 8), "little")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") // 4


@given(masks())
def test_digest_is_as_specified(mask: Any) -> None:
    s = Support.from_mask(mask)
    assert s.digest == _digest(mask) == hash(s)
    assert 0 <= s.digest < 2**62


def test_digest_is_the_same_in_another_process() -> None:
    code = "from hetconv_kernels import Support; print(Support.het(100, 90, 3, p=8).digest)"
    environment = {**os.environ, "PYTHONHASHSEED": "4242", "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert int(run.stdout) == Support.het(100, 90, 3, p=8).digest


def test_digest_tells_masks_and_shapes_apart() -> None:
    mask = random_mask()
    supports = [Support.from_mask(mask)]
    for index in np.ndindex(mask.shape):
        flipped = mask.copy()
        flipped[index] ^= True
        supports.append(Support.from_mask(flipped))
    # The same bits in other shapes.
    supports += [Support.dense(c, 12 // c, (1, 2)) for c in (1, 2, 3, 4, 6, 12)]
    supports += [Support.dense(1, 12, (2, 1)), Support.dense(1, 12, (1, 1))]
    assert len({s.digest for s in supports}) == len(supports)


def test_equality_is_by_content() -> None:
    a, b = Support.grouped(4, 4, 3, 1), Support.dense(4, 4, 3)
    assert a == b
    assert hash(a) == hash(b)
    assert a.kind != b.kind
    assert len({a, b}) == 1
    assert a != Support.dense(4, 4, 1)
    assert a != "a string"


def test_equal_supports_share_what_is_derived_and_stay_findable() -> None:
    mask = random_mask(77)
    first, second = Support.from_mask(mask), Support.from_mask(mask, "another kind")
    digest = first.digest
    assert first.derived is second.derived
    first.derived["tensor"] = 1
    del first
    gc.collect()
    assert find_support(digest) == second
    assert second.derived == {"tensor": 1}
    del second
    gc.collect()
    assert find_support(digest) is None


def test_repr_says_what_it_is() -> None:
    text = repr(Support.het(100, 90, 3, p=8))
    for part in ("het(p=8, blocked)", "C=100", "F=90", "3x3", "density=0.222"):
        assert part in text


# Copies, immutability ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "way",
    [lambda s: pickle.loads(pickle.dumps(s)), copy.deepcopy, copy.copy],
    ids=["pickle", "deepcopy", "copy"],
)
def test_copies_are_equal(way: Callable[[Support], Support]) -> None:
    s = Support.het(10, 12, 3, p=4)
    copied = way(s)
    assert copied == s
    assert (copied.kind, copied.digest, copied.kernel) == (s.kind, s.digest, s.kernel)


def test_pickle_carries_no_derived_values() -> None:
    s = Support.dense(64, 64, 3)
    s.derived["large"] = np.zeros(10**6)
    assert len(pickle.dumps(s)) < 20_000


def test_nothing_that_a_support_hands_out_can_be_written() -> None:
    s = Support.from_mask(random_mask())
    for array in (s.mask, s.bits, s.groups[0].filters, s.groups[0].mask):
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0


def test_the_mask_that_a_support_was_made_from_is_not_kept() -> None:
    mask = random_mask()
    s = Support.from_mask(mask)
    before = s.mask.copy()
    mask[:] = ~mask
    np.testing.assert_array_equal(s.mask, before)
    assert s.digest == _digest(before)


@given(masks())
def test_bits_give_the_support_back(mask: Any) -> None:
    s = Support.from_mask(mask)
    assert s.bits.shape == (len(mask), -(-mask[0].size // 8))
    assert support_from_bits(s.bits, s.shape[1:]) == s


# JSON -------------------------------------------------------------------------------------------


@given(masks())
def test_json_gives_the_support_back(mask: Any) -> None:
    s = Support.from_mask(mask, "a kind — with «marks»")
    read = Support.from_json(s.to_json())
    assert read == s
    assert read.kind == s.kind


def test_json_written_once_stays_readable() -> None:
    text = (
        '{"format": "hetconv_kernels.Support/1", "shape": [2, 4, 3, 3], "kind": "het(p=2, blocked)"'
        ', "digest": "2c72249f1f96f9bc", "bits": "eJz7/9+5gUFA4c9/fgAeYAT8"}'
    )
    assert Support.from_json(text) == Support.het(4, 2, 3, p=2)


def _tampered(**changes: Any) -> str:
    return json.dumps({**json.loads(Support.het(4, 2, 3, p=2).to_json()), **changes})


def _bits(raw: bytes) -> str:
    return base64.b64encode(zlib.compress(raw)).decode()


BAD_JSON = {
    "empty": "",
    "not-json": "{format: 1}",
    "not-an-object": "[]",
    "null": "null",
    "nested-too-deep": "[" * 100_000,
    "no-format": "{}",
    "foreign-format": _tampered(format="somebody.else/7"),
    "no-shape": _tampered(shape=None),
    "shape-of-three": _tampered(shape=[2, 4, 9]),
    "shape-of-words": _tampered(shape=["2", "4", "3", "3"]),
    "shape-of-fractions": _tampered(shape=[2, 4, 3.5, 3]),
    "negative-shape": _tampered(shape=[-2, -4, 3, 3]),
    "zero-shape": _tampered(shape=[0, 4, 3, 3]),
    "other-shape": _tampered(shape=[4, 2, 3, 3]),
    "huge-shape": _tampered(shape=[2, 4, 2**40, 2**40]),
    "shape-without-the-data": _tampered(shape=[2, 4, 3000, 3000]),
    "other-kernel-of-equal-bytes": _tampered(shape=[2, 4, 2, 5]),
    "no-bits": _tampered(bits=None),
    "bits-not-base64": _tampered(bits="§§§"),
    "bits-not-compressed": _tampered(bits=base64.b64encode(b"raw bytes").decode()),
    "bits-too-few": _tampered(bits=_bits(b"\xff" * 9)),
    "bits-too-many": _tampered(bits=_bits(b"\xff" * 11)),
    "bits-a-bomb": _tampered(bits=_bits(bytes(10**7))),
    "bits-of-another-support": _tampered(bits=_bits(b"\xff\xff\xff\xff\x0f" * 2)),
    "digest-of-another-support": _tampered(digest="0" * 16),
    "digest-missing": _tampered(digest=None),
}


@pytest.mark.parametrize("text", BAD_JSON.values(), ids=BAD_JSON)
def test_json_that_is_not_a_support_is_refused(text: str) -> None:
    with pytest.raises(SupportError, match="expected"):
        Support.from_json(text)


def test_json_says_what_is_wrong() -> None:
    with pytest.raises(SupportError, match=r"received somebody\.else/7, expected hetconv_kernels"):
        Support.from_json(BAD_JSON["foreign-format"])
    with pytest.raises(SupportError, match=r"digest of a Support.*changed or damaged"):
        Support.from_json(BAD_JSON["bits-of-another-support"])
    with pytest.raises(SupportError, match="9 bytes of mask, where the shape needs 10"):
        Support.from_json(BAD_JSON["bits-too-few"])


@pytest.mark.parametrize("value", [None, 7, ["format"], {"format": 1}], ids=repr)
def test_json_that_is_not_text_is_refused(value: Any) -> None:
    with pytest.raises(SupportError, match=r"expected what Support\.to_json wrote"):
        Support.from_json(value)


def test_json_cut_anywhere_is_refused() -> None:
    text = Support.het(6, 5, 3, p=2).to_json()
    for length in range(len(text)):
        with pytest.raises(SupportError):
            Support.from_json(text[:length])


@given(st.data())
def test_json_with_a_changed_character_is_refused_or_means_the_same(data: st.DataObject) -> None:
    s = Support.het(6, 5, 3, p=2)
    text = s.to_json()
    at = data.draw(st.integers(0, len(text) - 1))
    changed = text[:at] + data.draw(st.characters(codec="utf-8")) + text[at + 1 :]
    with contextlib.suppress(SupportError):
        assert Support.from_json(changed) == s
