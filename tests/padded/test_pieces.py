"""Decomposed attention in unmodified models: logits, greedy texts and bytes against the padded run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from steeple.errors import InternalError, UnsupportedModel
from steeple.padded.pieces import (
    NAME,
    PieceCache,
    best_width,
    decomposed,
    forward_pieces,
    generate_pieces,
    pieces_of,
    read_prompts,
    saved_share,
)

VOCAB = 97
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
CONFIGS: dict[str, Any] = {
    "llama": transformers.LlamaConfig(**SHAPE, num_key_value_heads=2),
    "gpt_neox": transformers.GPTNeoXConfig(**SHAPE, rotary_pct=0.5),
    "phi": transformers.PhiConfig(**SHAPE, partial_rotary_factor=0.5),
    "qwen3": transformers.Qwen3Config(**SHAPE, num_key_value_heads=1, head_dim=16),
}
PROMPTS = [np.random.default_rng(n).integers(1, VOCAB, size=size).tolist() for n, size in enumerate((9, 120, 12, 5))]
WRITES = 12


@pytest.fixture(scope="module", params=list(CONFIGS))
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(3)
    return transformers.AutoModelForCausalLM.from_config(CONFIGS[request.param]).float().eval()


@torch.inference_mode()
def padded(model: Any, texts: list[list[int]]) -> Tensor:
    """Logits ``[B, V]`` behind each text, of one left-padded forward."""
    longest = max(map(len, texts))
    tokens = torch.tensor([[0] * (longest - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (longest - len(text)) + [1] * len(text) for text in texts])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return model(input_ids=tokens, attention_mask=mask, position_ids=positions).logits[:, -1]


@pytest.mark.parametrize(("width", "chunk"), [(16, 512), (7, 50), (120, 33), (1, 512), (200, 512)])
def test_logits_of_a_ragged_batch_are_those_of_the_padded_one(model: Any, width: int, chunk: int) -> None:
    cache = PieceCache(len(PROMPTS), width)
    with decomposed(model):
        found = read_prompts(model, cache, PROMPTS, chunk)
    torch.testing.assert_close(found, padded(model, PROMPTS), atol=1e-5, rtol=1e-5)
    assert cache.lengths.tolist() == list(map(len, PROMPTS))


def test_greedy_texts_are_those_of_the_padded_batch(model: Any) -> None:
    written, cache = generate_pieces(model, PROMPTS, WRITES, chunk=64)
    texts = [list(prompt) for prompt in PROMPTS]
    for _ in range(WRITES):
        for text, token in zip(texts, padded(model, texts).argmax(dim=-1).tolist(), strict=True):
            text.append(token)
    assert written == [text[len(prompt) :] for text, prompt in zip(texts, PROMPTS, strict=True)]
    lengths = [len(prompt) + WRITES for prompt in PROMPTS]
    saved = saved_share(lengths, cache.width)
    assert saved > 0.4
    with torch.inference_mode():
        rectangle = model(input_ids=torch.zeros(len(PROMPTS), max(lengths), dtype=torch.int64)).past_key_values
    rectangular = sum(layer.keys.nbytes + layer.values.nbytes for layer in rectangle.layers)
    assert cache.held_bytes == pytest.approx(rectangular * (1 - saved))


def test_a_refused_draft_is_written_over(model: Any) -> None:
    """Verification: the root and 3 nodes each; of the nodes 0, 3, 1 and 2 stay, then the right text goes on."""
    cache = PieceCache(len(PROMPTS), 8)
    kept = [0, 3, 1, 2]
    drafts = [[11, 12, 13, 14 + n] for n in range(4)]
    with decomposed(model):
        read_prompts(model, cache, PROMPTS, 512)
        forward_pieces(model, cache, range(4), drafts)
        cache.keep(range(4), [1 + n for n in kept])
        logits = forward_pieces(model, cache, range(4), [[21, 22]] * 4)[:, 1]
    texts = [[*p, *d[: 1 + n], 21, 22] for p, d, n in zip(PROMPTS, drafts, kept, strict=True)]
    torch.testing.assert_close(logits, padded(model, texts), atol=1e-5, rtol=1e-5)


def test_some_rows_may_go_on_alone_with_unequal_counts(model: Any) -> None:
    cache = PieceCache(len(PROMPTS), 8)
    with decomposed(model):
        read_prompts(model, cache, PROMPTS, 512)
        logits = forward_pieces(model, cache, [3, 1], [[4, 5, 6], [7]])
    wanted = padded(model, [[*PROMPTS[3], 4, 5, 6], [*PROMPTS[1], 7]])
    torch.testing.assert_close(torch.stack([logits[0, 2], logits[1, 0]]), wanted, atol=1e-5, rtol=1e-5)


def test_the_model_gets_its_attention_back(model: Any) -> None:
    before = model.config._attn_implementation
    with decomposed(model):
        assert model.config._attn_implementation == NAME
    assert model.config._attn_implementation == before
    with pytest.raises(InternalError, match="no forward was announced"), decomposed(model):
        model(input_ids=torch.tensor([[1, 2]]), past_key_values=PieceCache(1, 4), use_cache=True)
    assert model.config._attn_implementation == before
    with pytest.raises(UnsupportedModel, match="no map of pieces"), decomposed(model):
        model(input_ids=torch.tensor([[1, 2]]), use_cache=False)


def test_what_the_attention_does_not_have_is_refused() -> None:
    config = transformers.MistralConfig(**SHAPE, num_key_value_heads=2, sliding_window=4)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with pytest.raises(UnsupportedModel, match="sliding_window"), decomposed(model):
        read_prompts(model, PieceCache(1, 4), [[1, 2, 3]], 8)


def cost(lengths: list[int], width: int, queries: int, c_kv: float, c_q: float) -> float:
    pieces = sum(-(-length // width) for length in lengths)
    return c_kv * (pieces * width - sum(lengths)) + c_q * (pieces - len(lengths)) * queries


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("c_kv", "c_q"), [(1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (1.0, 50.0)])
def test_the_width_is_the_cheapest_of_all(seed: int, c_kv: float, c_q: float) -> None:
    lengths = np.random.default_rng(seed).integers(1, 300, size=7).tolist()
    found = best_width(lengths, 5, c_kv=c_kv, c_q=c_q, least=1)
    every = {width: cost(lengths, width, 5, c_kv, c_q) for width in range(1, max(lengths) + 1)}
    assert every[found] == pytest.approx(min(every.values()))
    assert found == max(width for width, own in every.items() if own <= every[found] + 1e-9)


def test_widths_at_the_ends() -> None:
    assert best_width([100, 100, 100], 5) == 100  # nothing to save
    assert best_width([3], 5) == 3
    assert best_width([1000, 10, 10], 1, c_q=0.0) == 17  # 10 would waste nothing, but 16 is the least and wastes 20
    assert best_width([1000, 10, 10], 1, c_q=0.0, least=1) == 10
    assert pieces_of([1000, 10, 10], 20) == 52
    assert saved_share([1000, 10, 10], 20) == pytest.approx(1 - 52 * 20 / 3000)
    assert saved_share([10, 10], 16) < 0


def test_a_text_that_fills_its_pieces_takes_no_more() -> None:
    cache = PieceCache(2, 4)
    assert cache.begin([0, 1], [4, 5]).owner.tolist() == [0, 1, 1]
    cache.keep([0, 1], [4, 5])
    found = cache.begin([1, 0], [3, 1])
    assert found.owner.tolist() == [0, 0, 1, 1]
    assert found.pieces.tolist() == [1, 2, 0, 3]
    assert found.start.tolist() == [0, 4, 0, 4]
    assert found.position.tolist() == [[5, 6, 7], [4, -1, -1]]
