"""The target's own logits, differences, the timed run, and the record of the surroundings."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from steeple.draft import drafter_config
from steeple.draft.small_lm import SmallLM
from steeple.engine import EngineConfig, LoadedModel, build_engine, load_model
from steeple.errors import ConfigError
from steeple.evidence.environment import environment, revision
from steeple.evidence.logits import first_difference, last_logits, top_gap
from steeple.evidence.measure import require_counted, run_requests
from steeple.request import Request
from steeple.types import SamplingParams

TEXTS = [list(range(5, 40)), [7, 8, 9], list(range(60, 82))]


@pytest.fixture(scope="module")
def target(target_folder: Path) -> LoadedModel:
    return load_model(str(target_folder), EngineConfig())


def test_last_logits_are_those_of_transformers(target: LoadedModel, target_folder: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(target_folder)
    ours = last_logits(target, TEXTS, last=3)
    for row, text in zip(ours, TEXTS, strict=True):
        theirs = model(torch.tensor([text])).logits[0, -3:].detach()
        torch.testing.assert_close(row, theirs, atol=1e-4, rtol=1e-4)
    best = last_logits(target, TEXTS[:1])[0, 0].sort(descending=True).values
    assert top_gap(target, TEXTS[0]) == pytest.approx(float(best[0] - best[1]), abs=1e-5)


@pytest.mark.parametrize(
    ("ours", "theirs", "place"),
    [([1, 2], [1, 2], None), ([1, 2, 3], [1, 5, 3], 1), ([1, 2], [1, 2, 3], 2), ([], [4], 0)],
)
def test_first_difference(ours: list[int], theirs: list[int], place: int | None) -> None:
    assert first_difference(ours, theirs) == place


def _requests(max_tokens: int) -> list[Request]:
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    return [Request(str(i), text, params) for i, text in enumerate(TEXTS)]


def test_a_run_counts_the_rounds_in_which_all_decode(target: LoadedModel) -> None:
    """Plain: of 10 tokens the first is the prompt's and the second its request's first round; 8 rounds count."""
    run = run_requests(build_engine(target, EngineConfig(kv_tokens=512)), _requests(10))
    timing = run.timing
    assert (timing.rounds, timing.request_rounds, timing.committed) == (8, 24, 24)
    assert timing.total_tokens == 30 == sum(map(len, run.outputs))
    assert 0 < timing.seconds < timing.total_seconds
    assert timing.accepted == []


def test_a_perfect_drafter_is_counted_as_perfect(target: LoadedModel, target_folder: Path) -> None:
    """The target drafts for itself: every round writes k + 1; rounds without room for a full draft are left out."""
    config = drafter_config(f"small_lm:{target_folder}", k=3)
    run = run_requests(build_engine(target, EngineConfig(kv_tokens=512), config), _requests(16))
    timing = run.timing
    # 1 from the prompt, 4 in the first round, then 9, 13 and 16: the last round had room for 2 nodes only.
    assert (timing.rounds, timing.committed, timing.accepted) == (2, 24, [6, 6, 6])


def test_a_run_can_end_once_enough_is_written(target: LoadedModel, target_folder: Path) -> None:
    """Of a perfect drafter with 1 node instead of 3: 1 token from the prompt, then 2 a round: 9 is past 8."""
    config = drafter_config(f"small_lm:{target_folder}", k=3)
    engine = build_engine(target, EngineConfig(kv_tokens=512), config)
    engine.budget = lambda _request: 1
    run = run_requests(engine, _requests(100), nodes=1, tokens=8)
    assert [len(output) for output in run.outputs] == [9, 9, 9]
    timing = run.timing
    assert (timing.rounds, timing.committed, timing.drafted, timing.accepted) == (3, 18, 9, [9])
    assert engine.idle


def test_a_run_ends_where_a_request_has_no_room_for_a_full_draft(target: LoadedModel, target_folder: Path) -> None:
    """Every round that began counts, but for the first: 1 + 4 + 4 + 4 of 16 leave room for 3 nodes, but for no root."""
    config = drafter_config(f"small_lm:{target_folder}", k=3)
    run = run_requests(build_engine(target, EngineConfig(kv_tokens=512), config), _requests(16), tokens=50)
    assert [len(output) for output in run.outputs] == [13, 13, 13]
    assert run.timing.rounds == 2


@pytest.mark.parametrize("share", [True, False])
def test_prompts_are_computed_anew_in_every_repeat(target: LoadedModel, target_folder: Path, share: bool) -> None:
    """Neither the target's cache nor the drafter's remembers a prompt where prefixes are not shared."""
    config = drafter_config(f"small_lm:{target_folder}", k=3)
    engine = build_engine(target, EngineConfig(kv_tokens=512, share_prefixes=share), config)
    run_requests(engine, _requests(12))
    assert isinstance(engine.drafter, SmallLM)
    for cache in (engine.cache, engine.drafter.cache):
        assert (cache.attach("again", np.array(TEXTS[0])) > 0) == share


def test_requests_that_never_decode_together_are_refused(target: LoadedModel) -> None:
    engine = build_engine(target, EngineConfig(kv_tokens=512, batch_size=1))
    run = run_requests(engine, _requests(4))
    with pytest.raises(ConfigError, match="cell x: in no round did all requests decode together"):
        require_counted(run, "cell x")


def test_the_environment_is_json_with_everything_that_decides_a_number(target: LoadedModel) -> None:
    record = environment(target)
    json.dumps(record)
    assert record["torch"] == torch.__version__
    assert record["threads"] == torch.get_num_threads()
    needed = {"steeple", "revision", "python", "transformers", "cpu", "device", "native_attention", "loadavg"}
    assert needed <= record.keys()


def test_the_revision_is_that_of_the_clone_around_the_package(tmp_path: Path) -> None:
    package = tmp_path / "src" / "steeple"
    package.mkdir(parents=True)
    assert revision(package) is None

    def git(*arguments: str) -> str:
        settings = ("-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false")
        done = subprocess.run(("git", "-C", str(tmp_path), *settings, *arguments), capture_output=True, check=True)
        return done.stdout.decode().strip()

    git("init")
    (package / "a.py").write_text("1")
    git("add", ".")
    git("commit", "--no-verify", "-m", "a")
    assert revision(package) == git("rev-parse", "HEAD")
    (package / "a.py").write_text("2")
    assert revision(package) == git("rev-parse", "HEAD") + "+changes"
