"""Writes tables and heatmaps of sweeps into a page, between ``<!-- numbers:NAME -->`` and its closing marker.

python bench/sweep_page.py bench/results/sweep.json --plots bench/results/plots-sweep --page docs/methods/spire.md
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from steeple.bench.step.table import fill_page
from steeple.bench.sweep.table import sweep_markdown

KINDS = ("multiplier", "parts")


def charts(folder: Path, page: Path) -> str:
    """Links from ``page`` to the heatmaps in ``folder``, highest temperature first."""
    place = Path(os.path.relpath(folder.resolve(), page.resolve().parent)).as_posix()
    files = [path for kind in KINDS for path in sorted(folder.glob(f"{kind}-t*.png"), reverse=True)]
    return "\n\n".join(f"![{path.stem}]({place}/{path.name})" for path in files)


def main() -> None:
    """Read the results, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="JSON of steeple bench --sweep")
    parser.add_argument("--plots", nargs="*", type=Path, default=[], help="folders that --plots wrote")
    parser.add_argument("--page", type=Path, default=Path("docs/methods/spire.md"))
    parser.add_argument("--name", default="sweep", help="of the markers in the page")
    given = parser.parse_args()
    parts = [charts(folder, given.page) for folder in given.plots]
    parts += [sweep_markdown(json.loads(path.read_text(encoding="utf-8"))) for path in given.results]
    page = fill_page(given.page.read_text(encoding="utf-8"), given.name, "\n\n".join(parts))
    given.page.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
