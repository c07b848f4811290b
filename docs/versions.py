# SPDX-License-Identifier: Apache-2.0
"""Adds the documentation of this version to a folder with those of others: versions.py FOLDER.

    FOLDER/0.1.0/       the pages of a version
    FOLDER/versions.json  the list that the selector on each page reads (mike's format)
    FOLDER/index.html   leads to the newest

Any server of files can serve the folder; nothing on it loads from elsewhere.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TO_NEWEST = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<title>hetconv_kernels</title>
<meta http-equiv="refresh" content="0; url={0}/index.html">
<a href="{0}/index.html">hetconv_kernels {0}</a>
</html>
"""


def version() -> str:
    """Reads the version of this tree."""
    text = (ROOT / "hetconv_kernels" / "_version.py").read_text()
    return re.findall(r'__version__ = "(.*)"', text)[0]


def listed(folder: Path) -> list[str]:
    """Lists the versions whose pages are in the folder, the newest first."""
    found = [path.parent.name for path in folder.glob("*/index.html")]
    return sorted(found, key=_order, reverse=True)


def _order(name: str) -> tuple[tuple[int, ...], bool, str]:
    """Orders 0.9.0, 0.10.0rc1, 0.10.0."""
    numbers, rest = re.fullmatch(r"([\d.]*)(.*)", name).groups()  # type: ignore[union-attr]
    return tuple(int(part) for part in numbers.split(".") if part), not rest, rest


def write_list(folder: Path) -> None:
    """Writes the list of versions, and the page that leads to the newest."""
    names = listed(folder)
    entries = [
        {"version": name, "title": name, "aliases": ["latest"] if name == names[0] else []}
        for name in names
    ]
    (folder / "versions.json").write_text(json.dumps(entries, indent=2) + "\n")
    (folder / "index.html").write_text(TO_NEWEST.format(names[0]))


def main() -> int:
    """Builds the pages of this version and lists it."""
    folder = Path(sys.argv[1]).resolve()
    place = folder / version()
    shutil.rmtree(place, ignore_errors=True)
    subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(place)],
        cwd=ROOT,
        env={**os.environ, "HETCONV_DOCS_VERSIONED": "1"},
        check=True,
    )
    write_list(folder)
    print(f"{folder}: {', '.join(listed(folder))}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
