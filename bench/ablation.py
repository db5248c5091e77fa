"""What each part of SPIRe is worth: drafts trained alike but for one switch, and their simulated tau on held-out text.

    python bench/ablation.py --run runs/ablation --tokens 300000 --json bench/results/spire-ablation.json

Tau is the mean number of tokens of a round, teacher-forced, the bonus token included (``steeple.train.spire_loss``).
Budgets are small, so the numbers compare variants with each other, not with the finished draft. A variant that the run
folder already holds is not trained again.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from steeple.train.spire import train_spire
from steeple.train.spire_config import SpireConfig

VARIANTS: dict[str, dict[str, Any]] = {
    "spire": {},
    "carried state": {"carry": True},
    "feedback memory": {"feedback": True},
    "both": {"carry": True, "feedback": True},
    "no target activations": {"target_activations": False},
    "random init": {"random_init": True},
    "hard targets": {"hard_targets": True},
    "no alpha term": {"alpha_weight": 0.0},
    "dense keys": {"dense": True},
    "own keys": {"own_keys": True},
    "window 128": {"window": 128},
    "k = 4": {"k": 4},
}
SHARED = ("tokens", "seq_lens", "shares", "matrix_lr", "embed_lr", "head_lr", "decay_share", "seed")


def row(name: str, record: dict[str, Any], drafted: int) -> dict[str, Any]:
    """What of a training record goes into the table."""
    settings = record["settings"]
    return {
        "variant": name,
        "switches": VARIANTS[name],
        **{field: settings[field] for field in SHARED},
        "steps": record["steps"],
        "seconds": record["seconds"],
        "memory_mix": record["memory_mix"],
        "tau": {split: found[f"tau_{drafted}"] for split, found in record["tau"].items()},
        "greedy_tau": {split: found[f"greedy_{drafted}"] for split, found in record["tau"].items()},
        "tau_by_context": {split: found[f"tau_{drafted}_from"] for split, found in record["tau"].items()},
        "blocks": {split: found["blocks"] for split, found in record["tau"].items()},
        "loss": {split: found["loss"] for split, found in record["tau"].items()},
    }


def main() -> None:
    """Train and measure every variant, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, default=Path("models/target"))
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=300_000)
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--drafted", type=int, default=4, help="tokens drafted per round in tau")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    rows = []
    for name in options.variants.split(","):
        folder = options.run / name.replace(" ", "-")
        made = folder / "model" / "training.json"
        if not made.exists():
            config = SpireConfig(
                target=options.target,
                out=folder / "model",
                run=folder,
                tokens=options.tokens,
                matrix_lr=2e-3,
                embed_lr=1e-2,
                head_lr=2e-3,
                decay_share=0.7,
                compile=options.compile,
                validate_every=10**6,
                **VARIANTS[name],
            )
            train_spire(config)
        rows.append(row(name, json.loads(made.read_text(encoding="utf-8")), options.drafted))
        sys.stderr.write(f"{name}: tau {rows[-1]['tau']}\n")
        command = "python bench/ablation.py " + shlex.join(sys.argv[1:])
        result = {"schema_version": 1, "kind": "spire-ablation", "command": command, "drafted": options.drafted}
        options.json.write_text(json.dumps({**result, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
