# SPDX-License-Identifier: Apache-2.0
"""What both GPU engines stand on: devices, axes, weights in memory, CUDA-graph capture, packing."""
