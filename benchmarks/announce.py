# SPDX-License-Identifier: Apache-2.0
"""A plugin of pytest: says which test begins before it does, for `benchmarks.watch`."""

from __future__ import annotations

from typing import Any

from benchmarks.watch import BEGIN

_reporter: list[Any] = []


def pytest_configure(config: Any) -> None:
    """Finds what writes to the terminal, past the capture of a test's own output."""
    _reporter.append(config.pluginmanager.get_plugin("terminalreporter"))


def pytest_runtest_logstart(nodeid: str) -> None:
    """Names a test."""
    reporter = _reporter[-1]
    reporter.ensure_newline()
    reporter.write_line(BEGIN + nodeid)
    reporter.flush()
