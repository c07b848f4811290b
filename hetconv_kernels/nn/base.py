# SPDX-License-Identifier: Apache-2.0
"""SupportLayer: the life of a layer with a Support: projection, freezing, checkpoints."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from .. import backends
from ..errors import InputTypeError, SupportError, TraceError, mismatch
from ..packing import bits_on, dense_weight, forget, live_weight, mask_on, owned
from ..problem import Geometry, memory_format
from ..support import Support
from .extra_state import described_by, extra_state

# What torch.fx's tracers put in the place of tensors; of no type that a checker could follow.
STAND_IN: Any = Proxy


def as_step(layer: nn.Module, *operands: Any) -> Any:
    """Records a layer as one step of a graph: its forward was given what a tracer of torch.fx made.

    Such a tracer goes into every module that is not of torch.nn; the layers of this package ask
    their operands for what only tensors have.

    Raises:
        TraceError: the layer is the whole network, which is no step of itself.
    """
    tracer: Any = next(o.tracer for o in operands if isinstance(o, Proxy))
    name = tracer.path_of_module(layer)
    if not name:
        raise TraceError(
            mismatch(
                f"{type(layer).__name__} for torch.fx",
                "the layer alone",
                "a network that it is in",
                "Trace torch.nn.Sequential(layer); torch.export takes the layer itself.",
            )
        )
    return tracer.create_proxy("call_module", name, operands, {})


class ForcedBackend(nn.Module):
    """A module that an engine can be forced on."""

    _backend: str | None = None
    _code: int | None = None

    @property
    def backend(self) -> str | None:
        """The engine that this layer is forced to, None to follow `use_backend`."""
        return self._backend

    @backend.setter
    def backend(self, name: str | None) -> None:
        self._code = None if name is None else backends.backend_code(name)
        self._backend = name

    def _backend_code(self) -> int:
        code = self._code
        return backends.forced_code() if code is None else code


class SupportLayer(ForcedBackend):
    """What a layer with a Support does besides its forward: freezing, projection, checkpoints.

    The `weight` is an ordinary dense Parameter while training, so ``nn`` checkpoints, initialisers,
    weight decay, averaging and DDP work as they are. Dead entries are ignored by every engine and
    kept at zero by `project_`. `freeze` leaves only the live vector, `thaw` goes back.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

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
    def frozen(self) -> bool:
        """Whether only the live weights are left, see `freeze`."""
        return self._geometry.frozen

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
            InputTypeError: ``support`` is not a Support.
            SupportError: the shape differs, the class of the layer rules it out (a HetConv2d stays
                within its p and order), or the layer is frozen.
        """
        self._check_support(support)
        if self.frozen:
            raise SupportError("a frozen layer cannot change its Support. Call thaw() first.")
        old = self._geometry
        self._geometry = Geometry(support, old.stride, old.pads, old.dilation)
        bits_on(support, self.weight.device)
        self.project_(optimizer)

    def _check_support(self, support: Support) -> None:
        """Refuses a Support that this layer cannot take, whoever brings it."""
        if not isinstance(support, Support):
            raise InputTypeError(
                mismatch("support", type(support).__name__, "a Support", "See Support.from_mask.")
            )
        if support.shape != self.support.shape:
            raise SupportError(mismatch("shape of a Support", support.shape, self.support.shape))
        fixed = self._fixed_support
        if fixed is not None and support & fixed != support:
            raise SupportError(
                mismatch(
                    f"Support of {type(self).__name__}",
                    support,
                    f"weights within {fixed}",
                    "Build the layer with the order and p that a checkpoint was trained with.",
                )
            )

    def live_parameters(self) -> int:
        """Counts the weights that exist, and the bias: the number that papers quote."""
        return self.support.live + (0 if self.bias is None else self.bias.numel())

    @torch.no_grad()
    def project_(self, optimizer: torch.optim.Optimizer | None = None) -> Self:
        """Zeroes dead entries in the weight, its gradient, and the optimiser's slots, in place.

        A parametrised weight (``torch.nn.utils.parametrize``, pruning hooks) is computed anew at
        each call and left as it is: dead entries are ignored whatever they hold.

        Args:
            optimizer: the one that trains this layer, if its slots are to be projected too.

        Returns:
            The layer itself.
        """
        if self._all_live or not self._owns_weight:
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

    @property
    def _owns_weight(self) -> bool:
        """Whether the weight is this module's Parameter, not what a parametrisation computes."""
        return "weight" in self._parameters

    def _mask(self, device: torch.device) -> Tensor:
        return mask_on(self.support, device).view(self._dense_shape)

    def freeze(self) -> Self:
        """Keeps only the live vector, for inference; engines then keep their packed form of it.

        It is packed anew when the weight is another tensor, has another storage, or was written to
        in place: by ``copy_``, ``load_state_dict``, ``to``, an assignment to ``weight.data``. Not
        seen is a write into its memory past PyTorch's version counter: ``weight.data.mul_(2)``, one
        through NumPy, or through a tensor whose memory the weight was given by ``weight.data = t``,
        as ``vector_to_parameters`` does. Call freeze() again after such a write. Layers that are
        not frozen keep nothing and see every write.

        Returns:
            The layer itself.

        Raises:
            SupportError: the weight is parametrised.
        """
        if self.frozen:
            forget(self.support, self.weight)
        else:
            if not self._owns_weight:
                raise SupportError(
                    "the weight of this layer is computed by a parametrisation; freeze() expects a "
                    "plain Parameter. Call torch.nn.utils.parametrize.remove_parametrizations "
                    "(or torch.nn.utils.prune.remove) first."
                )
            self._weight_trained = self.weight.requires_grad
            # Not the memory format itself, which cannot be pickled.
            last = memory_format(self.weight, self.weight) == torch.channels_last
            self._weight_channels_last = last
            live = self._to_live(self.weight.detach())
            self.weight = nn.Parameter(owned(live), requires_grad=False)
            self._geometry = replace(self._geometry, frozen=True)
        return self

    def thaw(self) -> Self:
        """Goes back to a dense, trainable weight.

        Returns:
            The layer itself.
        """
        if self.frozen:
            dense = self._to_dense(self.weight.detach())
            if self._weight_channels_last:
                dense = dense.contiguous(memory_format=torch.channels_last)
            self._geometry = replace(self._geometry, frozen=False)
            self.weight = nn.Parameter(dense, requires_grad=self._weight_trained)
        return self

    def dense_weight(self) -> Tensor:
        """Returns a copy of the weight as it is while not frozen, dead entries zero."""
        weight = self.weight.detach()
        return self._to_dense(weight) if self.frozen else self._masked(weight)

    def _masked(self, dense: Tensor) -> Tensor:
        # In place on a copy: out of place, masked_fill does not keep channels_last.
        dense = dense.clone()
        return dense if self._all_live else dense.masked_fill_(~self._mask(dense.device), 0)

    def _to_live(self, dense: Tensor) -> Tensor:
        if dense.is_meta:  # has no entries to pick from
            return dense.new_empty(self.support.live)
        return live_weight(self.support, dense)

    def _to_dense(self, live: Tensor) -> Tensor:
        return dense_weight(self.support, live, live.dtype).view(self._dense_shape)

    @torch.no_grad()
    def _initialise(self) -> None:
        """Initialises like ``nn.Conv2d``, each filter by its *live* fan-in."""
        if self.weight.is_meta:
            return
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        # float64, since float16 does not reach a fan-in of 65536.
        fan_in = self._live_fan_in().double()
        gain = (math.prod(self.weight.shape[1:]) / fan_in).sqrt()
        self.weight.mul_(gain.view(-1, *[1] * (self.weight.dim() - 1)))
        if self.bias is not None:
            nn.init.uniform_(self.bias, -1, 1)
            self.bias.div_(fan_in.sqrt())
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
        if self.frozen and self._owns_weight:
            self._frozen_weight()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # copies and pickles
        if self.__dict__.pop("frozen", False):  # where older pickles have it
            self._geometry = replace(self._geometry, frozen=True)
        if self.frozen and self._owns_weight:
            self._frozen_weight()

    def _operands(self) -> tuple[Tensor, Tensor | None]:
        """Returns weight and bias, past nn.Module's search, which takes a tenth of a short call."""
        own, frozen = self._parameters, self._geometry.frozen
        weight = own.get("weight")
        if torch.compiler.is_compiling() or weight is None or (frozen and weight.is_inference()):
            return self._frozen_weight() if frozen else self.weight, self.bias
        # One that a replica or a parametrisation keeps elsewhere is found by the search.
        return weight, own["bias"] if "bias" in own else self.bias  # noqa: SIM401

    def _weight_as(self, frozen: bool) -> tuple[Tensor, Geometry]:
        """Returns what describes the weight in a call, as it is or as freezing would leave it."""
        if not frozen or self.frozen:
            return self.weight, self._geometry
        return self.weight.new_empty(self.support.live), replace(self._geometry, frozen=True)

    def _frozen_weight(self) -> Tensor:
        """Returns the weight of a frozen layer, made anew first where it is an inference tensor."""
        weight = self.weight
        if torch.compiler.is_compiling() or not self._owns_weight:
            return weight
        if weight.is_inference() and not weight.is_meta:
            with torch.inference_mode(False):
                weight = self.weight = nn.Parameter(owned(weight), weight.requires_grad)
        return weight

    def get_extra_state(self) -> Tensor:
        """Saves the Support beside the weight, as a tensor.  # uint8"""
        return extra_state({"support": self.support.to_json()})

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
        if extra is not None:
            self._adopt(extra)
        weight = state_dict.get(prefix + "weight")
        if isinstance(weight, Tensor):
            state_dict[prefix + "weight"] = self._loaded(weight.detach())
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        # An nn.Conv2d checkpoint has no Support, and needs none.
        missing_keys[:] = [key for key in missing_keys if key != prefix + "_extra_state"]

    def _adopt(self, extra: Any) -> None:
        """Takes over a saved Support, unless it contradicts the layer."""
        saved = Support.from_json(described_by(extra, "support"))
        self._check_support(saved)
        if saved != self.support:
            # The live vector of a frozen layer changes its length with the Support.
            frozen = self.frozen
            self.thaw().set_support(saved)
            if frozen:
                self.freeze()

    def _loaded(self, weight: Tensor) -> Tensor:
        """Brings a checkpoint's weight, dense or live, to the form that the layer has now."""
        support = self.support
        if weight.shape == (support.live,) and weight.shape != self._dense_shape:
            return weight if self.frozen else self._to_dense(weight)
        if weight.shape != self._dense_shape:
            return weight  # nn.Module reports the mismatch
        if self.frozen:
            return self._to_live(weight)
        return weight if self._all_live or weight.is_meta else self._masked(weight)


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
