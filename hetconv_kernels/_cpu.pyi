# SPDX-License-Identifier: Apache-2.0
"""The types of csrc/cpu/bindings.cpp: addresses are integers, strides count elements."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

class Packed:
    @property
    def bytes(self) -> int: ...

class Plan:
    def __init__(
        self,
        mask: NDArray[np.uint8],
        dtype: str = "float32",
        isa: str = "",
        form: str = "auto",
        channels_last: bool = True,
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
    def pack(self, weight: int, strides: Sequence[int], dtype: str, threads: int = 1) -> Packed: ...
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
        scale: int = 0,
        shift: int = 0,
        residual: int = 0,
        residual_strides: Sequence[int] = ...,
        act: str = "none",
        threads: int = 1,
    ) -> None: ...
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
        threads: int = 1,
    ) -> None: ...

class PackedParts:
    @property
    def bytes(self) -> int: ...

class Dgrad:
    def __init__(
        self,
        mask: NDArray[np.uint8],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        dtype: str = "float32",
        isa: str = "",
        form: str = "auto",
        channels_last: bool = True,
    ) -> None: ...
    @property
    def forms(self) -> list[str]: ...
    def pack(
        self, weight: int, strides: Sequence[int], dtype: str, threads: int = 1
    ) -> PackedParts: ...
    # The last but one is called `in` in C++, which no Python caller can name.
    def dgrad(
        self,
        packed: PackedParts,
        dy: int,
        dy_strides: Sequence[int],
        nhw: Sequence[int],
        dx: int,
        dx_strides: Sequence[int],
        in_size: Sequence[int],
        threads: int = 1,
    ) -> None: ...

def isas() -> list[str]: ...
