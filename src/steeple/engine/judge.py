"""From the hidden states of a step to its verdict: logits where they are needed, penalties, verification, logprobs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from steeple.model.decoder import Hidden
from steeple.model.run import Runner
from steeple.ops.law import Counts, Laws, count_text, penalise
from steeple.request import Request, TokenLogprob
from steeple.types import Batch, Draft, Verdict
from steeple.verify import verify


@dataclass(frozen=True, slots=True)
class Judgement:
    """A verdict on the host, for S sampling requests: tokens, kept nodes (numbered within the request), logprobs."""

    tokens: list[list[int]]
    kept: list[list[int]]
    logprobs: list[list[TokenLogprob]]
    verdict: Verdict | None


class Judge:
    """Args: runner of the target. Logits are computed for the newest token of a request and its nodes only."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._vocab = runner.decoder.config.vocab_size

    @torch.inference_mode()
    def judge(
        self, batch: Batch, requests: Sequence[Request], places: Sequence[int], draft: Draft, hidden: Hidden
    ) -> Judgement:
        """Judge the drafts of the sampling ``requests``, which stand at ``places`` in the batch."""
        if not requests:
            return Judgement([], [], [], None)
        device = hidden.final_TD.device
        at = np.asarray(places, dtype=np.int64)
        nodes = draft.counts.numpy()[at]
        counts = nodes + 1
        first = np.concatenate(([0], np.cumsum(counts)))
        owner = np.repeat(np.arange(at.shape[0]), counts)
        root = batch.layout.node_row.numpy()[at].astype(np.int64) - 1
        rows = np.arange(int(first[-1])) - first[owner] + root[owner]
        hidden_RD = hidden.final_TD if rows.shape[0] == hidden.final_TD.shape[0] else hidden.final_TD[_to(rows, device)]
        raw_RV = self._runner.logits(hidden_RD)
        laws = Laws.of([r.params for r in requests], device)
        owner_R = _to(owner, device)
        is_node = np.ones(rows.shape[0], dtype=bool)
        is_node[first[:-1]] = False
        node_law = np.flatnonzero(is_node)
        # Only sampling requests have nodes, so leaving the others out moves no node.
        own = Draft(draft.tokens, draft.parent, _offsets(nodes), draft.row, draft.probs)
        logits_RV = self._penalised(raw_RV, requests, laws, owner_R, batch, own, node_law) if laws.penalised else raw_RV
        verdict = verify(
            logits_RV,
            own,
            laws,
            owner_R=owner_R,
            root_law=_to(first[:-1], device),
            node_law=_to(node_law, device),
            seed=torch.tensor([r.seed for r in requests], dtype=torch.int64, device=device),
            counter=torch.tensor([len(r) for r in requests], dtype=torch.int64, device=device),
        )
        return self._on_host(verdict, own, requests, raw_RV)

    def _penalised(
        self,
        logits_RV: Tensor,
        requests: Sequence[Request],
        laws: Laws,
        owner_R: Tensor,
        batch: Batch,
        draft: Draft,
        node_law: np.ndarray[tuple[int], np.dtype[np.int64]],
    ) -> Tensor:
        """Each row's penalties count the text and the path of nodes above the row."""
        device = logits_RV.device
        prompts = [r.tokens[: r.prompt_len] for r in requests]
        table = count_text(prompts, [r.output for r in requests], self._vocab, device)
        counts = Counts(table.prompt[owner_R], table.output[owner_R])
        bits = batch.layout.ancestors[batch.node_rows].numpy()
        if bits.size:
            per_request = draft.counts.numpy()
            start = np.repeat(draft.cu.numpy()[:-1], per_request)
            node, above = np.nonzero((bits[:, None] >> np.arange(int(per_request.max()))) & 1)
            counts.add(_to(node_law[node], device), draft.tokens[_to(start[node] + above, device)])
        return penalise(logits_RV, laws, owner_R, counts)

    def _on_host(self, verdict: Verdict, draft: Draft, requests: Sequence[Request], raw_RV: Tensor) -> Judgement:
        cu = verdict.cu.tolist()
        flat = verdict.tokens.tolist()
        tokens = [flat[a:b] for a, b in pairwise(cu)]
        kept_flat, base = verdict.kept.tolist(), draft.cu.tolist()
        kept, at = [], 0
        for b, own in enumerate(tokens):
            kept.append([node - base[b] for node in kept_flat[at : at + len(own) - 1]])
            at += len(own) - 1
        logprobs: list[list[TokenLogprob]] = [[] for _ in requests]
        for b, request in enumerate(requests):
            if request.params.logprobs is not None:
                rows = verdict.row[cu[b] : cu[b + 1]]
                logprobs[b] = _logprobs(raw_RV[rows], tokens[b], request.params.logprobs)
        return Judgement(tokens, kept, logprobs, verdict)


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


def _offsets(counts: np.ndarray[tuple[int], np.dtype[np.int64]]) -> Tensor:
    return torch.from_numpy(np.concatenate(([0], np.cumsum(counts))))


def _to(values: np.ndarray[tuple[int], np.dtype[np.int64]], device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(device)
