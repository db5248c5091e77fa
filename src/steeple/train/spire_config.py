"""The settings of a SPIRe training run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from steeple.config import check_range
from steeple.draft.spire_model import SpireShape
from steeple.errors import ConfigError
from steeple.train.optim import check_phases, phase_of


@dataclass(frozen=True, kw_only=True)
class SpireConfig:
    """One training run of a SPIRe draft.

    Attributes:
        target: the folder of the target; any model of a Llama-like family.
        out: the folder for the finished draft.
        run: the folder for tokens, checkpoint and log.
        data: files or folders of .py, .txt, .md, .jsonl; empty = this interpreter's standard library.
        layers: layers of the draft, the target's last ones; 0 = a quarter of the target's.
        sink: positions at the start of the text that stay visible.
        window: positions before the newest token that stay visible.
        page: positions of a page; the engine's block size.
        k: drafted positions per block in training.
        dense: every cached key is visible.
        random_init: begin at random instead of from the target's layers; keys stay the target's.
        target_activations: cached keys come from the target; without, the draft computes its own.
        feedback: keys in flight come from a learned mix of the draft's states at earlier positions.
        own_keys: train projections for keys and values; the target's cache can then not be read.
        start: folder of a trained draft to begin from instead; parts that it lacks begin as ever.
        carry: the state that a token was predicted from is projected into its input; the target's for the root.
        hard_targets: learn the text's next token instead of the target's law.
        alpha_weight: share of the loss that is minus the chance of acceptance; the rest is distillation.
        tokens: the budget; the schedule is a function of it.
        seq_lens: window length of each phase, tokens.
        shares: share of the budget of each phase; they sum to 1.
        batch_tokens: tokens per step; a multiple of every length.
        micro_tokens: tokens per forward and backward, at least one window; a step adds up its gradients.
        matrix_lr: peak learning rate of the layers' matrices (Muon) and of the norms (AdamW).
        embed_lr: peak learning rate of the embedding (AdamW).
        head_lr: peak learning rate of the output head (AdamW).
        weight_decay: of the layers' matrices.
        warmup: steps until the peak rate.
        decay_share: share of the steps in which the rate falls linearly to zero.
        clip: largest norm of the gradient.
        seed: of data order, block offsets and random weights.
        compile: compile the work on the laws with ``torch.compile`` (needs a C++ compiler on CPU).
        device: ``auto``, ``cpu`` or ``cuda``.
        save_every: steps between checkpoints.
        validate_every: steps between simulated taus on validation text.
        validate_windows: windows of the last length in them.
    """

    target: Path
    out: Path
    run: Path
    data: tuple[str, ...] = ()
    layers: int = 0
    sink: int = 16
    window: int = 64
    page: int = 16
    k: int = 6
    dense: bool = False
    random_init: bool = False
    start: Path | None = None
    target_activations: bool = True
    feedback: bool = False
    own_keys: bool = False
    carry: bool = False
    hard_targets: bool = False
    alpha_weight: float = 0.5
    tokens: int = 2_000_000
    seq_lens: tuple[int, ...] = (1024, 4096)
    shares: tuple[float, ...] = (0.85, 0.15)
    batch_tokens: int = 4096
    micro_tokens: int = 4096
    matrix_lr: float = 1e-3
    embed_lr: float = 5e-3
    head_lr: float = 1e-3
    weight_decay: float = 0.05
    warmup: int = 20
    decay_share: float = 0.6
    clip: float = 1.0
    seed: int = 0
    compile: bool = False
    device: str = "auto"
    save_every: int = 25
    validate_every: int = 100
    validate_windows: int = 4

    def __post_init__(self) -> None:
        check_phases("SpireConfig", self.seq_lens, self.shares, self.batch_tokens)
        for name in ("tokens", "batch_tokens", "micro_tokens", "save_every", "validate_every", "validate_windows"):
            check_range("SpireConfig", name, getattr(self, name), 1, 10**15)
        check_range("SpireConfig", "layers", self.layers, 0, 10**6)
        check_range("SpireConfig", "warmup", self.warmup, 0, 10**9)
        for name in ("decay_share", "alpha_weight"):
            check_range("SpireConfig", name, getattr(self, name), 0.0, 1.0)
        check_range("SpireConfig", "clip", self.clip, 1e-6, 1e9)
        if self.device not in ("auto", "cpu", "cuda"):
            raise ConfigError(f"SpireConfig.device = {self.device!r}; give 'auto', 'cpu' or 'cuda'.")
        self.shape(1)

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return max(1, self.tokens // self.batch_tokens)

    def phase(self, step: int) -> tuple[int, int]:
        """``(phase, index of the step within it)``."""
        return phase_of(step, self.steps, self.shares)

    def shape(self, target_layers: int) -> SpireShape:
        """The shape of the draft of a target with so many layers.

        Raises:
            ConfigError: a switch contradicts another, or the target has fewer layers.
        """
        count = self.layers or max(1, target_layers // 4)
        if target_layers > 1:
            check_range("SpireConfig", "layers", count, 1, target_layers)
        return SpireShape(
            target_layers=tuple(range(max(0, target_layers - count), max(1, target_layers))),
            sink=self.sink,
            window=self.window,
            page=self.page,
            k=self.k,
            feedback=self.feedback,
            own_keys=self.own_keys,
            dense=self.dense,
            target_activations=self.target_activations,
            carry=self.carry,
        )
