"""Batched lossless speculative decoding with any causal model of ``transformers``: the loop and its results."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from steeple.config import from_dict
from steeple.errors import ConfigError, RequestError
from steeple.ops.rng import derive_seed
from steeple.padded.config import PaddedConfig
from steeple.padded.holes import Holes
from steeple.padded.net import Net
from steeple.padded.pool import Pool
from steeple.padded.probe import check
from steeple.padded.round import play, prefill
from steeple.padded.rows import LeftPadded
from steeple.padded.schedule import Resident, Schedule
from steeple.padded.stats import PaddedStats
from steeple.request import FinishReason, Request, SpeculationStats
from steeple.types import SamplingParams

Prompt = str | Sequence[int]
Progress = Callable[[int, int], None]
Nets = tuple[Net, Net | None]


@dataclass(frozen=True, slots=True)
class PaddedResult:
    """What became of one prompt; ``error`` says what is wrong with it. ``text`` needs a tokenizer."""

    token_ids: list[int]
    text: str | None
    finish_reason: str
    error: str | None
    stats: SpeculationStats


class PaddedOutput(list[PaddedResult]):
    """The results in the order of the prompts, and ``stats`` of the whole call."""

    def __init__(self, results: Sequence[PaddedResult], stats: PaddedStats) -> None:
        super().__init__(results)
        self.stats = stats


def _align(config: PaddedConfig, nets: Nets, stats: PaddedStats) -> Schedule:
    return Resident(config.batch_size, nets, stats, LeftPadded.empty)


def _holes(config: PaddedConfig, nets: Nets, stats: PaddedStats) -> Schedule:
    return Resident(config.batch_size, nets, stats, lambda net: Holes(net, config.waste))


def _pool(config: PaddedConfig, nets: Nets, stats: PaddedStats) -> Schedule:
    return Pool(config.batch_size, config.window, nets, stats)


SCHEDULES: dict[str, Callable[[PaddedConfig, Nets, PaddedStats], Schedule]] = {
    "align": _align,
    "pool": _pool,
    "holes": _holes,
}
HOLED = frozenset({"holes"})  # schedules that leave rejected slots in the cache


def generate(
    model: Any,
    assistant: Any | None,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int | Sequence[int] = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int | None = None,
    tokenizer: Any | None = None,
    stop_token_ids: Sequence[int] = (),
    ignore_eos: bool = False,
    progress: Progress | None = None,
    **settings: Any,
) -> PaddedOutput:
    """Generate for all prompts; the output is what the model alone would have written (greedy) or has its law.

    Args:
        model, assistant: ``AutoModelForCausalLM`` with token ids of one tokenizer; no assistant: plain decoding.
        prompts: token ids, or texts if there is a ``tokenizer``.
        max_tokens: for all, or one number for each prompt.
        seed: prompt i draws from the i-th seed that follows from it, whatever runs beside it.
        stop_token_ids: end a text, as the end-of-text tokens of the model's generation config do.
        progress: told how many prompts are finished, and of how many.
        settings: fields of ``PaddedConfig``.

    A prompt that cannot be served becomes a result with ``finish_reason`` "error"; the others are finished. An
    interrupt (Ctrl-C) ends the call with what is written so far.

    Raises:
        ConfigError: a setting is wrong, or the schedule is wrong for the model; says which is right.
        UnsupportedModel: no schedule serves the model.
    """
    config: PaddedConfig = from_dict(PaddedConfig, settings)
    stats = PaddedStats()
    limits = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else list(max_tokens)
    if len(limits) != len(prompts):
        raise ConfigError(f"max_tokens holds {len(limits)} numbers for {len(prompts)} prompts; give one for each.")
    nets = Net(model), None if assistant is None else Net(assistant)
    ends = frozenset(stop_token_ids) | (frozenset() if ignore_eos else _eos(model))
    requests = []
    for index, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
        own = None if seed is None else derive_seed(seed, index)
        params = SamplingParams(
            max_tokens=limit, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=own
        )
        requests.append(_request(str(index), prompt, params, nets[0], tokenizer, ends))
    with torch.inference_mode():
        if config.probe and requests:
            with stats.timed("probe", nets[0].device):
                for net in nets:
                    if net is not None:
                        check(net, config.schedule in HOLED, config.batch_size)
        run(requests, nets, config, stats, progress)
    return PaddedOutput([_result(request, tokenizer) for request in requests], stats)


def run(
    requests: Sequence[Request], nets: Nets, config: PaddedConfig, stats: PaddedStats, progress: Progress | None = None
) -> None:
    """Write all requests that are not finished yet. Fills ``stats``."""
    schedule = SCHEDULES[config.schedule](config, nets, stats)
    waiting = deque(request for request in requests if not request.finished)
    try:
        while waiting or schedule.running:
            _refill(waiting, schedule, nets, config, stats)
            if schedule.running:
                group = schedule.next()
                schedule.settle(group, play(group, config.k, stats))
            if progress is not None:
                progress(sum(request.finished for request in requests), len(requests))
    except KeyboardInterrupt:
        for request in requests:
            request.finish(FinishReason.CANCELLED)
    for request in requests:
        stats.speculation.merge(request.stats)


def _refill(waiting: deque[Request], schedule: Schedule, nets: Nets, config: PaddedConfig, stats: PaddedStats) -> None:
    """Read the prompts of as many waiting requests as there are places, not more than a batch at once."""
    late = schedule.running > 0
    if late and not config.refill:
        return
    while waiting and schedule.free:
        count = min(len(waiting), schedule.free, config.batch_size)
        taken = [waiting.popleft() for _ in range(count)]
        stats.refills += count * late
        going, target, draft = prefill(taken, nets, stats)
        if going:
            schedule.join(going, target, draft)


def _eos(model: Any) -> frozenset[int]:
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if found is None:
        found = model.config.get_text_config(decoder=True).eos_token_id
    return frozenset(() if found is None else (found,) if isinstance(found, int) else found)


def _request(
    name: str, prompt: Prompt, params: SamplingParams, net: Net, tokenizer: Any | None, ends: frozenset[int]
) -> Request:
    """A request; with an error, and finished, where the prompt cannot be served."""
    try:
        tokens = _tokens(prompt, net, tokenizer)
    except RequestError as error:
        request = Request(name, [], params)
        request.finish(FinishReason.ERROR, str(error))
        return request
    request = Request(name, tokens, params)
    request.stops = ends
    if net.context:
        request.limit = min(request.limit, net.context)
    return request


def _tokens(prompt: Prompt, net: Net, tokenizer: Any | None) -> list[int]:
    if isinstance(prompt, str):
        if tokenizer is None:
            raise RequestError("A prompt is text, but there is no tokenizer; give one, or give token ids.")
        prompt = tokenizer.encode(prompt)
    tokens = [int(token) for token in prompt]
    if not tokens:
        raise RequestError("The prompt is empty; give one token at least.")
    for token in tokens:
        if not 0 <= token < net.known:
            raise RequestError(f"The prompt holds token id {token}; {net.name} knows 0 to {net.known - 1}.")
    if net.context and len(tokens) >= net.context:
        raise RequestError(
            f"The prompt has {len(tokens)} tokens, but {net.name} has a context of {net.context}; shorten it to "
            f"{net.context - 1} tokens or fewer."
        )
    return tokens


def _result(request: Request, tokenizer: Any | None) -> PaddedResult:
    tokens = request.output.tolist()
    text = None if tokenizer is None else tokenizer.decode(tokens, skip_special_tokens=True)
    reason = request.finish_reason or FinishReason.CANCELLED
    return PaddedResult(tokens, text, reason.value, request.error, request.stats)
