"""What a job answers: one record per request, and a summary of the run. JSON types only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from steeple.jobs.lines import Line
from steeple.llm import Completion, RequestOutput
from steeple.request import FinishReason, SpeculationStats, TokenLogprob


def answer(line: Line, output: RequestOutput) -> dict[str, Any]:
    """The record of a finished request. With ``n > 1``, ``text`` and ``token_ids`` are those of the first choice."""
    first = output.outputs[0]
    record: dict[str, Any] = {"id": line.id, **_choice(first)}
    if len(output.outputs) > 1:
        record["choices"] = [{"index": choice.index, **_choice(choice)} for choice in output.outputs]
    written = sum(len(choice.token_ids) for choice in output.outputs)
    record["usage"] = usage(len(output.prompt_token_ids), written)
    record["metrics"] = {
        **speculation(output.stats),
        "seconds": output.seconds,
        "first_token_seconds": output.first_token_seconds,
        "preemptions": output.preemptions,
    }
    if output.error is not None:
        record |= {"finish_reason": FinishReason.ERROR.value, "error": output.error, "line": line.number}
    return record


def refusal(line: Line, error: str) -> dict[str, Any]:
    """The record of a request that could not even be tried."""
    return answer(
        line,
        RequestOutput(line.key, [], [Completion(0, "", [], FinishReason.ERROR.value, error=error)], SpeculationStats()),
    )


def usage(prompt: int, completion: int) -> dict[str, int]:
    """Tokens read and written."""
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def speculation(stats: SpeculationStats) -> dict[str, Any]:
    """What speculation did: tau = committed tokens per target pass; acceptance by depth, as a share of all rounds."""
    return {
        "tau": stats.tau,
        "rounds": stats.rounds,
        "drafted": stats.drafted,
        "accepted": stats.accepted,
        "acceptance_by_position": stats.acceptance_by_position,
    }


def _choice(choice: Completion) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "text": choice.text,
        "token_ids": choice.token_ids,
        "finish_reason": choice.finish_reason,
    }
    if choice.logprobs is not None:
        fields["logprobs"] = _logprobs(choice.logprobs)
    return fields


def _logprobs(tokens: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    return [
        {
            "token_id": token.token_id,
            "logprob": _finite(token.logprob),
            "top": [{"token_id": other, "logprob": _finite(value)} for other, value in token.top],
        }
        for token in tokens
    ]


def _finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None
