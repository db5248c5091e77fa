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
    """Args: runner of the target. Logits are computed for the newest token of a request and its nodes only."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
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
        if not sampling.laws.all_greedy or sampling.laws.penalised or sampling.logprobs:
            return self._by_logits(batch, sampling, own, hidden_RD)
        choice_R = self._runner.best(hidden_RD)
        if not own.tokens.shape[0]:
            return Judgement([[token] for token in choice_R.tolist()], [()] * len(requests), [])
        return _chosen(choice_R, own) if own.chain else _as_lists(verify_choice(choice_R, own), own)

    @torch.inference_mode()
    def _by_logits(self, batch: Batch, sampling: SamplingBatch, draft: Draft, hidden_RD: Tensor) -> Judgement:
        """Where the best token of a row does not say enough."""
        requests, laws = sampling.requests, sampling.laws
        raw_RV = self._runner.logits(hidden_RD)
        logits_RV = self._penalised(raw_RV, sampling, batch, draft) if laws.penalised else raw_RV
        counter = np.fromiter(map(len, requests), np.int64, len(requests))
        verdict = verify(logits_RV, draft, laws, sampling.generators, counter, self._native)
        judgement = _as_lists(verdict, draft)
        if sampling.logprobs:
            cu = verdict.cu.tolist()
            for b, request in enumerate(requests):
                rows = torch.from_numpy(verdict.row[cu[b] : cu[b + 1]]).to(raw_RV.device)
                best = request.params.logprobs
                judgement.logprobs.append([] if best is None else _logprobs(raw_RV[rows], judgement.tokens[b], best))
        return judgement

    def _penalised(self, logits_RV: Tensor, sampling: SamplingBatch, batch: Batch, draft: Draft) -> Tensor:
        """Each row's penalties count the text and the path of nodes above the row."""
        device, requests = logits_RV.device, sampling.requests
        per_request, cu = draft.counts.numpy(), draft.cu.numpy()
        owner = np.repeat(np.arange(len(requests)), per_request + 1)
        owner_R = torch.from_numpy(owner).to(device)
        prompts = [r.tokens[: r.prompt_len] for r in requests]
        table = count_text(prompts, [r.output for r in requests], self._vocab, device)
        counts = Counts(table.prompt[owner_R], table.output[owner_R])
        bits = batch.layout.ancestors[batch.node_rows].numpy()
        if bits.size:
            start = np.repeat(cu[:-1], per_request)
            node, above = np.nonzero((bits[:, None] >> np.arange(int(per_request.max()))) & 1)
            rows = node + np.repeat(np.arange(len(requests)), per_request)[node] + 1
            path = torch.from_numpy(start[node] + above).to(device)
            counts.add(torch.from_numpy(rows).to(device), draft.tokens[path])
        return penalise(logits_RV, sampling.laws, owner_R, counts)


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
