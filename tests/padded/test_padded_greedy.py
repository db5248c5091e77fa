"""Greedy output is the model's own, token by token, whatever the schedule, the batch and the architecture."""

from __future__ import annotations

import functools

import pytest
import torch
from zoo import CONTEXT, HOLES, SLOTS_COUNT, ZOO, alone, noisy, texts, unrelated, zoo

from steeple.errors import ConfigError, UnsupportedModel
from steeple.padded import PaddedOutput, generate
from steeple.padded.config import SCHEDULE_NAMES

LENGTHS, TOKENS = (5, 1, 12, 3, 7, 20, 2, 9, 4, 4), (14, 9, 3, 14, 1, 12, 14, 2, 10, 6)
SERVED = [name for name in ZOO if name not in ("mamba", "gpt2_short", "bart")]
CASES = [(name, schedule) for name in SERVED for schedule in SCHEDULE_NAMES if schedule != "holes" or name in HOLES]


@functools.cache
def truth(name: str) -> list[list[int]]:
    found = [alone(zoo(name), prompt, count) for prompt, count in zip(texts(LENGTHS), TOKENS, strict=True)]
    assert len({tuple(text[:2]) for text in found}) > 3, "the prompts must matter"
    return found


def tokens(output: PaddedOutput) -> list[list[int]]:
    assert not [result.error for result in output if result.error]
    return [result.token_ids for result in output]


@pytest.mark.parametrize(("name", "schedule"), CASES)
def test_output_is_the_models_own(name: str, schedule: str) -> None:
    for batch in (1, 3, 8):
        out = generate(
            zoo(name),
            noisy(name),
            texts(LENGTHS),
            max_tokens=TOKENS,
            schedule=schedule,
            batch_size=batch,
            window=5,
            waste=0.25,
        )
        assert tokens(out) == truth(name), f"batch {batch}"
        assert 1.3 < out.stats.speculation.tau < 4.9, "some drafts must be refused, and some accepted"
        if batch == 3:
            assert out.stats.moved > 0, "rows were never moved"
            assert out.stats.refills > 0, "no row was given to another prompt"


@pytest.mark.parametrize("schedule", SCHEDULE_NAMES)
def test_other_assistants_and_none(schedule: str) -> None:
    settings = {"max_tokens": TOKENS, "schedule": schedule, "batch_size": 3}
    for assistant, tau in ((None, 1.0), (unrelated(), 1.0), (zoo("llama"), 3.0)):
        out = generate(zoo("llama"), assistant, texts(LENGTHS), **settings)
        assert tokens(out) == truth("llama")
        assert out.stats.speculation.tau >= tau
    assert out.stats.speculation.accepted == out.stats.speculation.drafted, "the target refuses itself"


@pytest.mark.parametrize("schedule", SCHEDULE_NAMES)
def test_vocabularies_of_different_size(schedule: str) -> None:
    """One assistant knows fewer tokens than the target, one more: neither may break anything."""
    for vocab in (40, 80):
        out = generate(zoo("llama"), zoo("gpt2", vocab), texts(LENGTHS), max_tokens=TOKENS, schedule=schedule)
        assert tokens(out) == truth("llama")


@pytest.mark.parametrize("schedule", SCHEDULE_NAMES)
def test_an_assistant_with_a_shorter_context(schedule: str) -> None:
    """It drafts as long as it has positions. Longer texts are finished all the same, in a batch and alone; rows that
    come when no row was drafted for any more are drafted for."""
    prompts, counts = texts((30, 40, 12, 5, 20)), (45, 50, 20, 30, 9)
    expected = [alone(zoo("llama"), prompt, count) for prompt, count in zip(prompts, counts, strict=True)]
    for batch in (1, 2, 5):
        out = generate(
            zoo("llama"), zoo("gpt2_short"), prompts, max_tokens=counts, schedule=schedule, batch_size=batch, window=2
        )
        assert tokens(out) == expected
        assert [result.stats.drafted > 0 for result in out] == [False, False, True, True, True]


@pytest.mark.parametrize("schedule", SCHEDULE_NAMES)
def test_without_refill(schedule: str) -> None:
    out = generate(
        zoo("llama"), noisy("llama"), texts(LENGTHS), max_tokens=TOKENS, schedule=schedule, batch_size=3, window=3,
        refill=False,
    )  # fmt: skip
    assert tokens(out) == truth("llama")
    assert out.stats.refills == 0


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_eager_attention(name: str) -> None:
    """Masks with holes are added to the scores there, and are not boolean."""
    out = generate(
        zoo(name, implementation="eager"), noisy(name), texts(LENGTHS), max_tokens=TOKENS, schedule="holes",
        batch_size=3,
    )  # fmt: skip
    assert tokens(out) == truth(name)


def test_the_truth_is_that_of_transformers() -> None:
    for prompt, count, own in zip(texts(LENGTHS), TOKENS, truth("llama"), strict=True):
        whole = zoo("llama").generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=count, do_sample=False
        )
        assert whole[0, len(prompt) :].tolist() == own


@pytest.mark.parametrize("name", SLOTS_COUNT)
def test_holes_are_refused_where_slots_tell_positions(name: str) -> None:
    with pytest.raises(ConfigError, match=r"schedule = 'align' or 'pool'"):
        generate(zoo(name), noisy(name), texts((3,)), schedule="holes")
    with pytest.raises(ConfigError, match=r"schedule = 'align' or 'pool'"):
        generate(zoo("llama"), zoo(name), texts((3,)), schedule="holes")


@pytest.mark.parametrize("schedule", ["align", "pool"])
def test_models_that_take_no_positions_are_served_one_by_one(schedule: str) -> None:
    """Bart's decoder counts positions from the start of the cache, padding included."""
    with pytest.raises(ConfigError, match="batch_size = 1"):
        generate(zoo("bart"), None, texts((3,)), schedule=schedule, batch_size=2)
    out = generate(zoo("bart"), noisy("bart"), texts(LENGTHS), max_tokens=TOKENS, schedule=schedule, batch_size=1)
    assert tokens(out) == truth("bart")


def test_the_refusal_is_no_superstition() -> None:
    """Without the probe a model with ALiBi that takes any mask writes something else."""
    out = generate(zoo("mpt"), noisy("mpt"), texts(LENGTHS), max_tokens=TOKENS, schedule="holes", probe=False)
    assert tokens(out) != truth("mpt")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("schedule", SCHEDULE_NAMES)
def test_recurrent_models_are_refused(schedule: str) -> None:
    with pytest.raises(UnsupportedModel, match="recurrent"):
        generate(zoo("mamba"), None, texts((3,)), schedule=schedule)


@pytest.mark.parametrize("schedule", SCHEDULE_NAMES)
def test_texts_end_at_the_models_context(schedule: str) -> None:
    """gpt2's positions are a table: a position beyond it would raise."""
    prompts = texts((CONTEXT - 3, 5, CONTEXT - 1))
    out = generate(zoo("gpt2"), noisy("gpt2"), prompts, max_tokens=12, schedule=schedule)
    assert [len(result.token_ids) for result in out] == [3, 12, 1]
    assert tokens(out) == [
        alone(zoo("gpt2"), prompt, len(own.token_ids)) for prompt, own in zip(prompts, out, strict=True)
    ]
