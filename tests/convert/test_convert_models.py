"""Every format gives the model that llama2.c would run: checked against its forward, written anew in numpy."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tinystore import (
    PIECES,
    Shape,
    llama2c_logits,
    make_weights,
    rounded,
    write_gguf,
    write_sentencepiece,
    write_tokenizer_bin,
    write_v0,
    write_v1,
    write_v2,
)

from steeple.convert import ConvertConfig, Format, convert, detect_format
from steeple.model import load_decoder

transformers.utils.logging.disable_progress_bar()

WRITERS = {
    Format.LLAMA2C_V0: write_v0,
    Format.LLAMA2C_V1: write_v1,
    Format.LLAMA2C_V2: write_v2,
    Format.GGUF: write_gguf,
}
SHAPES = {
    "tied": Shape(),
    "untied": Shape(tied=False),
    "heads": Shape(kv_heads=4, layers=1),
    "one kv": Shape(kv_heads=1),
}
TEXT = [1, 260, 271, 5, 130, 262, 262, 263, 277, 40, 259, 276]


def run(folder: Path, form: Format, shape: Shape, **changes: object) -> tuple[dict, Path]:
    source = WRITERS[form](folder / "model.bin", shape, make_weights(shape))
    tokenizer = None if form is Format.GGUF else str(write_tokenizer_bin(folder / "tokenizer.bin"))
    out = folder / "out"
    return convert(ConvertConfig(source=str(source), out=str(out), tokenizer=tokenizer, **changes)), out


@pytest.mark.parametrize("form", WRITERS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_folder_computes_what_llama2c_computes(tmp_path: Path, form: Format, shape: Shape) -> None:
    summary, out = run(tmp_path, form, shape)
    weights = make_weights(shape)
    stored = rounded(weights) if form is Format.LLAMA2C_V2 else weights
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    with torch.no_grad():
        found = model(torch.tensor([TEXT])).logits[0].numpy()
    np.testing.assert_allclose(found, llama2c_logits(shape, stored, TEXT), atol=2e-4)
    assert model.config.tie_word_embeddings is shape.tied
    assert summary["format"] == form.value
    assert summary["parameters"] == sum(weight.size for weight in weights.values())
    assert summary["shapes"]["model.layers.0.self_attn.k_proj.weight"] == [shape.kv_heads * 32 // shape.heads, 32]
    assert summary["context"] == shape.context


@pytest.mark.parametrize("shape", [Shape(), Shape(tied=False)], ids=["tied", "untied"])
def test_steeples_own_decoder_computes_the_same(tmp_path: Path, shape: Shape) -> None:
    _, out = run(tmp_path, Format.LLAMA2C_V0, shape)
    decoder = load_decoder(out, dtype=torch.float32)

    def attend(layer: int, q_TNH: torch.Tensor, k_TKH: torch.Tensor, v_TKH: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(0, 1) for x in (q_TNH, k_TKH, v_TKH))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(0, 1)

    hidden = decoder(torch.tensor(TEXT), torch.arange(len(TEXT)), attend)
    expected = llama2c_logits(shape, make_weights(shape), TEXT)
    np.testing.assert_allclose(decoder.logits(hidden.final_TD).numpy(), expected, atol=2e-4)
    assert decoder.config.eos_token_ids == (1, 2)


@pytest.mark.parametrize("tied", [True, False])
def test_float_formats_give_the_same_bytes(tmp_path: Path, tied: bool) -> None:
    folders = []
    for form in (Format.LLAMA2C_V0, Format.LLAMA2C_V1, Format.GGUF):
        folder = tmp_path / form.name
        folder.mkdir()
        folders.append(run(folder, form, Shape(tied=tied))[1])
    for name in ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json"):
        assert len({(folder / name).read_bytes() for folder in folders}) == 1, name


def test_a_stored_head_that_equals_the_embedding_is_tied(tmp_path: Path) -> None:
    shape = Shape(tied=False)
    weights = make_weights(shape)
    weights["head"] = weights["embed"].copy()
    source = write_gguf(tmp_path / "model.gguf", shape, weights)
    summary = convert(ConvertConfig(source=str(source), out=str(tmp_path / "out")))
    assert summary["tied"] is True
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("form", [Format.LLAMA2C_V1, Format.GGUF])
def test_dtype_rounds_each_weight_once(tmp_path: Path, dtype: str, form: Format) -> None:
    _, out = run(tmp_path, form, Shape(), dtype=dtype)
    embed = load_file(out / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(embed, torch.from_numpy(make_weights(Shape())["embed"]).to(getattr(torch, dtype)))
    assert json.loads((out / "config.json").read_text())["dtype"] == dtype


def test_context_replaces_what_the_file_states(tmp_path: Path) -> None:
    summary, out = run(tmp_path, Format.GGUF, Shape(), context=99)
    assert summary["context"] == 99
    assert transformers.AutoConfig.from_pretrained(out).max_position_embeddings == 99


def test_generation_ends_at_eos_and_at_the_bos_of_the_next_document(tmp_path: Path) -> None:
    _, out = run(tmp_path, Format.LLAMA2C_V0, Shape())
    assert transformers.GenerationConfig.from_pretrained(out).eos_token_id == [1, 2]


def test_formats_are_told_by_content(tmp_path: Path) -> None:
    for form, write in WRITERS.items():
        assert detect_format(write(tmp_path / "any.name", Shape(), make_weights(Shape()))) is form


def test_sentencepiece_and_bin_give_one_tokenizer_file(tmp_path: Path) -> None:
    source = write_v0(tmp_path / "model.bin", Shape(), make_weights(Shape()))
    files = []
    for path in (write_tokenizer_bin(tmp_path / "t.bin"), write_sentencepiece(tmp_path / "t.model")):
        out = tmp_path / f"out-{path.suffix}"
        summary = convert(ConvertConfig(source=str(source), out=str(out), tokenizer=str(path)))
        assert summary["vocab_size"] == len(PIECES)
        files.append((out / "tokenizer.json").read_bytes())
    assert files[0] == files[1]
