"""Chats: a turn that goes on where the last one ended finds the keys of the whole text, the written part too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from steeple.cache.paged import PagedCache
from steeple.draft import drafter_config
from steeple.draft.base import Drafter, DrafterConfig, Surroundings
from steeple.draft.carry import Carry
from steeple.draft.small_lm import SmallLM
from steeple.draft.spire import SpireDraftConfig, SpireParts, spire_drafter
from steeple.draft.spire_model import SpireShape, prune
from steeple.engine import Engine, EngineConfig, LoadedModel, build_engine, load_model
from steeple.model.load import load_decoder
from steeple.request import Request
from steeple.types import SamplingParams

BLOCK = 4
K = 3
CONFIG = EngineConfig(kv_tokens=1024, block_size=BLOCK, max_context=256)
CHATS, TURNS, WRITES = 2, 3, 21
DRAFTERS = ("none", "ngram", "small_lm", "small_lm_self", "sparse_self", "auto-k", "spire", "spire_carry")


@dataclass(frozen=True, kw_only=True)
class TinySpire:
    """The target's last layer, not trained, with another head."""

    k: int = K
    carry: bool = False

    def build(self, around: Surroundings) -> Drafter:
        assert around.model_folder is not None
        target = load_decoder(around.model_folder, dtype=around.dtype, device=around.device)  # not packed yet
        draft = prune(target, 1)
        generator = torch.Generator().manual_seed(3)
        draft.head.weight.add_(torch.randn(draft.head.weight.shape, generator=generator) * 0.1)
        shape = SpireShape(target_layers=(target.config.num_layers - 1,), sink=1, window=8, carry=self.carry)
        carried = Carry(target.config.hidden_size).requires_grad_(False) if self.carry else None
        if carried is not None:
            carried.projection.weight.normal_(std=0.2, generator=generator)
        return spire_drafter(SpireDraftConfig(k=self.k), shape, SpireParts(draft, None, carried), around)


@pytest.fixture(scope="module")
def target(target_folder: Path) -> LoadedModel:
    return load_model(str(target_folder), CONFIG)


def an_engine(target: LoadedModel, name: str, draft_folder: Path, config: EngineConfig = CONFIG) -> Engine:
    known: dict[str, DrafterConfig | None] = {
        "none": None,
        "ngram": drafter_config("ngram", k=K),
        "small_lm": drafter_config(f"small_lm:{draft_folder}", k=K),
        "small_lm_self": drafter_config(f"small_lm:{target.folder}", k=K),
        "sparse_self": drafter_config("sparse_self:sink=1+window=8", k=K),
        "auto-k": drafter_config("auto-k:sparse_self", k=K),
        "spire": TinySpire(),
        "spire_carry": TinySpire(carry=True),
    }
    return build_engine(target, config, known[name])


def run(engine: Engine, turn: str, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[list[int]]:
    requests = [Request(f"{turn}-{chat}", prompt, params) for chat, prompt in enumerate(prompts)]
    for request in requests:
        engine.add(request)
    while not engine.idle:
        engine.step()
    engine.check_integrity()
    return [request.output.tolist() for request in requests]


def found(cache: PagedCache, text: Sequence[int]) -> int:
    """Positions of ``text`` that ``cache`` remembers."""
    positions = cache.attach("probe", np.array(text))
    cache.free("probe")
    return positions


def opening(chat: int, turn: int) -> list[int]:
    """What the user says; no multiple of a block long."""
    return np.random.default_rng((chat, turn)).integers(5, 300, size=11 + 2 * turn + chat).tolist()


@pytest.mark.parametrize(
    ("name", "temperature"),
    [(name, 0.0) for name in DRAFTERS]
    + [(name, 0.9) for name in DRAFTERS if name != "auto-k"],  # whose k hangs on time
)
def test_a_turn_finds_the_whole_text_before_it(
    target: LoadedModel, draft_folder: Path, name: str, temperature: float
) -> None:
    engine = an_engine(target, name, draft_folder)
    params = SamplingParams(max_tokens=WRITES, ignore_eos=True, temperature=temperature, seed=5)
    texts: list[list[int]] = [[] for _ in range(CHATS)]
    for turn in range(TURNS):
        prompts = [[*text, *opening(chat, turn)] for chat, text in enumerate(texts)]
        # The newest token of a text never has keys, so the block that it would fill is not full.
        kept = [(len(text) - 1) // BLOCK * BLOCK if text else 0 for text in texts]
        assert [found(engine.cache, prompt) for prompt in prompts] == kept
        if isinstance(engine.drafter, SmallLM) and turn:
            # The small model names a block once it drafts behind it: what the last round wrote is read again.
            own = [found(engine.drafter.cache, prompt) for prompt in prompts]
            assert all(count >= len(text) - (K + 1) - BLOCK for count, text in zip(own, texts, strict=True))
            assert all(count > len(text) - WRITES for count, text in zip(own, texts, strict=True))
        before = engine.stats.prompt_tokens
        outputs = run(engine, f"t{turn}", prompts, params)
        # A prompt's last token is its first round's, not a prompt's.
        computed = sum(len(prompt) - 1 - count for prompt, count in zip(prompts, kept, strict=True))
        assert engine.stats.prompt_tokens - before == computed
        fresh = an_engine(target, "none" if temperature == 0 else name, draft_folder)
        assert run(fresh, f"t{turn}", prompts, params) == outputs
        texts = [[*prompt, *output] for prompt, output in zip(prompts, outputs, strict=True)]


def test_nothing_is_found_where_prefixes_are_not_shared(target: LoadedModel, draft_folder: Path) -> None:
    private = EngineConfig(kv_tokens=1024, block_size=BLOCK, max_context=256, share_prefixes=False)
    engine = an_engine(target, "small_lm", draft_folder, private)
    params = SamplingParams(max_tokens=WRITES, ignore_eos=True)
    (output,) = run(engine, "t0", [opening(0, 0)], params)
    text = [*opening(0, 0), *output, *opening(0, 1)]
    before = engine.stats.prompt_tokens
    (again,) = run(engine, "t1", [text], params)
    assert engine.stats.prompt_tokens - before == len(text) - 1
    assert run(an_engine(target, "none", draft_folder), "t1", [text], params) == [again]


def test_old_chats_give_way_before_new_ones(target: LoadedModel, draft_folder: Path) -> None:
    """A cache of one chat and a half: the first chat is forgotten from its end, its beginning is found longest."""
    tight = EngineConfig(kv_tokens=72, block_size=BLOCK, max_context=64)
    engine = an_engine(target, "sparse_self", draft_folder, tight)
    params = SamplingParams(max_tokens=WRITES, ignore_eos=True)
    first, second = opening(0, 4), opening(1, 4)
    texts = [[*prompt, *run(engine, name, [prompt], params)[0]] for name, prompt in (("a", first), ("b", second))]
    assert found(engine.cache, [*texts[1], 7]) == (len(texts[1]) - 1) // BLOCK * BLOCK
    left = found(engine.cache, [*texts[0], 7])
    assert 0 < left < (len(texts[0]) - 1) // BLOCK * BLOCK
    again = [*texts[0], 7, 8, 9]
    (output,) = run(engine, "c", [again], params)
    assert run(an_engine(target, "none", draft_folder), "c", [again], params) == [output]
