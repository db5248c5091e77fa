"""The scheduler alone, over a real cache: chunks, admission, preemption, capacity."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from steeple.cache.paged import PagedCache
from steeple.config import ModelConfig
from steeple.engine.scheduler import Scheduler, Work
from steeple.errors import CapacityError
from steeple.ops.attention import ReferenceAttention
from steeple.request import Request
from steeple.types import SamplingParams

CONFIG = ModelConfig(
    vocab_size=10,
    hidden_size=8,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=4,
    intermediate_size=8,
    max_context=512,
    rope_inv_freq=(1.0, 0.1),
)


class Desk:
    """A scheduler, and an engine's part of its contract played by hand."""

    def __init__(self, blocks: int = 32, batch_size: int = 8, step_tokens: int = 16, nodes: int = 3) -> None:
        self.cache = PagedCache(
            CONFIG,
            blocks=blocks,
            block_size=2,
            dtype=torch.float32,
            share_prefixes=False,
            attention=ReferenceAttention(),
        )
        self.forgotten: list[str] = []
        self.nodes = nodes
        self.scheduler = Scheduler(
            self.cache,
            batch_size=batch_size,
            step_tokens=step_tokens,
            forget=lambda request: self.forgotten.append(request.id),
        )

    def add(self, name: str, prompt: int, max_tokens: int = 20) -> Request:
        request = Request(name, np.arange(prompt) % 10, SamplingParams(max_tokens=max_tokens))
        self.scheduler.add(request)
        return request

    def plan(self) -> dict[str, Work]:
        return {work.request.id: work for work in self.scheduler.next(lambda request: self.nodes)}

    def step(self) -> dict[str, tuple[int, int]]:
        """Run a step that accepts nothing; text rows and nodes of every request in it."""
        out = {}
        for work in self.plan().values():
            request = work.request
            assert len(self.cache.table(request.id)) >= self.cache.blocks_for(work.stop + work.nodes), "no room"
            out[request.id] = (work.stop - request.cached, work.nodes)
            samples, request.cached = work.samples, work.stop
            if samples:
                request.append([1])
        return out


def test_a_prompt_goes_in_chunks_and_only_its_last_one_samples() -> None:
    desk = Desk(step_tokens=5, nodes=0)
    request = desk.add("a", 12)
    plans = []
    for _ in range(4):
        work = desk.plan()["a"]
        plans.append((work.stop, work.samples))
        samples, request.cached = work.samples, work.stop
        if samples:
            request.append([1])
    assert plans == [(5, False), (10, False), (12, True), (13, True)]


def test_prompts_share_the_rows_of_a_step_in_order() -> None:
    desk = Desk(step_tokens=10)
    desk.add("a", 7)
    desk.add("b", 7)
    desk.add("c", 7)
    assert desk.step() == {"a": (7, 0), "b": (3, 0)}
    # a decodes now and takes its row from the prompts' share, its nodes come on top
    assert desk.step() == {"a": (1, 3), "b": (4, 0), "c": (5, 0)}


def test_decoding_goes_on_however_small_the_step() -> None:
    desk = Desk(step_tokens=2)
    for name in "abc":
        desk.add(name, 1)
    for _ in range(4):
        desk.step()
    desk.add("d", 9)
    step = desk.step()
    assert {name: step[name] for name in "abc"} == dict.fromkeys("abc", (1, 3))
    assert step["d"] == (1, 0), "a prompt always moves on"


def test_no_more_than_the_batch_run() -> None:
    desk = Desk(batch_size=2)
    for name in "abc":
        desk.add(name, 2)
    assert desk.step().keys() == {"a", "b"}
    assert [r.id for r in desk.scheduler.waiting] == ["c"]


def test_nodes_stop_where_the_request_must() -> None:
    desk = Desk(nodes=9)
    desk.add("a", 2, max_tokens=4)
    assert [desk.step()["a"] for _ in range(4)] == [(2, 0), (1, 2), (1, 1), (1, 0)]


def test_a_negative_budget_is_none() -> None:
    desk = Desk(nodes=-2)
    desk.add("a", 2)
    assert [desk.step()["a"] for _ in range(2)] == [(2, 0), (1, 0)]


def test_the_youngest_is_preempted_and_read_again_but_for_its_root() -> None:
    desk = Desk(blocks=8, nodes=0)
    old, young = desk.add("old", 5, 11), desk.add("young", 5, 11)
    while not young.preemptions:
        step = desk.step()
    assert step.keys() == {"old"}
    assert not old.preemptions
    assert young.cached == 0
    assert desk.forgotten == ["young"]
    assert not desk.cache.has("young")
    while "old" in {r.id for r in desk.scheduler.running}:
        desk.step()
        if len(old) == old.limit:
            desk.scheduler.remove(old)
    before = len(young)
    assert desk.step() == {"young": (before - 1, 0)}
    assert len(young) == before, "reading again writes nothing"
    assert desk.step() == {"young": (1, 0)}


def test_who_was_preempted_comes_before_who_never_ran() -> None:
    desk = Desk(blocks=8, nodes=0, batch_size=2)
    desk.add("old", 5, 11)
    young = desk.add("young", 5, 11)
    desk.add("third", 1, 2)
    while not young.preemptions:
        desk.step()
    assert [r.id for r in desk.scheduler.waiting] == ["young", "third"]


def test_admission_leaves_the_others_a_block_to_grow() -> None:
    desk = Desk(blocks=8, nodes=0)
    desk.add("a", 4, 8)
    assert desk.step() == {"a": (4, 0)}
    desk.add("b", 10, 2)  # 5 blocks, exactly what is free once a has its third
    assert desk.step().keys() == {"a"}
    desk.scheduler.remove(desk.scheduler.running[0])
    assert desk.step().keys() == {"b"}


def test_what_can_never_fit_is_refused_with_advice() -> None:
    desk = Desk(blocks=8)
    with pytest.raises(
        CapacityError,
        match=r"request a: 30 positions \(prompt 10 \+ max_tokens 20\) do not fit into the cache of 16; "
        r"0\.0 MiB are missing\. Lower max_tokens or the prompt, or raise kv_tokens\.",
    ):
        desk.add("a", 10)
    assert desk.scheduler.idle
    desk.add("b", 10, 6)


def test_removing_gives_everything_back_wherever_it_was() -> None:
    desk = Desk(batch_size=1)
    running, waiting = desk.add("a", 3), desk.add("b", 3)
    desk.step()
    for request in (waiting, running):
        desk.scheduler.remove(request)
    assert desk.scheduler.idle
    desk.cache.check_integrity(idle=True)
    assert desk.forgotten == ["b", "a"]
