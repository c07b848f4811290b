# SPDX-License-Identifier: Apache-2.0
"""Frequency pruning: kernels lose DCT coefficients, which may come back during the search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ...errors import ArgumentError, mismatch
from ...graph import rules
from ...masks import BoolArray
from ...nn.dct import dct, idct
from ...nn.frequency import PATHS, FrequencyConv2d
from .. import ranks
from ..method import STEM, Method, is_stem
from ..run import Run, WeightLayer, support_of
from ..schedule import check_count, check_fraction, check_positive
from ..wildcards import check_patterns, first_that_fits

# Where between them a coefficient stays as it is, dead or live.
_LOW, _HIGH = 0.9, 1.1


@dataclass(frozen=True)
class FrequencyPruning(Method):
    """Frequency-domain dynamic pruning of convolution kernels.

    The weights are the orthonormal DCT coefficients of each kernel. At an iteration, with a
    probability that decays, the mask T of a layer is updated: T ← 0 where |F| < 0.9·t, T ← 1 where
    |F| ≥ 1.1·t, and unchanged between, with t = max(mean + c·std, 0) of the layer's |F|. Dropped
    coefficients do not count in the forward pass but keep their gradients, so they can come back.
    After the search the mask is frozen and the live coefficients are trained on.

    Source: Liu, Xu, Peng, Xiong, "Frequency-domain dynamic pruning for convolutional neural
    networks", NeurIPS 2018. Our reading; no code was published.

    Deviations: the probability of an update is 1 / (1 + ``decay``·iteration). The band-adaptive
    threshold of frequency (u, v) is t·(1 + ``band_slope``·(u + v)/(KH + KW − 2)), a straight line.
    1×1 kernels and fully-connected layers have one frequency, the weight itself: they stay dense,
    or with ``single`` lose weights by the same search. ``bands`` is ours: hardware can use it. A
    rate (``target``, ``layer_rates``, ``band_rates``) finds t where that fraction of the layer, or
    band, lies under it, instead of by mean and deviation, and the frozen mask has that rate
    exactly, or with ``bands`` as nearly as whole bands can, rather less.

    Attributes:
        c: how many standard deviations the threshold lies above the mean.
        target: the fraction of each layer's coefficients to have dropped; None leaves that to c.
        layer_rates: that of layers by name, or by a pattern such as ``"layer3.*"``, the first one
            that fits.
        band_rates: that of each band u + v of a layer, the last one of all higher bands too; of
            layers that ``layer_rates`` does not name.
        band_slope: how much higher the threshold is for the highest frequency; 0 is one for all.
        decay: of the probability of an update.
        bands: whether a frequency lives or dies for a whole layer, by the root mean square of its
            coefficients, instead of for each kernel.
        filters: with ``bands``, decides for each group of this many filters; 0 is the whole layer.
        single: whether layers of one tap, fully-connected and 1×1, are taken too: single weights
            go, with ``bands`` as well, and the layers become Supports.
        path: how the layers run: ``"frequency"`` (the paper), ``"spatial"`` (kernels transformed
            back), or ``"auto"`` for what is predicted faster, see `FrequencyConv2d`.
        search_epochs: of training with a changing mask.
        epochs: of training with the frozen mask.
        stem: whether a convolution that reads an image is taken too.

    Raises:
        ArgumentError: a value out of range.
    """

    title: ClassVar[str] = "frequency pruning"

    c: float = 0.0
    target: float | None = None
    layer_rates: Mapping[str, float] | None = None
    band_rates: Sequence[float] | None = None
    band_slope: float = 1.0
    decay: float = 0.01
    bands: bool = False
    filters: int = 0
    single: bool = False
    path: str = "auto"
    search_epochs: int = 30
    epochs: int = 90
    stem: bool = False

    def __post_init__(self) -> None:
        check_positive("c", abs(self.c), zero=True)
        if self.target is not None:
            check_fraction("target", self.target)
        for rate in (*(self.layer_rates or {}).values(), *(self.band_rates or ())):
            check_fraction("a rate", rate)
        if self.band_rates is not None and (not self.band_rates or self.target is not None):
            raise ArgumentError(
                mismatch("band_rates", list(self.band_rates), "one or more, and no target")
            )
        check_positive("band_slope", self.band_slope, zero=True)
        check_positive("decay", self.decay, zero=True)
        if self.path not in PATHS:
            raise ArgumentError(mismatch("path", repr(self.path), f"one of {PATHS}"))
        for name in ("filters", "search_epochs", "epochs"):
            check_count(name, getattr(self, name))

    def leaves_out(self, name: str, layer: WeightLayer) -> str | None:
        """Leaves out the stem and what has no frequencies."""
        if _has_one_tap(layer):
            return None if self.single else "its kernels have one tap, and so one frequency"
        assert isinstance(layer, nn.Conv2d)
        if layer.padding_mode != "zeros":
            return f"its padding mode is {layer.padding_mode!r}"
        return STEM if is_stem(layer) and not self.stem else None

    def check(self, run: Run) -> None:
        """Refuses a network without kernels to transform; those with a Support stay as they are."""
        for name in [name for name in run.layers if name in run.masks]:
            del run.layers[name]
            run.kept[name] = "it has a Support of single taps, which the transform would mix"
        super().check(run)
        check_patterns("layer_rates", self.layer_rates, run.layers)

    def run(self, run: Run) -> None:
        """Searches the mask while training, freezes it, and trains on."""
        masks = {}
        for name, layer in run.layers.items():
            masks[name] = _Coefficients(layer.weight.shape)
            masks[name].to(run.device)
            parametrize.register_parametrization(layer, "weight", masks[name])

        def after_step() -> None:
            iteration = int(run.tensors["iteration"])
            run.tensors["iteration"] += 1
            # Of its own generator: the global one differs from rank to rank.
            own = torch.Generator().manual_seed((run.seed * 1_000_003 + iteration) % 2**64)
            if float(torch.rand((), generator=own)) < 1 / (1 + self.decay * iteration):
                for name in run.layers:
                    self._update(run, masks[name], name)

        run.round("first mask", lambda: self._first(run, masks))
        run.train("search", self.search_epochs, after_step=after_step, decay=False)
        live = run.round("freeze the mask", lambda: self._freeze(run, masks))
        for mask in masks.values():
            mask.searching = False
        run.train("train", self.epochs)
        for layer in run.layers.values():
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
        for name in live:
            chosen = masks[name].mask.cpu().numpy()
            if _has_one_tap(run.layers[name]):
                run.choose(name, chosen)
            else:
                self._chosen(run)[name] = chosen

    def _first(self, run: Run, masks: dict[str, _Coefficients]) -> None:
        run.tensors["iteration"] = torch.zeros((), dtype=torch.int64)
        for name in run.layers:
            self._update(run, masks[name], name)

    def _sizes(self, run: Run, name: str) -> tuple[Tensor, Tensor]:
        """Returns the magnitudes of a layer's coefficients, and each frequency's threshold.

        # [F, C, KH, KW], [KH, KW]
        """
        layer: Any = run.layers[name]
        coefficients = ranks.mean_over_ranks(layer.parametrizations.weight.original)
        if coefficients.dim() == 2:
            coefficients = coefficients[:, :, None, None]
        whole = self.bands and not _has_one_tap(layer)
        size = magnitudes(coefficients, self.filters) if whole else coefficients.abs()
        rate = first_that_fits(name, self.layer_rates)
        rates = self.band_rates if rate is None else None
        rate = self.target if rate is None else rate
        if rates is not None:
            return size, band_limits(size, rates)
        if rate is not None:
            return size, rate_limits(size, rate, self.band_slope)
        return size, thresholds(size, self.c, self.band_slope)

    @torch.no_grad()
    def _update(self, run: Run, mask: _Coefficients, name: str) -> None:
        size, limit = self._sizes(run, name)
        old = mask.mask.view(size.shape)
        old.copy_(updated(old, size, limit.to(size.device)))

    @torch.no_grad()
    def _freeze(self, run: Run, masks: dict[str, _Coefficients]) -> dict[str, int]:
        for name, mask in masks.items():
            by_rate = (self.target, self.band_rates, first_that_fits(name, self.layer_rates))
            size, limit = self._sizes(run, name)
            live = mask.mask.view(size.shape)
            if any(rate is not None for rate in by_rate):
                live.copy_(size >= limit.to(size.device))
            if live.any():
                continue
            # A layer needs something: the mean of the patch, or each filter's largest weight.
            if _has_one_tap(run.layers[name]):
                live.copy_(size == size.amax((1, 2, 3), keepdim=True))
            else:
                live[:, :, 0, 0] = True
        ranks.check_same_supports({name: support_of(mask.mask) for name, mask in masks.items()})
        return {name: int(mask.mask.sum()) for name, mask in masks.items()}

    @staticmethod
    def _chosen(run: Run) -> dict[str, BoolArray]:
        found: dict[str, BoolArray] = vars(run).setdefault("coefficients", {})
        return found

    def rule(self, run: Run) -> rules.Rule:
        """Makes FrequencyConv2d of the layers."""
        chosen = self._chosen(run)

        def frequency(name: str, module: nn.Module) -> rules.Answer:
            if name in chosen and isinstance(module, nn.Conv2d):
                return FrequencyConv2d.from_conv2d(module, chosen[name], path=self.path)
            return None

        return rules.first_of(frequency, super().rule(run))


class _Coefficients(nn.Module):
    """Makes a layer's weight the inverse transform of masked coefficients (a parametrisation).

    Args:
        shape: of the weight.  # (F, C, KH, KW) or (F, C)
    """

    mask: Tensor

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.searching = True
        self.register_buffer("mask", torch.ones(shape, dtype=torch.bool))

    def forward(self, coefficients: Tensor) -> Tensor:
        """Masks and transforms back; while searching, dropped coefficients keep their gradients."""
        masked = coefficients * self.mask
        if self.searching:
            masked = coefficients + (masked - coefficients).detach()
        return masked if masked.dim() == 2 else idct(masked)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Transforms; the one frequency of a fully-connected layer is the weight itself."""
        return weight if weight.dim() == 2 else dct(weight)


def _has_one_tap(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) or layer.kernel_size == (1, 1)


def thresholds(size: Tensor, c: float, band_slope: float) -> Tensor:
    """Computes each frequency's threshold.  # [F, C, KH, KW] -> [KH, KW]

    Args:
        size: the magnitudes |F| of the coefficients.
        c: standard deviations (of the whole population) above the mean.
        band_slope: see `FrequencyPruning`.
    """
    base = max(float(size.mean() + c * size.std(correction=0)), 0.0)
    kh, kw = size.shape[2:]
    band = torch.arange(kh)[:, None] + torch.arange(kw)[None]
    return base * (1 + band_slope * band / max(kh + kw - 2, 1)).double()


def rate_limits(size: Tensor, rate: float, band_slope: float) -> Tensor:
    """Finds the thresholds that a fraction of all coefficients lies under.  # -> [KH, KW]

    Example: of the sizes 5, 1, 2 and 0 of a 2×2 kernel, by a slope of 0, half lies under 2.

    Args:
        size: the magnitudes |F| of the coefficients.  # [F, C, KH, KW]
        rate: the fraction.
        band_slope: see `FrequencyPruning`.
    """
    slope = thresholds(torch.ones_like(size), 0.0, band_slope).to(size.device)
    # Rounded as the sizes are, so that the smallest one that stays is no smaller than its limit.
    scaled = (size.double() / slope).flatten()
    kept = max(round((1 - rate) * scaled.numel()), 1)
    base = scaled.kthvalue(scaled.numel() - kept + 1).values
    return base * slope * (1 - 1e-12)


def band_limits(size: Tensor, rates: Sequence[float]) -> Tensor:
    """Finds the thresholds that a fraction of each band u + v lies under.  # -> [KH, KW]

    Args:
        size: the magnitudes |F| of the coefficients.  # [F, C, KH, KW]
        rates: by band, the last one of all higher bands too.
    """
    kh, kw = size.shape[2:]
    found = torch.zeros(kh, kw, dtype=torch.float64, device=size.device)
    band = (torch.arange(kh)[:, None] + torch.arange(kw)[None]).to(size.device)
    for number in range(kh + kw - 1):
        chosen = size[:, :, band == number]
        rate = rates[min(number, len(rates) - 1)]
        found[band == number] = rate_limits(chosen[..., None], rate, 0.0).max()
    return found


def updated(mask: Tensor, size: Tensor, limit: Tensor) -> Tensor:
    """Drops what is under 0.9·t, brings back what is at least 1.1·t, leaves what is between."""
    return (mask & (size >= _LOW * limit)) | (size >= _HIGH * limit)


def magnitudes(coefficients: Tensor, filters: int) -> Tensor:
    """Gives all coefficients of a frequency their root mean square, by groups of filters.

    # [F, C, KH, KW] -> [F, C, KH, KW]
    """
    groups = coefficients.split(filters or len(coefficients))
    means = [g.square().mean((0, 1), keepdim=True).sqrt().expand(g.shape) for g in groups]
    return torch.cat(means)
