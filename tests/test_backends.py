# SPDX-License-Identifier: Apache-2.0
"""The registry and the choice; what `vendor` and `reference` promise."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import hetconv_kernels as hk
from hetconv_kernels import backends, ops
from hetconv_kernels.backends import Choice, choose, get_backend
from hetconv_kernels.errors import BackendError
from hetconv_kernels.packing import FrozenCache
from hetconv_kernels.problem import Problem, make_geometry
from hetconv_kernels.testing import error_bound, oracle


def problem(verb: str = "fprop", **changes: object) -> Problem:
    geometry = make_geometry(hk.Support.het(8, 12, 3, p=4), 1, 1)
    x, w = torch.randn(2, 8, 6, 6), torch.randn(12, 8, 3, 3)
    first = x if verb == "fprop" else torch.randn(2, 12, 6, 6)
    made = ops.describe(verb, geometry, first, x, w, (6, 6))
    return Problem(**{**{f: getattr(made, f) for f in made.__dataclass_fields__}, **changes})


class Fake:
    """An engine with a settable prediction."""

    name = "triton"

    def __init__(self, factor: float, measured: bool = False, reasons: tuple[str, ...] = ()):
        self.factor, self.is_measured, self.reasons = factor, measured, reasons

    def unsupported_reasons(self, problem: Problem) -> list[str]:
        return list(self.reasons)

    def estimate(self, problem: Problem) -> float:
        return get_backend("vendor").estimate(problem) * self.factor

    def measured(self, problem: Problem) -> bool:
        return self.is_measured

    def efficiency(self, problem: Problem) -> float:
        return 1.0

    def fprop(self, problem: Problem):  # type: ignore[no-untyped-def]
        return lambda *tensors: "ran the fake"

    dgrad = wgrad = fprop


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    def install(*engines: object) -> None:
        table = {n: backends._engines()[n] for n in ("vendor", "reference")}
        table |= {e.name: e for e in engines}  # type: ignore[attr-defined]
        monkeypatch.setattr(backends, "_engines", lambda: table)

    return install


@pytest.mark.parametrize(
    ("factor", "measured", "winner"),
    [
        (0.5, True, "triton"),
        (0.99, True, "triton"),
        (1.01, True, "vendor"),
        (0.5, False, "triton"),
        (0.8, False, "vendor"),  # unmeasured hardware asks for 1.3x
        (1 / 1.31, False, "triton"),
    ],
)
def test_auto_leaves_vendor_only_for_a_better_prediction(
    registry, factor: float, measured: bool, winner: str
) -> None:
    registry(Fake(factor, measured))
    assert choose(problem(), 0).backend.name == winner


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize(
    ("factor", "chosen"), [(0.99, "always"), (1.04, "frozen"), (1.06, "never")]
)
def test_a_tie_is_the_engines_where_the_layer_is_frozen(
    registry, factor: float, chosen: str, frozen: bool
) -> None:
    registry(Fake(factor, measured=True))
    geometry = make_geometry(hk.Support.het(8, 12, 3, p=4), 1, 1, frozen=frozen)
    x, w = torch.randn(2, 8, 6, 6), torch.randn(geometry.support.live)
    made = ops.describe("fprop", geometry, x, x, w, (6, 6))
    taken = chosen == "always" or (chosen == "frozen" and frozen)
    assert (choose(made, 0).backend.name == "triton") is taken


def test_auto_passes_over_an_engine_with_reasons(registry) -> None:
    registry(Fake(0.1, True, reasons=("It is too old.",)))
    assert choose(problem(), 0).backend.name == "vendor"


def test_auto_never_takes_reference(registry) -> None:
    registry()
    assert choose(problem(), 0).backend.name == "vendor"


def test_the_choice_is_a_pure_function() -> None:
    first, second = choose(problem(), 0), choose(problem(), 0)
    assert isinstance(first, Choice)
    assert first.backend is second.backend


def test_a_forced_backend_that_cannot_run_says_all_its_reasons(registry) -> None:
    registry(Fake(0.1, reasons=("The image is too small.", "The moon is full.")))
    with pytest.raises(BackendError) as error:
        choose(problem(), backends.CODES["triton"])
    for part in ("'triton'", "too small", "moon is full", "backend='vendor'"):
        assert part in str(error.value)


@pytest.mark.parametrize("name", ["gpu", "", "Vendor"])
def test_an_unknown_name_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(BackendError, match=r"is unknown; expected one of auto, .*vendor"):
        hk.use_backend(name)


def test_a_backend_that_is_not_built_is_refused(registry) -> None:
    registry()
    with pytest.raises(BackendError, match="is not built here"):
        hk.use_backend("cuda")


def test_an_unknown_code_is_refused() -> None:
    with pytest.raises(BackendError, match="backend code: received 99"):
        choose(problem(), 99)


def test_use_backend_as_call_and_as_context() -> None:
    assert backends.forced_code() == 0
    with hk.use_backend("reference"):
        assert backends.ENGINE_OF_CODE[backends.forced_code()] == "reference"
        with hk.use_backend("auto"):
            assert backends.forced_code() == 0
        assert backends.ENGINE_OF_CODE[backends.forced_code()] == "reference"
    assert backends.forced_code() == 0
    with pytest.raises(ZeroDivisionError), hk.use_backend("vendor"):
        raise ZeroDivisionError
    assert backends.forced_code() == 0
    hk.use_backend("vendor")
    assert backends.ENGINE_OF_CODE[backends.forced_code()] == "vendor"
    hk.use_backend("auto")


@pytest.mark.parametrize("name", ["vendor", "reference"])
@pytest.mark.parametrize("verb", ["fprop", "dgrad", "wgrad"])
def test_pytorch_backends_refuse_nothing_and_predict_something(name: str, verb: str) -> None:
    engine = get_backend(name)
    p = problem(verb)
    assert engine.unsupported_reasons(p) == []
    assert engine.estimate(p) > 0
    assert engine.measured(p) == (name == "vendor")
    assert 0 < engine.efficiency(p) <= 1


@pytest.mark.parametrize(
    "make",
    [
        lambda: hk.nn.GroupedConv2d(8, 12, 3, padding=1, groups=4, backend="vendor"),
        lambda: hk.nn.SupportConv2d(
            8, 12, 3, padding=1, support=hk.Support.dense(8, 12, 3), backend="vendor"
        ),
        lambda: hk.nn.HetConv2d(8, 12, 3, padding=1, backend="vendor").freeze(),
    ],
    ids=["grouped", "dense", "frozen"],
)
def test_vendor_passes_on_what_has_no_dead_entry_without_a_copy(make, monkeypatch) -> None:
    layer = make()
    seen: list[int] = []
    original = torch.conv2d

    def spy(x, w, *rest):  # type: ignore[no-untyped-def]
        seen.append(w.data_ptr())
        return original(x, w, *rest)

    monkeypatch.setattr(torch, "conv2d", spy)
    x = torch.randn(1, 8, 5, 5)
    with torch.no_grad():
        layer(x)
        layer(x)
    assert seen[0] == seen[1]
    assert layer.frozen or seen[0] == layer.weight.data_ptr()


def test_vendor_masks_a_weight_whose_dead_entries_were_written_without_a_trace() -> None:
    layer = hk.nn.HetConv2d(8, 12, 3, padding=1, backend="vendor")
    x = torch.randn(1, 8, 5, 5)
    with torch.no_grad():
        before = layer(x)
        layer.weight.data[0, 7, 0, 0] = 1.0  # a dead entry
        assert torch.equal(layer(x), before)
        layer.weight.detach().numpy()[0, 7, 0, 0] = float("nan")
        assert torch.equal(layer(x), before)


def test_vendor_runs_an_equal_grouping_as_a_grouped_convolution() -> None:
    support = hk.Support.grouped(8, 12, 3, 4)
    geometry = make_geometry(support, 1, 1)
    x, w = torch.randn(2, 8, 6, 6), torch.randn(*support.shape)
    assert get_backend("vendor").efficiency(ops.describe("fprop", geometry, x, x, w, (6, 6))) == 1
    live = w[torch.tensor(support.mask)].view(12, 2, 3, 3)
    truth = torch.nn.functional.conv2d(x, live, padding=1, groups=4)
    for weight in (w, live, live.view(-1)):
        y = ops.run_fprop(x, weight, geometry)
        torch.testing.assert_close(y, truth)


class Strides(TorchDispatchMode):
    """Notes the strides of the gradients that PyTorch is asked for, and stops at one bar 1."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[list[int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is torch.ops.aten.convolution_backward.default:
            self.seen.append(args[4])
            assert args[4] == [1, 1], "oneDNN may crash"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pads", [0, 1, (3, 0, 0, 0)], ids=str)
@pytest.mark.parametrize("support", [hk.Support.dense(9, 14, 1), hk.Support.grouped(8, 12, 1, 2)])
def test_vendor_keeps_gradients_of_strided_1x1_kernels_from_onednn(support, pads, dtype) -> None:
    """`convolution_backward` wrote beyond its memory (3.12) for x, w and stride:

    [3, 9, 8, 17] and [14, 9, 1, 1], (2, 1), in bfloat16, and with two threads
    [3, 12, 10, 10] and [8, 12, 1, 1], (2, 2), in float32; all channels_last.
    """
    geometry = make_geometry(support, (2, 1), pads)
    size = 8, 17
    x = torch.randn(3, support.channels, *size).to(dtype)
    dy = torch.randn(3, support.filters, *geometry.output_size(*size)).to(dtype)
    x, dy = (t.to(memory_format=torch.channels_last) for t in (x, dy))
    w = torch.zeros(support.shape, dtype=torch.float64, requires_grad=True)
    with Strides() as mode:
        code = backends.backend_code("vendor")
        dw = ops.run_wgrad(dy, x, geometry, support.shape, x.dtype, code)
    assert mode.seen == [[1, 1]]
    y, sizes = (oracle(t.double(), w, geometry) for t in (x, x.abs()))
    (exact,) = torch.autograd.grad(y, w, dy.double())
    (most,) = torch.autograd.grad(sizes, w, dy.double().abs())
    assert ((dw.double() - exact).abs() <= error_bound(most, dy[:, 0].numel(), dtype)).all()


def test_a_frozen_weight_is_expanded_once() -> None:
    layer = hk.nn.HetConv2d(8, 12, 3, padding=1).freeze()
    x = torch.randn(1, 8, 5, 5)
    with hk.use_backend("vendor"):
        layer(x)
        caches = [v for v in layer.support.derived.values() if isinstance(v, FrozenCache)]
        (cache,) = [c for c in caches if c.recall(layer.weight) is not None]
        built = cache(layer.weight)
        layer(x)
        assert cache(layer.weight) is built


def test_non_finite_input_stays_in_its_receptive_field_and_image() -> None:
    support = hk.Support.het(4, 4, 3, p=2)
    for name in hk.available_backends("cpu"):
        x = torch.randn(2, 4, 9, 9)
        x[0, 1, 4, 4] = float("inf")
        w = torch.randn(*support.shape)
        y = hk.functional.support_conv2d(x, w, support, padding=1, backend=name)
        touched = ~y.isfinite()
        assert not touched[1].any(), f"{name}: another image"
        outside = touched[0].clone()
        outside[:, 3:6, 3:6] = False
        assert not outside.any(), f"{name}: outside the receptive field"
        assert touched[0, :2, 4, 4].all(), f"{name}: filters that read it"
