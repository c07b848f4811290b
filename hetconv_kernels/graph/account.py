# SPDX-License-Identifier: Apache-2.0
"""What `optimize` did to a network, or to a part of one, and how it says so."""

from __future__ import annotations

from dataclasses import dataclass

from .average import Average
from .compact import CompactReport
from .fold import Folded
from .order import Reordered
from .worth import LeftPlain


@dataclass(frozen=True)
class Part:
    """What was done to a network, or to the part of one that could be traced.

    Attributes:
        name: of the part; "" is the whole network.
        traced_by: ``torch.fx`` or ``torch.export``.
        compacted: what became smaller.
        reordered: which channels were put in another order.
        folded: what was fused.
        plain: layers that are PyTorch's own, since no Support pays there.
        brought: inputs that are brought into channels_last as they come in.
        averages: average poolings that are this package's, so that the engine computes them.
    """

    name: str
    traced_by: str
    compacted: CompactReport
    reordered: tuple[Reordered, ...]
    folded: Folded
    plain: tuple[LeftPlain, ...] = ()
    brought: tuple[str, ...] = ()
    averages: tuple[Average, ...] = ()


def account(part: Part) -> list[str]:
    """Says what was done to a part, line by line."""
    where = part.name or "the network"
    lines = [f"{where}, traced by {part.traced_by}"]
    shrunk = part.compacted.shrunk
    lines.append(
        f"  {len(shrunk)} layers made smaller" if shrunk else "  no dead channels to remove"
    )
    reasons: dict[str, list[int]] = {}
    for stayed in part.compacted.stayed:
        reasons.setdefault(stayed.reason, []).append(stayed.channels)
    for reason, dead in reasons.items():
        lines.append(f"    {sum(dead)} dead channels at {len(dead)} places stayed: {reason}")
    for moved in part.reordered:
        lines.append(
            f"  {moved.channels} channels of {', '.join(moved.layers)} put in order: "
            f"{moved.runs[0]} runs -> {moved.runs[1]}"
        )
    if not part.reordered:
        lines.append("  no order of channels with fewer runs was found")
    counts: dict[str, int] = {}
    for fused in part.folded.fused:
        counts[fused.parts] = counts.get(fused.parts, 0) + 1
    lines += [f"  {count} fused: {parts}" for parts, count in counts.items()]
    if part.folded.removed:
        lines.append(f"  {part.folded.removed} steps without effect removed (dropout, identity)")
    lines += [f"  {left.name} left alone: {left.reason}" for left in part.folded.left]
    lines += [f"  {left.name} left plain: {left.reason}" for left in part.plain]
    lines += [f"  {average.name} is averaged by the engine" for average in part.averages]
    lines += [f"  {name} is brought into channels_last" for name in part.brought]
    return lines
