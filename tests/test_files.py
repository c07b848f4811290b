# SPDX-License-Identifier: Apache-2.0
"""Files are written whole or not at all, and a full disk is one sentence."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import hetconv_kernels as hk
from benchmarks.report import __main__ as report
from hetconv_kernels import cli
from hetconv_kernels.errors import HetconvError
from hetconv_kernels.files import write_text, writing

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")

FAST = "--train-epochs 0 --no-measure --set epochs=0"


@contextmanager
def full_disk(bytes_left: int) -> Iterator[None]:
    """Lets no file grow beyond some bytes: what a full disk does to a writer, C++ ones included."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_the_stand_in_for_a_full_disk_works(tmp_path: Path) -> None:
    with full_disk(10), pytest.raises(OSError, match="large"):
        (tmp_path / "file").write_text("x" * 11)
    (tmp_path / "file").write_text("x" * 11)


@pytest.mark.parametrize(
    ("measured", "left"),
    [("compress", 0), ("compress", 4000), ("io.save", 0), ("io.save", 4000), ("trace", 4000),
     ("demo", 0), ("report", 0), ("report", 1000), ("onnx", 0)],
)  # fmt: skip
def test_a_full_disk_is_one_sentence_and_leaves_nothing_behind(
    measured: str, left: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    net = hk.models.digits_net(8).eval()
    if measured == "compress":
        torch.save(hk.models.digits_net().state_dict(), tmp_path / "net.pt")
        words = ["compress", "het", "--weights", str(tmp_path / "net.pt"), *FAST.split(), "--out",
                 str(out)]  # fmt: skip
    elif measured == "trace":
        words = ["profile", "digits_net", "--rounds", "5", "--seconds", "0.1", "--trace",
                 str(out / "trace.json")]  # fmt: skip
    elif measured == "demo":
        words = ["demo", "--quick", "--steps", "2", "--out", str(out)]
    elif measured == "report":
        results = Path(__file__).parents[1] / "benchmarks" / "results" / "dispatch-full.json"
        pytest.importorskip("matplotlib")
        words = [str(results), "-o", str(out)]
    else:
        pytest.importorskip("safetensors" if measured == "io.save" else "onnxscript")

        def write() -> None:
            if measured == "io.save":
                hk.save(net, tmp_path / "net.safetensors")
            else:
                hk.export.to_onnx(net, torch.randn(2, 1, 8, 8), tmp_path / "net.onnx")

        with full_disk(left), pytest.raises(HetconvError, match="cannot be written"):
            write()
        assert not list(tmp_path.glob("*.part"))
        return
    with full_disk(left):
        code = (report.main if measured == "report" else cli.main)(words)
    said = capsys.readouterr()
    assert code == cli.FAILURE, said
    assert [text for text in said.err.splitlines() if text.startswith(("hetconv: ", "report: "))][
        -1:
    ]
    assert "Traceback" not in said.err
    assert not list(out.glob("*.part")) if out.exists() else True


@pytest.mark.parametrize("command", [["info"], ["explain", "--channels", "8", "--size", "8"]])
def test_a_full_standard_output_is_one_sentence(command: list[str]) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full here")
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "hetconv_kernels", *command],
            stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=300,
            cwd=Path(__file__).parents[1],
        )  # fmt: skip
    assert done.returncode == cli.FAILURE
    assert done.stderr.startswith("hetconv: ")
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_text(path, "old")
    with full_disk(10), pytest.raises(HetconvError, match="cannot be written"):
        write_text(path, "new" * 10)

    def interrupted() -> None:
        with writing(path) as beside:
            beside.write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
