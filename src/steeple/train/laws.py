"""Train a grid of drafts, sizes by training tokens, and write the table of runs that scaling laws are fitted to.

Every cell is a run of its own whose rate decays to zero at its end: a checkpoint in the middle of a longer run is worse
than a run of that length and would bend the law. A cell that is finished is not trained again, and one that was stopped
goes on from its checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from steeple import hf
from steeple.config import ModelConfig
from steeple.errors import ConfigError, StorageError
from steeple.model.decoder import Decoder
from steeple.model.families import model_config
from steeple.model.load import load_decoder
from steeple.model.save import save_decoder
from steeple.train.checkpoint import NAME as CHECKPOINT
from steeple.train.data import SPLITS, TokenStream
from steeple.train.laws_config import Cell, LawsConfig, small_config, small_shape, spire_config
from steeple.train.lm import Trainer
from steeple.train.spire import SpireTrainer
from steeple.train.spire_forward import Seen, target_pass
from steeple.train.spire_loss import Laws, Rounds, joined_rounds

TABLE, RESULT = "table.json", "cell.json"
UNSEEN = ("held_out", "validation")
"""Splits that a tau may be measured on, the better one first."""
FREE = ("out", "small", "spire", "tokens", "device", "save_every", "compile", "micro_tokens")
"""Settings in which a cell that is done may differ from what is asked for now."""

Told = Callable[[str, int, int], None]


def train_laws(config: LawsConfig, told: Told = lambda *_: None) -> dict[str, Any]:
    """Train what is missing of the grid and write ``out/table.json`` after every cell.

    Args:
        told: called with what is done next, how many cells are done, and how many there are.

    Returns:
        The table: ``k``, ``target_parameters`` and ``runs``, with settings. Parameters are those that a pass
        multiplies with: the layers' matrices and the head.

    Raises:
        ConfigError: a size does not fit the target, or the data has no text to spare.
        StorageError: a finished cell was trained with other settings.
    """
    target = model_config(hf.load_hf_config(config.target))
    for layers in config.spire:
        if layers > target.num_layers:
            raise ConfigError(f"LawsConfig.spire has {layers} layers and the target {target.num_layers}; give fewer.")
    makers = {"small": (config.small, train_small), "spire": (tuple(map(str, config.spire)), train_spire_cell)}
    cells = [
        (Cell(kind, size, tokens), make)
        for tokens in sorted(config.tokens)
        for kind, (sizes, make) in makers.items()
        for size in sizes
    ]
    table = {
        "k": config.k,
        "target": config.target.resolve().name,
        "target_parameters": multiplied(target),
        "settings": {name: str(v) if isinstance(v, Path) else v for name, v in asdict(config).items()},
        "runs": [],
    }
    runs: list[dict[str, Any]] = []
    for done, (cell, make) in enumerate(cells):
        told(cell.name, done, len(cells))
        runs.append(_finished(config, cell) or _trained(config, cell, make))
        table["runs"] = runs
        _write(config.out / TABLE, table)
    told("done", len(cells), len(cells))
    return table


def multiplied(config: ModelConfig) -> int:
    """Weights that each token of a pass is multiplied with: the layers' matrices and the head."""
    return config.body_parameters() + config.hidden_size * config.vocab_size


def _folder(config: LawsConfig, cell: Cell) -> Path:
    return config.out / "cells" / cell.name


def _finished(config: LawsConfig, cell: Cell) -> dict[str, Any] | None:
    """The result of a cell that was trained before."""
    path = _folder(config, cell) / RESULT
    if not path.exists():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    for name, value in _fixed(config).items():
        if found["settings"].get(name) != value:
            raise StorageError(
                f"{path} was trained with {name} = {found['settings'].get(name)!r}, not {value!r}; give another --out, "
                "or the same settings."
            )
    return dict(found["run"])


def _trained(
    config: LawsConfig, cell: Cell, make: Callable[[LawsConfig, Cell, Path], dict[str, Any]]
) -> dict[str, Any]:
    folder = _folder(config, cell)
    _share_tokens(config, cell)
    run = {"kind": cell.kind, "size": cell.size, "tokens": cell.tokens, **make(config, cell, folder)}
    _write(folder / RESULT, {"settings": _fixed(config), "run": run})
    (folder / "run" / CHECKPOINT).unlink(missing_ok=True)  # a cell that is done needs none
    return run


def _fixed(config: LawsConfig) -> dict[str, Any]:
    """Settings that every cell of one table must share, as JSON gives them back."""
    values = {name: str(v) if isinstance(v, Path) else v for name, v in asdict(config).items() if name not in FREE}
    return dict(json.loads(json.dumps(values)))


def _share_tokens(config: LawsConfig, cell: Cell) -> None:
    """Give the cell the token files that another cell of its kind has made from the same data."""
    run = _folder(config, cell) / "run"
    for other in sorted((config.out / "cells").glob(f"{cell.kind}-*/run")):
        files = [other / f"{split}.bin" for split in SPLITS]
        if other == run or not (other / "tokenizer").is_dir() or not all(f.exists() for f in files):
            continue
        run.mkdir(parents=True, exist_ok=True)
        for file in files:
            if not (run / file.name).exists():
                _link(file, run / file.name)
        shutil.copytree(other / "tokenizer", run / "tokenizer", dirs_exist_ok=True)
        return


def _link(source: Path, place: Path) -> None:
    try:
        os.link(source, place)
    except OSError:  # some file systems have no links
        shutil.copyfile(source, place)


def _write(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def train_small(config: LawsConfig, cell: Cell, folder: Path) -> dict[str, Any]:
    """Train a small model on the text alone and measure its tau against the target."""
    target_config = model_config(hf.load_hf_config(config.target))
    context = max(target_config.max_context, *config.seq_lens)
    shape = small_shape(cell.size, target_config.vocab_size, context)
    trainer = Trainer(small_config(config, cell.tokens, folder), shape)
    trainer.run()
    save_decoder(trainer.model, trainer.config.out, trainer.hf_config)
    trainer.tokenizer.save_pretrained(trainer.config.out)
    length = max(config.seq_lens)
    split = _unseen(trainer.streams, length)
    target = load_decoder(config.target, dtype=torch.bfloat16, device=trainer.device)
    windows = trainer.streams[split].windows(max(1, config.eval_tokens // length), length).to(trainer.device)
    rounds = rounds_of_models(target, trainer.model, windows, config.k, max(1, config.micro_tokens // length))
    return _measured(trainer.model, rounds, config.k, split, trainer.progress)


def train_spire_cell(config: LawsConfig, cell: Cell, folder: Path) -> dict[str, Any]:
    """Train a SPIRe draft and measure its tau."""
    trainer = SpireTrainer(spire_config(config, int(cell.size), cell.tokens, folder))
    trainer.run()
    trainer.finish()
    length = max(config.seq_lens)
    split = _unseen(trainer.streams, length)
    rounds, _ = trainer.rounds_on(split, max(1, config.eval_tokens // length))
    if rounds is None:
        raise ConfigError(_nothing_unseen(length))
    return _measured(trainer.student.draft, rounds, config.k, split, trainer.progress)


def _unseen(streams: dict[str, TokenStream], length: int) -> str:
    """The split that taus are measured on: held-out text, or validation text where that is too short."""
    for split in UNSEEN:
        if len(streams[split].tokens) > length:
            return split
    raise ConfigError(_nothing_unseen(length))


def _nothing_unseen(length: int) -> str:
    return f"LawsConfig.data leaves no {length} tokens that were not trained on; give more files or shorter seq_lens."


def _measured(draft: Decoder, rounds: Rounds, k: int, split: str, progress: dict[str, Any]) -> dict[str, Any]:
    """What the table says of a cell. ``tau``: mean tokens of a round at temperature 1, on the text as it stands."""
    return {
        "parameters": multiplied(draft.config),
        "body_parameters": draft.config.body_parameters(),
        "tau": rounds.tau(k),
        "greedy_tau": rounds.tau(k, greedy=True),
        "blocks": len(rounds.begins),
        "text": split,
        "steps": progress["step"],
        "seconds": round(float(progress["seconds"]), 1),
    }


@torch.no_grad()
def rounds_of_models(target: Decoder, draft: Decoder, windows: torch.Tensor, k: int, rows: int) -> Rounds:
    """Scores of whole blocks of ``k`` positions of windows ``[B, S + 1]``, ``rows`` windows at a time."""
    laws = Laws(target, draft, alpha_weight=0.0, hard=False)
    found: list[Rounds] = []
    for part in windows.split(rows):
        inputs = part[:, :-1]
        B, S = inputs.shape
        with torch.autocast(inputs.device.type, torch.bfloat16):
            final_TD, _, _ = target_pass(target, inputs, (), ())
            hidden_TD, _, _ = target_pass(draft, inputs, (), ())
            scores = laws.score(Seen(final_TD), hidden_TD, part[:, 1:].reshape(-1))
        whole = S // k
        alpha, match = (x.view(B, S)[:, : whole * k].reshape(B * whole, k) for x in (scores.alpha, scores.match))
        found.append(Rounds(alpha, match, (k * torch.arange(whole, device=inputs.device)).repeat(B)))
    return joined_rounds(found)
