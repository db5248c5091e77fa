"""What shapes laws: biases, least lengths and grammars, alone and through an engine that drafts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import xgrammar
from tiny import VOCAB, tiny_tokenizer

from steeple.draft import drafter_config
from steeple.engine import EngineConfig, LoadedModel, build_engine, load_model
from steeple.request import Request
from steeple.serve.constraint import All, JsonGrammar, LeastLength, LogitBias, _allow, combined
from steeple.serve.grammar import _too_wide
from steeple.types import SamplingParams

END = 0
CLOSED = {
    "type": "object",
    "properties": {"a": {"enum": [1, 10]}, "b": {"enum": ["of", "side"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"enum": ["of", "side"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def compiler(tokenizer: Any) -> Any:
    info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=VOCAB, stop_token_ids=[END])
    return xgrammar.GrammarCompiler(info, max_threads=1)


def grammar(compiler: Any, schema: dict[str, Any] = SCHEMA) -> JsonGrammar:
    compiled = compiler.compile_json_schema(json.dumps(schema), any_whitespace=False)
    return JsonGrammar(xgrammar.GrammarMatcher(compiled), VOCAB)


def request(written: list[int]) -> Request:
    made = Request("r", [5, 9], SamplingParams(max_tokens=64))
    made.stops = frozenset({END})
    made.append(written)
    return made


def allowed(tokenizer: Any, row_V: torch.Tensor) -> set[str]:
    return {tokenizer.decode([token]) for token in torch.isfinite(row_V).nonzero()[:, 0].tolist()}


def test_a_bias_is_added_to_every_row() -> None:
    logits = torch.zeros(3, 8)
    LogitBias({2: -100.0, 5: 1.5}).shape(request([1]), logits, [(), (1,), (1, 2)])
    assert logits.tolist() == [[0, 0, -100.0, 0, 0, 1.5, 0, 0]] * 3


def test_the_end_waits_for_the_least_length() -> None:
    logits = torch.zeros(3, 8)
    LeastLength(3).shape(request([4]), logits, [(), (1,), (1, 2)])
    assert torch.isinf(logits[:, END]).tolist() == [True, True, False]
    assert torch.isfinite(logits[:, 1:]).all()


def test_a_grammar_follows_text_and_paths(compiler: Any, tokenizer: Any) -> None:
    def ids(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    shaped = grammar(compiler)
    begun, digit, comma = ids('{"a": '), ids("1"), ids(",")
    logits = torch.zeros(4, VOCAB)
    # the second branch is walked after the first has been taken back
    shaped.shape(request(begun), logits, [(), digit, [*digit, *comma], comma])
    assert {"1", "-"} <= allowed(tokenizer, logits[0])
    assert "," not in allowed(tokenizer, logits[0])
    assert {"1", ","} <= allowed(tokenizer, logits[1])
    assert " " in allowed(tokenizer, logits[2])
    assert "1" not in allowed(tokenizer, logits[2])
    assert torch.equal(logits[3], torch.zeros(VOCAB))  # behind what cannot be: still a law


def test_a_complete_text_can_only_end(compiler: Any, tokenizer: Any) -> None:
    whole = tokenizer.encode('{"a": 1, "b": "of"}', add_special_tokens=False)
    shaped, logits = grammar(compiler), torch.zeros(2, VOCAB)
    shaped.shape(request(whole), logits, [(), (END,)])
    assert torch.isfinite(logits[0]).nonzero().flatten().tolist() == [END]
    assert torch.isfinite(logits[1]).all()


def test_what_was_shaped_before_changes_nothing(compiler: Any, tokenizer: Any) -> None:
    """Round after round beside a matcher that reads the whole text each time."""
    text = tokenizer.encode('{"a": 10, "b": "side"}', add_special_tokens=False)
    kept = grammar(compiler)
    for length in range(len(text) + 1):
        paths = [text[length : length + n] for n in range(4)] + [[7, 8], [END], [text[0]]]
        ours, fresh = torch.zeros(len(paths), VOCAB), torch.zeros(len(paths), VOCAB)
        kept.shape(request(text[:length]), ours, paths)
        grammar(compiler).shape(request(text[:length]), fresh, paths)
        assert torch.equal(ours, fresh)
        assert torch.isfinite(ours).any(dim=1).all()


def test_a_vocabulary_wider_than_the_grammar_is_shut(compiler: Any) -> None:
    logits = torch.zeros(1, VOCAB)
    grammar(compiler).shape(request([]), logits, [()])
    refused = int(torch.isinf(logits).sum())
    assert 0 < VOCAB - refused < 10


def test_what_cannot_be_spelled_ends_the_text(tokenizer: Any) -> None:
    """A vocabulary without a single brace."""
    pieces = [END, *(t for t in range(1, VOCAB) if "{" not in tokenizer.decode([t]))]
    words = [tokenizer.convert_ids_to_tokens(t) for t in pieces]
    info = xgrammar.TokenizerInfo(words, xgrammar.VocabType.BYTE_LEVEL, vocab_size=len(words), stop_token_ids=[0])
    compiled = xgrammar.GrammarCompiler(info, max_threads=1).compile_json_schema(json.dumps(SCHEMA))
    logits = torch.zeros(1, len(words))
    JsonGrammar(xgrammar.GrammarMatcher(compiled), len(words)).shape(request([]), logits, [()])
    assert torch.isfinite(logits[0]).nonzero().flatten().tolist() == [END]


@pytest.mark.parametrize("token", [0, 5, 31, 32, 63])
def test_bits_of_tokens(token: int) -> None:
    mask = torch.zeros(2, dtype=torch.int32)
    _allow(mask, [token])
    bits = (mask.unsqueeze(1) >> torch.arange(32, dtype=torch.int32)) & 1
    assert bits.flatten().nonzero().flatten().tolist() == [token]


def test_several_apply_in_turn() -> None:
    logits = torch.zeros(1, 8)
    All([LogitBias({3: 1.0}), LeastLength(5)]).shape(request([]), logits, [()])
    assert logits[0, 3] == 1.0
    assert torch.isinf(logits[0, END])
    assert combined([]) is None


def test_depth_of_schemas() -> None:
    nested: Any = 1
    for _ in range(3):
        nested = [nested]
    assert not _too_wide(nested, 3)
    assert _too_wide(nested, 2)
    assert not _too_wide([dict.fromkeys(map(str, range(256)))], 3)
    assert _too_wide([dict.fromkeys(map(str, range(257)))], 3)


@pytest.fixture(scope="module")
def loaded(target_folder: Path) -> LoadedModel:
    return load_model(str(target_folder), EngineConfig())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_drafts_change_nothing_of_a_grammar(
    compiler: Any, loaded: LoadedModel, near_folder: Path, temperature: float
) -> None:
    """The same text with and without drafts where it is greedy, and of the grammar in any case."""
    texts: dict[str, list[str]] = {}
    for drafter in ("none", f"small_lm:{near_folder}", "ngram"):
        config = EngineConfig(kv_tokens=2048)
        engine = build_engine(loaded, config, drafter_config(drafter))
        requests = []
        for seed in range(6):
            made = Request(str(seed), [5, 9, seed], SamplingParams(temperature=temperature, seed=seed, max_tokens=60))
            made.constraint = grammar(compiler, CLOSED)
            engine.add(made)
            requests.append(made)
        while not engine.idle:
            engine.step()
        engine.check_integrity()
        texts[drafter] = [loaded.tokenizer.decode(r.output.tolist(), skip_special_tokens=True) for r in requests]
        for text, made in zip(texts[drafter], requests, strict=True):
            assert made.finish_reason == "stop"
            assert text in {f'{{"a": {a}, "b": "{b}"}}' for a in (1, 10) for b in ("of", "side")}
    if temperature == 0.0:
        plain, *drafted = texts.values()
        assert all(own == plain for own in drafted)
