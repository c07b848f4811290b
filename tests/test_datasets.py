# SPDX-License-Identifier: Apache-2.0
"""Data sets: the binary format of CIFAR-10 on files made here, the digits, and batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from cifar import RECORD, write_cifar

from hetconv_kernels.datasets import Split, cifar10, digits, shifted_and_flipped
from hetconv_kernels.errors import ArgumentError, HetconvError
from hetconv_kernels.models import digits_net


def test_records_are_read_as_the_format_says(tmp_path: Path) -> None:
    written = write_cifar(tmp_path, {"data_batch_1.bin": 4, "data_batch_3.bin": 3,
                                     "test_batch.bin": 2})  # fmt: skip
    data = cifar10(tmp_path, validation=2)
    assert [len(part) for part in (data.train, data.validation, data.test)] == [5, 2, 2]
    both = np.concatenate([written["data_batch_1.bin"], written["data_batch_3.bin"]])
    assert data.train.labels.tolist() + data.validation.labels.tolist() == both[:, 0].tolist()
    # Green, row 5, column 7 of the last training image.
    byte = both[4, 1 + 1024 + 5 * 32 + 7]
    expected = (byte / 255 - 0.4822) / 0.2435
    assert data.train.images[4, 1, 5, 7].item() == pytest.approx(expected, rel=1e-5)
    byte = written["test_batch.bin"][1, 1 + 2048 + 31 * 32 + 31]
    assert data.test.images[1, 2, 31, 31].item() == pytest.approx(
        (byte / 255 - 0.4465) / 0.2616, rel=1e-5
    )
    assert data.train.images.dtype == torch.float32
    assert data.train.labels.dtype == torch.int64


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda p: (p / "test_batch.bin").unlink(), HetconvError, "no such files"),
        (lambda p: (p / "data_batch_1.bin").unlink(), HetconvError, "no such files"),
        (lambda p: (p / "test_batch.bin").write_bytes(b""), HetconvError, "size of"),
        (lambda p: (p / "test_batch.bin").write_bytes(b"\0" * 5000), HetconvError, "5000 bytes"),
        (lambda p: (p / "test_batch.bin").write_bytes(b"\x0b" * RECORD), HetconvError, "label"),
    ],
    ids=["no test", "no training", "empty", "cut off", "label 11"],
)
def test_other_files_are_refused(change, error, message, tmp_path: Path) -> None:
    write_cifar(tmp_path, {"data_batch_1.bin": 4, "test_batch.bin": 2})
    change(tmp_path)
    with pytest.raises(error, match=message):
        cifar10(tmp_path, validation=1)


@pytest.mark.parametrize("validation", [0, 4, 5000])
def test_validation_must_leave_something(validation: int, tmp_path: Path) -> None:
    write_cifar(tmp_path, {"data_batch_1.bin": 4, "test_batch.bin": 2})
    with pytest.raises(ArgumentError, match="validation"):
        cifar10(tmp_path, validation)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(HetconvError, match="no such folder"):
        cifar10(tmp_path / "nowhere")


def test_digits_are_three_parts_that_share_no_image() -> None:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    data = digits()
    parts = (data.train, data.validation, data.test)
    assert [len(part) for part in parts] == [1000, 297, 500]
    assert data.train.images.shape[1:] == (1, 8, 8)
    assert float(data.train.images.min()) == 0
    assert float(data.train.images.max()) == 1
    for part in parts:
        assert part.labels.bincount().min() > 15
    seen = torch.cat([part.images for part in parts]).flatten(1)
    assert len(seen.unique(dim=0)) == 1797
    assert torch.equal(digits().train.images, data.train.images)


def test_shuffled_batches_are_new_each_time_and_leave_no_single_image() -> None:
    split = Split(torch.arange(9.0).reshape(9, 1, 1, 1), torch.arange(9))
    data = split.shuffled(4)
    torch.manual_seed(0)
    first, second = data(0), data(1)
    assert [len(y) for _, y in first] == [4, 4]
    labels = torch.cat([y for _, y in first])
    assert labels.unique().numel() == 8
    assert not torch.equal(labels, torch.cat([y for _, y in second]))
    assert all(torch.equal(x.flatten().long(), y) for x, y in first)
    assert [len(y) for _, y in split.batches(4)] == [4, 4, 1]


def test_augmentation_shifts_by_at_most_four_and_mirrors() -> None:
    image = torch.zeros(200, 1, 16, 16)
    image[:, :, 8, 6] = 1
    torch.manual_seed(0)
    moved = shifted_and_flipped(image)
    place = moved.flatten(1).argmax(1)
    rows, columns = place // 16, place % 16
    assert moved.sum() == 200
    assert set((rows - 8).tolist()) == set(range(-4, 5))
    assert {abs(c - 6) <= 4 or abs(15 - c - 6) <= 4 for c in columns.tolist()} == {True}
    assert columns.max() > 10  # 6 + 4 is the most without a mirror


def test_digits_net_reads_digits() -> None:
    net = digits_net(8)
    assert net(torch.randn(2, 1, 8, 8)).shape == (2, 10)
