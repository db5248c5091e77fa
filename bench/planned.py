"""Compares what a calibration predicts with what a sweep measured, and writes the numbers into a page.

python bench/planned.py bench/results/sweep.json bench/results/calibration.json
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from steeple.bench.planned import planned, planned_markdown
from steeple.bench.planned_plots import write_planned_plots
from steeple.bench.step.table import fill_page
from steeple.plan.calibration import read_calibration


def main() -> None:
    """Read both, predict, write the result, the chart and the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path, help="JSON of steeple bench --sweep")
    parser.add_argument("calibration", type=Path, help="JSON of steeple plan calibrate, of other models")
    parser.add_argument("--out", type=Path, default=Path("bench/results/planned.json"))
    parser.add_argument("--plots", type=Path, default=Path("bench/results/plots-planned"))
    parser.add_argument("--page", type=Path, default=Path("docs/planner.md"))
    parser.add_argument(
        "--inner", nargs="*", default=["auto-k=spire"], help="NAME=DRAFTER: whose passes an adaptive drafter makes"
    )
    given = parser.parse_args()
    inner = dict(pair.split("=", 1) for pair in given.inner)
    sweep = json.loads(given.sweep.read_text(encoding="utf-8"))
    result = planned(sweep, read_calibration(given.calibration), inner)
    given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    write_planned_plots(result, given.plots)
    chart = Path(os.path.relpath(given.plots.resolve(), given.page.resolve().parent)).as_posix()
    text = f"![predicted against measured throughput]({chart}/planned.png)\n\n{planned_markdown(result)}"
    page = fill_page(given.page.read_text(encoding="utf-8"), "planned", text)
    given.page.write_text(page, encoding="utf-8")
    sys.stdout.write(json.dumps(result["summary"], indent=1) + "\n")


if __name__ == "__main__":
    main()
