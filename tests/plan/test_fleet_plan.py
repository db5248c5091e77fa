"""Around the simulation of a fleet: traces, tokens per round, models of time, reports, the search, the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from steeple.bench.fleet_plots import write_fleet_plots
from steeple.cli.plan_fleet import app, fleet_table, run
from steeple.cli.shell import Shell
from steeple.errors import CapacityError, ConfigError, ModelError, StorageError
from steeple.plan.fleet.config import FleetConfig, LoadConfig, ReplicaConfig
from steeple.plan.fleet.drafting import Drafting, from_conditional, from_tau
from steeple.plan.fleet.load import Load, fixed, lognormal, poisson, read_trace
from steeple.plan.fleet.models import DraftPasses, ModelStep, cache_tokens
from steeple.plan.fleet.replica import BIN_COUNT, BIN_SHIFT, BINS, Limits
from steeple.plan.fleet.report import Latencies, Objectives, gap_percentiles, report
from steeple.plan.fleet.run import make_load, make_step, make_way, plan_fleet
from steeple.plan.fleet.search import fewest_replicas, highest_rate
from steeple.plan.fleet.simulate import Fleet, simulate
from steeple.plan.fleet.steps import LinearStep
from steeple.plan.machines import find_machine
from steeple.plan.ours import Precision, StepModel, pass_work
from steeple.plan.shapes import find_shape

TRACES = Path(__file__).resolve().parents[3] / "shared" / "data" / "traces"
STEP = LinearStep(fixed=7e-3, per_token=2e-5, per_context=5e-8)
SMALL = LoadConfig(rate=30.0, requests=600, prompt=300, output=40)


def load_of(count: int, rate: float, seed: int = 0) -> Load:
    rng = np.random.default_rng(seed)
    return Load(poisson(rate, count, rng), lognormal(300, 1.0, count, rng), lognormal(40, 0.8, count, rng))


def written(folder: Path, text: str) -> Path:
    path = folder / "trace.csv"
    path.write_text(text)
    return path


def test_a_trace_is_read_by_the_names_of_its_columns(tmp_path: Path) -> None:
    lines = (
        "GeneratedTokens,x,TIMESTAMP,ContextTokens\n7,a,2023-11-16 18:00:01.5000000,30\n5,b,2023-11-16 18:00:00,20\n"
    )
    load = read_trace(written(tmp_path, lines + "0,c,2023-11-16 18:00:02,9\n"))
    assert load.arrival.tolist() == [0.0, 1.5]
    assert load.prompt.tolist() == [20, 30]
    assert load.output.tolist() == [5, 7]


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("TIMESTAMP,ContextTokens\n1,2\n", ConfigError, "no column GeneratedTokens"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n1,2,3\n2,x,3\n", StorageError, "line 3"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n1,2\n", StorageError, "line 2"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n1,2,0\n", StorageError, "no request"),
    ],
)
def test_a_bad_trace_says_where(tmp_path: Path, text: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        read_trace(written(tmp_path, text))


@pytest.mark.shared
@pytest.mark.skipif(not TRACES.is_dir(), reason="shared/data/traces is not beside the repository")
def test_the_azure_trace_runs() -> None:
    load = read_trace(TRACES / "AzureLLMInferenceTrace_conv.csv")
    assert len(load) == 19_366
    assert 3000 < load.arrival[-1] < 3700
    assert load.prompt.mean() == pytest.approx(1154.7, abs=1)
    assert load.output.mean() == pytest.approx(211.1, abs=1)
    out = simulate(load.first(2000).at_rate(20.0), Fleet(replicas=2), STEP, Drafting())
    assert not np.isnan(out.done).any()


def test_a_load_is_stretched_and_repeated() -> None:
    load = load_of(50, 3.0)
    assert load.at_rate(12.0).rate == pytest.approx(12.0)
    longer = load.first(120)
    assert len(longer) == 120
    assert longer.rate == pytest.approx(load.rate, rel=0.2)
    assert (longer.prompt[50:100] == load.prompt).all()
    assert (np.diff(longer.arrival) >= 0).all()
    gaps = np.diff(poisson(4.0, 20_000, np.random.default_rng(0)))
    assert gaps.mean() == pytest.approx(0.25, rel=0.03)
    assert gaps.std() == pytest.approx(0.25, rel=0.05)
    assert lognormal(200, 1.0, 50_000, np.random.default_rng(0)).mean() == pytest.approx(200, rel=0.03)


@pytest.mark.parametrize(
    ("arrival", "prompt", "output", "words"),
    [
        ([0.0, 1.0], [1], [1], "differ in length"),
        ([], [], [], "no request"),
        ([1.0, 0.0], [1, 1], [1, 1], "in order"),
        ([0.0], [0], [1], "no prompt"),
    ],
)
def test_a_bad_load_is_refused(arrival: list[float], prompt: list[int], output: list[int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Load(np.array(arrival), np.array(prompt, dtype=np.int64), np.array(output, dtype=np.int64))


@pytest.mark.parametrize(("k", "tau"), [(1, 1.4), (4, 2.82), (6, 6.9), (3, 4.0), (2, 1.0)])
def test_a_law_has_the_tau_it_was_made_from_and_draws_it(k: int, tau: float) -> None:
    way = Drafting("some", from_tau(k, tau))
    assert way.tau == pytest.approx(tau, abs=1e-6)
    assert way.rows == k + 1
    tokens = np.full(4_000, 500, dtype=np.int64)
    rounds = way.rounds(tokens, np.random.default_rng(0))
    # the last round may bring more than is left, by less than a round
    assert 500 / tau <= rounds.mean() <= (500 + k) / tau + 0.5
    assert rounds.min() >= -(-500 // (k + 1))
    assert (way.rounds(tokens, None) == int(np.ceil(500 / tau - 1e-6))).all()


def test_rounds_follow_the_law_of_each_position() -> None:
    """With 1, 2 or 3 tokens a round, the chance that 2 tokens take 2 rounds is that of no acceptance in the first."""
    reached = from_conditional([0.7, 0.5])
    assert reached == pytest.approx((0.7, 0.35))
    rounds = Drafting("some", reached).rounds(np.full(40_000, 2, dtype=np.int64), np.random.default_rng(1))
    assert (rounds == 2).mean() == pytest.approx(0.3, abs=0.01)
    rounds = Drafting("some", reached).rounds(np.full(40_000, 3, dtype=np.int64), np.random.default_rng(1))
    # one round: both accepted; three: none, then none
    assert (rounds == 1).mean() == pytest.approx(0.35, abs=0.01)
    assert (rounds == 3).mean() == pytest.approx(0.09, abs=0.01)


def test_a_law_must_not_rise() -> None:
    with pytest.raises(ConfigError, match="rises"):
        Drafting("some", (0.3, 0.4))


def model_step(devices: int = 1) -> ModelStep:
    machine = find_machine("h100")
    shape = find_shape("llama-3-8b")
    return ModelStep(shape=shape, model=StepModel.of_machine(machine), precision=Precision(), devices=devices)


def test_the_model_of_a_step_is_that_of_the_planner_and_reads_weights_once() -> None:
    step = model_step()
    plain = float(step.model.predict(pass_work(step.shape, 64, 1000.0, 5)))
    assert step.seconds(0, 64, 64_000.0, 5) == pytest.approx(plain)
    alone = step.seconds(500, 0, 0.0, 1)
    assert max(plain, alone) < step.seconds(500, 64, 64_000.0, 5) < plain + alone
    # one token of a prompt beside 64 requests is one more row, not one more pass over the weights
    assert step.seconds(1, 64, 64_000.0, 1) < 1.02 * step.seconds(0, 64, 64_000.0, 1)
    many = step.seconds(500, 64, np.array([0.0, 64_000.0]), 5)
    assert many[1] == step.seconds(500, 64, 64_000.0, 5)
    assert model_step(4).seconds(0, 64, 64_000.0, 1) < 0.5 * step.seconds(0, 64, 64_000.0, 1)


def test_drafting_by_a_model_takes_k_passes_and_a_window_bounds_them() -> None:
    step = model_step()
    free = DraftPasses(step=step, k=3)
    assert free.seconds(8, 80_000.0) == pytest.approx(3 * step.seconds(0, 8, 80_000.0, 1))
    near = DraftPasses(step=step, k=3, window=100)
    assert near.seconds(8, 80_000.0) == pytest.approx(3 * step.seconds(0, 8, 800.0, 1))


def test_the_cache_is_what_weights_leave() -> None:
    shape, machine, precision = find_shape("llama-3-8b"), find_machine("h100"), Precision()
    tokens = cache_tokens(shape, machine, precision, devices=1, share=0.9)
    used = tokens * shape.kv_elements_per_token * 2 + shape.parameters * 2
    assert 0 <= 0.9 * machine.memory_bytes - used < shape.kv_elements_per_token * 2
    small = find_shape("llama-3.2-1b")
    assert cache_tokens(shape, machine, precision, devices=1, share=0.9, drafts=(small,)) < tokens
    with pytest.raises(CapacityError, match="tp = 2"):
        cache_tokens(find_shape("llama-3-70b"), machine, precision, devices=1, share=0.9)


def test_percentiles_of_gaps() -> None:
    gaps = np.zeros(BIN_COUNT, dtype=np.int64)
    for seconds, count in ((0.01, 90), (0.5, 10)):
        gaps[int(np.log(seconds) * BINS) + BIN_SHIFT] += count
    assert gap_percentiles(gaps) == [
        pytest.approx(0.01, rel=0.02),
        pytest.approx(0.01, rel=0.02),
        pytest.approx(0.5, rel=0.02),
    ]
    assert gap_percentiles(np.zeros(BIN_COUNT)) == [None] * 3


def test_a_report_adds_up() -> None:
    load = Load(np.array([0.0, 0.0, 10.0]), np.array([100, 100, 5000]), np.array([11, 1, 1]))
    fleet = Fleet(replicas=1, gpus=4, limits=Limits(kv_tokens=1000))
    out = simulate(load, fleet, LinearStep(fixed=1.0), Drafting())
    found = report(out, fleet, Objectives(ttft=1.5, tpot=1.0), price=2.0, warmup=0.0)
    assert (found["requests"], found["answered"], found["refused"], found["gpus"]) == (3, 2, 1, 4)
    assert out.first.tolist()[:2] == [1.0, 2.0]  # the first was alone when its step began
    assert out.done.tolist()[:2] == [11.0, 2.0]
    assert found["seconds"] == 11.0
    assert found["tokens_per_second"] == pytest.approx(12 / 11)
    assert found["ttft"]["p50"] == 1.5
    assert found["tpot"]["p50"] == 1.0
    assert found["itl"]["p50"] == pytest.approx(1.0, rel=0.02)
    assert found["within"] == {"ttft": 0.5, "tpot": 1.0, "both": 0.5}
    assert not found["meets_objectives"]
    assert found["cost"] == pytest.approx(4 * 2.0 * 11 / 3600)
    assert found["cost_per_million_tokens"] == pytest.approx(found["cost"] / 12e-6)
    json.dumps(found)


def test_the_search_finds_the_fewest_replicas() -> None:
    load, objectives = load_of(1500, 120.0), Objectives(ttft=1.0, tpot=0.03)
    tried: list[int] = []
    fleet, outcome = fewest_replicas(
        load, Fleet(), STEP, Drafting(), objectives, told=lambda count, enough: tried.append(count)
    )
    assert Latencies.of(outcome, 0.1).within(objectives)["both"] >= objectives.share
    assert fleet.replicas > 1
    fewer = simulate(load, replace(fleet, replicas=fleet.replicas - 1), STEP, Drafting())
    assert Latencies.of(fewer, 0.1).within(objectives)["both"] < objectives.share
    assert len(tried) == len(set(tried)) <= 2 * np.log2(fleet.replicas) + 3


def test_what_no_fleet_can_do_says_which_objective_binds() -> None:
    with pytest.raises(CapacityError, match=r"tpot = 0\.001 s"):
        fewest_replicas(load_of(50, 10.0), Fleet(), STEP, Drafting(), Objectives(tpot=0.001), most=4)
    with pytest.raises(CapacityError, match=r"ttft = 0\.001 s"):
        fewest_replicas(load_of(50, 10.0), Fleet(), STEP, Drafting(), Objectives(ttft=0.001), most=4)


def test_the_highest_rate_meets_the_objectives_and_a_little_more_does_not() -> None:
    load, objectives, fleet = load_of(1500, 10.0), Objectives(ttft=1.0, tpot=0.03), Fleet(replicas=2)
    rate = highest_rate(load, fleet, STEP, Drafting(), objectives)
    for factor, enough in ((1.0, True), (1.1, False)):
        out = simulate(load.at_rate(rate * factor), fleet, STEP, Drafting())
        assert (Latencies.of(out, 0.1).within(objectives)["both"] >= objectives.share) == enough
    assert highest_rate(load, fleet, STEP, Drafting(), Objectives(tpot=1e-4)) == 0.0


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: LoadConfig(rate=-1), ConfigError, "LoadConfig.rate = -1"),
        (lambda: LoadConfig(rate=1, arrivals="poison"), ConfigError, "Did you mean 'poisson'"),
        (lambda: LoadConfig(rate=1, lengths="trace"), ConfigError, "needs a trace"),
        (lambda: FleetConfig(load=SMALL, route="robin"), ConfigError, "Did you mean 'round_robin'"),
        (lambda: make_step(ReplicaConfig(hardware="h10")), ConfigError, "Did you mean"),
        (lambda: make_step(ReplicaConfig(model="lama-3-8b")), ModelError, "Did you mean 'llama-3-8b'"),
        (lambda: make_load(LoadConfig(trace="nowhere.csv")), StorageError, "nowhere.csv"),
        (lambda: make_way("x,k=4", ReplicaConfig(), model_step()), ConfigError, "give k=.. and tau=.."),
        (lambda: make_way("x,k=4,tao=2", ReplicaConfig(), model_step()), ConfigError, "Did you mean 'tau'"),
        (lambda: make_way("x,k=4,tau=two", ReplicaConfig(), model_step()), ConfigError, "'two' is no number"),
        (lambda: make_way("x,k=2,tau=4", ReplicaConfig(), model_step()), ConfigError, "tau = 4"),
        (lambda: plan_fleet(FleetConfig(load=SMALL, drafter=("plain,k=1,tau=1.5",))), ConfigError, "rename"),
    ],
)
def test_bad_settings_say_what_to_do(make: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


def test_the_loads_of_a_configuration(tmp_path: Path) -> None:
    fixed_load = make_load(LoadConfig(rate=5, requests=100, lengths="fixed", prompt=70, output=9))
    assert set(fixed_load.prompt.tolist()) == {70}
    assert (fixed(3.4, 2) == 3).all()
    assert make_load(LoadConfig(requests=3000)).rate == pytest.approx(10.0, rel=0.1)
    lines = "".join(f"{i * i},{10 + i},{1 + i}\n" for i in range(20))
    trace = str(written(tmp_path, "TIMESTAMP,ContextTokens,GeneratedTokens\n" + lines))
    same = make_load(LoadConfig(trace=trace, requests=20))
    assert same.arrival.tolist() == [i * i for i in range(20)]
    drawn = make_load(LoadConfig(trace=trace, arrivals="poisson", requests=500, rate=3.0))
    assert (drawn.prompt - drawn.output == 9).all()
    assert drawn.rate == pytest.approx(3.0, rel=0.15)


def test_the_command_tells_draws_and_writes(tmp_path: Path) -> None:
    config = FleetConfig(
        load=replace(SMALL, requests=150),
        replica=ReplicaConfig(model="llama-3-8b", price=2.0, max_batch=16),
        drafter=("small,k=3,tau=2.5,model=llama-3.2-1b", "view,rates=0.8/0.7,share=0.3"),
        loads=(0.5, 2.0),
        highest_rate=True,
        plots=str(tmp_path / "charts"),
    )
    with (tmp_path / "told.txt").open("w") as file:
        result = run(config, Shell(Console(file=file, width=260), 0, None))
    told = (tmp_path / "told.txt").read_text()
    names = {path.name for path in (tmp_path / "charts").iterdir()}
    assert names == {"latency.png", "latency.svg", "load.png", "load.svg"}
    rows = result["rows"]
    assert [row["drafter"] for row in rows] == ["plain", "small", "view"]
    assert all(row["drafter"] in told for row in rows)
    assert rows[1]["kv_tokens"] < rows[0]["kv_tokens"] == rows[2]["kv_tokens"]
    assert rows[2]["tau"] == pytest.approx(1 + 0.8 + 0.56)
    assert rows[1]["tpot"]["p50"] < rows[0]["tpot"]["p50"]
    assert [p["multiple"] for p in rows[0]["loads"]] == [0.5, 2.0]
    assert all(row["highest_rate"] > 0 and row["meets_objectives"] for row in rows)
    json.dumps(result, default=str)
    assert fleet_table(result).row_count == 3


def test_plots_that_cannot_be_written_say_so(tmp_path: Path) -> None:
    result = plan_fleet(FleetConfig(load=SMALL, replica=ReplicaConfig(model="llama-3-8b")))
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        write_fleet_plots(result, tmp_path / "file")


def test_the_command_line_gives_json_and_one_clean_error() -> None:
    small = ["--requests", "40", "--output", "5", "--replicas", "2", "--model", "llama-3-8b"]
    told = CliRunner().invoke(app, [*small, "--drafter", "view,k=2,tau=1.9,share=0.1", "--json", "-"])
    assert told.exit_code == 0
    result = json.loads(told.stdout)
    assert [row["drafter"] for row in result["rows"]] == ["plain", "view"]
    assert result["config"]["load"]["requests"] == 40
    failed = CliRunner().invoke(app, [*small, "--route", "robin"])
    assert failed.exit_code == 2
    assert "Did you mean 'round_robin'" in failed.stderr
    assert failed.stdout == ""


def test_the_warm_up_leaves_out_the_first_requests() -> None:
    out = simulate(load_of(40, 5.0), Fleet(), STEP, Drafting())
    whole, warm = Latencies.of(out), Latencies.of(out, 0.25)
    assert len(whole.ttft) == 40
    assert warm.ttft.tolist() == whole.ttft[10:].tolist()
