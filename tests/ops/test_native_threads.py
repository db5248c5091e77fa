"""Two threads in the native library at once: each gets the numbers that it would get alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from steeple.cache.batch import Span, make_batch
from steeple.cache.paged import PagedCache
from steeple.config import ModelConfig
from steeple.model.decoder import Decoder
from steeple.model.run import Runner
from steeple.model.whole import NativeForward
from steeple.ops.kernels import kernels
from steeple.ops.native_attention import NativeAttention, attention_backend
from steeple.types import Draft

TURNS = 60
PATIENCE = 60.0

needs_native = pytest.mark.skipif(
    not isinstance(attention_backend("cpu"), NativeAttention), reason="no native library here"
)


def a_decoder() -> Decoder:
    """Wide enough that every phase of its forward is shared by the team."""
    config = ModelConfig(
        vocab_size=1000,
        hidden_size=128,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        intermediate_size=512,
        max_context=256,
        rope_inv_freq=tuple(100.0 ** (-i / 16) for i in range(16)),
    )
    decoder = Decoder(config).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, weight in decoder.named_parameters():
        if "norm" not in name:
            weight.copy_(torch.randn(weight.shape, generator=generator) / weight.shape[-1] ** 0.5)
    decoder.use(kernels(torch.device("cpu"), None))
    return decoder


Work = Callable[[], torch.Tensor]


def works_of(decoder: Decoder, seed: int) -> dict[str, Work]:
    """The forward of four prompts through a cache of its own, and the logits of all its rows."""
    attention = attention_backend("cpu")
    numbers = np.random.default_rng(seed)
    cache = PagedCache(decoder.config, blocks=64, block_size=16, dtype=torch.float32, attention=attention)
    texts = {f"r{i}": numbers.integers(1000, size=20 + 15 * i) for i in range(4)}
    for name, text in texts.items():
        cache.attach(name, text)
        cache.reserve(name, len(text))
    spans = [Span(name, 0, text, cache.table(name)) for name, text in texts.items()]
    batch = make_batch(spans, Draft.empty(4), 16, torch.device("cpu"))
    runner = Runner(decoder, cache, attention)
    assert isinstance(runner.whole, NativeForward)
    hidden_TD = runner.forward(batch).final_TD.clone()
    return {"forward": lambda: runner.forward(batch).final_TD, "head": lambda: runner.logits(hidden_TD)}


@needs_native
@pytest.mark.parametrize("part", ["forward", "head"])
def test_two_threads_do_not_disturb_each_other(part: str) -> None:
    decoder = a_decoder()
    works = [works_of(decoder, seed)[part] for seed in (1, 2)]
    expected = [work().clone() for work in works]
    assert not torch.equal(expected[0], expected[1])
    both = threading.Barrier(2)

    def repeat(side: int) -> int:
        same = 0
        for _ in range(TURNS):
            both.wait(PATIENCE)  # so that they really meet in the library
            same += torch.equal(works[side](), expected[side])
        return same

    with ThreadPoolExecutor(max_workers=2) as pool:
        assert list(pool.map(repeat, (0, 1))) == [TURNS, TURNS]


@needs_native
def test_a_new_thread_has_the_number_of_threads_that_was_set() -> None:
    """A pipeline drafts on a thread of its own, with torch's number of threads as the engine set it."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with ThreadPoolExecutor(max_workers=1) as pool:
            assert pool.submit(torch.get_num_threads).result() == 3
    finally:
        torch.set_num_threads(before)
