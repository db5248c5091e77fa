"""``steeple plan laws``: fit scaling laws of drafters to a table of runs, and say what to train next."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table as RichTable

from steeple.cli.bridge import Look
from steeple.cli.shell import Shell, command
from steeple.config import check_range
from steeple.plan.bootstrap import LEVEL, SAMPLES, Interval
from steeple.plan.laws import AcceptanceLaw, DraftCost, advise, fit_acceptance, fit_width
from steeple.plan.laws_table import Table, read_table

HELP = "Fit scaling laws of drafters to a table of runs, and say what the next draft should be."


@dataclass(frozen=True, kw_only=True)
class LawsConfig:
    """What is fitted, and within which limits the next draft is looked for."""

    table: Path = field(metadata={"help": "JSON with the runs, as steeple train laws writes it"})
    target: float = field(default=0.0, metadata={"help": "parameters of the target; 0 = as the table says"})
    k: int = field(default=0, metadata={"help": "drafted tokens of a round; 0 = as the table says"})
    verify: float = field(default=1.0, metadata={"help": "time of a verification, in plain steps"})
    pass_time: float = field(
        default=0.0, metadata={"help": "time of a draft's pass that does not depend on its size, in plain steps"}
    )
    tokens: float = field(default=0.0, metadata={"help": "training tokens there are; 0 = the most of the runs"})
    flops: float = field(default=0.0, metadata={"help": "operations that training may take; 0 = no limit"})
    reach: float = field(default=10.0, metadata={"help": "how far outside the sizes of the runs to look, as a factor"})
    level: float = field(default=LEVEL, metadata={"help": "of the intervals"})
    samples: int = field(default=SAMPLES, metadata={"help": "of the bootstrap"})
    seed: int = field(default=0, metadata={"help": "of the bootstrap"})
    plots: str = field(default="", metadata={"help": "folder to draw charts into; empty: none"})

    def __post_init__(self) -> None:
        check_range("LawsConfig", "target", self.target, 0.0, 1e16)
        check_range("LawsConfig", "k", self.k, 0, 63)
        check_range("LawsConfig", "tokens", self.tokens, 0.0, 1e18)
        check_range("LawsConfig", "flops", self.flops, 0.0, 1e30)
        check_range("LawsConfig", "level", self.level, 0.5, 0.999)
        check_range("LawsConfig", "samples", self.samples, 100, 10**6)
        check_range("LawsConfig", "seed", self.seed, 0, 2**63 - 1)


def run(config: LawsConfig, shell: Shell) -> dict[str, Any]:
    """Fit, show, advise, draw."""
    tables = read_table(config.table)
    result: dict[str, Any] = {"config": {**asdict(config), "table": str(config.table)}, "laws": []}
    for kind, table in tables.items():
        law = fit_acceptance(table, samples=config.samples, seed=config.seed)
        result["laws"].append(_law_result(kind, table, law, config))
    widths = next((table for table in tables.values() if table.widths), None)
    result["width"] = None if widths is None else _width_result(widths, config)
    for found in _tables(result):
        shell.console.print(found)
    for entry in result["laws"]:
        shell.console.print(_advice_words(entry), markup=False, soft_wrap=True)
    if config.plots:
        from steeple.bench.laws_plots import write_laws_plots  # matplotlib takes a second to load

        for path in write_laws_plots(result, Path(config.plots)):
            shell.console.print(f"Wrote {path}.", markup=False, soft_wrap=True)
    return result


def _law_result(kind: str, table: Table, law: AcceptanceLaw, config: LawsConfig) -> dict[str, Any]:
    """One law in JSON types, with the prediction at each run and the advice."""
    k, target = config.k or table.k, config.target or table.target
    advice = None
    if k and target:
        cost = DraftCost(target=target, k=k, verify=config.verify, fixed=config.pass_time)
        found = advise(law, cost, tokens=config.tokens, flops=config.flops, reach=config.reach, level=config.level)
        advice = asdict(found)
    runs = [
        {
            **asdict(run),
            "predicted": law.predict(run.tokens, run.parameters, config.level).to_dict(),
        }
        for run in table.runs
    ]
    return {
        "kind": kind,
        **law.fit.to_dict(config.level),
        "k": k,
        "target_parameters": target,
        "tokens": list(law.tokens),
        "parameters": list(law.parameters),
        "runs": runs,
        "advice": advice,
    }


def _width_result(table: Table, config: LawsConfig) -> dict[str, Any]:
    law = fit_width(table, samples=config.samples, seed=config.seed)
    best = [
        {"batch": batch, "best": width, "predicted": law.predict(batch, config.level).to_dict()}
        for batch, width in law.best.items()
    ]
    return {**law.fit.to_dict(config.level), "best": best, "falls_to_one_at": law.falls_to(1.0)}


def _tables(result: dict[str, Any]) -> list[RichTable]:
    share = f"{result['config']['level']:.0%} interval"
    rows = [(entry["kind"] or "tau", entry) for entry in result["laws"]]
    if result["width"] is not None:
        rows.append(("log2 of the best width", result["width"]))
    table = RichTable(title="Laws")
    for name in ("law of", "coefficient", "value", share, "R2", "residual"):
        table.add_column(name, justify="left" if name in ("law of", "coefficient") else "right")
    for name, entry in rows:
        for number, (coefficient, value) in enumerate(entry["coefficients"].items()):
            first = number == 0
            table.add_row(
                name if first else "",
                coefficient,
                f"{value['value']:.4f}",
                f"{value['low']:.4f} to {value['high']:.4f}",
                f"{entry['r2']:.3f}" if first else "",
                f"{entry['residual']:.3f}" if first else "",
                end_section=number == len(entry["coefficients"]) - 1,
            )
    return [table]


def _advice_words(entry: dict[str, Any]) -> str:
    name = entry["kind"] or "draft"
    found = entry["advice"]
    if found is None:
        return f"{name}: for advice give --k and --target (parameters of the target), or write them into the table."
    tau, gain = Interval(**found["tau"]), Interval(**found["multiplier"])
    words = (
        f"{name}: next train {found['parameters']:,.0f} parameters on {found['tokens']:,.0f} tokens: tau "
        f"{tau.value:.2f} ({tau.low:.2f} to {tau.high:.2f}), {gain.value:.2f} times plain decoding "
        f"({gain.low:.2f} to {gain.high:.2f}) at dt = {found['dt']:.2f}."
    )
    if found["bound"]:
        words += " That is the edge of what was looked at; raise --reach to look further."
    if found["extrapolated"]:
        words += " It lies outside the runs, so this is an extrapolation."
    return words


app = command(LawsConfig, run, help=HELP, look=Look(positional=("table",)))
