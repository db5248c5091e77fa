"""From the hidden states of a step to its verdict: logits where they are needed, penalties, verification, logprobs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steeple.model.decoder import Hidden
from steeple.model.run import Runner
from steeple.ops.law import Counts, SamplingBatch, count_text, penalise
from steeple.ops.sampling import sampler
from steeple.request import Request, TokenLogprob
from steeple.types import Batch, Draft, Verdict
from steeple.verify import verify, verify_choice
from steeple.verify.chains import chosen_nodes


@dataclass(frozen=True, slots=True)
class Judgement:
    """A verdict for S sampling requests, as lists: tokens, kept nodes (numbered within the request), logprobs.

    ``logprobs`` is empty where nobody asked for any.
    """

    tokens: list[list[int]]
    kept: list[Sequence[int]]
    logprobs: list[list[TokenLogprob]]


class Judge:
    """Args: runner of the target; portion: rows whose laws may be in memory at once (those of one request always are),
    0 = all. Logits are computed for the newest token of a request and its nodes only.
    """

    def __init__(self, runner: Runner, portion: int = 0) -> None:
        self._runner, self._portion = runner, portion
        self._vocab = runner.decoder.config.vocab_size
        self._sampling = SamplingBatch.of(())
        self._native = sampler(runner.decoder.kernels.library)

    def judge(
        self, batch: Batch, requests: list[Request], places: Sequence[int], draft: Draft, hidden: Hidden
    ) -> Judgement:
        """Judge the drafts of the sampling ``requests``, which stand at ``places`` in the batch."""
        if not requests:
            return Judgement([], [], [])
        hidden_TD = hidden.final_TD
        if self._sampling.requests != requests:
            self._sampling = SamplingBatch.of(requests, hidden_TD.device)
        sampling = self._sampling
        if len(requests) + draft.tokens.shape[0] == hidden_TD.shape[0]:
            own, hidden_RD = draft, hidden_TD  # every row is a root or a node
        else:
            own, rows = _rows_of(batch, places, draft)
            hidden_RD = hidden_TD[torch.from_numpy(rows).to(hidden_TD.device)]
        if sampling.constrained or sampling.logprobs or sampling.laws.penalised or not sampling.laws.all_greedy:
            bits_N = batch.layout.ancestors[batch.node_rows]
            if self._portion and hidden_RD.shape[0] > self._portion:
                return self._in_portions(bits_N, sampling, own, hidden_RD)
            return self._by_logits(bits_N, sampling, own, hidden_RD)
        choice_R = self._runner.best(hidden_RD)
        if not own.tokens.shape[0]:
            return Judgement([[token] for token in choice_R.tolist()], [()] * len(requests), [])
        return _chosen(choice_R, own) if own.chain else _as_lists(verify_choice(choice_R, own), own)

    @torch.inference_mode()
    def _in_portions(self, bits_N: Tensor, sampling: SamplingBatch, draft: Draft, hidden_RD: Tensor) -> Judgement:
        """``_by_logits``, some requests after the other. A verdict depends on its own request alone."""
        whole = Judgement([], [], [])
        device, cu = hidden_RD.device, draft.cu.numpy()
        for first, end in portions(np.diff(cu) + 1, self._portion):
            a, b = int(cu[first]), int(cu[end])
            nodes, parent = slice(a, b), draft.parent[a:b]
            part = replace(
                draft,
                tokens=draft.tokens[nodes],
                parent=torch.where(parent < 0, parent, parent - a),
                cu=draft.cu[first : end + 1] - a,
                row=draft.row[nodes],
            )
            own = SamplingBatch.of(sampling.requests[first:end], device)
            found = self._by_logits(bits_N[nodes], own, part, hidden_RD[a + first : b + end])
            whole.tokens.extend(found.tokens)
            whole.kept.extend(found.kept)
            if sampling.logprobs:
                whole.logprobs.extend(found.logprobs or [[] for _ in found.tokens])
        return whole

    @torch.inference_mode()
    def _by_logits(self, bits_N: Tensor, sampling: SamplingBatch, draft: Draft, hidden_RD: Tensor) -> Judgement:
        """Where the best token of a row does not say enough. ``bits_N``: the nodes above each node, as in a batch."""
        requests, laws = sampling.requests, sampling.laws
        logits_RV = self._runner.logits(hidden_RD)
        raw_RV = logits_RV if sampling.logprobs else None  # not held where nobody reads it
        if sampling.constrained:
            logits_RV = _constrained(logits_RV, sampling, bits_N, draft)
        if laws.penalised:
            logits_RV = self._penalised(logits_RV, sampling, bits_N, draft)
        counter = np.fromiter(map(len, requests), np.int64, len(requests))
        verdict = verify(logits_RV, draft, laws, sampling.generators, counter, self._native)
        judgement = _as_lists(verdict, draft)
        if raw_RV is not None:
            cu = verdict.cu.tolist()
            for b, request in enumerate(requests):
                rows = torch.from_numpy(verdict.row[cu[b] : cu[b + 1]]).to(raw_RV.device)
                best = request.params.logprobs
                judgement.logprobs.append([] if best is None else _logprobs(raw_RV[rows], judgement.tokens[b], best))
        return judgement

    def _penalised(self, logits_RV: Tensor, sampling: SamplingBatch, bits_N: Tensor, draft: Draft) -> Tensor:
        """Each row's penalties count the text and the path of nodes above the row."""
        device, requests = logits_RV.device, sampling.requests
        per_request, cu = draft.counts.numpy(), draft.cu.numpy()
        owner = np.repeat(np.arange(len(requests)), per_request + 1)
        owner_R = torch.from_numpy(owner).to(device)
        prompts = [r.tokens[: r.prompt_len] for r in requests]
        table = count_text(prompts, [r.output for r in requests], self._vocab, device)
        counts = Counts(table.prompt[owner_R], table.output[owner_R])
        bits = bits_N.numpy()
        if bits.size:
            start = np.repeat(cu[:-1], per_request)
            node, above = np.nonzero((bits[:, None] >> np.arange(int(per_request.max()))) & 1)
            rows = node + np.repeat(np.arange(len(requests)), per_request)[node] + 1
            path = torch.from_numpy(start[node] + above).to(device)
            counts.add(torch.from_numpy(rows).to(device), draft.tokens[path])
        return penalise(logits_RV, sampling.laws, owner_R, counts)


def _constrained(logits_RV: Tensor, sampling: SamplingBatch, bits_N: Tensor, draft: Draft) -> Tensor:
    """New logits, shaped by what constrains each request. ``bits_N``: the nodes above each node."""
    shaped_RV = logits_RV.clone()
    cu, bits, tokens = draft.cu.tolist(), bits_N.tolist(), draft.tokens.tolist()
    for b, request in enumerate(sampling.requests):
        if request.constraint is None:
            continue
        first, end = cu[b], cu[b + 1]
        own = tokens[first:end]
        paths = [[own[j] for j in range(end - first) if bits[node] >> j & 1] for node in range(first, end)]
        request.constraint.shape(request, shaped_RV[first + b : end + b + 1], [[], *paths])
    return shaped_RV


def portions(rows: NDArray[np.int64], most: int) -> list[tuple[int, int]]:
    """Runs ``(first, end)`` of requests whose ``rows [B]`` are at most ``most`` together; one request at least."""
    found, first, taken = [], 0, 0
    for b, own in enumerate(rows.tolist()):
        if taken and taken + own > most:
            found.append((first, b))
            first, taken = b, 0
        taken += own
    return [*found, (first, rows.shape[0])]


def _rows_of(batch: Batch, places: Sequence[int], draft: Draft) -> tuple[Draft, NDArray[np.int64]]:
    """The draft of the requests at ``places`` alone, and the rows of their roots and nodes."""
    at = np.asarray(places, dtype=np.int64)
    nodes = draft.counts.numpy()[at]
    first = np.concatenate(([0], np.cumsum(nodes + 1)))
    root = batch.layout.node_row.numpy()[at].astype(np.int64) - 1
    rows = np.arange(int(first[-1])) + np.repeat(root - first[:-1], nodes + 1)
    # Only sampling requests have nodes, so leaving the others out moves no node.
    cu = torch.from_numpy(np.concatenate(([0], np.cumsum(nodes))))
    return replace(draft, cu=cu), rows


def _chosen(choice_R: Tensor, draft: Draft) -> Judgement:
    """The verdict on chains by choice. What is written are the choices themselves, as far as the chain is right."""
    choice = choice_R.cpu()
    kept, flat, cu = chosen_nodes(draft, choice.numpy()).tolist(), choice.tolist(), draft.cu.tolist()
    tokens = [flat[first + b : first + b + count + 1] for b, (first, count) in enumerate(zip(cu, kept, strict=False))]
    return Judgement(tokens, [range(count) for count in kept], [])


def _as_lists(verdict: Verdict, draft: Draft) -> Judgement:
    flat, kept = verdict.tokens.tolist(), verdict.kept.tolist()
    tokens = [flat[first:end] for first, end in pairwise(verdict.cu.tolist())]
    if draft.chain:
        return Judgement(tokens, [range(len(own) - 1) for own in tokens], [])
    paths: list[Sequence[int]] = []
    at = 0
    for own, base in zip(tokens, draft.cu.tolist(), strict=False):
        paths.append([node - base for node in kept[at : at + len(own) - 1]])
        at += len(own) - 1
    return Judgement(tokens, paths, [])


def _logprobs(logits_MV: Tensor, tokens: Sequence[int], best: int) -> list[TokenLogprob]:
    """Log-probabilities under the unprocessed target."""
    logs = torch.log_softmax(logits_MV, dim=-1)
    own = logs.gather(1, torch.tensor(tokens, device=logs.device).unsqueeze(1)).squeeze(1).tolist()
    top = logs.topk(min(best, logs.shape[-1]), dim=-1) if best else None
    out = []
    for i, (token, value) in enumerate(zip(tokens, own, strict=True)):
        pairs = zip(top.indices[i].tolist(), top.values[i].tolist(), strict=True) if top is not None else ()
        out.append(TokenLogprob(token, value, tuple(pairs)))
    return out
