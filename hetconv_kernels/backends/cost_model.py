# SPDX-License-Identifier: Apache-2.0
"""The cost model of a CPU: seconds that predictions are made of, from `benchmarks.calibrate`."""

from __future__ import annotations

from typing import NamedTuple

import torch


class DenseSeconds(NamedTuple):
    """What PyTorch's dense float32 convolution takes on a CPU.

    Attributes:
        mac: per multiply-accumulate, on one thread.
        weight: per weight, which a call lays out anew or at least reads.
        byte: per byte of input, output and live weights.
        call: per call.
    """

    mac: float
    weight: float
    byte: float
    call: float


class EngineSeconds(NamedTuple):
    """What the native engine takes, in one of its forms.

    Attributes:
        operation: per weighted vector multiply-add of the plan, on one thread.
        load: per vector of activations that a tile of at most eight filters reads, on one thread.
        image: per image, for each weighted multiply-add of one output pixel, on one thread.
        packed: per element of the packed weight.
        call: per call.
    """

    operation: float
    load: float
    image: float
    packed: float
    call: float


# Fitted on two threads of an AMD Zen 5 server core (AVX-512), torch 2.13, channels_last, on half of
# 240 random layers; benchmarks/calibration-avx512.json shows them beside a later measurement.
# Other machines are predicted by the same ratios.
DENSE_RATES = DenseSeconds(8.8e-12, 4.6e-10, 4.9e-12, 2.7e-5)
ENGINE = {
    "filters": EngineSeconds(1.12e-10, 4.9e-11, 8.7e-10, 4.4e-11, 4.6e-6),
    "pixels": EngineSeconds(8.9e-11, 2.65e-10, 3.3e-9, 7.4e-11, 1.2e-5),
}
# These are set by hand from single measurements, not fitted.
# A convolution or matrix product whose weight is laid out in advance, and ``torch.nn.functional``'s
# matrix product, which is not oneDNN's; that one's weights in a cache, and from main memory.
PREPACKED_RATES = DenseSeconds(8.8e-12, 1.0e-10, 4.9e-12, 2.7e-5)
LINEAR = DenseSeconds(2.8e-11, 8.5e-11, 4.9e-12, 6e-6)
LINEAR_FAR = LINEAR._replace(weight=2.0e-10)
# One image of at most so many elements does not go to oneDNN: seconds per multiply-accumulate on
# all threads, and per call; in NCHW more than one tap takes it longer.
SMALL_IMAGE, SMALL_MAC, SMALL_CALL = 20480, 1.6e-11, 6e-6
SMALL_NCHW = 2.2
# Filters that oneDNN's dense convolution computes together, needed or not: one of 64 channels on
# 512² pixels was seen to take 49 ms on one thread, the engine's planes 15 ms.
FILTERS_BLOCK = 16
# How much longer oneDNN's prepacked products take in 1x1 kernels on images, beside the engine's: of
# eight layers of ResNets, one thread of a Zen 4 core, it took 2.0 to 2.4 times what the rates above
# say, the engine 1.45 to 2.2 times.
POINTWISE = 1.2
# Memory that comes from the system, page by page: seconds per byte on one thread. 64 MiB of zeros
# were seen to take 31 ms fresh and 3 ms where they had been before.
FRESH = 4e-10
# How much longer a call of PyTorch's takes between two programs of a network than alone: a margin,
# so that a tie of a frozen layer goes to the engine, whose layer is a step of the program.
BETWEEN_PROGRAMS = 1.05
# Groups of at most so many channels: seconds per multiply-accumulate on all threads, in NCHW and in
# channels_last. `python -m benchmarks.calibrate_calls` has them, measured on two threads of an AMD
# Zen 4 server core and brought to the machine of the fitted ones by what `cpu` takes on both.
NARROW_GROUPS = {1: (1.7e-11, 2.0e-11), 3: (1.05e-10, 5.6e-11), 7: (2.3e-11, 1.8e-11)}
# What a whole layer's call takes around the above, mostly Python: measured once, on two threads of
# an AMD Zen 4 server core, on layers so small that it is nearly all there is, less the seconds per
# call above. By what runs, for images and for rows of features. `benchmarks/test_dispatch.py` has
# such layers beside plain ones.
OVERHEAD = {
    "vendor": 4e-6, "vendor small": 1.1e-5, "vendor rows": 3.3e-6,
    "filters": 9.9e-6, "filters rows": 4.6e-6, "pixels": 5.5e-6, "pixels rows": 4e-6,
}  # fmt: skip
# Rows of features fill vectors of pixels badly: how much longer the work per image takes there.
PIXELS_OF_ROWS = 2.2
# Packed weights that come from main memory: seconds per element, on all threads, and how much
# longer the multiply-adds take.
FAR_WEIGHT, FAR_COMPUTE = 1.0e-10, 1.7
# Packed weights between two layers of a network, where others were used since: seconds per element,
# on any number of threads. Of layers of 14² and 7², on one thread and two of an AMD Zen 5 server
# core, with 190 MB read in between, Winograd's forms took 1.4e-10 to 3.8e-10 longer than again.
COLD_WEIGHT = 2e-10
# A plan of all weights saves no work: there a prediction this much better may be chance.
DOUBT = 1.15
# Max-pooling in a pass of its own: per byte of what it reads; and as a share of that, where it is
# pooled as it is computed.
POOL, POOLED = 5e-11, 0.2
# A trained weight is packed at each call: seconds per element of the packed weight on one thread;
# from so many elements on all threads do it. Two runs of `python -m benchmarks.calibrate_calls`, on
# two threads of an AMD Zen 4 server core that took 2.6 times as long as the machine of the fitted
# rates, gave 1.4e-9 and 8.0e-10 there.
PACK, PACK_ALONE = 1.1e-9, 2**16
# For `vendor` its dead entries are masked: seconds per dense weight, into its own layout and into
# channels_last, and per call; where only the live entries are given they are expanded first. From
# the same runs; without the compiled engine PyTorch's operators take several times as long.
MASK, TRANSPOSE, MASK_CALL = 2.7e-11, 7e-11, 1.4e-6
EXPAND = 1.1e-9
# Kernels are transformed back from frequencies: seconds per element of a weight, and per operation,
# both for each frequency. Where the engine sums them, in one operation: of 16 and 64 channels, on
# the machine of the masks, less what it is slower.
INVERSE, INVERSE_CALL = 5e-10, 1.2e-5
SUMMED = 7e-11
# dgrad runs at a lower rate than fprop with the same multiply-accumulates.
VERB = {"fprop": 1.0, "dgrad": 1.15}
# wgrad, by form: seconds per weighted vector multiply-add of its plan, on one thread; and per dense
# weight, dead ones included, for the gradient itself.
WGRAD = {"channels": 2.2e-10, "pixels": 2.7e-10}
GRADIENT = 1.8e-10
# How much faster than float32 a dense convolution may be; generous where nothing was measured, so
# that `auto` does not leave it too early.
DTYPE_SPEED = {torch.bfloat16: 2.0, torch.float16: 1.0, torch.float64: 0.5}
