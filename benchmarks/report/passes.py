# SPDX-License-Identifier: Apache-2.0
"""The timeline of a network in the report: one pass, layer after layer, dense and ours."""

from __future__ import annotations

from hetconv_kernels.colours import light
from hetconv_kernels.files import Json

from .figures import Picture, _axes, _ms, _styled

# A layer's name is written into its segment where that is at least this share of the longer pass.
_NAMED = 0.045


@_styled
def timeline(name: str, row: Json) -> Picture | None:
    """Draws the layers of a network in the order in which they run, each as long as it takes.

    Args:
        name: of the picture.
        row: of a network, with ``layers``: by name the dense time and ours, in seconds.

    Returns:
        The picture; None where the row does not say what the whole dense network took.
    """
    layers = [(layer, *times[:2]) for layer, times in row["layers"].items()]
    dense = [(layer, before) for layer, before, _ in layers if before is not None]
    variants = row.get("timings", {}).get("dense", {}).get("variants", {})
    if "dense:eager" not in variants:
        return None
    passes = [
        ("dense", variants["dense:eager"]["median_s"], dense),
        ("ours", row["median_s"], [(layer, after) for layer, _, after in layers]),
    ]
    longest = max(max(whole, sum(s for _, s in parts)) for _, whole, parts in passes)
    figure, axes = _axes(8.0, 2.5)
    tips = {}
    for place, (label, whole, parts) in enumerate(passes):
        start = 0.0
        rest = whole - sum(seconds for _, seconds in parts)
        behind = [("everything else", rest)] if rest > 0 else []
        for number, (layer, seconds) in enumerate([*parts, *behind]):
            own = number < len(parts)
            role = ("dense" if label == "dense" else "blue") if own else "rule"
            (bar,) = axes.barh(
                place, seconds * 1e3, 0.62, left=start * 1e3, color=light(role),
                edgecolor=light("page"), linewidth=0.6,
            )  # fmt: skip
            bar.set_gid(f"{name}-{label}-{number}")
            tips[f"{name}-{label}-{number}"] = f"{label}, {layer}: {_ms(seconds)}"
            if seconds > _NAMED * longest:
                said = layer.rpartition(".")[2] if own else "else"
                axes.annotate(
                    said, ((start + seconds / 2) * 1e3, place), ha="center", va="center",
                    fontsize=7, color=light("page" if own else "ink"),
                )  # fmt: skip
            start += seconds
    axes.set_yticks(range(len(passes)), [label for label, *_ in passes])
    axes.tick_params(axis="y", length=0, labelcolor=light("ink"))
    axes.set_ylim(len(passes) - 0.4, -0.6)
    axes.set_xlim(0, longest * 1e3 * 1.02)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("ms since the pass began")
    case = row["case"]
    return Picture(
        name,
        f"{case['name']}: timeline of a pass",
        f"One pass of {case['network']}, batch {case['n']}, {case['size']} pixels, as two bars: "
        f"its {len(layers)} convolutions in the order in which they run, and everything else "
        f"behind them. Dense, in PyTorch: {_ms(passes[0][1])}; ours: {_ms(passes[1][1])}. Each is "
        "a median of its own, so that they need not add up to the whole; where the layers alone "
        "add up to more, nothing is drawn behind them.",
        figure,
        tips,
    )
