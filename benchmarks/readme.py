# SPDX-License-Identifier: Apache-2.0
"""Writes what the README says of measurements, from the committed results.

    python -m benchmarks.readme [--check]

It replaces what stands between the two markers, and nothing else.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks import summary

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN = "<!-- measured: written by `python -m benchmarks.readme` -->"
END = "<!-- /measured -->"


def measured() -> str:
    """Composes the section: tables with their hardware, date and commit, losses included."""
    layers, prepacked = summary.results(summary.LAYERS), summary.results(summary.PREPACKED)
    narrow = summary.results(summary.NARROW)
    models = [
        f"`{name}.json`: {summary.provenance(data)}."
        for name, data in summary.all_results().items()
        if any(row["kind"] == "model" for row in data["rows"])
    ]
    against = summary.span(summary.ratios(summary.PREPACKED, "prepacked"))
    held = summary.span(summary.ratios(summary.NARROW, "dense"))
    against = summary.span(summary.ratios(summary.PREPACKED, "prepacked"))
    held = summary.span(summary.ratios(summary.NARROW, "dense"))
    steps = {
        kind: summary.span(
            summary.ratios(summary.LAYERS, "dense", training=True, kind=kind, value=value)
        )
        for kind, value in (("het", 4), ("self_group", 70))
    }
    parts = [
        "Layers in float32, batch 8, channels_last, in turn with every rival in one process. Times "
        "faster than the *fastest* dense form that PyTorch has eagerly; in brackets how many times "
        "fewer multiply-accumulates:",
        summary.grid(),
        f"{summary.provenance(layers)}.",
        f"A training step (fprop, dgrad, wgrad) of HetConv p=4 is {steps['het']} times faster than "
        f"the dense one, of self-grouping at 70 % {steps['self_group']} times (same run).",
        "**Losses** of the same run: every layer that was slower than any rival, in bold. A "
        "*composition* is the same result from several of PyTorch's own layers, such as grouped + "
        "1×1; the last column is against dense while the weights still change, so that they are "
        "packed anew at each call:",
        summary.losses(),
        "Beside weights that oneDNN has packed beforehand (as `torch.compile` with freezing does), "
        f"{len(prepacked['rows'])} of these layers are {against} times faster "
        f"({summary.provenance(prepacked)}). With engine and PyTorch held to AVX2, the "
        f"{len(narrow['rows'])} layers of that run are {held} times faster than dense "
        f"({summary.provenance(narrow)}).",
        "Whole networks, HetConv p=4 (het4) or self-grouped at 70 % (sg70), beside PyTorch, "
        "torch.compile, ONNX Runtime and OpenVINO; the composition is the same network out of "
        "PyTorch's own layers: grouped + 1×1, or a gather and a convolution for each group:",
        summary.networks(),
        "\n".join(models),
        "Every method in its paper's form, on a small network for the digits that scikit-learn "
        "ships; it is too small for some of them to pay:",
        summary.methods_table("digits", only_papers=True),
        f"{summary.methods_provenance('digits')}.",
        "The same methods on networks of the papers' shapes, untrained, at the papers' rates: "
        "times faster, of times fewer multiply-accumulates:",
        summary.methods_grid(),
        f"{summary.methods_provenance('speed')}.",
        f"{summary.right_picks()} ({summary.provenance(summary.calibration())}.)",
    ]
    return "\n\n".join(parts)


def updated(text: str) -> str:
    """Returns a README with the section written anew.

    Raises:
        ValueError: the markers are not there, once each and in order.
    """
    if (text.count(BEGIN), text.count(END)) != (1, 1) or text.index(BEGIN) > text.index(END):
        raise ValueError(f"README.md: expected {BEGIN} and, after it, {END}, once each.")
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{measured()}\n\n{END}{rest.partition(END)[2]}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if stale")
    options = parser.parse_args(arguments)
    now = README.read_text()
    wanted = updated(now)
    if options.check:
        print("README.md agrees with the results." if now == wanted else "README.md is stale.")
        return int(now != wanted)
    README.write_text(wanted)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
