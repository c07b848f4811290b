# SPDX-License-Identifier: Apache-2.0
"""The rig: builds a case's tensors, our layer and its rivals, and checks them before any timing.

It is of layers as users hold them: modules, frozen and not, under autocast, in every memory format.
`bench` is of primitives: operators called with ready geometries, each gradient alone, all engines
in one row. Both check with `gate` and rotate buffers by `timing`; they have no call in common.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

import hetconv_kernels as hk
from benchmarks import baselines, gate
from benchmarks.cases import Case
from hetconv_kernels.measure import timing
from hetconv_kernels.measure.timing import Call
from hetconv_kernels.packing import dense_weight, live_weight

_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
_SHORT = {"contiguous": "nchw", "channels_last": "nhwc"}
OURS, UNFROZEN, OURS_FLOAT32 = "ours", "ours-unfrozen", "ours-float32"
DENSE, COMPOSITION, PREPACKED = "dense", "composition", "prepacked"


class Rig:
    """One case on one backend, ready to be checked and timed.

    Attributes:
        case: what is measured.
        support: its Support.
        layer: our layer as a user holds it (frozen in inference).
        variants: name -> calls on rotating buffers (one call where the cache may be warm). Names
            begin with the role: ``ours``, ``ours-unfrozen``, ``dense``, ``composition``,
            ``prepacked``.
    """

    def __init__(
        self, case: Case, backend: str, *, rotate: bool = False, with_prepacked: bool = False
    ) -> None:
        self.case, self.backend = case, backend
        self.support = case.build_support()
        device, dtype = torch.device(case.device), getattr(torch, case.dtype)
        generator = torch.Generator().manual_seed(1)
        copies = 1
        if rotate:
            copies = timing.rotations(case.bytes(self.support.live), device)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device, dtype)

        mask = torch.as_tensor(self.support.mask.copy())
        self.weight = random(case.f, case.c, case.k, case.k) * mask.to(device, dtype)
        self.inputs = [random(case.n, case.c, case.h, case.w) for _ in range(copies)]
        self.grad_output = random(case.n, case.f, *case.output) if case.training else None
        self.layer = self._our_layer(frozen=not case.training)
        self.variants = self._variants(with_prepacked)

    def check(self) -> gate.Agreement:
        """Compares every variant with the truth, on the first and the last image.

        Returns:
            The worst match of all variants.
        """
        case = self.case
        computed = torch.bfloat16 if case.amp else getattr(torch, case.dtype)
        x, weight = self.inputs[0].to(computed), self.weight.to(computed)
        images = slice(None) if case.training or case.n == 1 else [0, -1]
        dy = None if self.grad_output is None else self.grad_output.to(computed)
        truth = gate.truth(
            x[images], weight, dy, stride=case.stride, padding=case.k // 2, dtype=computed
        )
        matches = []
        for name, calls in self.variants.items():
            results = gate.results_of(calls[0])
            results = (results[0][images], *results[1:])
            if len(results) > 1 and not name.startswith("ours"):
                # Gradients of a rival's own, differently shaped weights are not ours to judge.
                results = results[:2]
            matches.append(self._match(truth, results))
        return max(matches, key=lambda match: match.worst)

    def ran(self) -> str:
        """Names the backend that runs our layer."""
        layer, x = self.layer, self.inputs[0]
        if self.case.amp:  # autocast converts both before a backend is chosen
            layer, x = copy.deepcopy(layer).to(torch.bfloat16), x.to(torch.bfloat16)
        x = x.to(memory_format=_FORMATS[self.case.memory_format])
        return hk.explain(layer, x, measure=False).chosen

    def _match(self, truth: gate.Truth, results: tuple[Tensor, ...]) -> gate.Agreement:
        values = truth.values
        if len(results) == 3:  # the gradient of a dead weight means nothing
            y, dx, dw = results
            results = (y, dx, dense_weight(self.support, dw, dw.dtype))
            values = (*values[:2], dense_weight(self.support, values[2], values[2].dtype))
        kept = len(results)
        return gate.Truth(values[:kept], truth.bounds[:kept]).match(results)

    def _our_layer(self, *, frozen: bool) -> hk.nn.SupportConv2d:
        case = self.case
        more: dict[str, Any] = {
            "bias": False,
            "device": self.weight.device,
            "dtype": self.weight.dtype,
            "backend": None if self.backend == "auto" else self.backend,
        }
        shape = (case.c, case.f, case.k, case.stride, case.k // 2)
        layer: hk.nn.SupportConv2d
        if case.support.kind == "grouped":
            layer = hk.nn.GroupedConv2d(*shape, groups=case.support.value, **more)
            weight = live_weight(self.support, self.weight).view_as(layer.weight)
        else:
            layer = hk.nn.SupportConv2d(*shape, support=self.support, **more)
            weight = self.weight
        with torch.no_grad():
            layer.weight.copy_(weight)
        layer = _formatted(layer.train(case.training), case.memory_format)
        if frozen:
            layer.freeze()
        return layer

    def _variants(self, with_prepacked: bool) -> dict[str, list[Call]]:
        case = self.case
        found = {OURS: self._calls(self.layer, case.memory_format)}
        if case.dtype == "bfloat16" and case.device == "cpu" and not case.training:
            wide = copy.deepcopy(self._our_layer(frozen=False)).float()
            wide.freeze()
            images = (x.float() for x in self.inputs)
            found[OURS_FLOAT32] = [self._call(wide, case.memory_format, x) for x in images]
        if not case.training:
            unfrozen = self._our_layer(frozen=False)
            found[UNFROZEN] = self._calls(unfrozen, case.memory_format)
        rivals: dict[str, nn.Module] = {DENSE: baselines.dense_baseline(case, self.weight)}
        for name, module in baselines.compositions(case, self.support, self.weight).items():
            rivals[f"{COMPOSITION}:{name}"] = module
        for name, module in rivals.items():
            for form in _FORMATS:
                found[f"{name}:{_SHORT[form]}"] = self._calls(copy.deepcopy(module), form)
        if with_prepacked and not case.training and not case.amp:
            torch.compiler.reset()  # what earlier cases compiled counts against a limit
            for form, memory_format in _FORMATS.items():
                module = _formatted(copy.deepcopy(rivals[DENSE]), form)
                x = self.inputs[0].to(memory_format=memory_format)
                compiled = baselines.prepacked(module, x)
                found[f"{PREPACKED}:{_SHORT[form]}"] = self._calls(compiled, form, shared=True)
        return found

    def _calls(self, module: nn.Module, form: str, *, shared: bool = False) -> list[Call]:
        """One call per set of buffers; the weights are copied too, as a network has many."""
        calls = []
        for place, x in enumerate(self.inputs):
            own = module if shared or place == 0 else copy.deepcopy(module)
            calls.append(self._call(own, form, x))
        return calls

    def _call(self, module: nn.Module, form: str, x: Tensor) -> Call:
        case, kind, memory_format = self.case, self.case.device, _FORMATS[form]
        if not isinstance(module, hk.nn.SupportConv2d):
            module = _formatted(module, form)
        x = x.to(memory_format=memory_format, copy=True)
        if not case.training:
            if not case.amp:
                return lambda: module(x)

            def mixed() -> Tensor:
                with torch.autocast(kind, torch.bfloat16):
                    return module(x)

            return mixed

        x.requires_grad_()
        leaves: list[Any] = [x, *module.parameters()]
        assert self.grad_output is not None
        dy = self.grad_output.to(memory_format=memory_format)

        def step() -> tuple[Tensor, ...]:
            with torch.autocast(kind, torch.bfloat16, enabled=case.amp):
                y = module(x)
            return (y, *torch.autograd.grad(y, leaves, dy.to(y.dtype)))

        return step


def _formatted(module: Any, form: str) -> Any:
    """Brings a module's weights to a memory format (torch's types do not know the argument)."""
    return module.to(memory_format=_FORMATS[form])
