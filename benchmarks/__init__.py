# SPDX-License-Identifier: Apache-2.0
"""The benchmarks: ``pytest benchmarks`` measures, writes results/*.json and prints a table."""
