# SPDX-License-Identifier: Apache-2.0
"""The compiled engine of csrc/cpu: addresses are integers, strides count elements."""

from collections.abc import Sequence

from typing_extensions import Buffer

def isas() -> list[str]: ...

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
    def useful(self) -> float: ...
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
        pool: Sequence[int] | None = ...,
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
