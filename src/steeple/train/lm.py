"""Train a language model from scratch: the embedded target and its small draft model.

A run has a folder (``run``) with the tokens, the last checkpoint and ``log.jsonl``, to which one line is added per
step. The same command continues a run that was stopped; with fewer ``tokens`` the decay starts earlier.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from steeple.config import check_range
from steeple.errors import ConfigError, ModelError, did_you_mean
from steeple.model.decoder import Decoder
from steeple.model.families import model_config
from steeple.train.card import write_model
from steeple.train.checkpoint import load_checkpoint, save_checkpoint
from steeple.train.data import SPLITS, TokenStream, documents, write_tokens
from steeple.train.loss import flops_per_token, next_token_loss
from steeple.train.optim import Optimizers, Rates, check_phases, phase_of, wsd
from steeple.train.progress import Reporter, measured_peak
from steeple.train.shape import SHAPES, Shape, init_weights, llama_config
from steeple.train.tokenizer import load_tokenizer, train_tokenizer


@dataclass(frozen=True, kw_only=True)
class LMConfig:
    """One training run.

    Attributes:
        shape: a name in ``SHAPES``.
        out: the folder for the finished model.
        run: the folder for tokens, checkpoint and log.
        data: files or folders of .py, .txt, .md, .jsonl; empty = this interpreter's standard library.
        tokenizer: a folder with a tokenizer to share; empty = train one.
        tokens: the budget; the schedule is a function of it.
        seq_lens: window length of each phase, tokens.
        shares: share of the budget of each phase; they sum to 1.
        batch_tokens: tokens per step; a multiple of every length.
        micro_tokens: tokens per forward and backward, at least one window; a step adds up its gradients.
        matrix_lr: peak learning rate of the layers' matrices (Muon).
        embed_lr: peak learning rate of the embedding (AdamW).
        head_lr: peak learning rate of the output head (AdamW).
        weight_decay: of the layers' matrices.
        warmup: steps until the peak rate.
        decay_share: share of the steps in which the rate falls linearly to zero.
        clip: largest norm of the gradient.
        seed: of initial weights and data order.
        compile: compile the loss with ``torch.compile`` (needs a C++ compiler on CPU).
        device: ``auto``, ``cpu`` or ``cuda``.
        save_every: steps between checkpoints.
        validate_every: steps between validation losses.
        validate_windows: windows of the first length in a validation loss.
    """

    shape: str = "small"
    out: Path
    run: Path
    data: tuple[str, ...] = ()
    tokenizer: str = ""
    tokens: int = 5_000_000
    seq_lens: tuple[int, ...] = (512, 1024, 4096)
    shares: tuple[float, ...] = (0.70, 0.22, 0.08)
    batch_tokens: int = 4096
    micro_tokens: int = 4096
    matrix_lr: float = 5e-3
    embed_lr: float = 5e-2
    head_lr: float = 5e-3
    weight_decay: float = 0.05
    warmup: int = 10
    decay_share: float = 0.4
    clip: float = 1.0
    seed: int = 0
    compile: bool = False
    device: str = "auto"
    save_every: int = 25
    validate_every: int = 50
    validate_windows: int = 16

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise ConfigError(f"LMConfig.shape = {self.shape!r} is unknown. {did_you_mean(self.shape, SHAPES)}")
        for length in self.seq_lens:
            check_range("LMConfig", "seq_lens", length, 2, SHAPES[self.shape].context)
        check_phases("LMConfig", self.seq_lens, self.shares, self.batch_tokens)
        for name in ("tokens", "batch_tokens", "micro_tokens", "save_every", "validate_every", "validate_windows"):
            check_range("LMConfig", name, getattr(self, name), 1, 1e15)
        check_range("LMConfig", "warmup", self.warmup, 0, 1e9)
        check_range("LMConfig", "decay_share", self.decay_share, 0.0, 1.0)
        check_range("LMConfig", "clip", self.clip, 1e-6, 1e9)
        if self.device not in ("auto", "cpu", "cuda"):
            raise ConfigError(f"LMConfig.device = {self.device!r}; give 'auto', 'cpu' or 'cuda'.")

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return max(1, self.tokens // self.batch_tokens)

    def phase(self, step: int) -> tuple[int, int]:
        """``(phase, index of the step within it)``."""
        return phase_of(step, self.steps, self.shares)


class Trainer:
    """One run: model, optimisers, data and log. Building it restores the run's last checkpoint.

    Args: shape: of the model, where it is none of ``SHAPES``.
    """

    def __init__(self, config: LMConfig, shape: Shape | None = None) -> None:
        self.config, shape = config, shape or SHAPES[config.shape]
        cuda = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
        self.device = torch.device("cuda" if cuda else "cpu")
        self.tokenizer = prepare_tokens(config, shape)
        self.hf_config = llama_config(shape, int(self.tokenizer.eos_token_id))
        self.model = Decoder(model_config(self.hf_config))
        init_weights(self.model, config.seed)
        self.model.to(self.device)
        rates = Rates(
            matrix=config.matrix_lr, embed=config.embed_lr, head=config.head_lr, weight_decay=config.weight_decay
        )
        self.optimizers = Optimizers(self.model, rates)
        self.loss = torch.compile(next_token_loss, dynamic=False) if config.compile else next_token_loss
        self.streams = {split: TokenStream.open(config.run / f"{split}.bin", config.seed) for split in SPLITS}
        restored = load_checkpoint(config.run, self.model, self.optimizers)
        self.progress: dict[str, Any] = {"step": 0, "seconds": 0.0} if restored is None else restored

    def scale(self, step: int) -> float:
        """The factor on the learning rates at ``step``."""
        return wsd(step, self.config.steps, self.config.warmup, self.config.decay_share)

    def step(self, step: int) -> float:
        """One optimiser step; returns the mean loss of its batch, in nats.

        Raises:
            ModelError: the loss is not finite.
        """
        phase, index = self.config.phase(step)
        length = self.config.seq_lens[phase]
        batch = self.streams["train"].batch(phase, index, self.config.batch_tokens // length, length)
        total = 0.0
        for part in batch.to(self.device).split(max(1, self.config.micro_tokens // length)):
            with torch.autocast(self.device.type, torch.bfloat16):
                loss = self.loss(self.model, part) * (len(part) / len(batch))
            loss.backward()
            total += loss.item()
        if not math.isfinite(total):
            raise ModelError(f"The loss of step {step} is {total}; lower matrix_lr = {self.config.matrix_lr}.")
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.optimizers.step(self.scale(step))
        return total

    @torch.no_grad()
    def loss_on(self, split: str, windows: int, length: int) -> float:
        """Mean loss (nats) on windows spread over ``split``; NaN if the split is too short for one."""
        stream = self.streams[split]
        if len(stream.tokens) <= length:
            return math.nan
        rows = stream.windows(windows, length).to(self.device)
        total = 0.0
        for part in rows.split(max(1, self.config.micro_tokens // length)):
            with torch.autocast(self.device.type, torch.bfloat16):
                total += next_token_loss(self.model, part).item() * len(part)
        return total / len(rows)

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
                loss = self.step(step)
                rate = config.batch_tokens / (time.perf_counter() - start)
                length = config.seq_lens[config.phase(step)[0]]
                record: dict[str, Any] = {
                    "step": done,
                    "tokens": done * config.batch_tokens,
                    "loss": loss,
                    "lr": config.matrix_lr * self.scale(step),
                    "tokens_per_s": rate,
                    "of_peak": rate * flops_per_token(self.model.config, length) / peak,
                }
                if done % config.validate_every == 0 or done == config.steps:
                    record["validation"] = self.loss_on("validation", config.validate_windows, config.seq_lens[0])
                    peak = max(peak, measured_peak(self.device))  # the first measure may have met a busy machine
                self.progress = {"step": done, "seconds": before + time.perf_counter() - begun}
                reporter.record(**record, seconds=self.progress["seconds"])
                if done % config.save_every == 0 or done == config.steps:
                    save_checkpoint(config.run, self.model, self.optimizers, self.progress)

    def finish(self) -> dict[str, Any]:
        """Measure the finished model, write it to ``out`` and return its record."""
        config = self.config
        losses = {
            f"{split}_loss_{length}": self.loss_on(split, max(1, 65_536 // length), length)
            for split in ("validation", "held_out")
            for length in dict.fromkeys((config.seq_lens[0], config.seq_lens[-1]))
        }
        return write_model(config, self.model, self.hf_config, self.tokenizer, self.progress, losses)


def prepare_tokens(config: LMConfig, shape: Shape) -> PreTrainedTokenizerFast:
    """The tokenizer of the run, and its token files where they are not there yet."""
    folder = config.run / "tokenizer"
    files = {split: config.run / f"{split}.bin" for split in SPLITS}
    if (folder / "tokenizer.json").exists() and all(path.exists() for path in files.values()):
        return load_tokenizer(folder)
    docs = documents(config.data)
    if config.tokenizer:
        tokenizer = load_tokenizer(Path(config.tokenizer))
    else:
        tokenizer = train_tokenizer((d.text for d in docs if d.split == "train"), shape.vocab, shape.context)
    if len(tokenizer) > shape.vocab:
        raise ConfigError(f"LMConfig.tokenizer has {len(tokenizer)} entries, shape {config.shape!r} {shape.vocab}.")
    backend = tokenizer.backend_tokenizer
    for split, path in files.items():
        write_tokens(
            [d for d in docs if d.split == split],
            lambda texts: [e.ids for e in backend.encode_batch(texts, add_special_tokens=False)],
            int(tokenizer.eos_token_id),
            path,
            seed=config.seed,
        )
    tokenizer.save_pretrained(folder)
    return tokenizer


def train(config: LMConfig) -> dict[str, Any]:
    """Train, or continue, the run of ``config`` and write the model to ``config.out``.

    Returns:
        The record that is also written to ``training.json`` beside the weights.

    Raises:
        ConfigError: the configuration contradicts itself or the data.
        StorageError: data or checkpoint cannot be read.
        ModelError: the loss is not finite.
    """
    trainer = Trainer(config)
    trainer.run()
    return trainer.finish()
