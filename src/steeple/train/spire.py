"""Train SPIRe: a draft of the target's last layers that reads the target's own cache through a window.

A step runs the target once over its windows, without gradients, then the draft over the same positions in blocks of k,
and compares the two laws at every position. A run has a folder (``run``) with the tokens, the last checkpoint and
``log.jsonl``; the same command continues a run that was stopped. The finished draft is written only after its laws in
training have been found equal to those that the engine computes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import nn

from steeple import hf
from steeple.errors import ConfigError, ModelError, StorageError
from steeple.model.decoder import Decoder
from steeple.model.load import load_decoder
from steeple.train.checkpoint import load_checkpoint, save_checkpoint
from steeple.train.data import SPLITS, TokenStream, documents, token_dtype, write_tokens
from steeple.train.optim import Optimizers, Rates, wsd
from steeple.train.progress import Reporter, measured_peak
from steeple.train.spire_card import spire_flops_per_token, write_draft
from steeple.train.spire_config import SpireConfig
from steeple.train.spire_forward import Student, one_pass, target_forward, target_pass
from steeple.train.spire_loss import Laws, Rounds, joined_rounds, rounds_of
from steeple.train.spire_parity import check_parity
from steeple.train.spire_student import begin_from, finished, new_student

OFFSETS_STREAM = 7  # keeps the draws of block offsets apart from those of the data order
FINAL_TOKENS, PARITY_TOKENS = 65_536, 4096
DRAFTED = 4
"""Drafted tokens per round in the tau that is watched, as in the paper."""


class SpireTrainer:
    """One run: target, draft, optimisers, data and log. Building it restores the run's last checkpoint."""

    def __init__(self, config: SpireConfig) -> None:
        self.config = config
        cuda = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
        self.device = torch.device("cuda" if cuda else "cpu")
        self.hf_config = hf.load_hf_config(config.target)
        self.target = load_decoder(config.target, dtype=torch.bfloat16, device=self.device)
        shape = self.target.config
        for length in config.seq_lens:
            check_length(length, shape.max_context)
        self.shape = config.shape(shape.num_layers)
        exact = self.target
        if stored_dtype(config.target) != exact.dtype:
            exact = load_decoder(config.target, dtype=torch.float32, device=self.device)
        self.student = new_student(exact, self.shape, random_init=config.random_init, seed=config.seed)
        if config.start is not None:
            begin_from(self.student, config.start)
        self.tokenizer = prepare_spire_tokens(config, shape.vocab_size, shape.eos_token_ids)
        rates = Rates(
            matrix=config.matrix_lr,
            embed=config.embed_lr,
            head=config.head_lr,
            norm=config.matrix_lr,
            weight_decay=config.weight_decay,
        )
        memory, carry = self.student.memory, self.student.carry
        self.optimizers = Optimizers(
            self.student.draft,
            rates,
            () if memory is None else (memory.mix,),
            () if carry is None else list(carry.parameters()),
        )
        self.laws = self._laws(self.target, self.student.draft)
        # Only training is compiled: validation has other shapes, and each takes minutes to compile.
        self._run_target, self._trained, self._trained_laws = target_pass, self.student, self.laws
        if config.compile:
            self._run_target = torch.compile(target_pass, dynamic=False)
            self._trained = replace(self.student, one_pass=torch.compile(one_pass, dynamic=False))
            self._trained_laws = self._laws(self.target, self.student.draft, compiled=True)
        dtype = token_dtype(shape.vocab_size)
        self.streams = {s: TokenStream.open(config.run / f"{s}.bin", config.seed, dtype) for s in SPLITS}
        self.modules = nn.ModuleDict({"draft": self.student.draft})
        if memory is not None:
            self.modules["memory"] = memory
        if carry is not None:
            self.modules["carry"] = carry
        self.progress = self._restored()

    def _laws(self, target: Decoder, draft: Decoder, *, compiled: bool = False) -> Laws:
        config = self.config
        return Laws(target, draft, alpha_weight=config.alpha_weight, hard=config.hard_targets, compiled=compiled)

    def _restored(self) -> dict[str, Any]:
        """The progress of the run so far; ``StorageError`` if it trained another kind of draft."""
        switches = {
            "shape": {**asdict(self.shape), "target_layers": list(self.shape.target_layers)},
            "random_init": self.config.random_init,
            "hard_targets": self.config.hard_targets,
            "alpha_weight": self.config.alpha_weight,
            "target": str(self.config.target),
            "start": str(self.config.start or ""),
        }
        restored = load_checkpoint(self.config.run, self.modules, self.optimizers)
        if restored is None:
            return {"step": 0, "seconds": 0.0, "switches": switches}
        for name, value in switches.items():
            begun = restored.get("switches", {}).get(name)
            if begun != value:
                raise StorageError(
                    f"The run in {str(self.config.run)!r} was begun with {name} = {begun!r}, not {value!r}; give "
                    "another run folder or remove it."
                )
        return restored

    def scale(self, step: int) -> float:
        """The factor on the learning rates at ``step``."""
        return wsd(step, self.config.steps, self.config.warmup, self.config.decay_share)

    def step(self, step: int) -> tuple[float, float]:
        """One optimiser step; returns the mean loss of its batch and the mean chance of acceptance.

        Raises:
            ModelError: the loss is not finite.
        """
        config = self.config
        phase, index = config.phase(step)
        length = config.seq_lens[phase]
        batch = self.streams["train"].batch(phase, index, config.batch_tokens // length, length).to(self.device)
        offsets = np.random.default_rng((config.seed, OFFSETS_STREAM, step))
        loss = alpha = 0.0
        for part in batch.split(max(1, config.micro_tokens // length)):
            weight, offset = len(part) / len(batch), int(offsets.integers(config.k))
            with torch.autocast(self.device.type, torch.bfloat16):
                seen = target_forward(self.target, part[:, :-1], self.shape, self._run_target)
                hidden = self._trained.forward(part[:, :-1], seen, offset)
                scores = self._trained_laws.backward(seen, hidden, part[:, 1:].reshape(-1), weight)
            loss += scores.loss.mean().item() * weight
            alpha += scores.alpha.mean().item() * weight
        if not math.isfinite(loss):
            raise ModelError(f"The loss of step {step} is {loss}; lower matrix_lr = {config.matrix_lr}.")
        nn.utils.clip_grad_norm_(self.modules.parameters(), config.clip)
        self.optimizers.step(self.scale(step))
        return loss, alpha

    @torch.no_grad()
    def rounds_on(self, split: str, windows: int, student: Student | None = None) -> tuple[Rounds | None, float]:
        """Blocks of windows spread over ``split``, of the longest length that it has one of, and their mean loss."""
        stream, student = self.streams[split], student or self.student
        laws = self.laws if student is self.student else self._laws(self.target, student.draft)
        lengths = [n for n in sorted(self.config.seq_lens, reverse=True) if len(stream.tokens) > n]
        if not lengths:
            return None, math.nan
        rows = stream.windows(windows, lengths[0]).to(self.device)
        parts, loss = [], 0.0
        for number, part in enumerate(rows.split(max(1, self.config.micro_tokens // lengths[0]))):
            with torch.autocast(self.device.type, torch.bfloat16):
                seen = target_forward(self.target, part[:, :-1], self.shape)
                found, mean = rounds_of(student, laws, part, seen, number % self.config.k)
            parts.append(found)
            loss += mean * len(part) / len(rows)
        return joined_rounds(parts), loss

    def run(self) -> None:
        """Train from where the run stands to the end of its budget."""
        config = self.config
        first = int(self.progress["step"])
        if first >= config.steps:
            return
        peak = measured_peak(self.device)
        begun, before = time.perf_counter(), float(self.progress["seconds"])
        with Reporter(config.run, first, config.steps) as reporter:
            for step in range(first, config.steps):
                start, done = time.perf_counter(), step + 1
                loss, alpha = self.step(step)
                rate = config.batch_tokens / (time.perf_counter() - start)
                length = config.seq_lens[config.phase(step)[0]]
                flops = spire_flops_per_token(self.target.config, self.student.draft.config, length)
                record: dict[str, Any] = {
                    "step": done,
                    "tokens": done * config.batch_tokens,
                    "loss": loss,
                    "alpha": alpha,
                    "lr": config.matrix_lr * self.scale(step),
                    "tokens_per_s": rate,
                    "of_peak": rate * flops / peak,
                }
                if done % config.validate_every == 0 or done == config.steps:
                    record |= self._validation()
                    peak = max(peak, measured_peak(self.device))  # the first measure may have met a busy machine
                self.progress |= {"step": done, "seconds": before + time.perf_counter() - begun}
                reporter.record(**record, seconds=self.progress["seconds"])
                if done % config.save_every == 0 or done == config.steps:
                    save_checkpoint(config.run, self.modules, self.optimizers, self.progress)

    def _validation(self) -> dict[str, Any]:
        rounds, loss = self.rounds_on("validation", self.config.validate_windows)
        return {} if rounds is None else {"validation": loss, **rounds.report(self._drafted())}

    def _drafted(self) -> tuple[int, ...]:
        return tuple(sorted({min(DRAFTED, self.config.k), self.config.k}))

    def finish(self) -> dict[str, Any]:
        """Check the finished draft against the engine, measure it, write it to ``out`` and return its record.

        Raises:
            ModelError: the engine computes other laws than the training; nothing is written.
        """
        stored = stored_dtype(self.config.target)
        student = finished(self.student, stored)
        exact = load_decoder(self.config.target, dtype=torch.float32, device=self.device)
        stream = next(s for s in (self.streams[name] for name in ("held_out", "validation", "train")) if len(s.tokens))
        tokens = torch.from_numpy(stream.tokens[:PARITY_TOKENS].astype(np.int64)).to(self.device)
        # Other drafts are for comparisons in training; no drafter runs them.
        parity = check_parity(exact, student, tokens) if self.shape.has_drafter else None
        del exact
        windows = max(1, FINAL_TOKENS // max(self.config.seq_lens))
        taus: dict[str, Any] = {}
        for split in ("validation", "held_out"):
            rounds, loss = self.rounds_on(split, windows, student)
            if rounds is not None:
                taus[split] = {"loss": loss, "blocks": len(rounds.begins), **rounds.report(self._drafted())}
        return write_draft(
            self.config,
            student,
            target=self.target.config,
            hf_config=self.hf_config,
            tokenizer=self.tokenizer,
            stored=stored,
            progress=self.progress,
            taus=taus,
            parity=parity,
        )


def check_length(length: int, context: int) -> None:
    """Raise ``ConfigError`` if the target has too few positions for windows of ``length`` tokens."""
    if length > context:
        raise ConfigError(
            f"SpireConfig.seq_lens has {length}, but the target has {context} positions; give shorter windows, for "
            f"example --seq-lens {context // 2},{context} --shares 0.8,0.2."
        )


def stored_dtype(folder: Path) -> torch.dtype:
    """The type of the target's weights on disk, which the draft's must have for its keys to be the target's."""
    names = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    with safe_open(hf.safetensors_files(folder)[0], framework="pt") as file:
        return names[file.get_slice(next(iter(file.keys()))).get_dtype()]


def prepare_spire_tokens(config: SpireConfig, vocab: int, eos_ids: Sequence[int]) -> Any:
    """The target's tokenizer, and the run's token files where they are not there yet.

    Documents are encoded as prompts are, with the tokens that the tokenizer puts before a text, and joined by the
    end-of-text token: the target sees what it will see when it generates.

    Raises:
        ConfigError: the target names no end-of-text token.
        TokenizerMismatch: the run's token files were made by another tokenizer.
    """
    tokenizer = hf.load_tokenizer(config.target)
    folder = config.run / "tokenizer"
    files = {split: config.run / f"{split}.bin" for split in SPLITS}
    if folder.is_dir() and all(path.exists() for path in files.values()):
        hf.check_same_tokenizer(tokenizer, hf.load_tokenizer(folder))
        return tokenizer
    eos = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else next(iter(eos_ids), None)
    if eos is None:
        raise ConfigError(f"{config.target} names no end-of-text token; add eos_token_id to its config.json.")

    def encode(texts: list[str]) -> list[list[int]]:
        if getattr(tokenizer, "is_fast", False):
            return [e.ids for e in tokenizer.backend_tokenizer.encode_batch(texts)]
        return [list(tokenizer.encode(text)) for text in texts]

    docs = documents(config.data)
    for split, path in files.items():
        chosen = [d for d in docs if d.split == split]
        write_tokens(chosen, encode, int(eos), path, seed=config.seed, dtype=token_dtype(vocab))
    tokenizer.save_pretrained(folder)
    return tokenizer


def train_spire(config: SpireConfig) -> dict[str, Any]:
    """Train, or continue, the run of ``config`` and write the draft to ``config.out``.

    Returns:
        The record that is also written to ``training.json`` beside the weights.

    Raises:
        ConfigError: the configuration contradicts itself, the target or the data.
        StorageError: data or checkpoint cannot be read.
        ModelError: the loss is not finite, or the engine computes other laws than the training.
    """
    trainer = SpireTrainer(config)
    trainer.run()
    return trainer.finish()
