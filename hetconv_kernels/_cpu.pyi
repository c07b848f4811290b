# SPDX-License-Identifier: Apache-2.0
"""The compiled engine of csrc/cpu: addresses are integers, strides count elements."""

from collections.abc import Sequence
from typing import Any

from typing_extensions import Buffer

def isas() -> list[str]: ...
def non_temporal_bytes() -> int: ...
def set_non_temporal_bytes(more_than: int) -> None: ...

class Pool:
    def __init__(
        self,
        kernel: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        out: Sequence[int],
    ) -> None: ...

class Packed:
    @property
    def bytes(self) -> int: ...

class Plan:
    def __init__(
        self,
        mask: Buffer,
        dtype: str = ...,
        isa: str = ...,
        form: str = ...,
        channels_last: bool = ...,
    ) -> None: ...
    @property
    def half_vectors(self) -> bool: ...
    @property
    def form(self) -> str: ...
    @property
    def isa(self) -> str: ...
    @property
    def live(self) -> int: ...
    @property
    def packed_elements(self) -> int: ...
    @property
    def cost(self) -> float: ...
    @property
    def winograd_cost(self) -> float: ...
    @property
    def useful(self) -> float: ...
    @property
    def layouts(self) -> int: ...
    def pack(
        self, weight: int, strides: Sequence[int], dtype: str, threads: int = ...
    ) -> Packed: ...
    def fprop(
        self,
        packed: Packed,
        x: int,
        x_strides: Sequence[int],
        nhw: Sequence[int],
        y: int,
        y_strides: Sequence[int],
        out: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        scale: int = ...,
        shift: int = ...,
        residual: int = ...,
        residual_strides: Sequence[int] = ...,
        act: str = ...,
        threads: int = ...,
        pool: Pool | None = ...,
    ) -> bool: ...

class Wgrad:
    def __init__(
        self,
        mask: Buffer,
        dtype: str = ...,
        isa: str = ...,
        form: str = ...,
        channels_last: bool = ...,
    ) -> None: ...
    @property
    def form(self) -> str: ...
    @property
    def isa(self) -> str: ...
    @property
    def cost(self) -> float: ...
    @property
    def useful(self) -> float: ...
    def wgrad(
        self,
        x: int,
        x_strides: Sequence[int],
        nhw: Sequence[int],
        dy: int,
        dy_strides: Sequence[int],
        out: Sequence[int],
        dw: int,
        dw_strides: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        threads: int = ...,
    ) -> None: ...

class PackedParts:
    @property
    def bytes(self) -> int: ...

class Dgrad:
    def __init__(
        self,
        mask: Buffer,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        dtype: str = ...,
        isa: str = ...,
        form: str = ...,
        channels_last: bool = ...,
    ) -> None: ...
    @property
    def forms(self) -> list[str]: ...
    def pack(
        self, weight: int, strides: Sequence[int], dtype: str, threads: int = ...
    ) -> PackedParts: ...
    def dgrad(
        self,
        packed: PackedParts,
        dy: int,
        dy_strides: Sequence[int],
        nhw: Sequence[int],
        dx: int,
        dx_strides: Sequence[int],
        size: Sequence[int],
        threads: int = ...,
    ) -> None: ...

def int8_isas() -> list[str]: ...
def int8_kernels(isa: str = ...) -> Int8Kernels: ...

class Int8Packed:
    @property
    def bytes(self) -> int: ...
    def fprop(
        self,
        x: int,
        x_signed: bool,
        x_zero: int,
        nhw: Sequence[int],
        y: int,
        dtype: str,
        y_zero: int,
        low: float,
        high: float,
        out: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        multiplier: int,
        bias: int,
        residual: int,
        residual_signed: bool,
        residual_multiplier: float,
        residual_zero: int,
        threads: int,
        pool: Pool | None,
    ) -> bool: ...

class Int8Block:
    @property
    def lanes(self) -> int: ...
    @property
    def filters(self) -> int: ...
    @property
    def quads(self) -> int: ...
    @property
    def shuffles(self) -> int: ...
    @property
    def triples(self) -> int: ...
    @property
    def twins(self) -> int: ...
    @property
    def order(self) -> int: ...
    @property
    def contiguous(self) -> int: ...
    @property
    def spreads(self) -> int: ...

class Int8Plan:
    def __init__(self, mask: Buffer, isa: str = ..., form: str = ...) -> None: ...
    @property
    def form(self) -> str: ...
    @property
    def isa(self) -> str: ...
    @property
    def live(self) -> int: ...
    @property
    def cost(self) -> float: ...
    @property
    def useful(self) -> float: ...
    @property
    def blocks(self) -> list[Int8Block]: ...
    def pack(self, weight: int, strides: Sequence[int], threads: int = ...) -> Int8Packed: ...

class Int8Kernels:
    @property
    def isa(self) -> str: ...
    def sum(
        self,
        count: int,
        a: int,
        a_signed: bool,
        a_zero: int,
        a_multiplier: float,
        b: int,
        b_signed: bool,
        b_zero: int,
        b_multiplier: float,
        y: int,
        dtype: str,
        y_zero: int,
        low: float,
        high: float,
        threads: int,
    ) -> None: ...
    def mean(
        self,
        x: int,
        x_signed: bool,
        x_zero: int,
        nhwc: Sequence[int],
        multiplier: float,
        y: int,
        dtype: str,
        y_zero: int,
        low: float,
        high: float,
        threads: int,
    ) -> None: ...
    def max_pool(
        self,
        x: int,
        x_signed: bool,
        nhwc: Sequence[int],
        y: int,
        threads: int,
        pool: Pool,
    ) -> None: ...
    def quantize(
        self, x: int, count: int, scale: float, zero: int, signed: bool, y: int, threads: int
    ) -> None: ...

class Step:
    @property
    def kind(self) -> str: ...
    @property
    def operands(self) -> int: ...
    @property
    def lying(self) -> str: ...
    @property
    def weight_bytes(self) -> int: ...
    def of_part(self, parts: int) -> Step | None: ...
    def in_planes(self, which: Sequence[bool], nhw: tuple[int, int, int]) -> Step: ...

class Tape:
    def __init__(self) -> None: ...
    def start(self) -> None: ...
    def stop(self) -> None: ...
    def take(self) -> list[tuple[Step, list[int]]]: ...

class Program:
    def __init__(self, steps: Sequence[tuple[Step, Sequence[tuple[int, int]]]]) -> None: ...
    @property
    def bases(self) -> int: ...
    @property
    def kinds(self) -> list[str]: ...
    def run(self, addresses: Sequence[int]) -> None: ...
    def run_parts(
        self, addresses: Sequence[int], strides: Sequence[int], parts: int, workers: int
    ) -> None: ...

class SavedProgram:
    def __init__(self, file: bytes) -> None: ...
    @property
    def arena(self) -> int: ...
    def run(self, inputs: Sequence[int], outputs: Sequence[int], threads: int = ...) -> None: ...
    def release(self) -> int: ...

_Tensor = tuple[str, str, Sequence[int], Sequence[int]]
_Weights = tuple[bytes, int, int, str]

def saved_program(
    parts: Sequence[tuple[Program, Sequence[_Weights | None], Sequence[int]]],
    arena: int,
    inputs: Sequence[_Tensor],
    outputs: Sequence[_Tensor],
    made_by: str,
    network: str,
) -> bytes: ...

class Guard:
    def __init__(self) -> None: ...
    def entry(self, of: dict[str, Any], key: str) -> None: ...
    def tensor(self, tensor: Any, storage: Any) -> None: ...
    def holds(self) -> bool: ...

def each_step(
    what: str, dtype: str, count: int, low: float = ..., high: float = ..., threads: int = ...
) -> Step: ...
def max_pool_step(dtype: str, nhwc: Sequence[int], pool: Pool, threads: int = ...) -> Step: ...
def concat_step(outer: int, sizes: Sequence[int], threads: int = ...) -> Step: ...
def pick_step(
    images: int,
    height: int,
    width: int,
    pixel_bytes: int,
    rows: Sequence[int],
    columns: Sequence[int],
    threads: int = ...,
) -> Step: ...
def average_pool(
    dtype: str,
    x: int,
    nhwc: Sequence[int],
    y: int,
    pool: Pool,
    inside: bool,
    threads: int = ...,
) -> None: ...
def copy_step(
    element: int,
    sizes: Sequence[int],
    x_strides: Sequence[int],
    y_strides: Sequence[int],
    threads: int = ...,
) -> Step: ...
def pad_step(
    element: int,
    sizes: Sequence[int],
    x_strides: Sequence[int],
    y_strides: Sequence[int],
    count: int,
    first: int,
    value: bytes,
    threads: int = ...,
) -> Step: ...
def cast_step(from_dtype: str, to_dtype: str, count: int, threads: int = ...) -> Step: ...
