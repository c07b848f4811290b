# SPDX-License-Identifier: Apache-2.0
"""The bench: one case's primitives and their rivals on rotating buffers, each checked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import hetconv_kernels as hk
from benchmarks import baselines, gate
from benchmarks.cases import Case
from hetconv_kernels import ops
from hetconv_kernels.measure import timing
from hetconv_kernels.measure.timing import Call
from hetconv_kernels.packing import dense_weight, live_weight
from hetconv_kernels.problem import VERBS, Problem, make_geometry

TRAINING_STEP = "step"  # all three in turn: what a training step runs
LAST = torch.channels_last
# Measured beside the engine that was asked for, where they take a row.
ENGINES = ("triton", "cuda")


class Bench:
    """One case: tensors on rotating buffers, our primitives and their rivals.

    Attributes:
        case: what is measured.
        support: its Support.
        variants: verb -> name -> calls; names begin with ``ours``, ``dense`` or ``composition``.
    """

    def __init__(self, case: Case, backend: str, compiled: bool = False) -> None:
        self.case, self.code = case, hk.backends.backend_code(backend)
        self.support = case.build_support()
        self.geometry = make_geometry(self.support, case.stride, case.k // 2)
        self.frozen = make_geometry(self.support, case.stride, case.k // 2, frozen=True)
        device, self.dtype = torch.device(case.device), getattr(torch, case.dtype)
        torch.manual_seed(1)
        sets = 1
        if device.type == "cuda":
            sets = timing.rotations(case.bytes(self.support.live), device)

        def random(*shape: int) -> Tensor:
            drawn = torch.randn(*shape, device=device).to(self.dtype)
            return drawn.contiguous(memory_format=LAST)

        self.mask = torch.as_tensor(self.support.mask.copy(), device=device)
        self._truths: dict[str, tuple[Tensor, Tensor]] = {}
        self.weight = random(case.f, case.c, case.k, case.k) * self.mask
        self.live = live_weight(self.support, self.weight)
        self.inputs = [random(case.n, case.c, case.h, case.w)]
        self.grads = [random(case.n, case.f, *case.output)]
        for _ in range(sets - 1):  # the values are the same, the places in memory are not
            self.inputs.append(self.inputs[0].clone(memory_format=torch.preserve_format))
            self.grads.append(self.grads[0].clone(memory_format=torch.preserve_format))
        module, self.compiled = self._composition(), compiled
        self.variants = {
            verb: dict(self._variants(verb, module)) for verb in (*VERBS, TRAINING_STEP)
        }

    def described(self, verb: str) -> Problem:
        """Describes the calls of a verb."""
        x, dy, w = self.inputs[0], self.grads[0], self.weight
        first = x if verb == "fprop" else dy
        second = x if verb == "wgrad" else first
        return ops.describe(verb, self.geometry, first, second, w, tuple(x.shape[2:]))

    def check(self, verb: str, name: str) -> gate.Agreement:
        """Compares one variant of a verb with float64; dead gradients do not count."""
        matches = []
        found = self.variants[verb][name][0]()
        verbs = VERBS if verb == TRAINING_STEP else (verb,)
        for each, result in zip(verbs, found if verb == TRAINING_STEP else (found,), strict=True):
            # A composition's gradients of its own, differently shaped weights are not ours.
            if not isinstance(result, tuple):
                matches.append(self._match(each, name, result))
        return max(matches, key=lambda match: match.worst, default=gate.Agreement(True, 0.0, 0.0))

    def _match(self, verb: str, name: str, result: Tensor) -> gate.Agreement:
        if verb == "wgrad" and not name.startswith("ours"):
            result = dense_weight(self.support, result, result.dtype)
        value, bound = self._truth(verb)
        result = result[self._filters] if verb == "wgrad" else result[self._images]
        return gate.Truth((value,), (bound,)).match((result,))

    @property
    def _images(self) -> list[int]:
        return [0, -1] if self.case.n > 1 else [0]

    @property
    def _filters(self) -> list[int]:
        """Filters whose gradients are compared, spread over all."""
        return sorted({i * (self.case.f - 1) // 15 for i in range(16)})

    def _truth(self, verb: str) -> tuple[Tensor, Tensor]:
        """Returns the true values of a verb and their bounds, made once."""
        if verb not in self._truths:
            case, x, w, dy = self.case, self.inputs[0], self.weight, self.grads[0]
            if verb == "wgrad":
                w, dy = w[self._filters], dy[:, self._filters]
            else:
                x, dy = x[self._images], dy[self._images]
            # Trying out algorithms for one call in float64 would take longer than the call.
            with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
                truth = gate.truth(
                    x, w, dy, stride=case.stride, padding=case.k // 2, dtype=self.dtype
                )
            place = VERBS.index(verb)
            value, bound = truth.values[place], truth.bounds[place]
            if verb == "wgrad":
                value = value * (self.mask[self._filters])
            self._truths[verb] = value, bound
        return self._truths[verb]

    def _variants(self, verb: str, module: nn.Module | None) -> Iterator[tuple[str, list[Call]]]:
        pairs = list(zip(self.inputs, self.grads, strict=True))
        yield "ours", [self._ours(verb, x, dy, self.code) for x, dy in pairs]
        for name, code in self._others(verb):
            yield f"ours-{name}", [self._ours(verb, x, dy, code) for x, dy in pairs]
        if verb == "fprop":
            yield "ours-unfrozen", [self._ours("unfrozen", x, dy, self.code) for x, dy in pairs]
        yield "dense", [self._dense(verb, x, dy) for x, dy in pairs]
        if module is None:
            return
        if verb == "fprop":
            yield "composition", [lambda x=x: module(x) for x in self.inputs]
            if self.compiled:
                torch._dynamo.reset()  # what earlier cases compiled counts against a limit
                best = torch.compile(module, mode="max-autotune-no-cudagraphs", fullgraph=True)
                yield "compiled", [lambda x=x: best(x) for x in self.inputs]
        elif isinstance(module, baselines.GroupedPlusPointwise):
            convs = (module.grouped, module.pointwise)
            yield "composition", [self._gradients(verb, module, convs, x, dy) for x, dy in pairs]
        elif isinstance(module, nn.Conv2d):
            yield (
                "composition",
                [self._gradients(verb, module, (module,), x, dy) for x, dy in pairs],
            )

    def _others(self, verb: str) -> Iterator[tuple[str, int]]:
        """Lists our other engines that take this verb; of a training step, all its verbs."""
        problems = [self.described(each) for each in (VERBS if verb == TRAINING_STEP else (verb,))]
        for name in ENGINES:
            code = hk.backends.CODES[name]
            if code == self.code or name not in hk.available_backends(self.case.device):
                continue
            engine = hk.backends.get_backend(name)
            if not any(engine.unsupported_reasons(problem) for problem in problems):
                yield name, code

    def _ours(self, verb: str, x: Tensor, dy: Tensor, code: int) -> Call:
        geometry, w, live = self.geometry, self.weight, self.live
        size, shape = tuple(x.shape[2:]), tuple(w.shape)
        if verb == TRAINING_STEP:
            parts = [self._ours(each, x, dy, code) for each in ("unfrozen", "dgrad", "wgrad")]
            return lambda: tuple(part() for part in parts)
        if verb == "dgrad":
            return lambda: ops.run_dgrad(dy, w, geometry, size, code)
        if verb == "wgrad":
            return lambda: ops.run_wgrad(dy, x, geometry, shape, w.dtype, code)
        if verb == "unfrozen":
            return lambda: ops.run_fprop(x, w, geometry, None, code)
        return lambda: ops.run_fprop(x, live, self.frozen, None, code)

    def _dense(self, verb: str, x: Tensor, dy: Tensor) -> Call:
        case, w = self.case, self.weight
        if verb == "fprop":
            return lambda: torch.conv2d(x, w, None, case.stride, case.k // 2)
        part = (w, case.stride, case.k // 2, 1)
        if verb == TRAINING_STEP:
            forward = self._dense("fprop", x, dy)
            return lambda: (forward(), *self._backward(verb, x, dy, *part))
        return lambda: self._backward(verb, x, dy, *part)[0]

    def _gradients(
        self, verb: str, module: nn.Module, convs: Sequence[nn.Conv2d], x: Tensor, dy: Tensor
    ) -> Call:
        """The gradients of a sum of convolutions of one input, as autograd would compute them."""
        parts = [(c.weight.detach(), self.case.stride, int(c.padding[0]), c.groups) for c in convs]

        def run() -> Any:
            found = [self._backward(verb, x, dy, *part) for part in parts]
            if verb == "wgrad":
                return tuple(grads[0] for grads in found)
            dx = found[0][0] if len(found) == 1 else found[0][0] + found[1][0]
            return dx if verb == "dgrad" else (dx, tuple(grads[1] for grads in found))

        return (lambda: (module(x), *run())) if verb == TRAINING_STEP else run

    @staticmethod
    def _backward(
        verb: str, x: Tensor, dy: Tensor, w: Tensor, stride: int, padding: int, groups: int
    ) -> tuple[Tensor, ...]:
        """Returns dx, dw or both."""
        wanted = (verb != "wgrad", verb != "dgrad", False)
        found = torch.ops.aten.convolution_backward(
            dy, x, w, None, [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], groups, wanted
        )
        return tuple(t for t, want in zip(found, wanted, strict=True) if want)

    def _composition(self) -> nn.Module | None:
        found = baselines.compositions(self.case, self.support, self.weight)
        found.pop("mask-per-call", None)
        if not found:
            return None
        module: nn.Module = next(iter(found.values())).to(memory_format=LAST)  # type: ignore[call-overload]
        return module.requires_grad_(False)
