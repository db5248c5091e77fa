"""Writes the table of an ablation into a page, between ``<!-- numbers:ablation -->`` and its closing marker.

python bench/ablation_page.py bench/results/spire-ablation.json --page docs/methods/spire.md
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from steeple.bench.step.table import fill_page

SPLITS = ("validation", "held_out")


def table(result: dict[str, Any]) -> str:
    """A row per variant, and under what conditions they were trained."""
    rows, drafted = result["rows"], result["drafted"]
    first = rows[0]["tau"]["held_out"]
    lines = [
        "| variant | tau, held-out | against the first | tau, validation | greedy tau, held-out | loss, held-out |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        tau = row["tau"]
        shown = (tau["held_out"], tau["validation"], row["greedy_tau"]["held_out"], row["loss"]["held_out"])
        own = [f"{value:.3f}" for value in shown]
        lines.append(f"| {row['variant']} | {own[0]} | {tau['held_out'] - first:+.3f} | {' | '.join(own[1:])} |")
    lines.append("")
    lines.append(
        f"Simulated tau (teacher-forced) at k = {drafted}, {rows[0]['tokens']:,} tokens each, seed {rows[0]['seed']}, "
        "one run a variant (`bench/results/spire-ablation.json`)."
    )
    return "\n".join(lines)


def main() -> None:
    """Read the result, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="JSON of bench/ablation.py")
    parser.add_argument("--page", type=Path, default=Path("docs/methods/spire.md"))
    given = parser.parse_args()
    text = table(json.loads(given.result.read_text(encoding="utf-8")))
    given.page.write_text(fill_page(given.page.read_text(encoding="utf-8"), "ablation", text), encoding="utf-8")


if __name__ == "__main__":
    main()
