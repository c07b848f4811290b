# SPDX-License-Identifier: Apache-2.0
"""Tries an installed package from outside the source tree: smoke.py none|require.

``none`` expects an install without any compiled part, ``require`` one with all of those whose
sources are in the tree; the CUDA part where nvcc is on the path.
"""

import importlib.util
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F

# An editable install of the tree would lend its compiled parts to the install that is tried here.
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in getattr(f, "__module__", "")]

import hetconv_kernels as hk  # noqa: E402 (the line above must come first)

expected_compiled = sys.argv[1] == "require"
tree = Path(__file__).resolve().parents[1]
installed = Path(hk.__file__).resolve().parent
assert installed != tree / "hetconv_kernels", "the source tree was imported, not the install"
assert hk.__version__ == version("hetconv-kernels"), "the versions disagree"

build = hk.info()["build"]
for folder in {source.parent for source in tree.glob("csrc/*/*.cpp")}:
    part = f"hetconv_kernels._{folder.name}"
    found = importlib.util.find_spec(part) is not None
    without = folder.name == "cuda" and shutil.which("nvcc") is None  # may be there nevertheless
    assert found == expected_compiled or (without and not found), f"{part}: found={found}, {build}"
    if found:
        importlib.import_module(part)

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
print(f"{installed}: compiled parts {expected_compiled}, backends {hk.available_backends()}: good")
