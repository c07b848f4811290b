# SPDX-License-Identifier: Apache-2.0
"""The report: results files of the benchmarks as one HTML page with figures and every row.

    python -m benchmarks.report [FILE or FOLDER ...] [--out FILE or FOLDER]

By default of all committed results, into outputs/report. Needs matplotlib.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from hetconv_kernels.errors import HetconvError

from .figures import check_matplotlib
from .page import Page
from .results import Results, read_results

__all__ = ["Results", "read_results", "write_report"]


def write_report(
    results: Iterable[str | os.PathLike[str]], out: str | os.PathLike[str]
) -> list[Path]:
    """Writes the page, and its figures as PNG beside it.

    Args:
        results: results files of the benchmarks; a folder stands for all ``*.json`` in it.
        out: the page, or a folder (anything without the suffix .html) that gets a report.html.

    Returns:
        What was written, the page first.

    Raises:
        ArgumentError: there is no results file, or two have the same name.
        FileError: a file cannot be read or is no results file.
        HetconvError: matplotlib is not installed, or the page cannot be written.
    """
    files = read_results(results)
    check_matplotlib()
    page = Page(files)
    text = page.html()
    path = Path(out)
    path = path if path.suffix.lower() in (".html", ".htm") else path / "report.html"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return [path, *(picture.write_png(path.parent) for picture in page.pictures)]
    except OSError as error:
        raise HetconvError(f"{path.name} cannot be written: {error.strerror}.") from error
