# SPDX-License-Identifier: Apache-2.0
"""Work on whole networks: swap layers, remove dead channels, fuse, order channels."""
