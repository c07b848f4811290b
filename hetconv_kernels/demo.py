# SPDX-License-Identifier: Apache-2.0
"""The demo: a denoiser made dense, HetConv and self-grouped, in 8 bits too, measured side by side.

It trains a small DnCNN on one photograph, makes two sparse networks of it, trains all three on for
equally many steps, optimises the sparse ones for inference, and denoises another photograph that
none of them has seen. Where the engine in 8 bits is built the sparse networks are quantised,
calibrated on the first photograph. The dense network is run by PyTorch, eagerly. DnCNN is Zhang,
Zuo, Chen, Meng, Zhang, IEEE TIP 26(7), 2017, arXiv 1608.03981; its BatchNorm is left out, because a
few minutes of small batches train better without.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from . import json_output
from ._version import __version__
from .backends import use_backend
from .demo_data import (
    HELD_OUT,
    SIGMA,
    TRAINED_ON,
    Patches,
    add_noise,
    photograph,
    psnr,
    require_extra,
)
from .demo_report import TORCH, DemoRow, TrainingBar, draw_photographs, show
from .errors import ArgumentError, BackendError, HetconvError, mismatch
from .files import write_text, writing
from .graph import rules
from .graph.convert import convert
from .graph.optimize import optimize
from .layer_options import check_device
from .measure import stats, timing
from .measure.profiling.measure import backends_of as backends_by_layer
from .measure.samples import Timings
from .models import DnCNN, dncnn
from .nn.base import SupportLayer
from .nn.quantized_layer import QuantizedLayer
from .option_types import seed, whole
from .quantization import engine
from .quantization.quantize import quantize
from .self_grouping import self_group
from .support import Support

PART = 4
_PERCENT, _PERCENT_STEP, _MOST_CLUSTERS = 70, 10, 16
_LEARNING_RATE = 2e-3
_INT8 = ", int8"
# Batches of patches that calibrate a network.
_CALIBRATION = 8
# What single precision may differ by over a network, on images from 0 to 1.
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class DemoSettings:
    """The sizes of one run.

    Attributes:
        steps: training steps of the dense network; each network then has half as many more.
        depth: convolutions of the DnCNN.
        channels: its width.
        patch: height and width of a training patch.
        batch: patches in a batch.
        crop: height and width cut from the middle of the held-out photograph; None is all of it.
        rounds: how often each network is timed.
        seconds: about how long the timing may take.
    """

    steps: int = 1200
    depth: int = 7
    channels: int = 64
    patch: int = 40
    batch: int = 8
    crop: tuple[int, int] | None = None
    rounds: int = 20
    seconds: float = 15.0


QUICK = DemoSettings(
    80, depth=4, channels=16, patch=32, batch=4, crop=(96, 128), rounds=6, seconds=2
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the demo to a parser."""
    full = DemoSettings()
    add = parser.add_argument
    add("--quick", action="store_true", help="a tiny network and crop: seconds, for a first look")
    add("--out", type=Path, default=Path("outputs/demo"), help="results go here (outputs/demo)")
    add("--steps", type=whole(2), help=f"training steps of the dense network ({full.steps})")
    add("--channels", type=whole(), help=f"filters of each convolution ({full.channels})")
    add("--seed", type=seed, default=0, help="of all that is drawn (0)")
    add("--device", default="cpu", help="such as cpu or cuda:0")
    add("--backend", help="force this backend for the sparse networks")
    json_output.add_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the demo: prints a table, or the record as JSON; writes ``demo.png`` and ``demo.json``.

    Args:
        args: the options of `add_arguments`.

    Returns:
        The exit code, 0.

    Raises:
        HetconvError: a package of the ``demo`` extra is missing, the device or backend cannot be
            used, or a sparse network does not compute what its masked dense twin does.
        ArgumentError: a number is out of range.
    """
    return json_output.emit(args, lambda: _run(args))


def _run(args: argparse.Namespace) -> dict[str, Any]:
    require_extra()
    settings, device = _settings(args), check_device(args.device)
    started = time.perf_counter()
    with _forced(args.backend):
        _make_folder(args.out)
        networks = _train_all(settings, args.seed, device)
        training_s = time.perf_counter() - started
        # Read only now: nothing above can have looked at it.
        truth = _cropped(photograph(HELD_OUT), settings.crop)
        noisy = add_noise(truth, seed=args.seed + 2)
        rows, images, timings = _measure(networks, noisy, truth, settings, device)
    noisy_psnr_db = psnr(noisy, truth)
    record: dict[str, Any] = {
        "format": "hetconv_kernels.demo/1",
        "version": __version__,
        "settings": asdict(settings)
        | {"seed": args.seed, "device": str(device), "backend": args.backend, "quick": args.quick},
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "trained_on": TRAINED_ON,
        "held_out": HELD_OUT,
        "image": list(truth.shape),
        "sigma": SIGMA,
        "noisy_psnr_db": noisy_psnr_db,
        "training_s": training_s,
        "networks": {row.name: asdict(row) for row in rows},
        "timings": timings.to_dict(),
    }
    picture, results = args.out / "demo.png", args.out / "demo.json"
    shown = {r: i for r, i in zip(rows, images, strict=True) if not r.name.endswith(_INT8)}
    with writing(picture) as beside:
        draw_photographs(beside, truth, noisy, noisy_psnr_db, shown)
    write_text(results, json.dumps(record, indent=2) + "\n")
    show(rows, noisy_psnr_db)
    print(
        f"Trained on {TRAINED_ON} for {training_s:.0f} s; measured on {HELD_OUT}, never trained on."
    )
    print(f"Wrote {picture} and {results}.")
    return record


# training ----------------------------------------------------------------------------------------


def _train_all(settings: DemoSettings, seed: int, device: torch.device) -> dict[str, nn.Module]:
    """Trains the dense network, derives the sparse ones, trains all three on, quantises two."""
    photo = photograph(TRAINED_ON)

    def patches(offset: int) -> Patches:
        return Patches(photo, settings.patch, settings.batch, seed=seed + offset, device=device)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        dense = dncnn(settings.depth, settings.channels, 1, batch_norm=False)
    dense = _channels_last(dense).to(device)
    more = settings.steps // 2
    with TrainingBar(settings.steps + 3 * more) as progress:
        train_denoiser(dense, patches(0), settings.steps, _LEARNING_RATE, progress.stage("dense"))
        networks = {"dense": dense, "HetConv": to_hetconv(dense), "self-grouped": to_groups(dense)}
        for name, network in networks.items():
            # All three see the same patches, so that none has an advantage.
            train_denoiser(
                network, patches(1), more, _LEARNING_RATE, progress.stage(f"{name}, tuned")
            )
    found: dict[str, nn.Module] = {**networks}
    if has_int8(device):
        stream = patches(3)
        batches = [stream.next()[0] for _ in range(_CALIBRATION)]
        for name in ("HetConv", "self-grouped"):
            found[name + _INT8] = quantize(networks[name].eval(), batches, measure=False).model
    return found


def has_int8(device: torch.device) -> bool:
    """Tells whether the engine in 8 bits is here and may be used: its times are worth a row."""
    try:
        return engine.engine_name(device) == "cpu"
    except BackendError:  # another backend is forced, which has no 8 bits
        return False


def train_denoiser(
    model: DnCNN,
    patches: Patches,
    steps: int,
    learning_rate: float,
    report: Callable[[float], None],
) -> None:
    """Trains a DnCNN to predict the noise in patches.

    Adam with one cycle of the learning rate, on the mean squared error.

    Args:
        model: trained in place.
        patches: where batches come from; the only data that is read.
        steps: how many batches.
        learning_rate: the peak of the cycle.
        report: called with the loss after each step.
    """
    optimizer = torch.optim.Adam(model.parameters(), learning_rate)
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=max(steps, 2), pct_start=0.1
    )
    model.train()
    for _ in range(steps):
        noisy, noise = patches.next()
        loss = nn.functional.mse_loss(model.noise(noisy), noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        cycle.step()
        report(loss.item())


def to_hetconv(dense: DnCNN) -> DnCNN:
    """Copies a network with every 3×3 convolution but the first and last made HetConv, p = 4."""
    return _converted(dense, rules.het(p=PART))


def to_groups(dense: DnCNN) -> DnCNN:
    """Copies a network with the same convolutions self-grouped: 10, 20, … 70 % dropped."""
    chosen = {}
    for name, conv in dense.named_modules():
        if isinstance(conv, nn.Conv2d) and min(conv.in_channels, conv.out_channels) > 1:
            support = Support.dense(conv.in_channels, conv.out_channels, conv.kernel_size)
            clusters = min(_MOST_CLUSTERS, conv.out_channels // 4)
            for percent in range(_PERCENT_STEP, _PERCENT + 1, _PERCENT_STEP):
                support = self_group(conv.weight, percent, clusters, support)
            chosen[name] = support
    return _converted(dense, rules.supports(chosen))


def _converted(dense: DnCNN, rule: rules.Rule) -> DnCNN:
    return _channels_last(cast(DnCNN, convert(dense, rule).model))


def _channels_last(model: DnCNN) -> DnCNN:
    # The layout that convolutions on a CPU are fastest in; torch's types do not know the keyword.
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


# measuring ---------------------------------------------------------------------------------------


@torch.inference_mode()
def _measure(
    networks: dict[str, nn.Module],
    noisy: Tensor,
    truth: Tensor,
    settings: DemoSettings,
    device: torch.device,
) -> tuple[list[DemoRow], list[Tensor], Timings]:
    """Checks, denoises with, and times each network."""
    x = noisy[None].to(device).contiguous(memory_format=torch.channels_last)
    trained = networks
    networks = {name: optimized(network.eval(), x) for name, network in trained.items()}
    outputs = {name: network(x) for name, network in networks.items()}
    differences = {
        name: float((y - outputs[name.removesuffix(_INT8)]).abs().max())
        if name.endswith(_INT8)
        else _difference(name, trained[name], x, y)
        for name, y in outputs.items()
    }

    def call(network: nn.Module) -> Callable[[], Tensor]:
        return lambda: network(x)

    timings = timing.interleaved(
        {name: call(network) for name, network in networks.items()},
        rounds=settings.rounds,
        warmup=1,
        max_seconds=settings.seconds,
        device=device,
    )
    rows, images = [], []
    for name, network in networks.items():
        image = outputs[name][0].cpu()
        work = stats.layer_macs(trained[name], x)
        speedup = timings.speedup(name)
        rows.append(
            DemoRow(
                name=name,
                psnr_db=psnr(image, truth),
                live_weights=sum(layer.live for layer in work),
                macs=sum(layer.macs for layer in work),
                seconds=timings.median(name),
                speedup=(speedup.value, speedup.low, speedup.high),
                backends=sparse_backends(network, x),
                difference=differences[name],
            )
        )
        images.append(image)
    return rows, images, timings


def optimized(network: nn.Module, x: Tensor) -> nn.Module:
    """Optimises a network with sparse layers in float32 for images as large as this one."""
    if not any(isinstance(m, SupportLayer) for m in network.modules()):
        return network
    return optimize(network, x, leave_plain=False).model


def _difference(name: str, network: nn.Module, x: Tensor, y: Tensor) -> float:
    """Compares a network's output with that of the same network made of masked nn.Conv2d."""
    twin = convert(network, rules.dense()).model
    difference = float((twin(x) - y).abs().max())
    if not difference <= _TOLERANCE:
        raise HetconvError(
            f"The {name} network differs from its masked dense twin by {difference:.3g}, more than"
            f" {_TOLERANCE}: its time would mean nothing. Please report it; --backend vendor works."
        )
    return difference


def sparse_backends(network: nn.Module, x: Tensor) -> tuple[str, ...]:
    """Names what runs the sparse layers of a network on this input, the most frequent first.

    ``("torch",)`` for a network that has none.
    """
    if any(isinstance(m, QuantizedLayer) for m in network.modules()):
        return (f"{engine.engine_name(x.device)} int8",)
    chosen = Counter(backends_by_layer(network, x).values())
    return tuple(name for name, _ in chosen.most_common() if name != TORCH) or (TORCH,)


# options -----------------------------------------------------------------------------------------


def _settings(args: argparse.Namespace) -> DemoSettings:
    settings = QUICK if args.quick else DemoSettings()
    for name in ("steps", "channels"):
        value = getattr(args, name)
        least = {"steps": 2, "channels": 2 * PART}[name]
        if value is not None:
            if value < least:
                raise ArgumentError(mismatch(f"--{name}", value, f"at least {least}"))
            settings = replace(settings, **{name: value})
    return settings


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HetconvError(f"--out {path} cannot be made a folder: {error}.") from error


def _forced(backend: str | None) -> AbstractContextManager[None]:
    return nullcontext() if backend is None else use_backend(backend)


def _cropped(photo: Tensor, crop: tuple[int, int] | None) -> Tensor:
    """Cuts the middle out of a photograph.  # [1, H, W] -> [1, *crop]"""
    if crop is None:
        return photo
    top, left = ((size - part) // 2 for size, part in zip(photo.shape[-2:], crop, strict=True))
    return photo[:, top : top + crop[0], left : left + crop[1]]
