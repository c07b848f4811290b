# SPDX-License-Identifier: Apache-2.0
"""Support: which weights of a convolution exist.

A convolution is an implicit GEMM in which every filter is a dot product over *columns*, a column
being one (channel, tap) pair. HetConv, self-grouping, grouped, depthwise, pruned and dense
convolutions differ only in the columns that each filter has; a Support is exactly that, and
nothing else: it holds no weights and knows no hardware.
"""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Final, NamedTuple
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt

from .errors import SupportError, mismatch
from .integers import is_integer
from .masks import (
    BoolArray,
    IntArray,
    check_entries,
    mask_shape,
    owner,
    pack_mask,
    permutation,
    spread,
    unpack_mask,
)

__all__ = ["Group", "Support"]

# Supports alive, by digest: how an operator finds the one that its integers name.
_known: WeakValueDictionary[int, Support] = WeakValueDictionary()
_JSON_FORMAT = "hetconv_kernels.Support/1"


class Group(NamedTuple):
    """Filters that share one set of columns.

    Attributes:
        filters: indices of the filters, ascending.  # [members]
        mask: the columns they share.  # bool [C, KH, KW]
    """

    filters: IntArray
    mask: BoolArray


class Support:
    """The weights of a convolution that exist: a boolean mask and its distinct rows.

    A Support is immutable and hashable, compares by content, and is made of numpy only. Its
    *groups* are the distinct rows of the mask: filters that read exactly the same columns.

    Example: two filters on four channels, 3×3, HetConv with ``p=2``. Each filter keeps all nine
    taps on its own half of the channels and the centre tap on the other half, so it has
    2·9 + 2·1 = 20 of 36 weights, and there are two groups of one filter each:

        >>> s = Support.het(4, 2, 3, p=2)
        >>> s.mask[:, :, 0, 0].astype(int).tolist()      # the corner tap
        [[1, 1, 0, 0], [0, 0, 1, 1]]
        >>> s.mask[:, :, 1, 1].astype(int).tolist()      # the centre tap
        [[1, 1, 1, 1], [1, 1, 1, 1]]
        >>> s.live, s.density, len(s.groups), s.macs(8, 8)
        (40, 0.5555555555555556, 2, 2560)

    Args:
        mask: which weights exist.  # bool [F, C, KH, KW]
        kind: a short name for people (``repr``, reports); not part of the identity.

    Raises:
        SupportError: the mask is not a 4-D boolean array, has an empty dimension, or has more
            than 2**31 - 1 entries.
    """

    def __init__(self, mask: npt.ArrayLike, kind: str = "mask") -> None:
        array = np.asarray(mask)
        if array.ndim != 4 or array.dtype != np.bool_:
            raise SupportError(
                mismatch(
                    "mask of a Support",
                    f"a {array.ndim}-D array of {array.dtype}",
                    "a 4-D boolean array [F, C, KH, KW]",
                    "Use `mask != 0` to make a weight mask boolean.",
                )
            )
        if array.size == 0:
            raise SupportError(
                mismatch("shape of a Support", array.shape, "no dimension of size zero")
            )
        check_entries(array.size)
        self.kind = kind
        self.shape: Final[tuple[int, int, int, int]] = tuple(array.shape)
        # The packed form is the one that is kept: up to eight times smaller than the mask.
        self._bits: npt.NDArray[np.uint8] = pack_mask(array)
        self._bits.flags.writeable = False
        self.live: Final = int(np.count_nonzero(array))
        digest = hashlib.blake2b(repr(self.shape).encode(), digest_size=8)
        digest.update(self._bits.tobytes())
        # 62 bits: fits a SymInt with room for the arithmetic that compilers do on ranges.
        self.digest: Final = int.from_bytes(digest.digest(), "little") >> 2
        # Equal Supports, as the layers of a model have, keep the first of them alive and findable.
        first = _known.setdefault(self.digest, self)
        self._first = None if first is self else first
        # What others derive (tensors on devices, ...) is shared by equal Supports, and dies with
        # the last of them.
        self.derived: Final[dict[Any, Any]] = {} if first is self else first.derived

    # Constructors ---------------------------------------------------------------------------

    @classmethod
    def from_mask(cls, mask: npt.ArrayLike, kind: str = "mask") -> Support:
        """Builds a Support from a 4-D mask; a torch mask goes through ``mask.cpu().numpy()``.

        Raises:
            SupportError: see the class.
        """
        return cls(mask, kind)

    @classmethod
    def dense(cls, C: int, F: int, kernel: int | Sequence[int]) -> Support:
        """Builds the Support of an ordinary convolution: every weight exists.

        Raises:
            SupportError: a size that is not a positive integer, or too many weights.
        """
        return cls(np.ones(mask_shape(C, F, kernel), bool), "dense")

    @classmethod
    def grouped(cls, C: int, F: int, kernel: int | Sequence[int], groups: int) -> Support:
        """Builds the Support of ``nn.Conv2d(C, F, kernel, groups=groups)``.

        Raises:
            SupportError: ``groups`` does not divide both C and F.
        """
        _, _, kh, kw = mask_shape(C, F, kernel)
        whole = is_integer(groups) and groups >= 1
        if not whole or C % groups or F % groups:
            raise SupportError(
                mismatch(
                    "groups of a grouped Support",
                    f"groups={groups} with C={C}, F={F}",
                    "a divisor of both C and F",
                    "Uneven groups: Support.self_grouped.",
                )
            )
        own = owner(F, groups)[:, None] == owner(C, groups)[None, :]
        return cls(spread(own, kh, kw), f"grouped(groups={groups})")

    @classmethod
    def het(
        cls, C: int, F: int, kernel: int | Sequence[int], p: int = 4, order: str = "blocked"
    ) -> Support:
        """Builds the Support of HetConv: all taps on 1/p of the channels, the centre on the rest.

        ``interleaved`` is the order of the paper: filter f has the full kernel on channel c iff
        (c − f) mod p == 0. ``blocked`` keeps the same counts with contiguous groups, which is what
        hardware reads best: full iff ⌊f·p/F⌋ == ⌊c·p/C⌋. The two agree up to a permutation when p
        divides C and F. p need not divide the channel counts.

        Source: Singh, Verma, Rai, Namboodiri, "HetConv", CVPR 2019, arXiv 1903.04120.

        Args:
            C: input channels.
            F: filters (output channels).
            kernel: odd kernel size, one number or (KH, KW).
            p: the part; 1 is the dense convolution, C is depthwise plus pointwise.
            order: ``"blocked"`` or ``"interleaved"``.

        Raises:
            SupportError: p outside 1…C, an even kernel (it has no centre tap), an unknown order.
        """
        _, _, kh, kw = mask_shape(C, F, kernel)
        if kh % 2 == 0 or kw % 2 == 0:
            raise SupportError(
                mismatch(
                    "kernel of a HetConv",
                    (kh, kw),
                    "odd sizes, since an even kernel has no centre tap",
                    "Use Support.from_mask to say which tap the 1×1 part sits on.",
                )
            )
        if not is_integer(p) or not 1 <= p <= C:
            raise SupportError(mismatch("p of a HetConv", p, f"an integer from 1 to C={C}"))
        if order == "interleaved":
            full = (np.arange(C) - np.arange(F)[:, None]) % p == 0
        elif order == "blocked":
            full = owner(F, p)[:, None] == owner(C, p)
        else:
            raise SupportError(
                mismatch("order of a HetConv", repr(order), "'blocked' or 'interleaved'")
            )
        mask = spread(full, kh, kw)
        mask[:, :, kh // 2, kw // 2] = True
        return cls(mask, f"het(p={p}, {order})")

    @classmethod
    def self_grouped(
        cls,
        labels: npt.ArrayLike,
        keep: npt.ArrayLike,
        kernel: int | Sequence[int],
        within: Support | None = None,
    ) -> Support:
        """Builds the Support of a self-grouping convolution: cluster g keeps channels ``keep[g]``.

        Whole kernels live or die. With ``within`` the result is intersected with an earlier
        Support, as the method does step by step; the distinct rows may then outnumber the labels.

        Source: Guo, Wu, Kittler, Feng, Neural Networks 132, 2020, arXiv 2009.13803.

        Args:
            labels: the cluster of each filter.  # int [F]
            keep: the channels that each cluster reads.  # bool [G, C]
            kernel: kernel size, one number or (KH, KW).
            within: the Support of the step before.

        Raises:
            SupportError: labels outside 0…G-1, or shapes that do not match.
        """
        label, kept = np.asarray(labels), np.asarray(keep)
        if label.ndim != 1 or not np.issubdtype(label.dtype, np.integer) or label.size == 0:
            raise SupportError(
                mismatch(
                    "labels", f"{label.dtype} {label.shape}", "a non-empty 1-D integer array [F]"
                )
            )
        if kept.ndim != 2 or kept.dtype != np.bool_ or kept.size == 0:
            raise SupportError(
                mismatch("keep", f"{kept.dtype} {kept.shape}", "a non-empty boolean array [G, C]")
            )
        if label.min() < 0 or label.max() >= len(kept):
            raise SupportError(
                mismatch(
                    "labels", f"{label.min()}…{label.max()}", f"values from 0 to {len(kept) - 1}"
                )
            )
        _, _, kh, kw = mask_shape(kept.shape[1], label.size, kernel)
        mask = spread(kept[label], kh, kw)
        if within is not None:
            if within.shape != mask.shape:
                raise SupportError(mismatch("within", within.shape, mask.shape))
            mask &= within.mask
        return cls(mask, "self-grouped")

    # What it is -----------------------------------------------------------------------------

    @property
    def filters(self) -> int:
        """The number of filters (output channels), F."""
        return self.shape[0]

    @property
    def channels(self) -> int:
        """The number of input channels, C."""
        return self.shape[1]

    @property
    def kernel(self) -> tuple[int, int]:
        """The kernel size (KH, KW)."""
        return self.shape[2], self.shape[3]

    @property
    def bits(self) -> npt.NDArray[np.uint8]:
        """The bit-packed mask, a filter's columns in whole bytes.  # uint8 [F, ceil(C·KH·KW/8)]"""
        return self._bits

    @property
    def mask(self) -> BoolArray:
        """Which weights exist, unpacked anew at each call.  # bool [F, C, KH, KW]"""
        mask = unpack_mask(self._bits, self.shape[1:])
        mask.flags.writeable = False
        return mask

    @property
    def density(self) -> float:
        """The fraction of the dense weights that exist."""
        return self.live / float(np.prod(self.shape))

    @property
    def is_dense(self) -> bool:
        """Whether every weight exists."""
        return self.live == int(np.prod(self.shape))

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """The distinct mask rows, each with its filters, in order of their first filter."""
        members: dict[bytes, list[int]] = {}
        for f, row in enumerate(self._bits):
            members.setdefault(row.tobytes(), []).append(f)
        filters = [np.array(group) for group in members.values()]
        masks = unpack_mask(self._bits[[group[0] for group in filters]], self.shape[1:])
        for array in (*filters, masks):
            array.flags.writeable = False
        return tuple(Group(*pair) for pair in zip(filters, masks, strict=True))

    @cached_property
    def uniform_groups(self) -> int | None:
        """The g for which this is exactly ``nn.Conv2d(groups=g)``, None if there is none."""
        g = len(self.groups)
        if self.filters % g or self.channels % g:
            return None
        own = owner(self.filters, g)[:, None] == owner(self.channels, g)[None, :]
        same = np.array_equal(self.mask, spread(own, *self.kernel))
        return g if same else None

    def macs(self, height: int, width: int) -> int:
        """Counts multiply-accumulates for one image with an output of height × width pixels.

        Raises:
            SupportError: a size that is no integer of at least 0.
        """
        if not (is_integer(height) and is_integer(width) and min(height, width) >= 0):
            raise SupportError(
                mismatch("size of the output", (height, width), "integers, at least 0")
            )
        return self.live * int(height) * int(width)

    # Algebra --------------------------------------------------------------------------------

    def __and__(self, other: Support) -> Support:
        """Keeps the weights that exist in both Supports."""
        if not isinstance(other, Support):
            return NotImplemented
        if other.shape != self.shape:
            raise SupportError(
                mismatch("intersection of Supports", other.shape, f"the shape {self.shape}")
            )
        return Support(self.mask & other.mask, f"{self.kind} & {other.kind}")

    def permute(
        self, filters: npt.ArrayLike | None = None, channels: npt.ArrayLike | None = None
    ) -> Support:
        """Reorders filters and channels: row i of the result is row ``filters[i]`` of this one.

        Raises:
            SupportError: an argument is not a permutation.
        """
        mask = self.mask
        if filters is not None:
            mask = mask[permutation("filters", filters, self.filters)]
        if channels is not None:
            mask = mask[:, permutation("channels", channels, self.channels)]
        return Support(mask, f"{self.kind} permuted")

    def transpose(self) -> Support:
        """Returns the Support that dgrad convolves with: roles swapped, taps flipped."""
        mask = self.mask.transpose(1, 0, 2, 3)[:, :, ::-1, ::-1]
        return Support(np.ascontiguousarray(mask), f"{self.kind} transposed")

    # Identity -------------------------------------------------------------------------------

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Support):
            return NotImplemented
        return self.shape == other.shape and np.array_equal(self._bits, other._bits)

    def __hash__(self) -> int:
        return self.digest

    def __deepcopy__(self, memo: object) -> Support:
        return self  # immutable

    def __reduce__(self) -> tuple[Any, ...]:
        return _from_bits, (self._bits, self.shape[1:], self.kind)

    def __repr__(self) -> str:
        f, c, kh, kw = self.shape
        return f"Support({self.kind}, C={c}, F={f}, kernel={kh}x{kw}, density={self.density:.3g})"

    def to_json(self) -> str:
        """Writes the Support as one JSON object with a digest that `from_json` verifies."""
        return json.dumps(
            {
                "format": _JSON_FORMAT,
                "shape": list(self.shape),
                "kind": self.kind,
                "digest": f"{self.digest:016x}",
                "bits": base64.b64encode(zlib.compress(self._bits.tobytes())).decode(),
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Support:
        """Reads what `to_json` wrote.

        Raises:
            SupportError: the text is not such an object, is truncated, or fails its digest.
        """
        try:
            data = json.loads(text)
            if data["format"] != _JSON_FORMAT:
                raise SupportError(mismatch("Support JSON format", data["format"], _JSON_FORMAT))
            f, c, kh, kw = data["shape"]
            mask_shape(c, f, (kh, kw))
            size = f * -(-c * kh * kw // 8)
            unpacker = zlib.decompressobj()
            raw = unpacker.decompress(base64.b64decode(data["bits"], validate=True), size + 1)
            if len(raw) != size:
                raise ValueError(f"{len(raw)} bytes of mask, where the shape needs {size}")
            bits = np.frombuffer(raw, np.uint8).reshape(f, -1)
            support = _from_bits(bits, (c, kh, kw), str(data["kind"]))
            if f"{support.digest:016x}" != data["digest"]:
                raise SupportError(
                    mismatch(
                        "digest of a Support",
                        data["digest"],
                        f"{support.digest:016x}",
                        "The file was changed or damaged.",
                    )
                )
        except SupportError:
            raise
        except (ValueError, KeyError, TypeError, RecursionError, zlib.error) as error:
            raise SupportError(
                f"Support JSON cannot be read ({error!r}); expected what Support.to_json wrote."
            ) from error
        return support


def find_support(digest: int) -> Support | None:
    """Returns a live Support with this digest, None if there is none in the process."""
    return _known.get(digest)


def support_from_bits(bits: npt.NDArray[np.uint8], columns: tuple[int, int, int]) -> Support:
    """Builds a Support from its bit-packed mask [F, B] and its columns (C, KH, KW)."""
    return _from_bits(bits, columns, "mask")


def _from_bits(bits: npt.NDArray[np.uint8], columns: tuple[int, int, int], kind: str) -> Support:
    return Support(unpack_mask(np.ascontiguousarray(bits), columns), kind)
