"""``steeple verify``: the proof that speculation changes nothing. Exit status 1 if it does."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from steeple.cli.app import COMMANDS
from steeple.cli.progress import steps
from steeple.cli.shell import Shell, command
from steeple.proof.config import ProofConfig
from steeple.proof.run import run_proof


def run(config: ProofConfig, shell: Shell) -> dict[str, Any]:
    """Prove and show the verdict on each drafter."""
    with steps(shell.console) as progress:
        result = run_proof(config, progress)
    shell.console.print(proof_table(config, result))
    shell.console.print("lossless" if result["lossless"] else "NOT lossless", style="bold")
    return result


def proof_table(config: ProofConfig, result: dict[str, Any]) -> Table:
    """A row per drafter: greedy equality, then the test of the sampled law."""
    table = Table(title=f"{config.model}, {config.dtype}, k = {config.k}")
    for name in ("drafter", "greedy", "oracle", "worst gap", "samples", "tv", "noise", "p-value", "lossless"):
        table.add_column(name, justify="left" if name == "drafter" else "right")
    for name, proof in result["drafters"].items():
        greedy, sampling = proof["greedy"], proof["sampling"]
        oracle = greedy["oracle_identical"]
        table.add_row(
            name,
            f"{greedy['identical']} of {greedy['requests']}",
            "-" if oracle is None else f"{oracle} of {greedy['requests']}",
            f"{greedy['worst_gap']:.2g}",
            str(sampling["samples"]),
            f"{sampling['tv']:.3f}",
            f"{sampling['tv_noise']:.3f}",
            f"{sampling['p_value']:.3g}",
            "yes" if proof["lossless"] else "NO",
        )
    for name, proof in result["padded"].items():
        table.add_row(f"padded: {name}", *_padded(proof))
    return table


def _padded(proof: dict[str, Any]) -> list[str]:
    """A schedule's columns; ``oracle`` is what it is compared with."""
    if "refused" in proof:
        return ["refused", *["-"] * 6, "yes"]
    greedy, sampling = proof["greedy"], proof["sampling"]
    return [
        "-",
        f"{greedy['identical']} of {greedy['requests']}",
        f"{greedy['worst_gap']:.2g}",
        *(
            str(sampling[name]) if name == "samples" else f"{sampling[name]:.3g}"
            for name in ("samples", "tv", "tv_noise", "p_value")
        ),
        "yes" if proof["lossless"] else "NO",
    ]


def is_lossy(result: dict[str, Any]) -> bool:
    """Whether the proof failed."""
    return not result["lossless"]


app = command(ProofConfig, run, help=COMMANDS["verify"][1], failed=is_lossy)
