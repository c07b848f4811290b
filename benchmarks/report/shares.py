# SPDX-License-Identifier: Apache-2.0
"""The share of their MAC ratio that layers reach as speed-up, by families, with the misses.

Of a layer with a third of the multiply-accumulates that is 2.4 times as fast as dense the share is
0.8. ``python -m benchmarks.report --shares`` prints them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from hetconv_kernels.files import Json
from hetconv_kernels.measure import tables

from .results import computed_dtype

HETCONV, SELF_GROUPING = "HetConv", "self-grouping"
FAMILY_OF_KIND = {"het": HETCONV, "self_group": SELF_GROUPING, "trained_group": SELF_GROUPING}
WANTED = {HETCONV: 0.87, SELF_GROUPING: 0.75}  # of the geometric mean


@dataclass(frozen=True)
class MacShare:
    """One layer: what it saves, what that gave, and what its bytes would allow.

    Attributes:
        case: of the row, as its file has it.
        family: one of `WANTED`.
        mac_ratio: dense over live multiply-accumulates.
        speedup: how many times longer the fastest dense form took.
        allowed: the share if the layer took no longer than its bytes at the copy rate that its file
            recorded, the *floor by bytes*; None where the file has no such rate. Above 1, bytes
            forbid nothing. A layer whose tensors stay in a cache may beat it.
    """

    case: Json
    family: str
    mac_ratio: float
    speedup: float
    allowed: float | None

    @property
    def share(self) -> float:
        """Speed-up over MAC ratio."""
        return self.speedup / self.mac_ratio

    @property
    def missed(self) -> bool:
        """Whether the share is less than what is wanted of its family's mean."""
        return self.share < WANTED[self.family]


def mac_shares(data: Json) -> list[MacShare]:
    """Lists the share of each layer of a results file that counts.

    A row counts when all of these hold: it is a layer whose Support is a HetConv's or a
    self-grouped one (of Gaussian or of trained weights); it is inference in float32, without
    autocast, in either memory format, at any kernel, stride and batch; its case is not among those
    that are expected to lose; it was timed, and no other work disturbed it. The speed-up is over
    the faster of ``nn.Conv2d``'s two memory formats, dense, eager (the row's ``dense``), as the
    median of paired rounds.

    Args:
        data: what the file holds.
    """
    rate = max(
        (r["bytes_per_s"] for r in data["roofs"] if (r["dtype"], r["device"]) == _FLOAT32_ON_CPU),
        default=None,
    )
    found = []
    for row in data["rows"]:
        if not _counts(row) or "dense" not in row or "disturbed" in row:
            continue
        ratio = row["dense_macs"] / row["macs"]
        floor = None if rate is None else row["bytes"] / rate
        allowed = None if floor is None else row["dense"]["median_s"] / floor / ratio
        family = FAMILY_OF_KIND[row["case"]["support"]["kind"]]
        found.append(MacShare(row["case"], family, ratio, row["dense"]["ratio"], allowed))
    return found


_FLOAT32_ON_CPU = ("float32", "cpu")


def _counts(row: Json) -> bool:
    if row["kind"] != "layer" or row["case"].get("support", {}).get("kind") not in FAMILY_OF_KIND:
        return False
    case = row["case"]
    where = computed_dtype(row), case.get("device", "cpu")
    return where == _FLOAT32_ON_CPU and not case.get("training") and case["expected"] == "win"


def geometric_mean(values: Iterable[float]) -> float:
    """Returns the n-th root of the product of n numbers."""
    logarithms = [math.log(value) for value in values]
    return math.exp(sum(logarithms) / len(logarithms))


def uncounted(data: Json) -> int:
    """Counts the rows that would count, had they been right and undisturbed."""
    return sum(_counts(row) for row in data["rows"]) - len(mac_shares(data))


def _value(case: Json) -> int | None:
    value: int | None = case["support"].get("value")
    return value


# Of a family: its name, and the layers of it.
MeanPart = tuple[str, Callable[[Json], bool]]
_PARTS: dict[str, tuple[MeanPart, ...]] = {
    HETCONV: (
        ("p=4", lambda case: _value(case) == 4),
        ("p=8", lambda case: _value(case) == 8),
        ("p=16", lambda case: _value(case) == 16),
        ("p=C", lambda case: _value(case) == case["c"]),
    ),
    SELF_GROUPING: (
        ("70 %", lambda case: _value(case) == 70),
        ("90 %", lambda case: _value(case) == 90),
        ("1×1", lambda case: case["k"] == 1),
    ),
}
_EVERY: tuple[MeanPart, ...] = (
    (
        "3×3 in channels_last with a target of its own",
        lambda case: (
            case.get("target") is not None
            and (case["k"], case.get("memory_format")) == (3, "channels_last")
        ),
    ),
)


def share_lines(data: Json) -> tuple[Sequence[str], list[list[str]]]:
    """Lays out the means: a line for each family, and for parts of it, which overlap."""
    header = (
        "layers", "rows", "share of the MAC ratio, geometric mean", "lowest", "highest", "wanted",
        "rows below", "lowest floor by bytes", "rows that bytes hold below",
    )  # fmt: skip
    lines = []
    for family, wanted in WANTED.items():
        mine = [share for share in mac_shares(data) if share.family == family]
        whole: MeanPart = ("", lambda case: True)
        for name, belongs in (whole, *_PARTS[family], *_EVERY):
            shares = [share for share in mine if belongs(share.case)]
            if not shares:
                continue
            found = [share.share for share in shares]
            mean = geometric_mean(found)
            allowed = [share.allowed for share in shares if share.allowed is not None]
            known = len(allowed) == len(shares)
            lines.append(
                [
                    f"{family}, {name}" if name else f"**{family}**",
                    str(len(shares)),
                    f"{mean:.3f}" if mean >= wanted else f"**{mean:.3f}**",
                    f"{min(found):.2f}",
                    f"{max(found):.2f}",
                    f"{wanted:g}",
                    str(sum(share.missed for share in shares)),
                    f"{min(allowed):.2f}" if known else "",
                    str(sum(value < wanted for value in allowed)) if known else "",
                ]
            )
    return header, lines


def missed_lines(data: Json) -> tuple[Sequence[str], list[list[str]]]:
    """Lays out each layer whose share is less than what is wanted of the mean, lowest first."""
    header = ("layer", "family", "MAC ratio", "× dense", "share", "wanted", "floor by bytes")
    missed = sorted((s for s in mac_shares(data) if s.missed), key=lambda s: s.share)
    return header, [
        [
            share.case["name"],
            share.family,
            f"{share.mac_ratio:.2f}",
            f"{share.speedup:.2f}",
            f"{share.share:.3f}",
            f"{WANTED[share.family]:g}",
            "" if share.allowed is None else f"{share.allowed:.2f}",
        ]
        for share in missed
    ]


def left_out_sentence(data: Json) -> str:
    """Says how many rows are not in the mean though they are of its kind; empty if none."""
    count = uncounted(data)
    rows = "1 row is" if count == 1 else f"{count} rows are"
    return f"{rows} left out: a wrong result, or other work on the machine." if count else ""


def share_page(data: Json) -> str:
    """Composes what the documentation says of a file, in Markdown: the means, and the misses."""
    means = tables.markdown_table(*share_lines(data))
    header, lines = missed_lines(data)
    misses = tables.markdown_table(header, lines, left=2) if lines else "No layer is below."
    return "\n\n".join(filter(None, (means, left_out_sentence(data), misses)))


def without_marks(lines: Iterable[Sequence[str]]) -> list[list[str]]:
    """Returns lines of a table in Markdown without their bold type."""
    return [[cell.replace("**", "") for cell in line] for line in lines]


def share_report(data: Json) -> list[str]:
    """Lists the lines that a terminal shows of a file; none where it has no such layer."""
    header, lines = share_lines(data)
    if not lines:
        return list(filter(None, [left_out_sentence(data)]))
    shown = tables.text_table(header, without_marks(lines), left=(0,)).splitlines()
    header, missed = missed_lines(data)
    if missed:
        shown += ["", *tables.text_table(header, missed, left=(0, 1)).splitlines()]
    sentence = left_out_sentence(data)
    return [*shown, *([sentence] if sentence else [])]
