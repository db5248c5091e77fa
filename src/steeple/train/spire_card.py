"""A finished SPIRe draft as a folder: an ordinary model with ``spire.json`` beside it, its record and its card."""

from __future__ import annotations

import copy
import json
import platform
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PretrainedConfig

from steeple.config import ModelConfig
from steeple.model.save import save_decoder
from steeple.train.card import RECORD, STDLIB, command, curve, hardware, rounded
from steeple.train.progress import read_log
from steeple.train.spire_config import SpireConfig
from steeple.train.spire_forward import Student

GPU_FLOPS = 990e12
"""Dense bfloat16 operations per second of an H100."""

UTILISATION = 0.4
TOKENS_PER_PARAMETER = 20
LLAMA_8B = ModelConfig(
    vocab_size=128_256,
    hidden_size=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=14_336,
    max_context=131_072,
    rope_inv_freq=(),
)

CARD = """---
license: apache-2.0
library_name: steeple
---
# SPIRe draft of {target}

A draft model for lossless speculative decoding of the model `{target}`: {parameters:,} parameters
({body_parameters:,} in its {layers} layers), trained with `steeple train spire`. {keys}
It is of no use without its target.

**Attention.** {attention}
Rounds of up to {k} drafted tokens.{memory}

**Data.** {data}
About one file in twenty is held out and one in a hundred only validates, by the sha256 of its path.

**Recipe.** {begin} {loss}
{tokens:,} tokens in {steps:,} steps of {batch_tokens:,}, windows of {windows} tokens, seed {seed}. Muon on the
matrices of the layers, AdamW on the rest; warm-up, constant rate, linear decay to zero over the last
{decay_percent:.0f} % of the steps. {minutes:.0f} minutes on {hardware}.

**Simulated tau**: mean tokens per round, the bonus token included, teacher-forced on text that was not trained on.
Engines must measure their own.

{table}

{parity}

**For an 8B target.** {cost}

```
{command}
```
"""


def spire_flops_per_token(target: ModelConfig, draft: ModelConfig, seq_len: int = 0) -> float:
    """Operations of one trained token: the target's forward (2 per weight), the draft's forward and backward (6).

    With ``seq_len`` the target's causal attention counts too; the draft's window is small beside it.
    """
    attention = 2.0 * target.num_layers * target.num_heads * target.head_dim * seq_len
    return 2.0 * _multiplied(target) + attention + 6.0 * _multiplied(draft)


def _multiplied(config: ModelConfig) -> int:
    return config.body_parameters() + config.hidden_size * config.vocab_size


@dataclass(frozen=True, slots=True)
class Cost:
    """What training a draft takes: its parameters, tokens, operations per token, hours of one H100."""

    parameters: int
    tokens: float
    flops_per_token: float
    gpu_hours: float


def training_cost(target: ModelConfig, layers: int) -> Cost:
    """By arithmetic: 20 tokens per parameter of the draft, at 0.4 of 990 TFLOP/s."""
    draft = replace(target, num_layers=layers)
    embeddings = (1 if target.tie_embeddings else 2) * target.hidden_size * target.vocab_size
    parameters = draft.body_parameters() + embeddings
    tokens = float(TOKENS_PER_PARAMETER * parameters)
    flops = spire_flops_per_token(target, draft)
    return Cost(parameters, tokens, flops, tokens * flops / (UTILISATION * GPU_FLOPS) / 3600)


def cost_text(target: ModelConfig, layers: int) -> str:
    """The arithmetic of ``training_cost`` in words."""
    cost = training_cost(target, layers)
    speed = f"{UTILISATION} x {GPU_FLOPS / 1e12:.0f} = {UTILISATION * GPU_FLOPS / 1e12:.0f} TFLOP/s"
    return (
        f"A draft of {layers} of the {target.num_layers} layers of Llama 3.1 8B has {cost.parameters / 1e9:.2f} G "
        f"parameters: at {TOKENS_PER_PARAMETER} tokens each,\n{cost.tokens / 1e9:.1f} G tokens. A token costs "
        f"{cost.flops_per_token / 1e9:.1f} GFLOP (target forward 2, draft forward and backward 6 per\nmultiplied "
        f"weight), all of them {cost.tokens * cost.flops_per_token:.2e}: at {speed}\n**{cost.gpu_hours:,.0f} hours of "
        "one H100**. This is arithmetic; nothing of that size was trained."
    )


def write_draft(
    config: SpireConfig,
    student: Student,
    *,
    target: ModelConfig,
    hf_config: PretrainedConfig,
    tokenizer: Any,
    stored: torch.dtype,
    progress: dict[str, Any],
    taus: dict[str, Any],
    parity: float | None,
) -> dict[str, Any]:
    """Write the finished draft to ``config.out``; returns the record."""
    draft = student.draft
    save_decoder(draft, config.out, draft_config(hf_config, draft.config.num_layers), dtype=stored)
    student.shape.save(config.out)
    if student.memory is not None:
        student.memory.save(config.out)
    if student.carry is not None:
        student.carry.save(config.out, stored)
    tokenizer.save_pretrained(config.out)
    special = {"bos_token_id": hf_config.bos_token_id, "eos_token_id": hf_config.eos_token_id}
    GenerationConfig(**special).save_pretrained(config.out)
    record = {
        **_record(config, student, progress),
        "target_layers": target.num_layers,
        "parity": parity,
        "tau": _rounded_tree(taus),
        "cost_8b": asdict(training_cost(LLAMA_8B, LLAMA_8B.num_layers // 4)),
    }
    (config.out / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (config.out / "README.md").write_text(spire_card(record), encoding="utf-8")
    return record


def draft_config(hf_config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """The published form of a draft of the last ``layers`` layers of the model that ``hf_config`` describes."""
    made = copy.deepcopy(hf_config)
    types = getattr(hf_config, "layer_types", None)
    if types is not None:
        made.layer_types = list(types)[len(types) - layers :]
    made.num_hidden_layers = layers
    return made


def _record(config: SpireConfig, student: Student, progress: dict[str, Any]) -> dict[str, Any]:
    log = read_log(config.run)
    last = [r["loss"] for r in log[-max(1, config.steps // 50) :]]
    mix = None if student.memory is None else student.memory.mix.detach().softmax(dim=-1).tolist()
    return {
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()},
        "command": command(config, "steeple train spire"),
        "begun_from": _earlier(config.start),
        "target": config.target.resolve().name,
        "shape": {**asdict(student.shape), "target_layers": list(student.shape.target_layers)},
        "memory_mix": mix,
        "parameters": sum(p.numel() for m in (student.draft, student.carry) if m is not None for p in m.parameters()),
        "body_parameters": student.draft.config.body_parameters(),
        "data": STDLIB.format(python=platform.python_version()) if not config.data else f"{', '.join(config.data)}.",
        "steps": progress["step"],
        "tokens": progress["step"] * config.batch_tokens,
        "seconds": round(progress["seconds"], 1),
        "hardware": hardware(student.draft.device),
        "train_loss": rounded(sum(last) / len(last)) if last else None,
        "train_loss_steps": len(last),
        "curve": curve(log),
    }


def _earlier(start: Path | None) -> dict[str, Any] | None:
    """What is on record of the draft that training began from."""
    path = None if start is None else start / RECORD
    if path is None or not path.exists():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    return {name: record.get(name) for name in ("command", "begun_from", "tokens", "steps", "seconds", "tau")}


def spire_card(record: dict[str, Any]) -> str:
    """The model card of a training record, in Markdown."""
    settings, spire = record["settings"], record["shape"]
    return CARD.format(
        **{k: record[k] for k in ("target", "parameters", "body_parameters", "data", "tokens", "steps", "hardware")},
        layers=len(spire["target_layers"]),
        keys=_keys(spire),
        attention=_attention(spire),
        k=spire["k"],
        memory=_memory(record),
        begin=_begin(record),
        loss=_loss(settings),
        batch_tokens=settings["batch_tokens"],
        windows=", ".join(str(s) for s in settings["seq_lens"]),
        seed=settings["seed"],
        decay_percent=100 * settings["decay_share"],
        minutes=record["seconds"] / 60,
        table=_table(record["tau"]),
        parity=_parity(record["parity"]),
        cost=cost_text(LLAMA_8B, LLAMA_8B.num_layers // 4),
        command=record["command"],
    )


def _reads(spire: dict[str, Any]) -> bool:
    return bool(spire["target_activations"] and not spire["own_keys"])


def _keys(spire: dict[str, Any]) -> str:
    layers = ", ".join(map(str, spire["target_layers"]))
    if _reads(spire):
        return (
            f"Its keys and values of the text are those of the target's layers {layers}, read from the target's own "
            "cache:\nit keeps none and reads no prompt."
        )
    if spire["target_activations"]:
        return f"Its keys and values of the text are projections of what enters the target's layers {layers}."
    return "It computes all its keys and values itself."


def _attention(spire: dict[str, Any]) -> str:
    if spire["dense"]:
        return "It sees the whole text."
    return (
        f"It sees the first {spire['sink']} and the last {spire['window']} positions of the text, by pages of "
        f"{spire['page']},\nand the positions in flight."
    )


def _memory(record: dict[str, Any]) -> str:
    carried = (
        "\nThe state that a token was predicted from is projected into its input: for the newest token of the text the "
        "target's, in flight the draft's own."
    )
    text = carried if record["shape"].get("carry") else ""
    if record["memory_mix"] is None:
        return text
    rows = "; ".join(" ".join(f"{v:.2f}" for v in row) for row in record["memory_mix"])
    mixed = f"\nKeys in flight come from a mix of embedding and layer outputs of earlier positions; by layer: {rows}."
    return text + mixed


def _begin(record: dict[str, Any]) -> str:
    start = record["settings"].get("start")
    if start:
        earlier = record["begun_from"]
        return "Begun from a trained draft" + (
            "." if earlier is None else f" ({earlier['tokens']:,} tokens, `{earlier['command']}`)."
        )
    if record["settings"]["random_init"]:
        return "Random weights to begin with" + (", but for the keys' and values'." if _reads(record["shape"]) else ".")
    layers = record["shape"]["target_layers"]
    return f"Begun from the target's last {len(layers)} of {record['target_layers']} layers, embedding and head."


def _loss(settings: dict[str, Any]) -> str:
    if settings["hard_targets"]:
        return "Cross-entropy on the text's next token."
    weight = settings["alpha_weight"]
    return f"Loss: {1 - weight:g} x cross-entropy to the target's law - {weight:g} x chance of acceptance."


def _table(taus: dict[str, Any]) -> str:
    if not taus:
        return "Not measured: the data had no text to spare."
    ks = sorted({int(n.split("_")[1]) for n in next(iter(taus.values())) if n.startswith("greedy_")})
    names = [f"k = {k}, T = {t}" for k in ks for t in (1, 0)]
    lines = ["| text | blocks | " + " | ".join(names) + " |", "|---" * (2 + len(names)) + "|"]
    for split, found in taus.items():
        values = [found[f"{kind}_{k}"] for k in ks for kind in ("tau", "greedy")]
        cells = " | ".join(f"{v:.2f}" for v in values)
        lines.append(f"| {split.replace('_', '-')} | {found['blocks']:,} | {cells} |")
    context = next(iter(taus.values())).get(f"tau_{ks[0]}_from", {})
    if len(context) > 1:
        parts = ", ".join(f"{value:.2f} from position {start}" for start, value in context.items())
        lines.append(f"\nBy context (k = {ks[0]}, T = 1, {next(iter(taus)).replace('_', '-')}): {parts}.")
    return "\n".join(lines)


def _parity(gap: float | None) -> str:
    if gap is None:
        return "**No drafter of the engine runs this draft**: it was trained for a comparison."
    return f"The largest difference between a probability in training and in the engine, in float32: {gap:.1e}."


def _rounded_tree(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded_tree(inner) for name, inner in value.items()}
    return rounded(value) if isinstance(value, float) else value
