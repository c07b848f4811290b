# SPDX-License-Identifier: Apache-2.0
"""A plugin of pytest: says which test begins before it does, for `benchmarks.watch`."""

from __future__ import annotations

from typing import Any

from benchmarks.watch import BEGIN

_configs: list[Any] = []


def pytest_configure(config: Any) -> None:
    """Remembers where the writer to the terminal will be found: it may come after this plugin."""
    _configs.append(config)


def pytest_runtest_logstart(nodeid: str) -> None:
    """Names a test, past the capture of its own output."""
    reporter = _configs[-1].pluginmanager.get_plugin("terminalreporter")
    reporter.write(f"\n{BEGIN}{nodeid}\n", flush=True)  # a dot of the progress may stand there
