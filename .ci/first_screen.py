# SPDX-License-Identifier: Apache-2.0
"""Runs README's code as printed, with an installed package: first_screen.py README.

All Python blocks in their order in one namespace, as a reader would type them. Each has to print
something.
"""

import contextlib
import io
import re
import sys
from pathlib import Path

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)


def main() -> int:
    """Runs the blocks and shows what they print."""
    readme = Path(sys.argv[1]).resolve()
    blocks = BLOCK.findall(readme.read_text(encoding="utf-8"))
    if not blocks:
        print(f"{readme} has no code.", file=sys.stderr)
        return 1
    namespace: dict[str, object] = {"__name__": "__main__"}
    for number, block in enumerate(blocks, 1):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(block, f"README, block {number}", "exec"), namespace)
        print(out.getvalue(), end="")
        if not out.getvalue().strip():
            print(f"Block {number} printed nothing.", file=sys.stderr)
            return 1
    import hetconv_kernels

    installed = Path(hetconv_kernels.__file__).resolve()
    if installed.is_relative_to(readme.parent / "hetconv_kernels"):
        print("The source tree was imported, not the install.", file=sys.stderr)
        return 1
    print(f"README: {len(blocks)} blocks ran with {installed.parent}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
