# SPDX-License-Identifier: Apache-2.0
"""Compressors: they choose a Support (and weights), and never touch a kernel."""

from .self_grouping import self_group

__all__ = ["self_group"]
