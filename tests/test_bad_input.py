# SPDX-License-Identifier: Apache-2.0
"""Bad command lines: each is one sentence and an exit code, and none is a traceback."""

from __future__ import annotations

import pickle
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from hetconv_kernels import cli

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")

USER_CODE = """
import torch
from torch import nn

def net(): return nn.Sequential(nn.Conv2d(1, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 10))
def colour(): return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 10))
def three_classes(): return nn.Sequential(nn.Conv2d(1, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 3))
def images(): return nn.Conv2d(1, 8, 3)
def empty(): return nn.ReLU()
def nothing(): return None
def raises(): raise ValueError("two\\nlines")
def needs(argument): return net()
number = 3
def pair(): return net(), torch.ones(3)
def two(): return [], []
def iterators(): return [], iter([]), iter([])
def no_batches(): return [], [], []
def no_labels(): return ([torch.ones(2, 1, 8, 8)],) * 3
def words(): return ([("a", "b")],) * 3
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of every kind that is given for another."""
    folder = tmp_path_factory.mktemp("files")
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (3000,), dtype=torch.uint8, generator=generator)
    (folder / "random.pt").write_bytes(noise.numpy().tobytes())
    (folder / "random.safetensors").write_bytes(noise.numpy().tobytes())
    (folder / "text.pt").write_text("weights: none\n")
    (folder / "text.json").write_text("weights: none\n")
    (folder / "list.json").write_text("[]")
    (folder / "empty.pt").touch()
    (folder / "empty.safetensors").touch()
    (folder / "pickle.pt").write_bytes(pickle.dumps({"a": Path("b")}))
    (folder / "number.pt").write_bytes(pickle.dumps(3))
    torch.save(nn.Conv2d(1, 1, 1), folder / "module.pt")
    torch.save(nn.Conv2d(1, 1, 1).state_dict(), folder / "other.pt")
    torch.save(torch.ones(3), folder / "tensor.pt")
    torch.save({1: 2}, folder / "numbers.pt")
    whole = (folder / "other.pt").read_bytes()
    (folder / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (folder / "data_batch_1.bin").write_bytes(b"12345")
    (folder / "test_batch.bin").write_bytes(b"12345")
    (folder / "folder.pt").mkdir()
    (folder / "folder.safetensors").mkdir()
    (folder / "bad_user_code.py").write_text(USER_CODE)
    (folder / "bad_syntax.py").write_text("def net(:\n")
    (folder / "bad_import.py").write_text("import none_such\n")
    return folder


# What is meant to be given ({} is the folder of the files), and what the sentence has to say.
FAST = "--train-epochs 0 --no-measure --set epochs=0"
QUICK = "--train-epochs 0 --no-measure --images 8"
BAD: list[tuple[str, str]] = [
    # Weights that are none.
    *((f"compress het --weights {{}}/{name}.pt {FAST}", "--weights .* cannot be used")
      for name in ("random", "text", "empty", "pickle", "number", "module", "other", "tensor",
                   "numbers", "cut", "folder", "none")),
    # Numbers out of range, or none.
    *((f"compress het --learning-rate {value}", "--learning-rate: received")
      for value in ("-1", "0", "nan", "inf", "much")),
    *((f"compress het --seed {value}", "--seed: received") for value in ("-1", 2**64, 10**40, "x")),
    ("compress het --batch 0", "--batch"),
    ("compress het --batch 1", "--batch: received 1"),
    ("compress het --batch -3", "--batch"),
    ("compress het --train-epochs -1", "--train-epochs"),
    ("compress het --validation 0", "--validation"),
    *((f"compress het --require-speedup {value}", "--require-speedup")
      for value in ("-1", "0", "nan", "inf")),
    # Methods and settings.
    ("compress", "required: METHOD"),
    ("compress magic", "invalid choice"),
    ("compress het --set p", "NAME=VALUE"),
    ("compress het --set q=3", "NAME=VALUE"),
    ("compress het --set p=0", "p: received"),
    ("compress het --set p=many", "p: received"),
    ("compress het --set p=null", "p: received"),
    ("compress het --set p=[1]", "p: received"),
    ("compress het --set p={}", "p: received"),
    ("compress het --set epochs=1.5", "epochs: received"),
    ("compress wsp --set percentile=NaN", "percentile: received"),
    ("compress wsp --set percentile=2", "percentile: received"),
    ("compress admm --set rates=0.5", "--set"),
    ("compress admm --set rates=[]", "rates: received"),
    ("compress admm --set rates=[0.9,0.5]", "rates: received"),
    ("compress admm --set rho=-1", "rho: received"),
    ("compress stability --set regulariser=l3", "regulariser: received"),
    ("compress frequency --set path=magic", "path"),
    (f"compress het --skip nothing {FAST}", "skip: received"),
    # Devices.
    *((f"{command} --device {device}", f"evice.*{device}")
      for command in (f"compress het {FAST}", "explain", "profile layer", "profile digits_net",
                      "demo --quick")
      for device in ("meta", "toaster", "cuda:99")),
    # Networks and data.
    (f"compress het --model resnet20 {FAST}", "input: received .*expected one that the network"),
    (f"compress het --model none {FAST}", "--model: received 'none'"),
    (f"compress het --data none {FAST}", "no such folder"),
    (f"compress het --data {{}} {FAST}", "size of .*data_batch_1.bin"),
    (f"compress het --data {{}}/text.pt {FAST}", "CIFAR-10"),
    # A user's factories.
    *((f"compress het --model {name} {FAST}", what) for name, what in (
        ("bad_user_code:none", "'none', which 'bad_user_code' has not"),
        ("none_such_module:net", "'none_such_module', which is not there"),
        ("bad_import:net", "raised ModuleNotFoundError"),
        ("bad_syntax:net", "raised SyntaxError"),
        ("bad_user_code:number", "a int, expected a function"),
        ("bad_user_code:raises", r"raised ValueError at bad_user_code.py:[0-9]+: two$"),
        ("bad_user_code:needs", "raised TypeError"),
        ("bad_user_code:nothing", "NoneType, expected an nn.Module"),
        ("bad_user_code:empty", "no weights"),
        ("bad_user_code:colour", "input: received"),
        ("bad_user_code:", "module:function"),
        (":net", "module:function"),
        ("bad_user_code.py:net", "Write bad_user_code:net"),
        ("bad user:net", "module:function"),
    )),
    ("compress het --model bad_user_code:three_classes --train-epochs 1", "outputs and labels"),
    ("compress het --model bad_user_code:images --train-epochs 1", "outputs and labels"),
    *((f"compress het --model bad_user_code:net --data bad_user_code:{name} {FAST}", what)
      for name, what in (
        ("two", "expected three"),
        ("nothing", "expected three"),
        ("iterators", "starts anew each time"),
        ("no_batches", "first batch of the training data"),
        ("no_labels", "first batch of the training data"),
        ("words", "first batch of the training data"),
        ("raises", "raised ValueError"),
    )),
    ("profile bad_user_code:pair", "images"),
    ("profile bad_user_code:nothing", "expected an nn.Module"),
    ("profile bad_user_code:empty", "convolution"),
    ("profile bad_user_code:raises", "raised ValueError"),
    ("profile bad_user_code:net --size 3", "input: received"),
    # One layer.
    *((f"explain {words}", what) for words, what in (
        ("--density 2", "--density: received '2'"),
        ("--density 0 --kind mask", "--density"),
        ("--density nan", "--density"),
        ("--kind round", "--kind"),
        ("--channels 0", "--channels"),
        ("--channels -8", "--channels"),
        ("--channels 99999999999", "--channels"),
        ("--channels 2000000000 --kind dense", "entries"),
        ("--channels 2000000 --kind mask", "entries"),
        ("--kernel 0", "--kernel"),
        ("--kernel 4", "kernel"),
        ("--p 0", "--p"),
        ("--p 65", "p"),
        ("--kind grouped --p 7", "groups"),
        ("--size 0", "--size"),
        ("--size -3x5", "--size"),
        ("--size x5", "--size"),
        ("--size wide", "--size"),
        ("--size 1000000000", "No input of shape"),
        ("--batch 0", "--batch"),
        ("--stride 0", "--stride"),
        ("--backend none", "none"),
        ("--dtype int4", "--dtype"),
    )),
    # Profiles.
    *((f"profile {words}", what) for words, what in (
        ("", "required: MODEL"),
        ("nothing", "MODEL: received 'nothing'"),
        ("none.safetensors", "not there"),
        ("{}/random.safetensors", "damaged|no whole"),
        ("{}/empty.safetensors", "damaged|no whole"),
        ("{}/text.pt", "MODEL: received"),
        ("layer --seconds nan", "--seconds: received"),
        ("layer --seconds 0", "--seconds"),
        ("layer --seconds -1", "--seconds"),
        ("layer --rounds 1", "--rounds"),
        ("layer --passes -1", "--passes"),
        ("layer --het 4", "--het"),
        ("digits_net --het 0", "--het"),
        ("digits_net --backend none", "none"),
        ("digits_net --size 1", "input: received"),
        ("layer --trace {}/text.pt/trace.json --channels 8 --size 8 --rounds 5 --seconds 0.1",
         "cannot be written"),
    )),
    # In 8 bits.
    *((f"quantize --weights {{}}/{name}.pt {QUICK}", "--weights .* cannot be used")
      for name in ("random", "text", "pickle", "module", "other", "numbers", "cut", "folder",
                   "none")),
    *((f"quantize {words} {QUICK}", what) for words, what in (
        ("none.safetensors", "not there"),
        ("{}/random.safetensors", "damaged|no whole"),
        ("{}/empty.safetensors", "damaged|no whole"),
        ("{}/text.pt", "damaged|no whole"),
        ("{}/folder.pt", "folder.pt"),
        ("{}/random.safetensors --model resnet20", "one network, not two"),
        ("--seed -1", "--seed: received"),
        (f"--seed {2**64}", "--seed: received"),
        ("--batch 0", "--batch"),
        ("--qat-epochs -1", "--qat-epochs"),
        ("--validation 0", "--validation"),
        ("--percentile nan --observer percentile", "--percentile"),
        ("--percentile 101 --observer percentile", "--percentile"),
        ("--percentile 20 --observer percentile", "percentile"),
        ("--min-sqnr nan", "--min-sqnr"),
        ("--min-sqnr much", "--min-sqnr"),
        ("--max-drop nan", "--max-drop"),
        ("--max-drop -1", "--max-drop"),
        ("--observer none", "invalid choice"),
        ("--activations int4", "invalid choice"),
        ("--skip nothing", "names of layers"),
        ("--device meta", "evice.*meta"),
        ("--device toaster", "evice.*toaster"),
        ("--device cuda:99", "evice.*cuda:99"),
        ("--model none", "--model: received 'none'"),
        ("--model resnet20", "input: received"),
        ("--model bad_user_code:nothing", "NoneType, expected an nn.Module"),
        ("--model bad_user_code:raises", "raised ValueError"),
        ("--model bad_user_code:colour", "input: received"),
        ("--model bad_user_code:net --data bad_user_code:two", "expected three"),
        ("--model bad_user_code:net --data bad_user_code:iterators", "starts anew each time"),
        ("--model bad_user_code:net --data bad_user_code:no_batches", "training data"),
        ("--model bad_user_code:net --data bad_user_code:words", "training data"),
        ("--data none", "no such folder"),
        ("--data {}", "size of .*data_batch_1.bin"),
    )),
    ("quantize --images 0", "--images"),
    ("quantize --train-epochs -1", "--train-epochs"),
    # Optimised, and run.
    *((f"{command} {words}", what) for command in ("optimize", "run") for words, what in (
        ("", "required: "),
        ("nothing", "received 'nothing'"),
        ("none.safetensors", "not there"),
        ("{}/random.safetensors", "damaged|no whole"),
        ("{}/empty.safetensors", "damaged|no whole"),
        ("{}/text.pt", "received"),
        ("digits_net --size 1", "input: received"),
        ("digits_net --size 0", "--size"),
        ("digits_net --size 10000000", "No input of shape|memory|input: received"),
        ("digits_net --batch 0", "--batch"),
        ("digits_net --het 0", "--het"),
        ("digits_net --dtype int3", "--dtype"),
        ("digits_net --backend none", "none"),
        ("digits_net --device meta", "evice.*meta"),
        ("digits_net --device toaster", "evice.*toaster"),
        ("bad_user_code:nothing", "expected an nn.Module"),
        ("bad_user_code:raises", "raised ValueError"),
        ("bad_user_code:pair", "images"),
        ("bad_user_code:net --size 3", "input: received"),
    )),
    ("optimize digits_net --out {}/text.pt/net.safetensors", "cannot be written"),
    ("optimize digits_net --out {}/folder.safetensors", "cannot be written"),
    ("run digits_net --threads 0", "--threads"),
    ("run digits_net --threads 5000", "--threads"),
    ("run digits_net --rounds 5", "--rounds"),
    ("run digits_net --seconds nan", "--seconds"),
    ("run digits_net --seconds 0", "--seconds"),
    # The rest.
    ("", "required: COMMAND"),
    ("nothing", "invalid choice"),
    ("info --nothing", "unrecognized"),
    ("demo --steps 0", "--steps"),
    ("demo --channels 1", "--channels"),
    ("demo --seed -1", "--seed"),
    ("demo --quick --out {}/text.pt", "--out|cannot be"),
    ("bench --isa none", "--isa"),
]  # fmt: skip


def test_the_table_of_bad_command_lines_is_long() -> None:
    assert len({line for line, _ in BAD}) >= 220


@pytest.mark.parametrize(("line", "what"), BAD, ids=[line or "nothing at all" for line, _ in BAD])
def test_bad_input_is_one_sentence(
    line: str,
    what: str,
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(files)
    monkeypatch.setattr(sys, "path", [*sys.path])
    words = [word.replace("{}", str(files)) if "set p=" not in line else word
             for word in line.split(" ") if word]  # fmt: skip
    if "bad user:net" in line:
        words = ["compress", "het", "--model", "bad user:net", *FAST.split()]
    if (
        words[:1] in (["compress"], ["demo"], ["quantize"])
        and "--out" not in words
        and len(words) > 1
    ):
        words += ["--out", str(tmp_path / "out")]
    code = cli.main(words)
    said = capsys.readouterr()
    assert code in (cli.FAILURE, cli.USAGE), said
    assert "Traceback" not in said.err
    last = said.err.splitlines()[-1]
    assert re.search(what, last), said.err
    if code == cli.FAILURE:
        lines = [text for text in said.err.splitlines() if ", epoch " not in text]
        assert lines == [last], said.err
        assert last.startswith("hetconv: ")
    else:
        assert last.startswith("hetconv")
    assert not (tmp_path / "out" / "het.json").exists()
    assert not (tmp_path / "out" / "quantize.json").exists()
