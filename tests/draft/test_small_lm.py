"""The small model's own cache: filled to the right place after whatever happened, and laws that are the drawn ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
import transformers
from tiny import tiny_model

from steeple.cache.paged import PagedCache
from steeple.config import ModelConfig
from steeple.draft.base import Surroundings
from steeple.draft.small_lm import SmallLM, SmallLMConfig
from steeple.errors import ConfigError, InternalError, TokenizerMismatch
from steeple.hf import load_tokenizer
from steeple.model.decoder import Decoder
from steeple.ops.attention import ReferenceAttention
from steeple.ops.law import Counts, Laws, count_text, penalise, probabilities
from steeple.request import Request
from steeple.types import Draft, SamplingParams

V = 13
CPU = torch.device("cpu")


def a_decoder(seed: int = 0, vocab: int = V) -> Decoder:
    config = ModelConfig(
        vocab_size=vocab,
        hidden_size=8,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        intermediate_size=16,
        max_context=128,
        rope_inv_freq=(1.0, 0.1),
    )
    generator = torch.Generator().manual_seed(seed)
    decoder = Decoder(config).requires_grad_(False)
    for name, weight in decoder.named_parameters():
        if "norm" not in name:
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.7)
    return decoder


def around(target: Decoder, *, step_tokens: int = 64, folder: object = None, tokenizer: object = None) -> Surroundings:
    return Surroundings(
        decoder=target,
        tokenizer=tokenizer,
        attention=ReferenceAttention(),
        device=CPU,
        dtype=torch.float32,
        block_size=2,
        step_tokens=step_tokens,
        model_folder=folder,
    )


def a_drafter(small: Decoder, target: Decoder | None = None, *, blocks: int = 64, step_tokens: int = 64) -> SmallLM:
    drafter = SmallLM(SmallLMConfig(k=4), small, around(target or a_decoder(9), step_tokens=step_tokens))
    shape, dtype = (target or a_decoder(9)).config, torch.float32
    drafter.prepare(PagedCache(shape, blocks=blocks, block_size=2, dtype=dtype, attention=ReferenceAttention()))
    return drafter


def fresh_law(small: Decoder, request: Request, path: Sequence[int]) -> torch.Tensor:
    """The processed law after text and path, from a forward over all of it, no cache."""
    text = [*request.tokens.tolist(), *path]
    later = torch.ones(len(text), len(text), dtype=torch.bool).triu(1)

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = torch.einsum("tnh,sh->nts", q, k[:, 0]) * small.config.scale
        return torch.einsum("nts,sh->tnh", scores.masked_fill(later, -torch.inf).softmax(-1), v[:, 0])

    logits = small.logits(small(torch.tensor(text), torch.arange(len(text)), attend).final_TD[-1:])
    laws = Laws.of([request.params])
    prompt, output = request.tokens[: request.prompt_len], np.array(text[request.prompt_len :], dtype=np.int64)
    counts: Counts = count_text([prompt], [output], V, "cpu")
    owner = torch.tensor([0])
    return probabilities(penalise(logits, laws, owner, counts), laws, owner)[0]


def check_laws(small: Decoder, requests: Sequence[Request], draft: Draft) -> None:
    """Every drawn token carries the law it was drawn from; every chosen one is the best."""
    for b, request in enumerate(requests):
        path: list[int] = []
        for node in range(int(draft.cu[b]), int(draft.cu[b + 1])):
            law, row, token = fresh_law(small, request, path), int(draft.row[node]), int(draft.tokens[node])
            assert (row < 0) == request.params.greedy
            if row < 0:
                assert token == int(law.argmax())
            else:
                assert torch.allclose(draft.probs[row], law, atol=1e-5)
                assert law[token] > 0
            path.append(token)


KINDS = [
    SamplingParams(),
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.8, top_p=0.9, frequency_penalty=0.5),
    SamplingParams(repetition_penalty=1.4),
]


@pytest.mark.parametrize("step_tokens", [1, 3, 64])
def test_laws_stay_right_through_rejections_pauses_and_full_acceptance(step_tokens: int) -> None:
    small = a_decoder()
    drafter = a_drafter(small, blocks=300, step_tokens=step_tokens)
    numbers = np.random.default_rng(3)
    requests = [Request(f"r{i}", [1, 2, 3, 4, 5, 6, 7][: 1 + 2 * i], KINDS[i]) for i in range(4)]
    for turn in range(14):
        budget = [int(n) for n in numbers.integers(0, 5, size=4)]
        draft = drafter.propose(requests, budget)
        assert draft.counts.tolist() == budget
        check_laws(small, requests, draft)
        for b, request in enumerate(requests):
            own = draft.tokens[draft.cu[b] : draft.cu[b + 1]].tolist()
            accepted = len(own) if turn % 3 == 0 else int(numbers.integers(len(own) + 1))
            # The recovered token, and what rounds without this drafter wrote.
            rest = numbers.integers(V, size=int(numbers.integers(1, 4)))
            request.append([*own[:accepted], *rest.tolist()])
        if turn == 8:
            drafter.forget(requests[1])  # as after a preemption
    for request in requests:
        drafter.forget(request)
    drafter.check_integrity()


def test_a_round_that_came_to_nothing_is_drafted_again() -> None:
    """The target's forward may fail after the proposal; then the same text is asked about again."""
    small = a_decoder()
    drafter = a_drafter(small)
    requests = [Request("a", [1, 2, 3], KINDS[1]), Request("b", [4], KINDS[0])]
    first = drafter.propose(requests, [4, 4])
    again = drafter.propose(requests, [4, 4])
    check_laws(small, requests, again)
    assert torch.equal(first.tokens, again.tokens), "the same draws, because the text is the same"


def test_draws_belong_to_the_request() -> None:
    small = a_decoder()
    requests = [Request(f"r{i}", [1, 2, 3 + i], SamplingParams(temperature=1.0, seed=i)) for i in range(3)]
    together = a_drafter(small).propose(requests, [4, 2, 4])
    for b, (request, nodes) in enumerate(zip(requests, (4, 2, 4), strict=True)):
        alone = a_drafter(small).propose([request], [nodes])
        assert alone.tokens.tolist() == together.tokens[together.cu[b] : together.cu[b + 1]].tolist()


def test_without_room_a_request_gets_no_draft_and_the_others_do() -> None:
    drafter = a_drafter(a_decoder(), blocks=4)
    requests = [Request("a", [1, 2, 3], KINDS[0]), Request("b", [4, 5, 6], KINDS[0]), Request("c", [7], KINDS[0])]
    draft = drafter.propose(requests, [2, 2, 1])
    assert draft.counts.tolist() == [2, 2, 0]
    drafter.forget(requests[0])
    assert drafter.propose(requests[1:], [2, 1]).counts.tolist() == [2, 1]


@pytest.mark.parametrize("own", [V - 4, V + 4])
def test_another_padding_of_the_vocabulary(own: int) -> None:
    """The target may write ids that the small model has no embedding for, and the other way round."""
    drafter = a_drafter(a_decoder(vocab=own))
    request = Request("a", [V - 1, 0, V - 1], SamplingParams(temperature=1.0))
    draft = drafter.propose([request], [4])
    assert draft.probs.shape == (4, V)
    assert torch.allclose(draft.probs.sum(-1), torch.ones(4))
    assert int(draft.tokens.max()) < min(own, V)


def test_the_own_cache_shares_text_and_never_nodes() -> None:
    drafter = a_drafter(a_decoder())
    request = Request("a", [1, 2, 3, 4, 5], KINDS[0])
    nodes = drafter.propose([request], [4]).tokens.tolist()
    longer = np.array([*request.tokens.tolist(), *nodes, 1])
    assert drafter.cache.attach("probe", longer) == 4, "two full blocks of text; the nodes behind are nobody's"
    drafter.cache.free("probe")
    request.append([*nodes, 1])
    drafter.propose([request], [1])
    assert drafter.cache.attach("probe", longer) == 8, "what was a node is text now"


def test_left_over_requests_are_noticed() -> None:
    drafter = a_drafter(a_decoder())
    drafter.propose([Request("a", [1], KINDS[0])], [1])
    with pytest.raises(InternalError, match="still hold"):
        drafter.check_integrity()


def test_a_model_without_a_sibling_asks_for_a_name(tmp_path: object) -> None:
    with pytest.raises(ConfigError, match=r"has no small sibling; name a smaller model .* small_lm:DIR"):
        SmallLMConfig().build(around(a_decoder(), folder=tmp_path))


def test_tokenizers_must_be_the_same(tmp_path: object, target_folder: object) -> None:
    folder = tiny_model(tmp_path / "small", layers=1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(folder)
    place = around(a_decoder(), folder=target_folder, tokenizer=load_tokenizer(target_folder))
    with pytest.raises(TokenizerMismatch, match=r"is None in the target .* and 'another' in the drafter"):
        SmallLMConfig(model=str(folder)).build(place)


def test_a_shorter_context_than_the_targets_is_refused(tmp_path: object, target_folder: object) -> None:
    folder = tiny_model(tmp_path / "small", layers=1, context=100)
    place = around(a_decoder(), tokenizer=load_tokenizer(target_folder))
    with pytest.raises(ConfigError, match=r"drafter small_lm, model .*small: max_context = 128 .* 1 to 100\. Lower"):
        SmallLMConfig(model=str(folder)).build(place)
