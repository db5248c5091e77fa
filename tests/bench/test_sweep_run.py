"""A whole sweep on tiny models: its rows, turns, shared prompts, identity, and how it goes on after it was killed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import steeple.bench.sweep.run as sweep_run
from steeple.bench.sweep.config import SweepConfig
from steeple.bench.sweep.engines import Engines, Method, settings
from steeple.bench.sweep.run import run_sweep
from steeple.bench.sweep.workload import Cell
from steeple.draft import drafter_config
from steeple.engine import LoadedModel, build_engine, load_model
from steeple.errors import CapacityError, ConfigError, InternalError
from steeple.evidence.measure import Run
from steeple.hardware import Hardware
from steeple.model.run import Runner
from steeple.request import Request
from steeple.types import SamplingParams

COLUMNS = {
    "drafter": str, "batch": int, "context": int, "k": int, "temperature": float, "dtype": str, "max_tokens": int,
    "tokens_per_second": float, "tokens_per_second_range": list, "tau": float, "acceptance_by_position": list,
    "draft_ms": float, "verify_ms": float, "other_ms": float, "step_ms": float, "dt": float, "adaptive": bool,
    "throughput_multiplier": float, "tau_over_dt": float, "floor_ms": float, "identical_requests": int,
    "plain_step_ms": list, "read_bytes_per_second": float, "read_bytes_per_second_range": list, "drafted": float,
    "rounds": int, "repeat": int,
}  # fmt: skip


class KnownProbe:
    """Reading 256 MiB again and again is not what is tested here."""

    def __init__(self, device: object) -> None:
        pass

    def now(self) -> float:
        return 2e10


@pytest.fixture(autouse=True, scope="module")
def known_hardware() -> Iterator[None]:
    known = Hardware("known", 1, 1e10, {"float32": 1e11, "bfloat16": 2e11})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep_run, "measure", lambda device, dtype: known)
        patch.setattr(sweep_run, "ReadProbe", KnownProbe)
        yield


@pytest.fixture(scope="module")
def config(target_folder: Path, draft_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> SweepConfig:
    text = tmp_path_factory.mktemp("text") / "text.jsonl"
    lines = [json.dumps({"text": f"def f{i}(x):\n    return x * {i}\n" * 12}) for i in range(4)]
    text.write_text("\n".join(lines))
    return SweepConfig(
        model=str(target_folder),
        drafters=("none", "ngram", f"small_lm:{draft_folder}"),
        ks=(1, 3),
        batch=(1, 2),
        context=(48, 24),
        temperature=(0.0, 1.0),
        max_tokens=12,
        seconds_per_run=0.0,
        prompts=str(text),
        identity_requests=2,
    )


@pytest.fixture(scope="module")
def one_cell(config: SweepConfig) -> SweepConfig:
    return replace(config, drafters=("ngram",), batch=(2,), context=(24,), temperature=(0.0,), dtype="float32")


@pytest.fixture(scope="module")
def target(one_cell: SweepConfig) -> LoadedModel:
    return load_model(one_cell.model, settings(one_cell, dtype="float32", kv_tokens=0, batch_size=2))


@pytest.fixture(scope="module")
def result(config: SweepConfig) -> dict[str, Any]:
    return run_sweep(config, argv=["steeple", "bench"])


def test_the_result_is_json_with_every_column(result: dict[str, Any], config: SweepConfig) -> None:
    again = json.loads(json.dumps(result))
    assert (again["kind"], again["complete"], again["command"]) == ("sweep", True, ["steeple", "bench"])
    assert again["environment"]["read_bytes_per_second"] == 1e10
    small = config.drafters[2]
    methods = [("none", 0), ("ngram", 1), ("ngram", 3), (small, 1), (small, 3)]
    places = [(b, c, t) for b in (1, 2) for c in (24, 48) for t in (0.0, 1.0)]
    assert [(r["batch"], r["context"], r["temperature"], r["drafter"], r["k"]) for r in again["rows"]] == [
        (*place, *method) for place in places for method in methods
    ]
    for row in again["rows"]:
        for name, kind in COLUMNS.items():
            assert isinstance(row[name], kind), name
        assert row["dtype"] == "bfloat16"
        assert len(row["acceptance_by_position"]) == row["k"]
        assert 1.0 <= row["tau"] <= row["k"] + 1
        assert row["drafted"] <= row["k"]
        assert len(row["plain_step_ms"]) == 2
    assert {row["drafted"] for row in again["rows"] if row["drafter"] == small} == {1.0, 3.0}


def test_greedy_rows_are_compared_and_sampled_ones_are_not(result: dict[str, Any], config: SweepConfig) -> None:
    for row in result["rows"]:
        expected = (True, 2) if row["temperature"] == 0 else (None, 0)
        assert (row["identical"], row["identical_requests"]) == expected
        assert row["identical_in_dtype"] == (1.0 if row["temperature"] == 0 else None)
    identity = result["identity"]
    assert (identity["dtype"], identity["requests"], identity["contexts"]["max"]) == ("float32", 2, 24)
    assert len(identity["same"]) == 5


def test_plain_decoding_stands_around_turns_that_begin_one_later(
    one_cell: SweepConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    config = replace(one_cell, ks=(1, 2, 3), repeat=2)
    run_sweep(config, lambda what, done, total: told.append(f"{done}/{total} {what}"))
    runs = [line.partition(": ") for line in told if "tau" in line]
    assert [name.partition(",")[0] for _, _, name in runs] == [
        *("none", "ngram k=1", "ngram k=2", "ngram k=3"),
        *("none", "ngram k=2", "ngram k=3", "ngram k=1"),
        "none",
    ]
    assert "tokens/s, tau 1.00" in runs[0][2]
    assert runs[-1][0] == "100/100 batch 2, context 24, T 0"


def test_seconds_decide_tokens_and_turns(one_cell: SweepConfig) -> None:
    config = replace(one_cell, max_tokens=48, seconds_per_run=2.0, repeat=2)
    sweep = sweep_run._Sweep(config)
    assert sweep._plan(0.002) == (48, 16)  # 1000 tokens fit: more turns, up to a bound
    assert sweep._plan(0.01) == (48, 4)
    assert sweep._plan(0.05) == (40, 2)
    assert sweep._plan(0.5) == (24, 2)


def test_prompts_are_computed_once_for_all_drafters(config: SweepConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[bool, int]] = []
    run = Method.run

    def counting(self: Method, requests: list[Request], tokens: int = 0) -> Run:
        found = run(self, requests, tokens)
        read.append((requests[0].params.max_tokens == 1, self.engine.stats.prompt_tokens))
        return found

    monkeypatch.setattr(sweep_run, "exact_identity", lambda *_: {"same": {}})
    monkeypatch.setattr(Method, "run", counting)
    run_sweep(replace(config, batch=(2,), temperature=(0.0,)))
    # 24 tokens: a full block is shared, 8 are left, of which the last is not counted as a prompt's; 48: 16 are left
    assert read[0] == (True, 2 * 23)
    first = read.index((True, 2 * 31))  # the longer prompts begin with the shorter ones
    assert {tokens for _, tokens in read[1:first]} == {2 * 7}
    assert {tokens for _, tokens in read[first + 1 :]} == {2 * 15}


def test_engines_on_one_cache_find_each_others_prompts(one_cell: SweepConfig, target: LoadedModel) -> None:
    chosen = settings(one_cell, dtype="float32", kv_tokens=512, batch_size=2)
    first = build_engine(target, chosen)
    second = build_engine(target, chosen, drafter_config("ngram", k=2), first.cache)
    assert second.cache is first.cache
    outputs = []
    for engine in (first, second):
        request = Request("a", list(range(5, 45)), SamplingParams(max_tokens=9, ignore_eos=True))
        engine.add(request)
        while not engine.idle:
            engine.step()
        outputs.append(request.output.tolist())
        engine.check_integrity()
    assert outputs[0] == outputs[1]
    assert (first.stats.prompt_tokens, second.stats.prompt_tokens) == (39, 7)


def test_a_drafters_own_cache_is_as_long_as_the_shared_one(
    config: SweepConfig, target: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = settings(config, dtype="float32", kv_tokens=512, batch_size=2)
    plain = build_engine(target, chosen)
    small = drafter_config(config.drafters[2], k=2)
    monkeypatch.setattr("steeple.engine.build.available_memory", lambda device: 512 * 2 * 2 * 8 * 4 - 1)
    with pytest.raises(CapacityError, match="kv_tokens = 512"):
        build_engine(target, chosen, small, plain.cache)
    monkeypatch.undo()
    drafter: Any = build_engine(target, chosen, small, plain.cache).drafter
    assert drafter.cache.pool.count == plain.cache.pool.count == 32


@dataclass(frozen=True, kw_only=True)
class Tree:
    """A drafter with two nodes per depth, as it declares."""

    k: int = 4

    def build(self, around: Any) -> Any:
        inner = drafter_config("ngram", k=2 * self.k)
        assert inner is not None
        return inner.build(around)


def methods_of(config: SweepConfig, target: LoadedModel) -> list[Method]:
    return Engines(config, target, settings(config, dtype="float32", kv_tokens=512, batch_size=2)).methods


def test_one_engine_serves_every_k_of_a_chain(one_cell: SweepConfig, target: LoadedModel) -> None:
    chains = methods_of(one_cell, target)
    assert [(m.k, m.nodes, m.adaptive) for m in chains] == [(1, 1, False), (3, 3, False)]
    assert chains[0].engine is chains[1].engine
    chains[0].run([])
    assert chains[0].engine.budget(None) == 1  # type: ignore[arg-type]
    chains[1].run([])
    assert chains[0].engine.budget(None) == 3  # type: ignore[arg-type]


def test_a_tree_has_an_engine_for_each_depth(
    one_cell: SweepConfig, target: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("steeple.bench.sweep.engines.drafter_config", lambda spec, **given: Tree(**given))
    trees = methods_of(one_cell, target)
    assert [(m.k, m.nodes) for m in trees] == [(1, 2), (3, 6)]
    assert trees[0].engine is not trees[1].engine
    assert trees[0].engine.cache is trees[1].engine.cache


def test_an_adaptive_drafter_keeps_its_own_budget_and_learns_first(
    one_cell: SweepConfig, target: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(one_cell, drafters=("auto-k:ngram",))
    (method,) = methods_of(config, target)
    assert (method.k, method.adaptive, method.label) == (8, True, "auto-k:ngram")
    own = method.engine.budget
    method.run([])
    assert method.engine.budget is own
    calls: list[str] = []
    run = Method.run
    monkeypatch.setattr(Method, "run", lambda self, *given: calls.append(self.label) or run(self, *given))
    monkeypatch.setattr(sweep_run, "exact_identity", lambda *_: {"same": {}})
    rows = run_sweep(config)["rows"]
    fill, pilot, learn, turn = ["none"], ["none"], ["auto-k:ngram"], ["none", "auto-k:ngram"]
    assert calls == [*fill, *pilot, *learn, *fill, *turn, "none"]
    assert [(row["drafter"], row["k"], row["adaptive"]) for row in rows] == [
        ("none", 0, False),
        ("auto-k:ngram", 8, True),
    ]


def test_mixed_contexts_are_one_cell_per_batch(config: SweepConfig) -> None:
    rows = run_sweep(replace(config, mixed=True, drafters=("ngram",), batch=(2,), max_tokens=160))["rows"]
    assert len(rows) == 2 * 3
    for row in rows:
        spread = row["contexts"]
        assert spread["min"] < spread["mean"] < spread["max"] <= 256 - 160
        assert row["context"] == round(spread["mean"])


def test_a_drafter_that_changes_tokens_is_called_not_identical(
    config: SweepConfig, one_cell: SweepConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    best = Runner.best

    def worse(self: Runner, hidden_RD: Tensor) -> Tensor:
        """The next token of the vocabulary, where there are more rows than the two requests need."""
        return (best(self, hidden_RD) + (hidden_RD.shape[0] > 2)) % 320

    monkeypatch.setattr(Runner, "best", worse)
    plain, *drafted = run_sweep(replace(one_cell, drafters=config.drafters[2:]))["rows"]
    assert plain["identical"] is True
    assert {row["identical"] for row in drafted} == {False}
    assert all(row["identical_in_dtype"] < 1.0 and row["smallest_gap"] > 0.0 for row in drafted)


def test_a_killed_sweep_goes_on_where_it_stopped(
    config: SweepConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(config, drafters=("ngram",), ks=(2,), batch=(2,), plots=str(tmp_path / "charts"))
    file = tmp_path / "sweep.json"
    measure = sweep_run._Sweep.rows
    cells: list[Cell] = []

    def killed(self: Any, cell: Cell, *given: Any) -> list[Any]:
        if len(cells) == 2:
            raise InternalError("killed")
        cells.append(cell)
        return measure(self, cell, *given)

    monkeypatch.setattr(sweep_run._Sweep, "rows", killed)
    with pytest.raises(InternalError):
        run_sweep(config, file=file)
    partial = json.loads((tmp_path / "sweep.json.partial").read_text())
    assert not partial["complete"]
    assert len(partial["rows"]) == 4
    first, cells[:] = list(cells), []
    monkeypatch.setattr(sweep_run, "exact_identity", lambda *_: pytest.fail("this was found out already"))
    result = run_sweep(replace(config, resume=True), file=file)
    assert not set(first) & set(cells)
    assert len(cells) == 2
    assert result["rows"][:4] == partial["rows"]
    assert len(result["rows"]) == 8
    assert result["complete"]
    assert result["seconds"] > partial["seconds"]
    assert len(result["sittings"]) == 1
    assert json.loads(file.read_text()) == json.loads(json.dumps(result))
    assert not (tmp_path / "sweep.json.partial").exists()
    assert (tmp_path / "charts" / "multiplier-t1.svg").exists()


def test_impossible_sweeps_are_refused_before_they_run(config: SweepConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_run, "exact_identity", lambda *_: pytest.fail("too late"))
    with pytest.raises(ConfigError, match="Did you mean 'ngram'"):
        run_sweep(replace(config, drafters=("ngrm",)))
    with pytest.raises(ConfigError, match="do not fit into the model's context of 256"):
        run_sweep(replace(config, context=(250,)))
    with pytest.raises(ConfigError, match="99 different prompts of 48 tokens are needed"):
        run_sweep(replace(config, batch=(99,)))
    monkeypatch.setattr("steeple.bench.sweep.engines.available_memory", lambda device: 1000)
    with pytest.raises(CapacityError, match=r"caches of the target and of 2 drafters.*lower batch or context"):
        run_sweep(config)
