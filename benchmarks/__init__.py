# SPDX-License-Identifier: Apache-2.0
"""The benchmarks: ``pytest benchmarks`` measures, writes results/*.json and prints a table."""

from pathlib import Path

RESULTS = Path(__file__).parent / "results"
