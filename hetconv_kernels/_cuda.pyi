# SPDX-License-Identifier: Apache-2.0
"""The compiled engine of csrc/cuda: addresses and streams are integers, strides count elements.

The fields of `Narrow` and `NarrowWgrad` are described in ``csrc/cuda/narrow.h``.
"""

class Narrow:
    classes: int
    heads: int
    rounds: int
    lists: int
    words: int
    chunks: int
    slots: int
    rows: int
    x_n: int
    y_n: int
    x_h: int
    x_w: int
    y_h: int
    y_w: int
    batch: int
    image_h: int
    image_w: int
    class_count: int
    parts: int
    round_count: int
    tile_h: int
    tile_w: int
    warps_m: int
    warps_n: int
    raw_pitch: int
    slot_pitch: int
    halo_pixels: int
    max_words: int
    max_fragments: int
    vector_stores: int
    buffers: int
    resident: int
    blocks: int
    channels: int
    tma: int
    box_h: list[int]
    box_w: list[int]
    def __init__(self) -> None: ...
    @property
    def act(self) -> int: ...
    @act.setter
    def act(self, name: str) -> None: ...
    @property
    def shared_bytes(self) -> int: ...
    def max_resident_blocks(self, dtype: str) -> int: ...
    def launch(
        self,
        dtype: str,
        x: int,
        slabs: int,
        y: int,
        scale: int,
        shift: int,
        residual: int,
        stream: int,
    ) -> None: ...

class NarrowWgrad:
    geometry: int
    heads: int
    units: int
    chunks: int
    slots: int
    x_n: int
    y_n: int
    x_h: int
    x_w: int
    y_h: int
    y_w: int
    batch: int
    image_h: int
    image_w: int
    parts: int
    unit_count: int
    tile_h: int
    tile_w: int
    warps: int
    x_pitch: int
    x_slot_pitch: int
    dy_pitch: int
    dy_slot_pitch: int
    halo_pixels: int
    buffers: int
    blocks: int
    tma: int
    channels: int
    filters: int
    dy_h: int
    dy_w: int
    halo_h: int
    halo_w: int
    def __init__(self) -> None: ...
    @property
    def shared_bytes(self) -> int: ...
    def max_resident_blocks(self, dtype: str) -> int: ...
    def launch(self, dtype: str, x: int, dy: int, partials: int, stream: int) -> None: ...

def reduce(
    partials: int,
    targets: int,
    dw: int,
    size: int,
    dw_size: int,
    splits: int,
    dtype: str,
    stream: int,
) -> None: ...
def pack(
    w: int, w_dtype: str, source: int, slabs: int, dtype: str, size: int, stream: int
) -> None: ...
def wide_rate(
    clocks: int,
    values: int,
    blocks: int,
    steps: int,
    row_pitch: int,
    plane_pitch: int,
    taps: int,
    stream: int,
) -> None: ...
def kernels() -> list[str]: ...
def tma_unsupported() -> str: ...
def architectures() -> str: ...
def versions() -> tuple[int, int]: ...
