"""Sampled output has the model's own law, and a request's tokens are those of its seed, whoever its neighbours are."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
from exact import Floats, check_sample, process
from zoo import last_logits, noisy, texts, zoo

from steeple.padded import generate
from steeple.padded.config import SCHEDULE_NAMES
from steeple.types import SamplingParams

VOCAB, LENGTH, SAMPLES = 6, 3, 1500
PROMPT = [2, 4, 3, 2]
PROCESSORS = {
    "plain": SamplingParams(temperature=1.0),
    "top_p": SamplingParams(temperature=0.8, top_p=0.8),
    "top_k": SamplingParams(temperature=1.3, top_k=3),
}


@functools.cache
def law(name: str, processor: str) -> Floats:
    """Probability of every sequence of ``LENGTH`` tokens after the prompt, one row at a time."""
    found = np.ones((VOCAB,) * LENGTH)
    for depth in range(LENGTH):
        for path in itertools.product(range(VOCAB), repeat=depth):
            logits = last_logits(zoo(name, VOCAB), [*PROMPT, *path]).tolist()
            own = process(logits, PROCESSORS[processor], PROMPT, path)
            found[path] *= own.reshape(-1, *[1] * (LENGTH - depth - 1))
    return found


def sampled(name: str, schedule: str, processor: str, **settings: object) -> list[list[int]]:
    """Many samples after one prompt, between other prompts, so that rows are ragged."""
    params = PROCESSORS[processor]
    others = texts((1, 9, 6), VOCAB)
    prompts = [PROMPT if i % 4 else others[i // 4 % 3] for i in range(SAMPLES)]
    out = generate(
        zoo(name, VOCAB), noisy(name, 0.5, VOCAB), prompts, schedule=schedule, seed=7, k=2, batch_size=150, window=300,
        max_tokens=[LENGTH + 1 + i % 5 for i in range(SAMPLES)], temperature=params.temperature,
        top_p=params.top_p, top_k=params.top_k, ignore_eos=True, **settings,
    )  # fmt: skip
    speculation = out.stats.speculation
    assert 0.2 < speculation.accepted / speculation.drafted < 0.97, "drafts must be refused and accepted"
    return [result.token_ids for prompt, result in zip(prompts, out, strict=True) if prompt is PROMPT]


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("schedule", SCHEDULE_NAMES)
def test_samples_follow_the_law(schedule: str, processor: str) -> None:
    check_sample(sampled("llama", schedule, processor), law("llama", processor), f"{schedule}, {processor}")


def test_samples_follow_the_law_with_alibi() -> None:
    check_sample(sampled("bloom", "align", "plain"), law("bloom", "plain"), "bloom")


def test_the_target_as_its_own_assistant_is_never_refused() -> None:
    """What was drawn from the target's own law is kept: the law that each token was drawn from is known exactly."""
    out = generate(zoo("llama"), zoo("llama"), texts((5, 1, 12)), max_tokens=40, temperature=1.0, top_p=0.9, seed=1)
    assert out.stats.speculation.accepted == out.stats.speculation.drafted > 60


def test_a_seed_decides_whoever_the_neighbours_are() -> None:
    prompts, counts = texts((5, 1, 12, 3, 7, 20, 2, 9)), [6 + 3 * (i % 4) for i in range(8)]

    def run(**settings: object) -> list[list[int]]:
        out = generate(
            zoo("llama"), noisy("llama"), prompts, max_tokens=counts, temperature=1.0, top_p=0.95, seed=3, **settings
        )
        return [result.token_ids for result in out]

    expected = run(batch_size=1)
    assert len({tuple(own) for own in expected}) == len(prompts)
    for schedule, batch in itertools.product(SCHEDULE_NAMES, (2, 3, 8)):
        assert run(schedule=schedule, batch_size=batch, window=4) == expected, (schedule, batch)
