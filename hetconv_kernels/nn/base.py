# SPDX-License-Identifier: Apache-2.0
"""SupportLayer: the life of a layer with a Support: projection, freezing, checkpoints."""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..errors import SupportError, mismatch
from ..packing import bits_on, dense_weight, live_weight, mask_on
from ..problem import Geometry
from ..support import Support


class SupportLayer(nn.Module):
    """What a layer with a Support does besides its forward: freezing, projection, checkpoints.

    The `weight` is an ordinary dense Parameter while training, so ``nn`` checkpoints, initialisers,
    weight decay, averaging and DDP work as they are. Dead entries are ignored by every engine and
    kept at zero by `project_`. `freeze` leaves only the live vector, `thaw` goes back.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    frozen: bool = False

    _geometry: Geometry
    # Layers whose Support follows from their arguments refuse a checkpoint that contradicts it.
    _fixed_support: Support | None = None

    @property
    def support(self) -> Support:
        """Which weights exist; assigning another one projects the weight onto it."""
        return self._geometry.support

    @support.setter
    def support(self, support: Support) -> None:
        self.set_support(support)

    @property
    def _dense_shape(self) -> tuple[int, ...]:
        """The shape of the weight while it is not frozen."""
        return self.support.shape

    def set_support(self, support: Support, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Changes the Support and projects weight, gradient and optimiser slots onto it.

        Args:
            support: of the same shape as the present one.
            optimizer: the one that trains this layer, if its slots are to be projected too.

        Raises:
            SupportError: the shape differs, or the layer is frozen.
        """
        if support.shape != self.support.shape:
            raise SupportError(mismatch("Support of a layer", support.shape, self.support.shape))
        if self.frozen:
            raise SupportError("a frozen layer cannot change its Support. Call thaw() first.")
        self._place(support)
        self.project_(optimizer)

    def _place(self, support: Support) -> None:
        old = self._geometry
        self._geometry = Geometry(support, old.stride, old.pads, old.dilation)

    def live_parameters(self) -> int:
        """Counts the weights that exist, and the bias: the number that papers quote."""
        return self.support.live + (0 if self.bias is None else self.bias.numel())

    @torch.no_grad()
    def project_(self, optimizer: torch.optim.Optimizer | None = None) -> Self:
        """Zeroes dead entries in the weight, its gradient, and the optimiser's slots, in place.

        Args:
            optimizer: the one that trains this layer, if its slots are to be projected too.

        Returns:
            The layer itself.
        """
        if self._all_live:
            return self
        targets: list[Tensor] = [self.weight]
        if self.weight.grad is not None:
            targets.append(self.weight.grad)
        if optimizer is not None:
            slots = optimizer.state.get(self.weight, {}).values()
            targets += [s for s in slots if isinstance(s, Tensor) and s.shape == self.weight.shape]
        for target in targets:
            if not target.is_meta:
                target.masked_fill_(~self._mask(target.device), 0)
        return self

    @property
    def _all_live(self) -> bool:
        return self.frozen or self.support.is_dense

    def _mask(self, device: torch.device) -> Tensor:
        return mask_on(self.support, device).view(self._dense_shape)

    def freeze(self) -> Self:
        """Keeps only the live vector, for inference; engines then keep their packed form of it.

        Returns:
            The layer itself.
        """
        if not self.frozen:
            self._weight_trained = self.weight.requires_grad
            self.weight = nn.Parameter(self._to_live(self.weight.detach()), requires_grad=False)
            self.frozen = True
        return self

    def thaw(self) -> Self:
        """Goes back to a dense, trainable weight.

        Returns:
            The layer itself.
        """
        if self.frozen:
            dense = self._to_dense(self.weight.detach())
            self.frozen = False
            self.weight = nn.Parameter(dense, requires_grad=self._weight_trained)
        return self

    def _to_live(self, dense: Tensor) -> Tensor:
        return live_weight(self.support, dense.view(self.support.shape))

    def _to_dense(self, live: Tensor) -> Tensor:
        return dense_weight(self.support, live, live.dtype).view(self._dense_shape)

    @torch.no_grad()
    def _initialise(self) -> None:
        """Initialises like ``nn.Conv2d``, each filter by its *live* fan-in."""
        if self.weight.is_meta:
            return
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        fan_in = self._live_fan_in()
        full = math.prod(self.weight.shape[1:])
        gain = (full / fan_in.to(self.weight)).sqrt()
        self.weight.mul_(gain.view(-1, *[1] * (self.weight.dim() - 1)))
        if self.bias is not None:
            nn.init.uniform_(self.bias, -1, 1)
            self.bias.div_(fan_in.to(self.bias).sqrt())
        self.project_()

    def _live_fan_in(self) -> Tensor:
        """Counts the live weights of each filter, at least one.  # [F]"""
        mask = self.support.mask
        return torch.tensor(mask.sum((1, 2, 3)).clip(1), device=self.weight.device)

    # Moving and saving ------------------------------------------------------------------------

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        # The mask bits follow the weight here, so that no call has to move them.
        bits_on(self.support, self.weight.device)
        return self

    def get_extra_state(self) -> dict[str, str]:
        """Saves the Support beside the weight."""
        return {"support": self.support.to_json()}

    def set_extra_state(self, state: Any) -> None:
        """Is done by `_load_from_state_dict`, which needs the Support before the weight."""

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        extra = state_dict.get(prefix + "_extra_state")
        support = self.support if extra is None else self._adopted(extra)
        self._place(support)
        weight = state_dict.get(prefix + "weight")
        if weight is not None:
            state_dict[prefix + "weight"] = self._loaded(weight)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        # An nn.Conv2d checkpoint has no Support, and needs none.
        missing_keys[:] = [key for key in missing_keys if key != prefix + "_extra_state"]

    def _adopted(self, extra: Any) -> Support:
        """Reads a saved Support and refuses one that contradicts the layer."""
        if not isinstance(extra, dict) or "support" not in extra:
            raise SupportError(
                mismatch("extra state", type(extra).__name__, "what get_extra_state saved")
            )
        saved = Support.from_json(extra["support"])
        if saved.shape != self.support.shape:
            raise SupportError(
                mismatch("shape of the checkpoint's Support", saved.shape, self.support.shape)
            )
        fixed = self._fixed_support
        if fixed is not None and saved & fixed != saved:
            raise SupportError(
                mismatch(
                    "Support of the checkpoint",
                    saved,
                    f"weights within {fixed}",
                    "Build the layer with the order and p that the checkpoint was trained with.",
                )
            )
        return saved

    def _loaded(self, weight: Tensor) -> Tensor:
        """Brings a checkpoint's weight, dense or live, to the form that the layer has now."""
        support = self.support
        if weight.shape == (support.live,) and weight.shape != self._dense_shape:
            return weight if self.frozen else self._to_dense(weight)
        if weight.shape != self._dense_shape:
            return weight  # nn.Module reports the mismatch
        if self.frozen:
            return self._to_live(weight)
        if support.is_dense or weight.is_meta:
            return weight
        return weight.masked_fill(~self._mask(weight.device), 0)


Layer = nn.Conv2d | nn.Linear | SupportLayer


def take_parameters(target: Layer, source: Layer, weight: Tensor) -> None:
    """Gives target copies of a weight and of source's bias, and source's flags."""
    copy = weight.detach().clone(memory_format=torch.preserve_format)
    target.weight = nn.Parameter(copy, requires_grad=source.weight.requires_grad)
    if source.bias is not None:
        target.bias = nn.Parameter(
            source.bias.detach().clone(),
            requires_grad=source.bias.requires_grad,
        )
    target.train(source.training)
    if isinstance(target, SupportLayer):
        bits_on(target.support, copy.device)
        target.project_()
