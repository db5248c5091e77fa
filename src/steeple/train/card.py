"""A finished model as a folder: weights, tokenizer, the record of its training and a model card made from it."""

from __future__ import annotations

import json
import math
import platform
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from steeple.model.decoder import Decoder
from steeple.model.save import save_decoder
from steeple.train.progress import read_log
from steeple.train.shape import SHAPES

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from steeple.train.lm import LMConfig

RECORD = "training.json"
CURVE_POINTS = 40

CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---
# Steeple {shape}

A Llama-family model of {parameters:,} parameters ({body_parameters:,} in its layers): {layers} layers, width {hidden},
{heads} heads of {head_dim}, MLP {intermediate}, {vocab:,} tokens, {context:,} positions, bfloat16.

**Intended use.** Demos and tests of speculative decoding: a real, if small, law over text that everybody can load
without a download. It is no code generator: it writes text that looks like Python and means little.

**Data.** {data}
About one file in twenty is held out and one in a hundred only validates, by the sha256 of its path (see
`steeple.train.data`). The weights are under Apache-2.0.

**Recipe.** Byte-level BPE. Plain next-token cross-entropy, Muon on the matrices of the layers, AdamW on the rest, a
warm-up, a constant rate, linear decay to zero over the last {decay_percent:.0f} % of the steps. Windows of {windows}
tokens.

| | |
|---|---|
| tokens, steps | {tokens:,}, {steps:,} of {batch_tokens:,} |
| seed | {seed} |
| training loss, mean of the last {last_steps} steps | {train_loss} |
{loss_rows}
| wall time | {minutes:.0f} minutes on {hardware} |

Losses are nats per token. `training.json` has the settings and the curve.

```
{command}
```
"""

STDLIB = (
    "The `.py` files of the standard library of CPython {python} (PSF licence), without `encodings/`, installed\n"
    "packages, files above 300 kB (`pydoc_data/topics.py` stays) and files that are not UTF-8."
)


def write_model(
    config: LMConfig,
    model: Decoder,
    hf_config: LlamaConfig,
    tokenizer: PreTrainedTokenizerFast,
    progress: dict[str, Any],
    losses: dict[str, float],
) -> dict[str, Any]:
    """Write model, tokenizer, record and card to ``config.out``; returns the record."""
    save_decoder(model, config.out, hf_config)
    tokenizer.save_pretrained(config.out)
    special = {"bos_token_id": hf_config.bos_token_id, "eos_token_id": hf_config.eos_token_id}
    GenerationConfig(**special).save_pretrained(config.out)
    record = training_record(config, model, progress, losses)
    (config.out / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (config.out / "README.md").write_text(card(record), encoding="utf-8")
    return record


def training_record(
    config: LMConfig, model: Decoder, progress: dict[str, Any], losses: dict[str, float]
) -> dict[str, Any]:
    """Everything that is known about the run, as plain JSON values."""
    log = read_log(config.run)
    last = [r["loss"] for r in log[-max(1, config.steps // 50) :]]
    return {
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()},
        "command": command(config),
        "shape": asdict(SHAPES[config.shape]),
        "parameters": sum(p.numel() for p in model.parameters()),
        "body_parameters": model.config.body_parameters(),
        "data": STDLIB.format(python=platform.python_version()) if not config.data else f"{', '.join(config.data)}.",
        "steps": progress["step"],
        "tokens": progress["step"] * config.batch_tokens,
        "seconds": round(progress["seconds"], 1),
        "hardware": hardware(model.device),
        "train_loss": rounded(sum(last) / len(last)) if last else None,
        "train_loss_steps": len(last),
        "losses": {name: rounded(value) for name, value in losses.items()},
        "curve": curve(log),
    }


def curve(log: list[dict[str, Any]], points: int = CURVE_POINTS) -> list[dict[str, Any]]:
    """The log in at most ``points`` stretches: last step, tokens, mean loss, last rate, last validation loss."""
    size = max(1, math.ceil(len(log) / points))
    found = []
    for part in (log[i : i + size] for i in range(0, len(log), size)):
        point = {key: part[-1][key] for key in ("step", "tokens", "lr")}
        point["loss"] = rounded(sum(r["loss"] for r in part) / len(part))
        seen = [r["validation"] for r in part if "validation" in r]
        found.append({**point, "validation": rounded(seen[-1])} if seen else point)
    return found


def command(config: DataclassInstance, name: str = "steeple train lm") -> str:
    """The command line of ``config``: what differs from the defaults."""
    parts = [name]
    for item in fields(config):
        value = getattr(config, item.name)
        if value == item.default and item.name != "shape":
            continue
        flag = "--" + item.name.replace("_", "-")
        if isinstance(value, bool):
            parts.append(flag if value else flag.replace("--", "--no-"))
        else:
            parts.append(f"{flag} {','.join(map(str, value)) if isinstance(value, tuple) else value}")
    return " ".join(parts)


def hardware(device: torch.device) -> str:
    """The class of the machine, without its name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU threads ({torch.backends.cpu.get_cpu_capability()})"


def card(record: dict[str, Any]) -> str:
    """The model card of a training record, in Markdown."""
    settings = record["settings"]
    split_lengths = ((name.rsplit("_loss_", 1), value) for name, value in record["losses"].items())
    rows = [f"| {split.replace('_', '-')} loss, windows of {n} | {value} |" for (split, n), value in split_lengths]
    return CARD.format(
        **record["shape"],
        **{k: record[k] for k in ("parameters", "body_parameters", "data", "tokens", "steps", "hardware", "command")},
        shape=settings["shape"],
        batch_tokens=settings["batch_tokens"],
        seed=settings["seed"],
        decay_percent=100 * settings["decay_share"],
        windows=", ".join(str(s) for s in settings["seq_lens"]),
        train_loss=record["train_loss"],
        last_steps=record["train_loss_steps"],
        loss_rows="\n".join(rows),
        minutes=record["seconds"] / 60,
    )


def rounded(value: float) -> float | None:
    """Four decimals; None for what is not a number."""
    return None if math.isnan(value) else round(value, 4)
