"""The proof: for each drafter the greedy and the sampling half, and one word at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from steeple.draft import drafter_config
from steeple.engine import EngineConfig, LoadedModel, build_engine, load_model
from steeple.evidence.environment import command_line, environment
from steeple.evidence.progress import Progress, silent
from steeple.proof.config import ProofConfig
from steeple.proof.greedy import BLOCK, GreedyOutcome, prove_greedy
from steeple.proof.padded import PaddedProof, prove_padded
from steeple.proof.prompts import prompt_pool, ragged
from steeple.proof.reference import Texts, plain_alone, transformers_greedy
from steeple.proof.sampling import CaseOutcome, prepare_cases, prove_sampling
from steeple.proof.statistics import combine

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class DrafterProof:
    """Both halves for one drafter."""

    greedy: GreedyOutcome
    sampling: list[CaseOutcome]

    def lossless(self, alpha: float) -> bool:
        """No greedy difference that rounding does not explain, and samples that fit the law."""
        return self.greedy.passes and combine([c.fit for c in self.sampling]).passes(alpha)

    def as_dict(self, alpha: float) -> dict[str, Any]:
        """For JSON."""
        whole = combine([c.fit for c in self.sampling])
        cases = [c.as_dict(alpha) for c in self.sampling]
        drafted = sum(c.drafted for c in self.sampling) / len(self.sampling)
        return {
            "greedy": self.greedy.as_dict(),
            "sampling": {**whole.as_dict(alpha), "drafted": drafted, "cases": cases},
            "lossless": self.lossless(alpha),
        }


def run_proof(config: ProofConfig, progress: Progress = silent, argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Prove every drafter of ``config``; the result is ready for JSON.

    ``greedy`` and ``sampling`` sum over the drafters, ``drafters`` has each alone, ``lossless`` is true if all are.

    Args:
        progress: told about every request, drafter and wave of samples. argv: the command to put on record.

    Raises ``ConfigError``, ``ModelError``, ``CapacityError`` or ``StorageError``; a difference is no error.
    """
    started = time.perf_counter()
    progress("load", 0, 1)
    settings = EngineConfig(dtype=config.dtype, device=config.device, threads=config.threads, native=config.native)
    target = load_model(config.model, settings)
    for drafter in config.drafter:  # a wrong name or tokenizer is told before the work, not after it
        build_engine(target, _sized(settings, 1), drafter_config(drafter, k=config.k))
    pool = prompt_pool(config, target)
    prompts = ragged(pool.prompts, config.seed)
    expected = _expected(config, target, settings, prompts, progress)
    progress("exact laws", 0, 1)
    cases = prepare_cases(config, target, pool)
    settings = replace(settings, micro_batches=config.micro_batches)
    proofs: dict[str, DrafterProof] = {}
    for drafter in config.drafter:
        progress(f"{drafter}: greedy", 0, 1)
        greedy = prove_greedy(config, target, drafter, settings, prompts, expected)
        told = _told(progress, f"{drafter}: samples", config.samples)
        proofs[drafter] = DrafterProof(greedy, prove_sampling(config, target, drafter, settings, cases, told))
    padded: dict[str, PaddedProof] = {}
    if config.padded:
        oracle = expected.get("transformers") or transformers_greedy(target, prompts, config.max_tokens, lambda _: None)
        padded = prove_padded(config, target, config.padded, prompts, oracle, cases, progress)
    summary = _summary(config, list(proofs.values()))
    summary["lossless"] &= all(proof.lossless(config.alpha) for proof in padded.values())
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "proof",
        "command": command_line() if argv is None else list(argv),
        "config": asdict(config),
        "environment": environment(target),
        "prompts": {"source": pool.source, "sha256": pool.sha256},
        **summary,
        "drafters": {name: proof.as_dict(config.alpha) for name, proof in proofs.items()},
        "padded": {name: proof.as_dict(config.alpha) for name, proof in padded.items()},
        "seconds": time.perf_counter() - started,
    }


def _summary(config: ProofConfig, proofs: Sequence[DrafterProof]) -> dict[str, Any]:
    greedy = [p.greedy.as_dict() for p in proofs]
    oracles = [g["oracle_identical"] for g in greedy]
    return {
        "greedy": {
            "requests": sum(g["requests"] for g in greedy),
            "identical": sum(g["identical"] for g in greedy),
            "oracle_identical": None if None in oracles else sum(oracles),
            "worst_gap": max(g["worst_gap"] for g in greedy),
        },
        "sampling": combine([c.fit for p in proofs for c in p.sampling]).as_dict(config.alpha),
        "lossless": all(p.lossless(config.alpha) for p in proofs),
    }


def _expected(
    config: ProofConfig, target: LoadedModel, settings: EngineConfig, prompts: Texts, progress: Progress
) -> dict[str, Texts]:
    told = _told(progress, "plain decoding", len(prompts))
    alone = _sized(settings, max(map(len, prompts)) + config.max_tokens)
    expected = {"plain": plain_alone(target, alone, prompts, config.max_tokens, told)}
    if config.oracle:
        told = _told(progress, "transformers", len(prompts))
        expected["transformers"] = transformers_greedy(target, prompts, config.max_tokens, told)
    return expected


def _sized(settings: EngineConfig, tokens: int) -> EngineConfig:
    return replace(settings, kv_tokens=tokens + BLOCK, share_prefixes=False)


def _told(progress: Progress, what: str, total: int) -> Callable[[int], None]:
    return lambda done: progress(what, done, total)
