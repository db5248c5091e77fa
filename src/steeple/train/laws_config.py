"""The settings of a grid of drafts that scaling laws are fitted to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from steeple.config import check_range
from steeple.errors import ConfigError
from steeple.train.lm import LMConfig
from steeple.train.optim import check_phases
from steeple.train.shape import Shape
from steeple.train.spire_config import SpireConfig

HEAD_DIM = 64
MLP_RATIO = 2.75  # of the embedded models
MLP_MULTIPLE = 32


@dataclass(frozen=True, kw_only=True)
class LawsConfig:
    """A grid of drafts: every size with every number of training tokens, each a run of its own with its own decay.

    Attributes:
        target: the folder of the target.
        out: the folder for the cells and for table.json, which steeple plan laws reads.
        small: small language models as LAYERSxWIDTH; empty = none.
        spire: layers of SPIRe drafts; empty = none.
        tokens: training tokens of the cells.
        data: files or folders of .py, .txt, .md, .jsonl; empty = this interpreter's standard library.
        k: drafted tokens of a round, in SPIRe's training and in every tau.
        sink: positions at the start of the text that SPIRe drafts see.
        window: positions before the newest token that they see.
        page: positions of a page.
        seq_lens: window length of each phase, tokens.
        shares: share of the budget of each phase; they sum to 1.
        batch_tokens: tokens per step; a multiple of every length.
        micro_tokens: tokens per forward and backward.
        small_lr: peak learning rate of the matrices of small models; embedding ten times, head as much.
        spire_lr: peak learning rate of the matrices of SPIRe drafts; embedding five times, head as much.
        warmup: steps until the peak rate.
        decay_share: share of the steps in which the rate falls linearly to zero.
        eval_tokens: tokens of text that was not trained on behind each tau.
        seed: of weights and data order.
        compile: compile with torch.compile (needs a C++ compiler on CPU).
        device: auto, cpu or cuda.
        save_every: steps between checkpoints.
    """

    target: Path
    out: Path
    small: tuple[str, ...] = ("1x128", "2x192", "3x256", "4x384")
    spire: tuple[int, ...] = (1, 2, 3, 4)
    tokens: tuple[int, ...] = (500_000, 1_000_000, 2_000_000, 4_000_000)
    data: tuple[str, ...] = ()
    k: int = 4
    sink: int = 16
    window: int = 64
    page: int = 16
    seq_lens: tuple[int, ...] = (1024,)
    shares: tuple[float, ...] = (1.0,)
    batch_tokens: int = 4096
    micro_tokens: int = 4096
    small_lr: float = 5e-3
    spire_lr: float = 1e-3
    warmup: int = 10
    decay_share: float = 0.5
    eval_tokens: int = 65_536
    seed: int = 0
    compile: bool = False
    device: str = "auto"
    save_every: int = 50

    def __post_init__(self) -> None:
        check_phases("LawsConfig", self.seq_lens, self.shares, self.batch_tokens)
        if not self.small and not self.spire:
            raise ConfigError("LawsConfig: small and spire are both empty; give sizes of one of them.")
        for name in ("small", "spire", "tokens"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ConfigError(f"LawsConfig.{name} = {values!r} names a value twice; give each once.")
        if not self.tokens:
            raise ConfigError("LawsConfig.tokens is empty; give the training tokens of the cells.")
        for tokens in self.tokens:
            check_range("LawsConfig", "tokens", tokens, self.batch_tokens, 10**15)
        for layers in self.spire:
            check_range("LawsConfig", "spire", layers, 1, 10**4)
        for size in self.small:
            parsed(size)
        check_range("LawsConfig", "k", self.k, 1, 63)
        check_range("LawsConfig", "eval_tokens", self.eval_tokens, 1, 10**12)


@dataclass(frozen=True)
class Cell:
    """One draft of the grid. ``size``: as it was given; ``kind``: what the law is fitted over."""

    kind: str
    size: str
    tokens: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.kind}-{self.size}-{self.tokens}"


def parsed(size: str) -> tuple[int, int]:
    """``"2x192"`` -> layers and width; ``ConfigError`` if it is anything else."""
    layers, _, width = size.partition("x")
    if not (layers.isdigit() and width.isdigit() and int(layers) and int(width) and int(width) % 2 == 0):
        raise ConfigError(f"LawsConfig.small has {size!r}; give LAYERSxWIDTH with an even width, such as 2x192.")
    return int(layers), int(width)


def small_shape(size: str, vocab: int, context: int) -> Shape:
    """The shape of the small model ``size``, with the target's vocabulary and at least its context."""
    layers, width = parsed(size)
    heads = max(1, width // HEAD_DIM)
    while width % heads or (width // heads) % 2:
        heads -= 1
    return Shape(
        layers=layers,
        hidden=width,
        heads=heads,
        head_dim=width // heads,
        intermediate=max(1, round(width * MLP_RATIO / MLP_MULTIPLE)) * MLP_MULTIPLE,
        vocab=vocab,
        context=context,
    )


def small_config(config: LawsConfig, tokens: int, folder: Path) -> LMConfig:
    """The training run of one small model."""
    return LMConfig(
        out=folder / "draft",
        run=folder / "run",
        data=config.data,
        tokenizer=str(config.target),
        tokens=tokens,
        seq_lens=config.seq_lens,
        shares=config.shares,
        batch_tokens=config.batch_tokens,
        micro_tokens=config.micro_tokens,
        matrix_lr=config.small_lr,
        embed_lr=min(1.0, 10 * config.small_lr),
        head_lr=config.small_lr,
        warmup=config.warmup,
        decay_share=config.decay_share,
        seed=config.seed,
        compile=config.compile,
        device=config.device,
        save_every=config.save_every,
    )


def spire_config(config: LawsConfig, layers: int, tokens: int, folder: Path) -> SpireConfig:
    """The training run of one SPIRe draft."""
    return SpireConfig(
        target=config.target,
        out=folder / "draft",
        run=folder / "run",
        data=config.data,
        layers=layers,
        sink=config.sink,
        window=config.window,
        page=config.page,
        k=config.k,
        tokens=tokens,
        seq_lens=config.seq_lens,
        shares=config.shares,
        batch_tokens=config.batch_tokens,
        micro_tokens=config.micro_tokens,
        matrix_lr=config.spire_lr,
        embed_lr=min(1.0, 5 * config.spire_lr),
        head_lr=config.spire_lr,
        warmup=config.warmup,
        decay_share=config.decay_share,
        seed=config.seed,
        compile=config.compile,
        device=config.device,
        save_every=config.save_every,
    )
