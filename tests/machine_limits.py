# SPDX-License-Identifier: Apache-2.0
"""What the machine code of a kernel of csrc/cuda must show, and what would be worse than before."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from machine_code import Code

TMA_KERNELS = ("narrow_tma", "wgrad_tma")  # kernels whose tiles TMA brings
# With more, no block of three warpgroups starts; they exchange registers afterwards.
_WIDE_REGISTERS = 168
# Instructions that a halo's copies may take, each, beside products that wait for them.
_WIDE_TURN = 16.0
# Of a thread, so that sixteen warps are held; and the instructions that a product may take in the
# loop of the kernel for scattered groups: it takes a scheduler 6.4 clocks on Hopper.
_SCATTERED_REGISTERS, _SCATTERED_TURN = 128, 5.0


def problems(code: Code) -> list[str]:
    """Lists what the machine code of a kernel must show and does not."""
    found = []
    if code.name.startswith(("narrow_fprop", "narrow_wgrad", *TMA_KERNELS)):
        if "HMMA" not in code.matrix:
            found.append(f"no HMMA instruction: {code.matrix}")
        if code.name.startswith(TMA_KERNELS):
            if "UTMALDG" not in code.copies:
                found.append(f"no copies of boxes by TMA: {code.copies}")
        elif "LDGSTS" not in code.copies:
            found.append(f"no asynchronous copies: {code.copies}")
        if code.registers > 255:
            found.append(f"{code.registers} registers")
    if code.name.startswith("scattered_fprop"):
        if "HMMA" not in code.matrix:
            found.append(f"no HMMA instruction: {code.matrix}")
        if code.registers > _SCATTERED_REGISTERS:
            found.append(f"{code.registers} registers")
        if code.name.startswith("scattered_fprop_kernel<Bfloat, 3") and not (
            0 < code.products <= _SCATTERED_TURN
        ):
            found.append(f"{code.products} instructions for each product")
    if code.name.startswith("wide_fprop"):
        if not code.described or code.described != code.matrix.get("HGMMA"):
            found.append(f"{code.described} HGMMA of operands in shared memory: {code.matrix}")
        if not {"LDGSTS", "UBLKCP"} <= set(code.copies):
            found.append(f"no asynchronous and bulk copies: {code.copies}")
        if "ARRIVES" not in code.copies:
            found.append(f"copies whose end a barrier does not count by itself: {code.copies}")
        if not 0 < code.turn <= _WIDE_TURN:
            found.append(f"{code.turn} instructions for each asynchronous copy")
        if code.registers > _WIDE_REGISTERS:
            found.append(f"{code.registers} registers")
    if code.name.startswith("wide_wgrad"):
        if code.described or "HGMMA" not in code.matrix:
            found.append(f"no HGMMA with an operand in registers: {code.matrix}")
        if not {"LDGSTS", "ARRIVES"} <= set(code.copies):
            found.append(f"no asynchronous copies that a barrier counts: {code.copies}")
        if not 0 < code.turn <= _WIDE_TURN:
            found.append(f"{code.turn} instructions for each asynchronous copy")
        if code.registers > _WIDE_REGISTERS:
            found.append(f"{code.registers} registers")
    if code.losses:
        found.append(f"{code.losses} warnings of lost speed")
    if code.stack or code.spills or code.local:
        found.append(
            f"{code.stack} B of stack, {code.spills} B of spills, {code.local} local accesses"
        )
    return found


def regressions(code: Code, expected: dict[str, Any]) -> list[str]:
    """Lists what has become worse than the committed row; made by the same release of nvcc."""
    found = []
    if code.registers > expected["registers"]:
        found.append(f"{code.registers} registers, {expected['registers']} before")
    if code.shared != expected["shared"]:
        found.append(f"{code.shared} B of static shared memory, {expected['shared']} before")
    if code.described != expected.get("described", 0):
        found.append(f"{code.described} HGMMA of shared operands, {expected['described']} before")
    for kind in ("matrix", "copies"):
        mine, theirs = getattr(code, kind), expected[kind]
        if set(mine) != set(theirs):
            found.append(f"{kind}: {sorted(mine)}, {sorted(theirs)} before")
    return found
