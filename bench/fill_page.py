"""Writes tables of results into a page, between ``<!-- numbers:NAME -->`` and its closing marker.

python bench/fill_page.py bench/results/select.json --table select --name spin --page docs/methods/spin.md
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from steeple.bench.padded.table import padded_markdown
from steeple.bench.select.table import select_markdown
from steeple.bench.serve.table import serve_markdown
from steeple.bench.step.table import fill_page

TABLES = {"padded": padded_markdown, "select": select_markdown, "serve": serve_markdown}


def charts(folders: list[Path], page: Path) -> list[str]:
    """Links from ``page`` to the PNG files in ``folders``."""
    places = [file for folder in folders for file in sorted(folder.glob("*.png"))]
    links = [Path(os.path.relpath(file.resolve(), page.resolve().parent)).as_posix() for file in places]
    return [f"![{file.stem}]({link})" for file, link in zip(places, links, strict=True)]


def main() -> None:
    """Read the results, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="JSON of steeple bench select, padded or serve")
    parser.add_argument("--table", choices=sorted(TABLES), required=True, help="what the results are of")
    parser.add_argument("--plots", nargs="*", type=Path, default=[], help="folders of charts")
    parser.add_argument("--page", type=Path, required=True)
    parser.add_argument("--name", required=True, help="of the markers in the page")
    given = parser.parse_args()
    parts = charts(given.plots, given.page)
    for path in given.results:
        parts.append(TABLES[given.table](json.loads(path.read_text(encoding="utf-8"))))
        parts.append(f"`{path.as_posix()}`")
    page = fill_page(given.page.read_text(encoding="utf-8"), given.name, "\n\n".join(parts))
    given.page.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
