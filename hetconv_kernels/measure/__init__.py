# SPDX-License-Identifier: Apache-2.0
"""How fast something is, and why.

`timing` measures callables beside each other, `profiling` a network layer by layer, `explain` one
layer on every backend; `stats` counts multiply-accumulates and weights, `roofline` what the device
can do at most, and `tuning` remembers what was fastest. `disturbance` tells whether something else
ran meanwhile.
"""
