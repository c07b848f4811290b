# SPDX-License-Identifier: Apache-2.0
"""compress: one protocol for all methods, from a network and data to a report with times."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, HetconvError, InputTypeError, SpeedupError, mismatch
from ..graph import compact as compacting
from ..graph import rules, worth
from ..graph.convert import convert
from ..graph.copying import copied
from ..graph.trace import check_tensors
from ..graph.worth import LeftPlain
from ..integers import is_integer
from ..measure import stats
from ..measure.disturbance import shown
from ..measure.timing import check_seconds
from ..nn import GroupedConv2d, SupportConv2d, SupportLinear
from ..support import Support
from . import measure as clock
from . import ranks
from .identity import described, digest, identity_of, weights_of
from .method import Method
from .progress import Progress
from .report import CompressionReport, LayerReport
from .run import CHOSEN, Run, WeightLayer
from .sharded import gathered, is_sharded
from .state import StateFile
from .training import Data, Evaluate, MakeOptimizer, Training, TrainStep, seeded


def compress(
    model: nn.Module,
    method: Method,
    *,
    data: Data | None = None,
    train_step: TrainStep | None = None,
    evaluate: Evaluate | None = None,
    eval_data: Iterable[Any] | None = None,
    example: Tensor | None = None,
    optimizer: MakeOptimizer | None = None,
    skip: Sequence[str] = (),
    seed: int = 0,
    state: str | os.PathLike[str] | None = None,
    key: Mapping[str, object] | None = None,
    progress: bool = True,
    measure: bool = True,
    measure_seconds: float = 10.0,
    compact: bool = True,
    leave_plain: bool = True,
    require_speedup: float | None = None,
) -> CompressionReport:
    """Compresses a network by a method and measures what came of it.

    The given network is not changed. Equal seeds, data and thread counts give equal results on a
    CPU, bit by bit, also when the process was killed in between and called again with the same
    ``state``: each round starts from its own seed. Data is then the caller's part: draw shuffles
    and augmentations from torch's, numpy's or Python's global generator, or from the epoch.

    Under torch.distributed every rank calls this with its own part of the data and the same
    ``state`` path. Training is DDP's; what chooses a Support is all-reduced first. A network that
    FSDP2 has sharded is gathered, so that each rank needs the memory for all of it; the result is
    plain and equal on all ranks, to be sharded again by ``fully_shard(report.model)``.

    Args:
        model: the network, trained; on its device.
        method: one of this package's, such as ``SelfGrouping(target=0.7)``.
        data: batches ``(x, label)``, or whatever ``train_step`` takes; an iterable that starts
            anew at each epoch, or a callable of the epoch's number.
        train_step: ``(model, batch) -> loss``; None is cross-entropy.
        evaluate: ``(model) -> float``, larger is better.
        eval_data: batches ``(x, label)``, for the top-1 accuracy where ``evaluate`` is None.
        example: an input, for shapes, MACs and times; by default that of the first batch.
            # [N, C, H, W]
        optimizer: ``(parameters) -> optimizer``; None is SGD 0.01, momentum 0.9, decay 1e-4.
        skip: names of layers to leave alone; patterns such as ``"*.downsample.*"`` work. A layer
            that reads removed filters loses those inputs all the same.
        seed: of everything that is drawn.
        state: a file to save the state in after each round, and to continue from. It is refused
            when the method, seed, network, data, optimiser's settings or ``key`` are others.
        key: whatever else decides the result and is not seen from here, such as the settings of
            ``train_step``: numbers, text, tensors, and containers of them.
        progress: whether to show the rounds.
        measure: whether to time the network before and after, and its layers.
        measure_seconds: about how long that may take, for the whole and for the layers each.
        compact: whether to take removed filters out physically, where that can be done exactly.
        leave_plain: whether a layer for which no Support pays at the size of the example, in no
            memory format, is returned as plain ``nn.Conv2d`` or ``nn.Linear`` with zeros; the
            report says so, and counts its live weights and MACs by the mask that was chosen, while
            `stats` counts what the plain layer multiplies. False keeps every Support, and so the
            masks that training on, or compressing again, has to respect.
        require_speedup: how many times faster than dense the result has to be, at least.

    Returns:
        The report; ``report.model`` is the compressed network.

    Raises:
        InputTypeError: an argument has the wrong type, or ``train_step`` returns no loss.
        ArgumentError: a value out of range, nothing to compress, or a state of another run.
        HetconvError: the state cannot be read or written, the ranks disagree, or the result does
            not compute what the masked network does.
        SpeedupError: the result is slower than required, or other work on the machine disturbed
            the measurement; its ``report`` has everything.
    """
    _check(model, method, skip, require_speedup, measure)
    if not is_integer(seed):
        raise InputTypeError(mismatch("seed", repr(seed), "an integer"))
    seed = int(seed)
    check_seconds("measure_seconds", measure_seconds)
    training = Training(data, train_step, evaluate, eval_data, optimizer)
    if method.needs_accuracy and not training.can_judge:
        raise ArgumentError(
            mismatch(f"evaluate of {method.title}", None, "a callable, since accuracy decides")
        )
    # Whatever is drawn outside of rounds, such as the first batch, leaves no trace either.
    with seeded(seed, torch.device("cpu")):
        if is_sharded(model):
            model = gathered(model)
        example = _example(example, training, model)
        dense, first = _densified(model)
        ranks.same_weights(dense)
        layers, kept = _candidates(dense, method, skip)
        identity = {
            "method": {"name": type(method).__name__, **asdict(method)},
            "seed": seed,
            "layers": {name: list(layer.weight.shape) for name, layer in layers.items()},
            "parameters": {name: list(p.shape) for name, p in dense.named_parameters()},
            "weights at the start": digest(weights_of(dense)),
        }
        if state is not None:  # reads the data and calls the user's functions
            identity["training"] = identity_of(training, dense, example)
            identity["key"] = described(dict(key or {}))
        shown = Progress(progress and ranks.rank() == 0)
        try:
            file = StateFile(state, identity)
            run = Run(dense, layers, first, kept, example, training, seed, file, shown)
            method.check(run)
            before = run.evaluate("accuracy before")
            method.run(run)
            report = _report(
                model, method, run, before, measure, measure_seconds, compact, leave_plain
            )
        finally:
            shown.close()
    _require(report, require_speedup)
    return report


def _report(
    model: nn.Module,
    method: Method,
    run: Run,
    accuracy: float | None,
    measure: bool,
    seconds: float,
    compact: bool,
    leave_plain: bool,
) -> CompressionReport:
    """Converts the masked network, checks it, and measures it beside the given one."""
    run.model.train(model.training)
    result = convert(run.model, method.rule(run)).model
    notes = list(run.notes)
    small, why = (
        _compacted(result, run.example) if compact and method.removes_filters else (None, "")
    )
    if why:
        notes.append(why)
    after = result if small is None else small
    difference = clock.difference(run.model, after, run.example)
    rows = stats.layer_macs(model, run.example), stats.layer_macs(after, run.example)
    left = _left_plain(after, run.example) if leave_plain else ()

    def times() -> tuple[clock.Whole | None, tuple[LayerReport, ...]]:
        whole = clock.time_networks(model, after, run.example, seconds) if measure else None
        layouts = whole.layouts if whole else None
        return whole, clock.layer_reports(
            model, after, run.example, rows, run.kept, layouts, seconds, left
        )

    whole, layers = ranks.from_first(times)
    now = run.training.judge(after)
    work = [sum(row.macs for row in side) for side in rows]
    return CompressionReport(
        model=after,
        method=method.title,
        settings=asdict(method),
        layers=layers,
        live=(sum(r.live[0] for r in layers), sum(r.live[1] for r in layers)),
        macs=(work[0], work[1]),
        accuracy=None if accuracy is None or now is None else (accuracy, now),
        seconds=whole.seconds if whole else None,
        speedup=whole.speedup if whole else None,
        layouts=whole.layouts if whole else None,
        batch=tuple(run.example.shape),
        threads=torch.get_num_threads(),
        device=_device_name(run.example.device),
        difference=difference,
        compacted=small is not None,
        notes=tuple(notes),
        history=tuple(run.history),
        disturbed=whole.disturbed if whole else (),
    )


def _left_plain(model: nn.Module, example: Tensor) -> tuple[LeftPlain, ...]:
    """Makes layers plain for which no Support pays in any memory format."""
    inputs = [clock.in_layout(example, layout) for layout in clock.layouts_of(example)]
    modes = {name: module.training for name, module in model.named_modules()}
    try:
        return worth.leave_plain(model.eval(), [(x,) for x in inputs])
    finally:
        for name, module in model.named_modules():  # the plain ones among them
            module.training = modes[name]


def _compacted(model: nn.Module, example: Tensor) -> tuple[nn.Module | None, str]:
    """Takes removed filters out physically, if that can be done; or says why they stay masked."""
    try:
        small = compacting.compact(copied(model).eval(), example).model
    except HetconvError as error:
        return None, f"removed filters stay as empty rows of a Support: {error}"
    return small.train(model.training), ""


def _require(report: CompressionReport, required: float | None) -> None:
    if required is None:
        return
    if report.speedup is None or report.seconds is None:
        raise ArgumentError(mismatch("measure", False, "True, since a speed-up is required"))
    middle, low, high = report.speedup
    if report.disturbed:
        raise SpeedupError(
            f"{report.method}: at least {required:.2f}× was required, and whether that was reached "
            f"cannot be said: the measurement is {shown(report.disturbed)}. Call again when the "
            "machine is quiet. The report is in the error's `report`.",
            report,
        )
    if middle < required:
        raise SpeedupError(
            f"{report.method} made the network {middle:.2f}× [{low:.2f}, {high:.2f}] as fast as "
            f"dense on this machine, and at least {required:.2f}× was required. The report is in "
            "the error's `report`; str() of it says which layers lose.",
            report,
        )


# What goes in ------------------------------------------------------------------------------------


def _check(
    model: nn.Module,
    method: Method,
    skip: Sequence[str],
    require_speedup: float | None,
    measure: bool,
) -> None:
    if not isinstance(model, nn.Module):
        raise InputTypeError(mismatch("model", type(model).__name__, "an nn.Module"))
    check_tensors(model)
    if not isinstance(method, Method):
        raise InputTypeError(
            mismatch(
                "method",
                method.__name__ if isinstance(method, type) else type(method).__name__,
                "a method with its settings, such as SelfGrouping(target=0.7)",
            )
        )
    if isinstance(skip, str):
        raise InputTypeError(mismatch("skip", repr(skip), "a list of names", f"Use [{skip!r}]."))
    names = [name for name, _ in model.named_modules()]
    for pattern in skip:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ArgumentError(
                mismatch("skip", repr(pattern), "the name of a module, or a pattern that fits one")
            )
    if require_speedup is not None:
        if not 0 < require_speedup < float("inf"):
            raise ArgumentError(
                mismatch("require_speedup", require_speedup, "a finite number above 0")
            )
        if not measure:
            raise ArgumentError(mismatch("measure", False, "True, since a speed-up is required"))


def _example(example: Tensor | None, training: Training, model: nn.Module) -> Tensor:
    if example is None:
        if training.data is None:
            raise ArgumentError(
                mismatch("example and data", None, "an example input, or data to take one from")
            )
        batch: Any = next(iter(training.batches(0)), None)
        example = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if not isinstance(example, Tensor):
        raise InputTypeError(
            mismatch("example", type(example).__name__, "a tensor [N, C, H, W]", "Pass example=...")
        )
    device = next((p.device for p in model.parameters()), example.device)
    return example.detach().to(device)


def _densified(model: nn.Module) -> tuple[nn.Module, dict[str, Tensor]]:
    """Copies a network with plain layers, and notes the masks of those that had a Support."""
    masks = {}
    for name, module in model.named_modules():
        if isinstance(module, GroupedConv2d):
            continue
        if isinstance(module, SupportConv2d | SupportLinear) and not module.support.is_dense:
            mask = torch.from_numpy(module.support.mask.copy()).to(module.weight.device)
            shape = mask.shape if isinstance(module, SupportConv2d) else mask.shape[:2]
            masks[name] = mask.reshape(shape)
    return convert(model, rules.dense()).model, masks


def _candidates(
    model: nn.Module, method: Method, skip: Sequence[str]
) -> tuple[dict[str, WeightLayer], dict[str, str]]:
    """Finds the layers that may be compressed, and says why the others may not."""
    every = {name: m for name, m in model.named_modules() if isinstance(m, WeightLayer)}
    # convert says what it would refuse at the end: hooks, shared weights, subclasses, groups.
    possible = {name: m for name, m in every.items() if getattr(m, "groups", 1) == 1}
    trial = convert(model, rules.supports({n: _full(m) for n, m in possible.items()}))
    kept = {found.name: found.reason for found in trial.kept}
    layers = {}
    for name, module in every.items():
        if name in kept:
            continue
        if name not in possible:
            kept[name] = f"it has {getattr(module, 'groups', 1)} groups"
            continue
        skipped = any(fnmatchcase(name, pattern) for pattern in skip)
        reason = "named in skip" if skipped else method.leaves_out(name, module)
        if reason:
            kept[name] = CHOSEN + reason
        else:
            layers[name] = module
    return layers, kept


def _full(layer: WeightLayer) -> Support:
    if isinstance(layer, nn.Linear):
        return Support.dense(layer.in_features, layer.out_features, 1)
    return Support.dense(layer.in_channels, layer.out_channels, layer.kernel_size)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
