"""Writes tables and charts of step benches into a page, between ``<!-- numbers:step -->`` and its closing marker.

python bench/step_page.py bench/results/step-bfloat16.json --plots bench/results/plots-step
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from steeple.bench.step.table import fill_page, step_markdown

CHARTS = (("roofline", "roofline"), ("floor", "share of the floor by batch and context"), ("parts", "parts of a step"))


def charts(folder: Path, page: Path) -> str:
    """Links from ``page`` to the charts in ``folder``."""
    place = Path(os.path.relpath(folder.resolve(), page.resolve().parent)).as_posix()
    return "\n\n".join(f"![{what}]({place}/{name}.png)" for name, what in CHARTS)


def main() -> None:
    """Read the results, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="JSON of steeple bench step")
    parser.add_argument("--plots", nargs="*", type=Path, default=[], help="folders that --plots wrote")
    parser.add_argument("--page", type=Path, default=Path("docs/performance.md"))
    given = parser.parse_args()
    parts = [charts(folder, given.page) for folder in given.plots]
    parts.append(step_markdown([json.loads(path.read_text(encoding="utf-8")) for path in given.results]))
    page = fill_page(given.page.read_text(encoding="utf-8"), "step", "\n\n".join(parts))
    given.page.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
