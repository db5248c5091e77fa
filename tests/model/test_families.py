"""Every family: the decoder's logits over a ragged batch are those of transformers, text by text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from tiny_models import LENGTHS, SHAPE, published_logits, ragged_logits, sequences, tiny

from steeple.errors import ConfigError, ModelError, UnsupportedModel
from steeple.model import FAMILIES, Decoder, load_decoder, model_config, save_decoder

SCALED = {"rope_theta": 10000.0, "factor": 4.0}
LLAMA3 = {**SCALED, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
GLM = {"head_dim": 16, "partial_rotary_factor": 0.5}

CASES = {
    "llama": ("Llama", {}),
    "llama-mqa": ("Llama", {"num_key_value_heads": 1}),
    "llama-mha-tied": ("Llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("Llama", {"head_dim": 24}),
    "llama-linear": ("Llama", {"rope_parameters": {**SCALED, "rope_type": "linear"}}),
    "llama-llama3": ("Llama", {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 16}}),
    "llama-yarn": (
        "Llama",
        {"rope_parameters": {**SCALED, "rope_type": "yarn", "original_max_position_embeddings": 16}},
    ),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-window": ("Mistral", {"sliding_window": 5}),
    "qwen2": ("Qwen2", {}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    "qwen2-yarn-tied": (
        "Qwen2",
        {"rope_parameters": {**SCALED, "rope_type": "yarn"}, "tie_word_embeddings": True},
    ),
    "qwen3": ("Qwen3", {"head_dim": 24, "attention_bias": True}),
    "qwen3-window": (
        "Qwen3",
        {
            "head_dim": 16,
            "use_sliding_window": True,
            "sliding_window": 4,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
    ),
    "phi3": ("Phi3", {"sliding_window": 9}),
    "phi3-partial": ("Phi3", {"partial_rotary_factor": 0.75, "num_key_value_heads": 4}),
    "gemma2": (
        "Gemma2",
        {
            "head_dim": 16,
            "sliding_window": 5,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 4.0,
        },
    ),
    "gemma2-no-caps-biases": (
        "Gemma2",
        {"head_dim": 32, "attn_logit_softcapping": None, "final_logit_softcapping": None, "attention_bias": True},
    ),
    "glm": ("Glm", GLM),
    "glm-mha-no-bias": ("Glm", {**GLM, "num_key_value_heads": 4, "attention_bias": False}),
    "glm4": ("Glm4", GLM),
    "glm4-tied": ("Glm4", {**GLM, "partial_rotary_factor": 1.0, "tie_word_embeddings": True}),
}


def published(case: str) -> transformers.PreTrainedModel:
    family, changes = CASES[case]
    return tiny(family, **changes)


def loaded(model: transformers.PreTrainedModel, folder: Path, **options: object) -> Decoder:
    model.save_pretrained(folder, max_shard_size=options.pop("max_shard_size", "5GB"))
    return load_decoder(folder, **{"dtype": torch.float32, **options})


def test_every_family_has_a_case() -> None:
    assert {published(case).config.model_type for case in CASES} == set(FAMILIES)


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    model = published(case)
    decoder = loaded(model, tmp_path)
    texts = sequences(SHAPE["vocab_size"])
    expected, found = published_logits(model, texts), ragged_logits(decoder, texts)
    scale = expected.abs().max().item()
    assert scale > 1.0
    assert found.shape == (sum(LENGTHS), SHAPE["vocab_size"])
    assert (found - expected).abs().max().item() <= 1e-4 * scale
    assert (found.argmax(-1) == expected.argmax(-1)).all()


@pytest.mark.parametrize("case", ["llama-biases", "qwen2", "qwen3", "phi3", "gemma2", "glm4"])
def test_the_comparison_sees_every_weight(case: str, tmp_path: Path) -> None:
    """A wrong value in any one parameter moves the logits far beyond the tolerance of the comparison above."""
    decoder = loaded(published(case), tmp_path)
    texts = sequences(SHAPE["vocab_size"], (9, 12))
    before = ragged_logits(decoder, texts)
    for name, value in decoder.named_parameters():
        kept = value.clone()
        value.mul_(1.1).add_(0.03 * torch.randn_like(value))
        change = (ragged_logits(decoder, texts) - before).abs().max().item()
        value.copy_(kept)
        assert change > 1e-3 * before.abs().max().item(), name


def test_dynamic_ntk_is_fixed_for_the_context_to_serve(tmp_path: Path) -> None:
    model = tiny("Llama", max_position_embeddings=16, rope_parameters={**SCALED, "rope_type": "dynamic"})
    # transformers keeps the frequencies of its longest text, so all texts here lie beyond the trained context
    texts = sequences(SHAPE["vocab_size"], (40, 17, 31))
    expected = published_logits(model, texts)
    found = ragged_logits(loaded(model, tmp_path, max_context=40), texts)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    other = ragged_logits(load_decoder(tmp_path, dtype=torch.float32, max_context=64), texts)
    assert (other - expected).abs().max() > 1e-2 * expected.abs().max()


def test_a_context_beyond_the_model_is_refused(llama_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"max_context = 65 is out of range; this model allows 1 to 64"):
        load_decoder(llama_folder, dtype=torch.float32, max_context=65)
    assert load_decoder(llama_folder, dtype=torch.float32, max_context=33).cos.shape == (33, 8)


def test_scaled_rope_allows_factor_times_the_context() -> None:
    config = transformers.LlamaConfig(**SHAPE, rope_parameters={**SCALED, "rope_type": "yarn"})
    assert model_config(config, 256).max_context == 256
    with pytest.raises(ConfigError, match="1 to 256"):
        model_config(config, 257)


@pytest.mark.parametrize("case", ["llama", "qwen2-yarn-tied", "gemma2", "glm4"])
def test_sharded_checkpoint(case: str, tmp_path: Path) -> None:
    model = published(case)
    decoder = loaded(model, tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    texts = sequences(SHAPE["vocab_size"], (9, 12))
    expected = published_logits(model, texts)
    assert (ragged_logits(decoder, texts) - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("case", ["llama", "qwen2", "gemma2", "glm4"])
def test_bfloat16_load(case: str, tmp_path: Path) -> None:
    model = published(case)
    decoder = loaded(model, tmp_path, dtype=torch.bfloat16)
    assert {value.dtype for value in decoder.parameters()} == {torch.bfloat16}
    assert decoder.cos.dtype == torch.float32
    texts = sequences(SHAPE["vocab_size"], (9, 12))
    exact = published_logits(model, texts)
    theirs = published_logits(model.to(torch.bfloat16), texts)
    ours = ragged_logits(decoder, texts)
    # as far from the exact logits as transformers in bfloat16 is, up to a factor; both only round
    assert (ours - exact).pow(2).mean().sqrt() <= 1.5 * (theirs - exact).pow(2).mean().sqrt()


def test_a_bfloat16_checkpoint_is_widened_before_anything_is_added(tmp_path: Path) -> None:
    published("gemma2").to(torch.bfloat16).save_pretrained(tmp_path)
    model = transformers.Gemma2ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    texts = sequences(SHAPE["vocab_size"], (9, 12))
    expected = published_logits(model, texts)
    found = ragged_logits(load_decoder(tmp_path, dtype=torch.float32), texts)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_tied_weights_are_one_tensor_and_nothing_trains(tmp_path: Path) -> None:
    decoder = loaded(published("llama-mha-tied"), tmp_path)
    assert decoder.head.weight is decoder.embed.weight
    assert not decoder.training
    assert not any(value.requires_grad for value in decoder.parameters())


def test_windows_and_eos_of_the_configuration() -> None:
    qwen = transformers.Qwen2Config(
        **{**SHAPE, "eos_token_id": [2, 5]}, use_sliding_window=True, sliding_window=6, max_window_layers=1
    )
    assert model_config(qwen).windows == (0, 6, 6)
    assert model_config(qwen).eos_token_ids == (2, 5)
    assert model_config(transformers.Qwen2Config(**SHAPE, sliding_window=6)).windows == ()
    assert model_config(transformers.Gemma2Config(**SHAPE, head_dim=16, sliding_window=6)).windows == (6, 0, 6)
    assert model_config(transformers.MistralConfig(**SHAPE, sliding_window=6)).windows == (6, 6, 6)


LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("Mixtral", {}, r"model_type 'mixtral' is not supported. Supported: gemma2 \(Gemma 2\), .*llama"),
        ("Llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported. Supported: silu"),
        ("Llama", {"num_local_experts": 8}, "num_local_experts = 8 of 'llama' is not supported"),
        ("Llama", {"sliding_window": 8}, "sliding_window = 8 is not supported for 'llama'"),
        ("Llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not supported for 'llama'"),
        ("Llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config = .*gptq"),
        ("Gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        ("Phi3", {"rope_parameters": LONGROPE}, "rope_type 'longrope' is not supported. Supported: default, linear"),
        ("Qwen3", {"layer_types": ["full_attention"] * 2 + ["chunked_attention"]}, "chunked_attention"),
    ],
)
def test_what_the_decoder_lacks_is_refused_by_name(family: str, changes: dict[str, object], message: str) -> None:
    config = getattr(transformers, f"{family}Config")(**{**SHAPE, **changes})
    with pytest.raises(UnsupportedModel, match=message):
        model_config(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 3}, "num_attention_heads = 4 is not a multiple of num_key_value_heads = 3"),
        ({"eos_token_id": 97}, "eos_token_id = 97 is out of range; this vocabulary has ids 0 to 96"),
        ({"rms_norm_eps": None}, "lacks the field 'rms_norm_eps'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers = 0 of 'llama' must be a whole number"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "type 'linear' lack or mistype.*factor"),
    ],
)
def test_contradictions_of_the_configuration(changes: dict[str, object], message: str) -> None:
    config = transformers.LlamaConfig(**SHAPE)
    for name, value in changes.items():
        config.__dict__[name] = value  # past the validation of transformers, which other versions lack
    with pytest.raises(ModelError, match=message):
        model_config(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"windows": "some"}, "windows = 'some' is unknown"), ({"qk_norm": True}, "interleaved_rope with qk_norm")],
)
def test_a_family_that_cannot_be(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(FAMILIES["glm"], **changes)


@pytest.mark.parametrize("case", CASES)
def test_saving_is_the_inverse_of_loading(case: str, tmp_path: Path) -> None:
    model = published(case)
    decoder = loaded(model, tmp_path / "published")
    save_decoder(decoder, tmp_path / "ours", model.config, dtype=torch.float32)
    again = type(model).from_pretrained(tmp_path / "ours")
    for (name, expected), found in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        # an offset that is added and taken off again rounds once
        torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-6, msg=name)
    assert load_decoder(tmp_path / "ours", dtype=torch.float32).config == decoder.config
