"""The proof of padded generation: every schedule against transformers' own greedy text, and samples against the law.

The prompts and the exact laws are those of the engine's proof; the models are those of ``transformers``, unmodified.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from steeple import hf
from steeple.engine import LoadedModel
from steeple.errors import ConfigError
from steeple.evidence.logits import first_difference
from steeple.evidence.progress import Progress, silent
from steeple.padded import PaddedConfig, generate
from steeple.padded.config import SCHEDULE_NAMES
from steeple.padded.generate import HOLED
from steeple.proof.config import ProofConfig
from steeple.proof.reference import Texts
from steeple.proof.sampling import TOKENS, Case
from steeple.proof.statistics import Fit, combine, fit

BATCHES = (1, 3, 8)
AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class PaddedProof:
    """One schedule. differences: requests whose greedy text differs, with the gap between the target's two best logits
    there; tau: committed tokens per round; refused: why the models do not bear the schedule."""

    requests: int
    differences: list[dict[str, Any]]
    fits: dict[str, Fit]
    tau: float
    tie_gap: float
    refused: str | None = None

    def lossless(self, alpha: float) -> bool:
        """No difference that rounding does not explain, and samples that fit. A refusal writes nothing wrong."""
        if self.refused is not None:
            return True
        ties = all(difference["gap"] <= self.tie_gap for difference in self.differences)
        return ties and (not self.fits or combine(list(self.fits.values())).passes(alpha))

    def as_dict(self, alpha: float) -> dict[str, Any]:
        """For JSON."""
        if self.refused is not None:
            return {"refused": self.refused, "lossless": True}
        whole = combine(list(self.fits.values())).as_dict(alpha) if self.fits else {}
        cases = [{"case": name, **found.as_dict(alpha)} for name, found in self.fits.items()]
        return {
            "greedy": {
                "requests": self.requests,
                "identical": self.requests - len(self.differences),
                "worst_gap": max((difference["gap"] for difference in self.differences), default=0.0),
                "differences": self.differences,
                "tau": self.tau,
            },
            "sampling": {**whole, "cases": cases},
            "lossless": self.lossless(alpha),
        }


def prove_padded(
    config: ProofConfig,
    target: LoadedModel,
    assistant: str,
    prompts: Texts,
    expected: Texts,
    cases: Sequence[Case],
    progress: Progress = silent,
) -> dict[str, PaddedProof]:
    """Prove every schedule with ``target`` and ``assistant`` (a folder or hub name), both loaded by ``transformers``.

    Args:
        prompts, expected: of the greedy half; what ``transformers`` writes after them (``transformers_greedy``).
        cases: of the sampling half; those with penalties are left out, for padded generation has none.
    """
    models = [
        AutoModelForCausalLM.from_pretrained(folder, dtype=target.decoder.dtype, local_files_only=True)
        .to(target.device)
        .eval()
        for folder in (target.folder, hf.resolve(assistant))
    ]
    usable = [case for case in cases if not case.params.penalised]
    proofs = {}
    for done, schedule in enumerate(SCHEDULE_NAMES):
        progress(f"padded, {schedule}", done, len(SCHEDULE_NAMES))
        # What every model of this proof bears is not asked for: an error of ours must not pass for a refusal.
        probe = schedule in HOLED
        settings = PaddedConfig(schedule=schedule, k=config.k, window=max(BATCHES) + 2, waste=0.25, probe=probe)
        try:
            proofs[schedule] = _prove(config, settings, models, prompts, expected, usable)
        except ConfigError as error:
            proofs[schedule] = PaddedProof(0, [], {}, 0.0, config.tie_gap, str(error))
    return proofs


def _prove(
    config: ProofConfig,
    settings: PaddedConfig,
    models: Sequence[Any],
    prompts: Texts,
    expected: Texts,
    cases: Sequence[Case],
) -> PaddedProof:
    differences: list[dict[str, Any]] = []
    taus = []
    for batch in BATCHES:
        own = replace(settings, batch_size=batch)
        out = generate(models[0], models[1], prompts, max_tokens=config.max_tokens, ignore_eos=True, **vars(own))
        taus.append(out.stats.speculation.tau)
        for number, (prompt, right, result) in enumerate(zip(prompts, expected, out, strict=True)):
            place = first_difference(right, result.token_ids)
            if place is not None:
                gap = _gap(models[0], [*prompt, *right[:place]])
                differences.append({"batch": batch, "request": number, "position": place, "gap": gap})
    samples = config.samples // max(len(cases) * len(SCHEDULE_NAMES), 1)
    fits = {case.name: _sample(config, settings, models, case, samples) for case in cases}
    return PaddedProof(len(prompts) * len(BATCHES), differences, fits, sum(taus) / len(taus), config.tie_gap)


def _gap(model: Any, text: Sequence[int]) -> float:
    """Between the two best logits after a text."""
    with torch.inference_mode():
        best = model(input_ids=torch.tensor([list(text)], device=model.device)).logits[0, -1].float().topk(2).values
    return float(best[0] - best[1])


def _sample(config: ProofConfig, settings: PaddedConfig, models: Sequence[Any], case: Case, samples: int) -> Fit:
    """Samples of one case, among rows of other lengths, so that the batch is ragged."""
    rows = [case.prompt if place % 4 else case.prompt[: 1 + place % 7] for place in range(-(-samples * 4 // 3))]
    params = case.params
    own = replace(settings, batch_size=AT_ONCE, window=2 * AT_ONCE)
    out = generate(
        models[0],
        models[1],
        rows,
        max_tokens=TOKENS + 1,
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        seed=config.seed,
        ignore_eos=True,
        **vars(own),
    )
    drawn = [tuple(result.token_ids[:TOKENS]) for place, result in enumerate(out) if place % 4]
    counts = Counter(case.law.outcome(tokens) for tokens in drawn)
    return fit(counts, case.law.probabilities, config.seed)
