# SPDX-License-Identifier: Apache-2.0
"""Images from a folder that has a folder for each class."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import ArgumentError, HetconvError, mismatch
from .split import Dataset, Folder, Split, check_digests

# Means and standard deviations of ImageNet's channels, as everybody uses them.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}


def image_folder(
    folder: Folder,
    size: int,
    validation: float = 0.1,
    test: float = 0.1,
    seed: int = 0,
    digests: Mapping[str, str] | None = None,
) -> Dataset:
    """Reads a folder of images, one folder within it for each class; needs Pillow.

    Classes are numbered by name. Each image is resized so that its shorter edge is ``size``, cut
    to its centre, and normalised by ImageNet's means and deviations. Where the folder has folders
    ``train`` and ``val`` (and perhaps ``test``), with the classes in each, those are the parts;
    otherwise a part of each class is drawn for decisions and for the report. All images are held in
    memory: for more than fit, give `hk.compress` batches of a ``DataLoader``.  # [N, 3, size, size]

    Args:
        folder: with a folder for each class.
        size: of an image's edge, in pixels.
        validation: fraction for decisions, where it is drawn.
        test: fraction for the report, where it is drawn.
        seed: of drawing.
        digests: SHA-256, in hexadecimal, of files by their path within the folder; each must be
            there and have it.

    Raises:
        HetconvError: Pillow is not installed, a file cannot be read or has another digest, or there
            are no classes.
        ArgumentError: a fraction that leaves nothing, or a size below one.
    """
    if size < 1:
        raise ArgumentError(mismatch("size", size, "at least 1 pixel"))
    if validation <= 0 or test <= 0 or validation + test >= 1:
        raise ArgumentError(
            mismatch("validation and test", (validation, test), "fractions whose sum is below 1")
        )
    place = Path(folder)
    check_digests(place, digests)
    if (place / "train").is_dir() and (place / "val").is_dir():
        classes = _class_names(place / "train")
        train, decide = (_images(place / part, classes, size) for part in ("train", "val"))
        if (place / "test").is_dir():
            return Dataset(train, decide, _images(place / "test", classes, size))
        order = torch.randperm(len(decide), generator=torch.Generator().manual_seed(seed))
        half = len(order) // 2
        return Dataset(train, *(decide.chosen(part) for part in (order[:half], order[half:])))
    whole = _images(place, _class_names(place), size)
    drawn: list[list[Tensor]] = [[], [], []]
    generator = torch.Generator().manual_seed(seed)
    for label in whole.labels.unique():
        members = (whole.labels == label).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        counts = [math.ceil(len(members) * part) for part in (validation, test)]
        if sum(counts) >= len(members):
            raise ArgumentError(
                mismatch(
                    f"images of class {int(label)} in {place}", len(members),
                    f"more than {sum(counts)}, which validation and test take",
                )
            )  # fmt: skip
        for kept, part in zip(
            drawn, members.split([len(members) - sum(counts), *counts]), strict=True
        ):
            kept.append(part)
    return Dataset(*(whole.chosen(torch.cat(part)) for part in drawn))


def _class_names(place: Path) -> list[str]:
    names = sorted(path.name for path in place.iterdir() if path.is_dir()) if place.is_dir() else []
    if len(names) < 2:
        raise HetconvError(
            mismatch(
                f"classes in {place}", names or "no folder", "a folder for each of several classes"
            )
        )
    return names


def _images(place: Path, classes: list[str], size: int) -> Split:
    """Reads the images of a folder, resized, cut and normalised."""
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ImportError as error:
        raise HetconvError(
            "Folders of images are read by Pillow, which is not installed: pip install Pillow."
        ) from error
    found, labels = [], []
    for label, name in enumerate(classes):
        paths = sorted(p for p in (place / name).glob("**/*") if p.suffix.lower() in _SUFFIXES)
        if not paths:
            raise HetconvError(
                mismatch(f"images in {place / name}", "none", f"some of {sorted(_SUFFIXES)}")
            )
        for path in paths:
            try:
                with Image.open(path) as image:
                    fitted = ImageOps.fit(image.convert("RGB"), (size, size))
            except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
                raise HetconvError(f"{path} cannot be read as an image: {error}") from error
            found.append(np.asarray(fitted))
            labels.append(label)
    images = torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(v)[None, :, None, None] for v in (_MEAN, _STD))
    return Split(((images - mean) / std).contiguous(), torch.tensor(labels))
