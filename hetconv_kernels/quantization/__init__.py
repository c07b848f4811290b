# SPDX-License-Identifier: Apache-2.0
"""Low precision: 8-bit activations and weights, 32-bit accumulation; see docs/low-precision.md."""
