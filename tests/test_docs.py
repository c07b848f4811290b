# SPDX-License-Identifier: Apache-2.0
"""Every code block of README and docs runs as printed; what the pages are made of is there.

The Python blocks of a page share one namespace, in order. Of shell blocks the ``hetconv`` lines
run; of the others it is checked that what they name exists. A block that cannot run here has a
title that says so to the reader; those are listed in `NOT_RUN`.
"""

from __future__ import annotations

import importlib.util
import json
import re
import runpy
import shlex
import sys
import tomllib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from pages import DOCS, FENCE, NAMES, PAGES, ROOT, TITLE, blocks

from hetconv_kernels import cli

# Blocks that cannot run here, by page, with the reason that the reader sees.
NOT_RUN = {
    ("docs/ecosystem.md", "needs torchvision (make external runs more of it)"),
    ("docs/start.md", "needs an NVIDIA GPU"),
    ("docs/start.md", "starts several processes (tests/test_examples.py does)"),
    ("docs/backends/triton.md", "needs an NVIDIA GPU"),
    ("docs/backends/cuda.md", "needs an NVIDIA GPU"),
    ("docs/cli.md", "mynets is yours"),
    ("docs/cli.md", "it writes to your home"),
    ("docs/ecosystem.md", "needs timm and torchvision"),
    ("docs/ecosystem.md", "needs accelerate (tests/test_accelerate.py runs it)"),
    ("docs/ecosystem.md", "needs lightning"),
    ("docs/ecosystem.md", "needs torchao"),
    ("docs/ecosystem.md", "needs huggingface_hub"),
    ("docs/profiling.md", "needs perf"),
}


@pytest.fixture(autouse=True)
def somewhere_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Blocks write files; torch's compiler keeps what it made between pages."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HETCONV_BACKEND", raising=False)


@pytest.mark.parametrize("path", PAGES, ids=NAMES)
def test_python_blocks_run_in_order(path: Path) -> None:
    namespace: dict[str, Any] = {"__name__": "page"}
    sys.modules["page"] = type(sys)("page")  # dataclasses look their module up
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, under export
            for block in blocks(path):
                if block.language == "python" and not block.title.startswith(TITLE):
                    # The block's line numbers are the page's, so that a failure names its place.
                    source = "\n" * (block.line - 1) + block.text
                    exec(compile(source, str(path), "exec"), namespace)
    finally:
        del sys.modules["page"]
        torch.set_num_threads(threads)


@pytest.mark.parametrize("path", PAGES, ids=NAMES)
def test_shell_blocks_run_or_name_what_exists(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for block in blocks(path):
        if block.language == "bash" and not block.title.startswith(TITLE):
            for line in filter(None, block.text.splitlines()):
                command, *arguments = shlex.split(line, comments=True)
                if command == "hetconv":
                    assert cli.main(arguments) == cli.OK, f"{line}\n{capsys.readouterr().err}"
                else:
                    check_command(command, arguments)


def check_command(command: str, arguments: list[str]) -> None:
    """Checks that a command of a page, which is not run, names what exists."""
    if command == "make":
        targets = [word for word in arguments if "=" not in word]
        makefile = (ROOT / "Makefile").read_text()
        assert [t for t in targets if not re.search(rf"^{t}:", makefile, re.M)] == []
    elif command == "python":
        assert arguments[0] == "-m"
        assert importlib.util.find_spec(arguments[1]) is not None
    elif command == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        named = re.findall(r"\[([\w,]+)\]", " ".join(arguments))
        assert set(",".join(named).split(",")) - {""} <= set(extras["optional-dependencies"])
    else:
        assert command in ("git", "cd"), f"{command}: no test knows what to make of it"


def test_blocks_that_are_not_run_are_these_and_say_why() -> None:
    found = {
        (name, block.title.removeprefix(TITLE))
        for name, path in zip(NAMES, PAGES, strict=True)
        for block in blocks(path)
        if block.title
    }
    assert found == NOT_RUN


def test_every_block_has_a_language_that_is_known() -> None:
    for path in PAGES:
        text = path.read_text()
        assert len(FENCE.findall(text)) * 2 == len(re.findall(r"^ *```", text, re.M)), path
        assert {block.language for block in blocks(path)} <= {"python", "bash", "text", "c"}, path


def test_a_failing_block_fails(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\nx = 1\n```\n\n```python\nassert x == 2\n```\n")
    with pytest.raises(AssertionError):
        test_python_blocks_run_in_order(page)
    with pytest.raises(AssertionError):
        check_command("make", ["no-such-target"])
    with pytest.raises(AssertionError):
        check_command("pip", ["install", "x[no_such_extra]"])


def test_the_routes_are_those_of_the_committed_results_with_the_ratios_of_the_readme() -> None:
    from benchmarks import summary

    made = runpy.run_path(str(DOCS / "hooks.py"))["routes"]()
    row = summary.network("resnet18-het4")
    assert row is not None
    lines = {text.split("|")[1].partition(",")[0].strip(): text for text in made.splitlines()}
    line = lines["resnet18-het4"]
    for role in ("dense", "composition"):
        for engine in ("onnxruntime", "openvino"):
            seconds = row["timings"][role]["variants"][f"{role}:{engine}"]["median_s"]
            assert f"| {seconds * 1e3:.1f} (" in line
    assert f"| {row['median_s'] * 1e3:.1f} |" in line
    rivals = [
        (name, rival)
        for name in lines
        for row in filter(None, [summary.network(name)])
        for rival in (row["dense"], row["composition"])
        if rival["name"].partition(":")[2] in ("onnxruntime", "openvino")
    ]
    assert rivals
    for name, rival in rivals:
        assert f"| {rival['median_s'] * 1e3:.1f} ({rival['ratio']:.2f})" in lines[name]


# What pages are made of --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hooks() -> dict[str, Any]:
    return runpy.run_path(str(DOCS / "hooks.py"))


@pytest.mark.parametrize("path", PAGES, ids=NAMES)
def test_every_made_part_can_be_made(path: Path, hooks: dict[str, Any]) -> None:
    text = path.read_text()
    asked = re.findall(r"^<!-- made: (.*?) -->$", text, re.M)
    assert len(asked) == text.count("<!-- made:"), "a marker stands alone on its line"
    for found in asked:
        name, *arguments = found.split()
        assert hooks["MADE"][name](*arguments).strip()


def test_what_a_command_of_its_own_wrote_stands_on_the_page_with_its_provenance(
    hooks: dict[str, Any], tmp_path: Path
) -> None:
    for name in ("memory", "overhead", "throughput"):
        assert hooks["measured"](name, tmp_path) == "None is committed yet."
    row = {"layers": 20, "median_s": {"program": 5e-5}, "overhead_s": 1e-5}
    environment = {
        "gpu": None, "threads": 1, "processor": "processor", "instructions": "AVX2", "torch": "2",
        "python": "3", "commit": "0123456789",
    }  # fmt: skip
    data = {"started": "2026-02-03T00:00:00", "environment": environment, "rows": [row]}
    (tmp_path / "overhead.json").write_text(json.dumps(data))
    page = hooks["measured"]("overhead", tmp_path)
    assert "| 20 |  | 50.0 |  |  | 10.0 |" in page
    assert page.endswith("2026-02-03, commit `012345678`.*")


def test_an_unknown_part_is_refused(hooks: dict[str, Any]) -> None:
    with pytest.raises(KeyError, match="no-such-part"):
        hooks["with_made_parts"]("<!-- made: no-such-part -->")


def test_the_help_of_every_command_is_on_the_page(hooks: dict[str, Any]) -> None:
    text = hooks["command_help"]()
    for name in ("info", "explain", "demo", "compress", "quantize", "profile", "bench"):
        assert f"## hetconv {name}\n" in text
        assert f"usage: hetconv {name}" in text


def test_pages_that_load_from_the_network_are_refused(hooks: dict[str, Any]) -> None:
    pattern = hooks["LOADED"]
    for bad in (
        '<script src="https://example.org/x.js">',
        "<link href=https://example.org/x.css rel=stylesheet>",
        '<link rel="preconnect" href="//fonts.example.org">',
        '<img alt="" src="http://example.org/x.png">',
    ):
        assert pattern.search(bad)
    for good in ('<a href="https://example.org">', '<link rel="next" href="https://example.org">'):
        assert not pattern.search(good)


def test_equations_become_mathml(hooks: dict[str, Any]) -> None:
    pytest.importorskip("latex2mathml", reason="the docs extra is not installed")
    page = hooks["with_equations"]('<span class="arithmatex">\\(a &lt; b\\)</span>')
    assert page.startswith("<math")
    assert "arithmatex" not in page


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (r"a = b", ["a = b"]),
        (r"a = b \qquad c \quad d", ["a = b ", " c ", " d"]),
        (r"\text{a \quad b} \quad c", [r"\text{a \quad b} ", " c"]),
        (r"\begin{cases} a & \quad b \end{cases}", [r"\begin{cases} a & \quad b \end{cases}"]),
        (r"a \leftarrow b \quad c", [r"a \leftarrow b ", " c"]),
        (r"\left( a \quad b \right)", [r"\left( a \quad b \right)"]),
    ],
)
def test_an_equation_is_parted_where_a_line_may_begin(
    text: str, parts: list[str], hooks: dict[str, Any]
) -> None:
    assert hooks["parted"](text) == parts


@pytest.mark.parametrize(
    ("script", "figure", "how"),
    [("figure", "idea", {}), ("figure", "idea-phone", {"phone": True}), ("rooms", "rooms", {})],
    ids=["idea", "idea-phone", "rooms"],
)
def test_a_figure_is_the_one_that_its_script_draws(
    script: str, figure: str, how: dict[str, Any]
) -> None:
    drawn = runpy.run_path(str(DOCS / f"{script}.py"))["draw"](**how)
    assert (DOCS / f"{figure}.svg").read_text() == drawn, f"run `python docs/{script}.py`"


def test_the_picture_of_the_rooms_fits_a_phone_and_no_word_leaves_its_room() -> None:
    """Half the size of a letter in pixels is about its width; a monospaced one takes 0.61."""
    text = (DOCS / "rooms.svg").read_text()
    found = re.search(r'viewBox="0 0 (\d+) (\d+)"', text)
    assert found is not None
    assert int(found[1]) <= 360
    pattern = r'<text x="(\d+)" y="(\d+)" font-size="(\d+)"([^>]*)>([^<]*)</text>'
    words = re.findall(pattern, text)
    assert len(words) > 40
    for x, y, size, style, said in words:
        width = len(said) * int(size) * (0.61 if "monospace" in style else 0.55)
        assert int(size) >= 12
        assert int(x) + width <= 360 - 20, said
        assert int(y) < int(found[2])


# `NAME` (and `NAME`) of `file`
_NAMED = re.compile(r"((?:`[\w.]+`(?: and )?)+) of\s+`([\w./]+\.\w+)`")
_PATH = re.compile(r"`((?:[\w-]+/)+[\w.-]*|\w+\.py)`")


@pytest.mark.parametrize(
    ("page", "least"),
    [("design.md", 8), ("extend/activation.md", 14), ("extend/compressor.md", 4),
     ("extend/layer.md", 1), ("extend/backend.md", 0)],
)  # fmt: skip
def test_every_place_that_a_page_sends_a_newcomer_to_is_there(page: str, least: int) -> None:
    text = (DOCS / page).read_text()
    named = [(n, path) for names, path in _NAMED.findall(text) for n in re.findall(r"[\w.]+", names)
             if n != "and"]  # fmt: skip
    assert len(named) >= least
    for name, path in named:
        defined = rf"\b(?:def|class|struct) {re.escape(name)}\b|\b{re.escape(name)}\b[^=(]*[=({{]"
        assert re.search(defined, place(path).read_text()), f"{name} of {path}"
    for path in _PATH.findall(text):
        assert place(path).exists(), path


# Files where an activation is named among others, and the next one need not be.
_NOT_ASKED = {"functional.py", "nn/fused.py", "graph/pairs.py"}


def test_the_page_of_activations_names_every_file_that_knows_one() -> None:
    text = (DOCS / "extend" / "activation.md").read_text()
    known = [
        path
        for folder in ("hetconv_kernels", "csrc")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".h", ".cpp", ".cu") and "models" not in path.parts
        and re.search(r"\bsilu\b", path.read_text(), re.IGNORECASE)
    ]  # fmt: skip
    named = {place(path) for path in _PATH.findall(text)}
    for path in known:
        inside = path.relative_to(ROOT).as_posix().removeprefix("hetconv_kernels/")
        assert path in named or inside in _NOT_ASKED, path
    assert len(known) > 12


def place(path: str) -> Path:
    """Finds a file that a page names from the root or from the package."""
    inside = ROOT / "hetconv_kernels" / path
    return inside if inside.exists() else ROOT / path


def test_the_pages_of_a_newcomer_are_looked_at_for_places_that_are_gone() -> None:
    assert _NAMED.findall("the `a` and `b.c` of\n`d/e.py` and") == [("`a` and `b.c`", "d/e.py")]
    assert _PATH.findall("`tests/x.py`, `nn/`, `io.py`, `x`, `tests/test_<stem>.py`") == [
        "tests/x.py", "nn/", "io.py"]  # fmt: skip


def test_every_page_is_in_the_navigation_and_every_link_leads_somewhere() -> None:
    config = (ROOT / "mkdocs.yml").read_text()
    for path in DOCS.rglob("*.md"):
        assert re.search(rf"\b{path.relative_to(DOCS)}$", config, re.M), path
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text()):
            assert (path.parent / target).exists(), f"{path}: {target}"


def test_shapes_in_docstrings_become_code() -> None:
    pytest.importorskip("griffe", reason="the docs extra is not installed")
    pattern = runpy.run_path(str(DOCS / "shapes.py"))["SHAPE"]
    assert (
        pattern.sub(r"`\1`", "Convolves.  # [N, C] -> [N, F]") == "Convolves.  `[N, C] -> [N, F]`"
    )
    assert pattern.sub(r"`\1`", "# [F]") == "`[F]`"
    assert pattern.sub(r"`\1`", "mask: which.  # bool [F, C]") == "mask: which.  `bool [F, C]`"
    assert pattern.sub(r"`\1`", "# A title") == "# A title"
