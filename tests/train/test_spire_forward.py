"""The batched forward of SPIRe's training against a naive rollout, one position after the other."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from steeple.draft.spire_model import SpireShape, embedding, keys_values
from steeple.model.decoder import Decoder
from steeple.model.load import load_decoder
from steeple.train.spire_forward import Seen, Student, target_forward
from steeple.train.spire_student import new_student

S, B = 56, 2
SHAPE = SpireShape(target_layers=(2, 3), sink=3, window=10, page=4, k=5)
SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
FAMILIES: dict[str, Any] = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES, head_dim=8)),
    "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**SIZES, sliding_window=7)),
}


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Decoder]:
    found = {}
    for name, make in FAMILIES.items():
        torch.manual_seed(0)
        model = make().float()
        with torch.no_grad():
            for key, value in model.named_parameters():
                if value.dim() == 1:  # norms and biases that matter
                    value.add_(0.3 * torch.randn_like(value)) if "bias" in key else value.mul_(
                        1 + torch.rand_like(value)
                    )
        folder: Path = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        found[name] = load_decoder(folder, dtype=torch.float64)
    return found


def student_of(target: Decoder, shape: SpireShape) -> Student:
    """A student whose weights differ from the target's, in float64."""
    made = new_student(target, shape, random_init=False, seed=0)
    generator = torch.Generator().manual_seed(1)
    made.draft.double()
    with torch.no_grad():
        for value in (p for p in made.draft.parameters() if p.requires_grad):
            value.add_(0.1 * torch.randn(value.shape, generator=generator))
        if made.memory is not None:
            made.memory.double().mix.normal_(generator=generator)
        if made.carry is not None:
            made.carry.double().projection.weight.normal_(std=0.3, generator=generator)
    return made


def windows() -> Tensor:
    return torch.randint(0, 97, (B, S), generator=torch.Generator().manual_seed(2))


@dataclass
class Rollout:
    """One window, position by position: what a round of drafting sees, written as directly as can be."""

    student: Student
    tokens: Tensor
    committed: list[tuple[Tensor, Tensor]]
    states: Tensor  # of the target
    finals: dict[int, Tensor] = field(default_factory=dict)
    own: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def visible(self, key: int, base: int) -> bool:
        shape = self.student.shape
        return shape.dense or key // shape.page < shape.sink_pages or key // shape.page >= shape.first_recent_page(base)

    def run(self, offset: int) -> Tensor:
        return torch.stack(
            [
                self.row(t, max(0, (t + offset) // self.student.shape.k * self.student.shape.k - offset))
                for t in range(S)
            ]
        )

    def row(self, t: int, base: int) -> Tensor:
        draft, shape, memory = self.student.draft, self.student.shape, self.student.memory

        def attend(layer: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
            if memory is None:
                self.own[layer, t] = (k_TKH[0], v_TKH[0])
            pairs = {}
            for key in (key for key in range(base) if self.visible(key, base)):
                pairs[key] = self.own[layer, key] if not self.committed else [x[key] for x in self.committed[layer]]
            for key in range(base, t if shape.feedback else t + 1):
                pairs[key] = self.own[layer, key]
            window = draft.config.window(layer)
            pairs = {key: pair for key, pair in pairs.items() if not window or t - key < window}
            if not pairs:
                return torch.zeros_like(q_TNH)
            k, v = (torch.stack([pair[i] for pair in pairs.values()]) for i in (0, 1))
            groups = q_TNH.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
            weights = (torch.einsum("tnh,snh->nts", q_TNH, k) * draft.config.scale).softmax(dim=-1)
            return torch.einsum("nts,snh->tnh", weights, v)

        token, position = self.tokens[t : t + 1], torch.tensor([t])
        layers = range(draft.config.num_layers)
        added = None
        if self.student.carry is not None and t > 0:
            before = self.states[t - 1] if t == base else self.finals[t - 1]
            added = (before @ self.student.carry.projection.weight.T).unsqueeze(0)
        hidden = draft(token, position, attend, keep=layers, added_TD=added)
        self.finals[t] = hidden.final_TD[0]
        if memory is not None:
            for i, m in enumerate(memory([embedding(draft, token), *(hidden.kept[i] for i in layers)])):
                k, v = keys_values(draft, i, m, position)
                self.own[i, t] = (k[0], v[0])
        return hidden.final_TD[0]


def naive(student: Student, seen: Seen, tokens: Tensor, offset: int) -> Tensor:
    """``[B * S, D]`` by a rollout of each window."""
    found = []
    for row in range(B):
        at = slice(row * S, (row + 1) * S)
        committed = [(k[at], v[at]) for k, v in seen.keys_values]
        for i, x in enumerate(seen.inputs):
            committed.append(keys_values(student.draft, i, x[at], torch.arange(S)))
        found.append(Rollout(student, tokens[row], committed, seen.final_TD[at]).run(offset))
    return torch.cat(found)


CASES: list[tuple[str, dict[str, Any], int]] = [
    ("llama", {}, 0),
    ("llama", {}, 3),
    ("llama", {"feedback": True}, 0),
    ("llama", {"feedback": True}, 3),
    ("llama", {"carry": True}, 0),
    ("llama", {"carry": True}, 3),
    ("llama", {"carry": True, "feedback": True}, 2),
    ("llama", {"carry": True, "own_keys": True}, 1),
    ("qwen3", {"carry": True, "dense": True}, 4),
    ("llama", {"dense": True}, 2),
    ("llama", {"sink": 0, "window": 0}, 1),
    ("llama", {"own_keys": True}, 1),
    ("llama", {"own_keys": True, "feedback": True}, 4),
    ("llama", {"target_activations": False}, 2),
    ("llama", {"target_layers": (0, 1, 2, 3), "own_keys": True}, 1),
    ("qwen2", {"feedback": True}, 1),
    ("qwen3", {}, 1),
    ("qwen3", {"feedback": True}, 4),
    ("mistral", {}, 1),
    ("mistral", {"feedback": True}, 2),
]


@pytest.mark.parametrize(("family", "changes", "offset"), CASES)
@torch.no_grad()
def test_the_batched_forward_is_the_rollout(
    targets: dict[str, Decoder], family: str, changes: dict[str, Any], offset: int
) -> None:
    shape, target, tokens = replace(SHAPE, **changes), targets[family], windows()
    student = student_of(target, shape)
    seen = target_forward(target, tokens, shape)
    ours = student.forward(tokens, seen, offset)
    torch.testing.assert_close(ours, naive(student, seen, tokens, offset), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("carry", [False, True])
def test_gradients_pass_through_the_memory_as_in_the_rollout(targets: dict[str, Decoder], carry: bool) -> None:
    shape, tokens = replace(SHAPE, feedback=True, carry=carry), windows()
    student = student_of(targets["llama"], shape)
    seen = target_forward(targets["llama"], tokens, shape)
    direction = torch.randn(B * S, 32, dtype=torch.float64)
    assert student.memory is not None
    carried = () if student.carry is None else student.carry.parameters()
    trained = [student.memory.mix, *carried, *(p for p in student.draft.parameters() if p.requires_grad)]
    grads = []
    for hidden in (student.forward(tokens, seen, 2), naive(student, seen, tokens, 2)):
        grads.append(torch.autograd.grad((hidden * direction).sum(), trained, allow_unused=True))
    assert all(g.abs().max() > 1e-3 for g in grads[0][: 1 + carry])  # the mix, the projection
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-8, rtol=1e-8)


@torch.no_grad()
def test_the_first_row_of_a_block_does_not_know_the_memory(targets: dict[str, Decoder]) -> None:
    shape, tokens, offset = replace(SHAPE, feedback=True), windows(), 2
    student = student_of(targets["llama"], shape)
    seen = target_forward(targets["llama"], tokens, shape)
    assert student.memory is not None
    before = student.forward(tokens, seen, offset).view(B, S, -1)
    student.memory.mix.normal_()
    after = student.forward(tokens, seen, offset).view(B, S, -1)
    first = (torch.arange(S) + offset) % shape.k == 0
    assert torch.equal(before[:, first], after[:, first])
    assert not torch.isclose(before[:, ~first], after[:, ~first]).all(dim=-1)[:, 1:].any()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_dense_draft_of_all_layers_is_the_target(targets: dict[str, Decoder], family: str) -> None:
    target, tokens = targets[family], windows()
    shape = replace(SHAPE, target_layers=(0, 1, 2, 3), dense=True)
    student = new_student(target, shape, random_init=False, seed=0)
    student.draft.double()
    seen = target_forward(target, tokens, shape)
    # new_student holds float32 weights; the target of this test has no more than these
    torch.testing.assert_close(student.forward(tokens, seen, 3), seen.final_TD, atol=1e-9, rtol=1e-9)
