# SPDX-License-Identifier: Apache-2.0
"""What the tables of methods compare: each method with its settings, and networks of the papers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import nn

import hetconv_kernels as hk
from benchmarks.problems import TaskSettings
from hetconv_kernels import methods
from hetconv_kernels.compression import Method

VGG16, RESNET56 = "VGG-16, 32², batch 8", "ResNet-56, 32², batch 8"
RESNET110, RESNET50 = "ResNet-110, 32², batch 8", "ResNet-50, 224², batch 1"
# What builds each network, the input, and the layers that the papers leave alone.
METHOD_NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[str, ...]]] = {
    VGG16: (hk.models.vgg16_cifar, (8, 3, 32, 32), ()),
    RESNET56: (hk.models.resnet56, (8, 3, 32, 32), ()),
    RESNET50: (hk.models.resnet50, (1, 3, 224, 224), ("*downsample*",)),
    RESNET110: (hk.models.resnet110, (8, 3, 32, 32), ()),
}


@dataclasses.dataclass(frozen=True)
class QualityRow:
    """One line of the tables of quality.

    Attributes:
        name: of the line.
        method: with its settings.
        paper: whether it is the paper's form; otherwise it is ours, for hardware.
        scratch: whether it begins from random weights, at the learning rate for that.
    """

    name: str
    method: Method
    paper: bool = True
    scratch: bool = False


def rows(settings: TaskSettings) -> list[QualityRow]:
    """Lists the lines of the tables of quality: each method as its paper has it, and in the form
    that hardware reads well.

    Args:
        settings: lengths of training, and what quality may be lost.
    """
    epochs, short, tolerance = settings.epochs, settings.short, settings.tolerance
    # On the way twice the tolerance is allowed, for stability thrice; the training at the end
    # brings it back.
    saved: dict[str, Any] = {"tolerance": 2 * tolerance, "target": 0.6, "epochs": epochs}
    by_pairs = saved | {"fraction": 0.1, "pair_epochs": 1, "tune_epochs": short,
                        "episodes": settings.steps}  # fmt: skip
    by_players = saved | {
        "fraction": 0.2, "threshold": 0.2, "prune_epochs": 1,
        "recover_epochs": short, "rounds": settings.steps,
    }  # fmt: skip
    by_change = saved | {
        "tolerance": 3 * tolerance, "fraction": 0.1, "probe_epochs": 1,
        "tune_epochs": 2 * short, "steps": settings.steps,
    }  # fmt: skip
    eights = {"multiple": 8, "fraction": 0.25}
    pull: dict[str, Any] = {
        "rates": (0.5, 0.7), "admm_epochs": 1, "updates": 3, "retrain_epochs": epochs // 2,
        "rho": 1e-2,
    }  # fmt: skip
    pull_blocks = pull | {"rates": (0.2, 0.4, 0.5, 0.6), "rho": 0.1}
    bands: dict[str, Any] = {"search_epochs": epochs, "epochs": epochs}
    groups: dict[str, Any] = {"target": 0.7, "epochs": epochs}
    local: dict[str, Any] = {"schedule": "LG", "local_epochs": short}
    return [
        QualityRow("HetConv p=4, projected", methods.Het(p=4, epochs=epochs), paper=False),
        QualityRow(
            "HetConv p=4, from scratch",
            methods.Het(p=4, scratch=True, epochs=settings.scratch_epochs),
            scratch=True,
        ),
        QualityRow("self-grouping G 70 %", methods.SelfGrouping(**groups)),
        QualityRow("self-grouping LG 70 %", methods.SelfGrouping(**groups, **local)),
        QualityRow(
            "self-grouping LG 60 %, runs of 8, tiles of 8",
            methods.SelfGrouping(
                **groups | {"target": 0.6} | local, granularity=8, tile=8, clusters=8
            ),
            paper=False,
        ),
        QualityRow("WSP 60 %", methods.WeakSubnetwork(0.6, epochs=epochs)),
        QualityRow(
            "WSP 60 %, widths of 8",
            methods.WeakSubnetwork(0.6, epochs=epochs, multiple=8),
            paper=False,
        ),
        QualityRow("filter correlation", methods.FilterCorrelation(**by_pairs)),
        QualityRow(
            "filter correlation, widths of 8",
            methods.FilterCorrelation(**by_pairs | eights),
            paper=False,
        ),
        QualityRow("Play and Prune", methods.PlayAndPrune(**by_players)),
        QualityRow(
            "Play and Prune, widths of 8",
            methods.PlayAndPrune(**by_players | {"multiple": 8, "threshold": 0.3}),
            paper=False,
        ),
        QualityRow("stability", methods.Stability(**by_change)),
        QualityRow("stability, widths of 8", methods.Stability(**by_change | eights), paper=False),
        QualityRow("frequency pruning", methods.FrequencyPruning(**bands, c=1.0, path="frequency")),
        QualityRow(
            "frequency pruning, path by prediction", methods.FrequencyPruning(**bands, c=1.0)
        ),
        QualityRow(
            "frequency pruning, whole bands",
            methods.FrequencyPruning(**bands, bands=True),
            paper=False,
        ),
        QualityRow("ADMM 70 %", methods.ADMM(**pull)),
        QualityRow("ADMM 70 %, kernels", methods.ADMM(**pull, projection="kernels"), paper=False),
        QualityRow(
            "ADMM 70 %, columns of 8 filters",
            methods.ADMM(**pull, projection="columns"),
            paper=False,
        ),
        QualityRow(
            "ADMM 60 %, blocks of 8×8",
            methods.ADMM(**pull_blocks, projection="blocks"),
            paper=False,
        ),
    ]


def speed_methods(network: str) -> dict[str, Method]:
    """Lists what the table of speed compresses a network with, without training.

    Args:
        network: one of `METHOD_NETWORKS`.
    """
    own = _papers_own().get(network, {})
    return own if network == RESNET110 else _for_all() | own


def _for_all() -> dict[str, Method]:
    """Lists what all networks but the deepest are compressed with, whatever their papers."""
    none: dict[str, Any] = {"epochs": 0}
    pull: dict[str, Any] = {"admm_epochs": 0, "updates": 1, "retrain_epochs": 0}
    return {
        "HetConv p=4": methods.Het(p=4, **none),
        "HetConv p=8": methods.Het(p=8, **none),
        "self-grouping 70 %": methods.SelfGrouping(target=0.7, step=0.7, **none),
        "self-grouping 70 %, runs of 16, tiles of 32": methods.SelfGrouping(
            target=0.7, step=0.7, granularity=16, tile=32, **none
        ),
        "WSP 70 %": methods.WeakSubnetwork(0.7, **none),
        "WSP 70 %, widths of 8": methods.WeakSubnetwork(0.7, multiple=8, **none),
        "filters removed, 6× fewer MACs, widths of 8": methods.FilterCorrelation(
            fraction=0.3, least_correlation=0.0, pair_epochs=0, tune_epochs=0, target=1 - 1 / 6,
            multiple=8, **none,
        ),
        "frequency pruning, coefficients": methods.FrequencyPruning(c=1.0, search_epochs=0, **none),
        "frequency pruning, whole bands": methods.FrequencyPruning(
            c=0.0, search_epochs=0, bands=True, filters=0, **none
        ),
        "ADMM 97 % (34×)": methods.ADMM(rates=(0.97,), **pull),
        "ADMM 75 %, blocks of 16×16": methods.ADMM(
            rates=(0.75,), projection="blocks", filters=16, channels=16, **pull
        ),
    }  # fmt: skip


def _papers_own() -> dict[str, dict[str, Method]]:
    """Lists the rates that the papers have of these very networks."""
    none: dict[str, Any] = {"epochs": 0}

    def removed(fraction: float) -> Method:
        # By correlation: the time depends on how many filters go, and not on which.
        return methods.FilterCorrelation(
            fraction=fraction, episodes=3, target=0.99, least_correlation=0.0, pair_epochs=0,
            tune_epochs=0, **none,
        )  # fmt: skip

    # By these the MACs fall by 9.2 as the paper counts them: see tests/test_seed_numbers.py.
    rates: dict[str, Any] = {
        "target": 0.8755, "layer_rates": {"layer[12].*": 0.9015}, "search_epochs": 0,
        "path": "frequency",
    }  # fmt: skip
    return {
        VGG16: {
            "filters removed, 6.03× fewer MACs": removed(0.2633),  # stability
            "filters removed, 6.43× fewer MACs": removed(0.2713),  # Play and Prune
        },
        # At 70 % the paper's trained weights lose 56.1 % of their channels. The two scores of
        # random weights know nothing of each other: of those, 0.749 · 0.749 are weak by both.
        RESNET50: {
            "WSP, as many channels as the paper's 70 %": methods.WeakSubnetwork(0.749, **none)
        },
        RESNET110: {
            "frequency pruning, the paper's rates": methods.FrequencyPruning(**rates, **none),
            "frequency pruning, the paper's rates, whole bands": methods.FrequencyPruning(
                **rates, bands=True, **none
            ),
        },
    }
