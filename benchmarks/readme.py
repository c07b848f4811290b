# SPDX-License-Identifier: Apache-2.0
"""Writes what the README says of measurements, and its picture, from the committed results.

    python -m benchmarks.readme [--check]

It replaces what stands between the two markers and docs/speedup.svg, and nothing else.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks import papers, picture, summary

README = Path(__file__).resolve().parents[1] / "README.md"
SECTION_BEGIN = "<!-- measured: written by `python -m benchmarks.readme` -->"
END = "<!-- /measured -->"


def measured_section() -> str:
    """Composes the section: headlines, networks, layers, and the papers' numbers beside ours."""
    layers = summary.results(summary.LAYERS_FILE)
    parts = [
        "A *composition* is the same sparse layer or network out of PyTorch's own layers: grouped "
        "+ 1×1, or a gather and a convolution for each group.",
        "\n".join(f"- {line}" for line in headlines()),
        summary.networks_summary(),
        "Whole networks with HetConv p=4 (het4) or self-grouped at 70 % (sg70), how many times as "
        "fast as the fastest of PyTorch, torch.compile, ONNX Runtime and OpenVINO at the same "
        "precision, alternating with every baseline in one process. A bold number is a loss. "
        f"{summary.networks_provenance()}.",
        "![Measured speed-up of layers against their MAC ratio](docs/speedup.svg)",
        "Each point is a layer in float32, against the fastest dense form that PyTorch has "
        f"eagerly: {summary.provenance(layers)}. {summary.lost()}",
        papers.papers_table(),
        papers.papers_provenance(),
    ]
    return "\n\n".join(parts)


def headlines() -> list[str]:
    """Lists a layer, a network and a network in 8 bits, as measured."""
    found = [
        "**One layer**: 3×3 HetConv with p=4, 64 to 512 channels, needs "
        f"{summary.value_span(summary.mac_ratios('HetConv p=4'), 1)} times fewer "
        "multiply-accumulates and is "
        f"{summary.value_span(summary.speedups('HetConv p=4'))} times "
        "as fast as the fastest dense convolution in PyTorch (float32)."
    ]
    for title, case in (
        ("One network", "resnet18-het4"),
        ("In 8 bits", "resnet18-het4-int8"),
        ("In bfloat16", "resnet18-het4-bf16"),
    ):
        row = summary.network(case)
        if row is None or not row.get("dense"):
            continue
        dense, composition = row["dense"], row.get("composition")
        line = (
            f"**{title}**: ResNet-18 with HetConv p=4, {summary.images(row['case'])}, is "
            f"{dense['ratio']:.2f} times as fast as the fastest dense engine at that precision "
            f"({summary.engine_title(dense)})"
        )
        if composition:
            line += (
                f", and {composition['ratio']:.2f} times as fast as the fastest composition "
                f"({summary.engine_title(composition)})"
            )
        found.append(line + ".")
    return found


def updated_readme(text: str) -> str:
    """Returns a README with the section written anew.

    Raises:
        ValueError: the markers are not there, once each and in order.
    """
    if (text.count(SECTION_BEGIN), text.count(END)) != (1, 1) or text.index(
        SECTION_BEGIN
    ) > text.index(END):
        raise ValueError(f"README.md: expected {SECTION_BEGIN} and, after it, {END}, once each.")
    before, _, rest = text.partition(SECTION_BEGIN)
    return f"{before}{SECTION_BEGIN}\n\n{measured_section()}\n\n{END}{rest.partition(END)[2]}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if stale")
    options = parser.parse_args(arguments)
    now = README.read_text()
    wanted = updated_readme(now)
    drawn = picture.draw_svg()
    stale = [
        path.name
        for path, text in ((README, wanted), (picture.SVG, drawn))
        if not path.exists() or path.read_text() != text
    ]
    if options.check:
        agrees = "README.md and its picture agree with the results."
        print(f"stale: {', '.join(stale)}" if stale else agrees)
        return int(bool(stale))
    README.write_text(wanted)
    picture.SVG.write_text(drawn)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
