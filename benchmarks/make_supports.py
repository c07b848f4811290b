# SPDX-License-Identifier: Apache-2.0
"""Writes self_grouped.json anew, the self-grouped Supports of all cases (see `supports`).

python -m benchmarks.make_supports
"""

from __future__ import annotations

import json

from benchmarks.cases import CPU_CASES, GPU_CASES
from benchmarks.networks import NETWORKS, self_grouped_layers
from benchmarks.supports import SELF_GROUPED_FILE, SMALL, entry_of, make_support, support_key
from hetconv_kernels import models


def main() -> None:
    """Makes the file anew, one entry for each self-grouped layer of the cases."""
    whole = {
        shape
        for case in NETWORKS
        if case.support.kind == "self_group"
        for _, shape in self_grouped_layers(case, models.create(case.network))
    }
    wanted = sorted(
        {
            (case.support.value, case.c, case.f, case.k, case.support.seed)
            for case in (*CPU_CASES, *GPU_CASES)
            if case.support.kind == "self_group"
        }
        | whole
        | {SMALL}
    )
    entries = {support_key(*shape): entry_of(make_support(*shape)) for shape in wanted}
    lines = [f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries.items()]
    SELF_GROUPED_FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
