# SPDX-License-Identifier: Apache-2.0
"""Tries an installed package from outside the source tree: smoke.py none|cpu|cpu,cuda.

The argument names the compiled parts that the install must have; it must have no others.
"""

import importlib.util
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F

import hetconv_kernels as hk

expected = {part for part in sys.argv[1].split(",") if part != "none"}
tree = Path(__file__).resolve().parents[1]
installed = Path(hk.__file__).resolve().parent
assert installed != tree / "hetconv_kernels", "the source tree was imported, not the install"
assert hk.__version__ == version("hetconv-kernels"), "the versions disagree"

parts = ("cpu", "cuda")
found = {part for part in parts if importlib.util.find_spec(f"hetconv_kernels._{part}") is not None}
assert found == expected, f"compiled parts: found {found}, expected {expected}"
for part in found:
    importlib.import_module(f"hetconv_kernels._{part}")  # a CUDA build too, without a GPU

# The console script, from the install's own folder, knows the same parts.
script = Path(sys.executable).with_name("hetconv")
said = subprocess.run([script, "info", "--json"], capture_output=True, text=True, check=True)
assert json.loads(said.stdout)["extensions"] == {f"_{part}": part in found for part in parts}

layer = hk.nn.HetConv2d(8, 16, 3, stride=2, padding=1, p=4)
x = torch.randn(2, 8, 9, 9, requires_grad=True)
mask = torch.from_numpy(layer.support.mask.copy())
truth = F.conv2d(x, layer.weight * mask, layer.bias, stride=2, padding=1)
for backend in ("auto", *hk.available_backends("cpu")):
    with hk.use_backend(backend):
        y = layer(x)
    torch.testing.assert_close(y, truth, rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    (wanted,) = torch.autograd.grad(truth.square().sum(), x, retain_graph=True)
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-4)
print(f"compiled parts: {sys.argv[1]}; backends: {', '.join(hk.available_backends())}: good")
