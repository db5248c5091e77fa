"""Drafting through windows: the laws are those of a slow forward that sees the same keys, and what is refused."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import transformers
from tiny import tiny_model
from torch import Tensor

from steeple import hf
from steeple.cache.window import EVERYTHING, Window
from steeple.draft import drafter_config
from steeple.draft.base import Surroundings
from steeple.draft.carry import Carry
from steeple.draft.sparse_self import SparseSelfConfig
from steeple.draft.spire import SpireDraftConfig, SpireParts, check_draft, draft_laws, spire_drafter
from steeple.draft.spire_model import FeedbackMemory, SpireShape, embedding, keys_values, prune
from steeple.draft.windowed import WindowDrafter
from steeple.errors import ConfigError, StorageError, WeightError
from steeple.model.decoder import Decoder
from steeple.model.load import load_decoder
from steeple.model.save import save_decoder
from steeple.ops.attention import PagedAttention, ReferenceAttention
from steeple.ops.native_attention import attention_backend

CPU = torch.device("cpu")
PAGE = 4
TEXT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6]
FORCED = [2, 6, 4, 3, 3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("windowed") / "target", layers=3, seed=5)


@pytest.fixture(scope="module")
def target(folder: Path) -> Decoder:
    return load_decoder(folder, dtype=torch.float32, device="cpu")


def a_draft(target: Decoder, layers: int = 2) -> Decoder:
    """Pruned, and with other weights where training may change them."""
    draft = prune(target, layers)
    generator = torch.Generator().manual_seed(1)
    for layer in draft.layers:
        for weight in (layer.attention.o.weight, layer.mlp.down.weight):
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.1)
    draft.embed.weight.add_(torch.randn(draft.embed.weight.shape, generator=generator) * 0.1)
    return draft


def a_memory(layers: int = 2) -> FeedbackMemory:
    memory = FeedbackMemory(layers).requires_grad_(False)
    memory.mix.copy_(torch.randn(layers, layers + 1, generator=torch.Generator().manual_seed(2)))
    return memory


def around(target: Decoder, attention: PagedAttention, folder: Path | None = None) -> Surroundings:
    return Surroundings(
        decoder=target,
        tokenizer=None,
        attention=attention,
        device=CPU,
        dtype=torch.float32,
        block_size=PAGE,
        step_tokens=64,
        model_folder=folder,
    )


def attended(q_TNH: Tensor, keys_SKH: Tensor, values_SKH: Tensor, scale: float, seen: Tensor) -> Tensor:
    """Attention of rows to the keys that ``seen [T, S]`` allows; nothing for a row that sees none."""
    group = q_TNH.shape[1] // keys_SKH.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (keys_SKH, values_SKH))
    scores = (torch.einsum("tnh,snh->nts", q_TNH, k) * scale).masked_fill(~seen, -torch.inf)
    return torch.einsum("nts,snh->tnh", scores.softmax(-1).nan_to_num(0.0), v)


def target_keys(target: Decoder, text: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of each layer from a forward over the whole text."""
    found: list[tuple[Tensor, Tensor]] = []
    causal = torch.ones(len(text), len(text), dtype=torch.bool).tril()

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found.append((k, v))
        return attended(q, k, v, target.config.scale, causal)

    target(torch.tensor(text), torch.arange(len(text)), attend)
    return found


def projected_keys(target: Decoder, draft: Decoder, text: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """Keys and values that the draft's own projections make of what enters the target's layers; by target layer."""
    causal = torch.ones(len(text), len(text), dtype=torch.bool).tril()

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attended(q, k, v, target.config.scale, causal)

    at, total = torch.arange(len(text)), target.config.num_layers
    hidden = target(torch.tensor(text), at, attend, keep=range(total))
    inputs = [embedding(target, torch.tensor(text)), *(hidden.kept[layer] for layer in range(total - 1))]
    first = total - draft.config.num_layers
    made = [keys_values(draft, i, inputs[first + i], at) for i in range(draft.config.num_layers)]
    return [made[0]] * first + made


@torch.no_grad()
def slow_laws(
    target: Decoder,
    draft: Decoder,
    window: Window,
    memory: FeedbackMemory | None = None,
    *,
    own_keys: bool = False,
    carry: Carry | None = None,
) -> Tensor:
    """One token after the other: the target's keys that the definition of a window shows, and the draft's own."""
    base, first = len(TEXT) - 1, target.config.num_layers - draft.config.num_layers
    cached = projected_keys(target, draft, TEXT[:-1]) if own_keys else target_keys(target, TEXT[:-1])
    sinks, recent = -(-window.sink // PAGE) * PAGE, max(0, base - window.window) // PAGE * PAGE
    shown = torch.tensor([p for p in range(base) if p < sinks or p >= recent], dtype=torch.int64)
    keys = [cached[first + layer][0][shown] for layer in range(draft.config.num_layers)]
    values = [cached[first + layer][1][shown] for layer in range(draft.config.num_layers)]
    state = target_states(target, TEXT[:-1])[-1:]
    laws = []
    for j, token in enumerate([TEXT[-1], *FORCED[:-1]]):
        tokens, positions = torch.tensor([token]), torch.tensor([base + j])

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            k, v = torch.cat((keys[layer], k)), torch.cat((values[layer], v))
            if memory is None:
                keys[layer], values[layer] = k, v
            else:
                k, v = k[:-1], v[:-1]
            return attended(q, k, v, draft.config.scale, torch.ones(1, k.shape[0], dtype=torch.bool))

        layers = range(draft.config.num_layers)
        added = None if carry is None else state @ carry.projection.weight.T
        hidden = draft(tokens, positions, attend, keep=layers, added_TD=added)
        state = hidden.final_TD
        laws.append(draft.logits(hidden.final_TD)[0].softmax(-1))
        if memory is not None:
            states = [embedding(draft, tokens), *(hidden.kept[layer] for layer in layers)]
            for layer, m_TD in enumerate(memory(states)):
                k, v = keys_values(draft, layer, m_TD, positions)
                keys[layer], values[layer] = torch.cat((keys[layer], k)), torch.cat((values[layer], v))
    return torch.stack(laws)


WINDOWS = [Window(4, 6), Window(0, 5), Window(8, 1), Window(0, EVERYTHING)]


@pytest.mark.parametrize("native", [False, True], ids=["reference", "native"])
@pytest.mark.parametrize("window", WINDOWS)
def test_the_target_drafts_what_it_would_say_if_it_saw_only_the_window(
    target: Decoder, window: Window, native: bool
) -> None:
    attention = attention_backend(CPU) if native else ReferenceAttention()
    drafter = SparseSelfConfig(sink=window.sink, window=window.window).build(around(target, attention))
    assert isinstance(drafter, WindowDrafter)
    torch.testing.assert_close(draft_laws(drafter, TEXT, FORCED), slow_laws(target, target, window), atol=1e-5, rtol=0)


def test_an_unbounded_window_is_the_target_itself(target: Decoder) -> None:
    drafter = SparseSelfConfig(window=EVERYTHING).build(around(target, ReferenceAttention()))
    text = [*TEXT, *FORCED[:-1]]
    laws = target_logits(target, text).softmax(-1)[len(TEXT) - 1 :]
    assert isinstance(drafter, WindowDrafter)
    torch.testing.assert_close(draft_laws(drafter, TEXT, FORCED), laws, atol=1e-5, rtol=0)


@torch.no_grad()
def target_states(target: Decoder, text: Sequence[int]) -> Tensor:
    causal = torch.ones(len(text), len(text), dtype=torch.bool).tril()

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attended(q, k, v, target.config.scale, causal)

    return target(torch.tensor(text), torch.arange(len(text)), attend).final_TD


def target_logits(target: Decoder, text: Sequence[int]) -> Tensor:
    return target.logits(target_states(target, text))


@pytest.mark.parametrize("feedback", [False, True], ids=["own", "feedback"])
@pytest.mark.parametrize("window", WINDOWS[:3])
def test_a_spire_draft_reads_the_targets_keys_and_its_own(target: Decoder, window: Window, feedback: bool) -> None:
    draft, memory = a_draft(target), a_memory() if feedback else None
    shape = SpireShape(target_layers=(1, 2), sink=window.sink, window=window.window, page=PAGE, feedback=feedback)
    drafter = spire_drafter(
        SpireDraftConfig(), shape, SpireParts(draft, memory), around(target, attention_backend(CPU))
    )
    expected = slow_laws(target, draft, window, memory)
    torch.testing.assert_close(draft_laws(drafter, TEXT, FORCED), expected, atol=1e-5, rtol=0)
    without = slow_laws(target, draft, window, None if feedback else a_memory())
    assert (expected - without).abs().max() > 1e-3, "the memory makes no difference here, so nothing was shown"


@pytest.mark.parametrize("native", [False, True], ids=["reference", "native"])
@pytest.mark.parametrize("feedback", [False, True], ids=["own", "feedback"])
def test_a_spire_draft_carries_states(target: Decoder, feedback: bool, native: bool) -> None:
    draft, memory, window = a_draft(target), a_memory() if feedback else None, Window(4, 6)
    carry = Carry(target.config.hidden_size).requires_grad_(False)
    carry.projection.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(5))
    shape = SpireShape(target_layers=(1, 2), sink=4, window=6, page=PAGE, feedback=feedback, carry=True)
    surroundings = around(target, attention_backend(CPU) if native else ReferenceAttention())
    drafter = spire_drafter(SpireDraftConfig(), shape, SpireParts(draft, memory, carry), surroundings)
    expected = slow_laws(target, draft, window, memory, carry=carry)
    torch.testing.assert_close(draft_laws(drafter, TEXT, FORCED), expected, atol=1e-5, rtol=0)
    per_law = (expected - slow_laws(target, draft, window, memory)).abs().amax(dim=-1)
    assert per_law.min() > 1e-3, "the states make no difference somewhere, so nothing was shown"


@pytest.mark.parametrize("layers", [2, 3])
@pytest.mark.parametrize("feedback", [False, True], ids=["own", "feedback"])
@pytest.mark.parametrize("window", [Window(4, 6), Window(0, 2)])
def test_a_draft_with_keys_of_its_own_projects_the_targets_activations(
    target: Decoder, window: Window, feedback: bool, layers: int
) -> None:
    draft, memory = a_draft(target, layers), a_memory(layers) if feedback else None
    generator = torch.Generator().manual_seed(7)
    for layer in draft.layers:
        layer.attention.qkv.weight.add_(torch.randn(layer.attention.qkv.weight.shape, generator=generator) * 0.1)
    shape = SpireShape(
        target_layers=tuple(range(3 - layers, 3)),
        sink=window.sink,
        window=window.window,
        page=PAGE,
        feedback=feedback,
        own_keys=True,
    )
    drafter = spire_drafter(
        SpireDraftConfig(k=5), shape, SpireParts(draft, memory), around(target, attention_backend(CPU))
    )
    expected = slow_laws(target, draft, window, memory, own_keys=True)
    torch.testing.assert_close(draft_laws(drafter, TEXT, FORCED), expected, atol=1e-5, rtol=0)
    assert (expected - slow_laws(target, draft, window, memory)).abs().max() > 1e-3


def saved(draft: Decoder, folder: Path, out: Path, **fields: object) -> Path:
    """A folder as training writes it, beside the target's tokenizer and configuration."""
    config = transformers.AutoConfig.from_pretrained(folder)
    config.num_hidden_layers = draft.config.num_layers
    save_decoder(draft, out, config, dtype=torch.float32)
    values = {"target_layers": (1, 2), "sink": 4, "window": 6, "page": PAGE} | fields
    SpireShape(**values).save(out)
    return out


def test_a_draft_loads_from_its_folder_or_stands_beside_its_target(
    folder: Path, target: Decoder, tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path / "target")
    draft, memory = a_draft(target), a_memory()
    carry = Carry(target.config.hidden_size).requires_grad_(False)
    carry.projection.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(5))
    out = saved(draft, folder, tmp_path / "spire", feedback=True, carry=True)
    memory.save(out)
    with pytest.raises(WeightError, match=r"carry\.safetensors cannot be read"):
        SpireDraftConfig(model=str(out)).build(around(target, ReferenceAttention()))
    carry.save(out, torch.float32)
    expected = slow_laws(target, draft, Window(4, 6), memory, carry=carry)
    for config in (SpireDraftConfig(model=str(out)), SpireDraftConfig()):
        drafter = config.build(around(target, ReferenceAttention(), tmp_path / "target"))
        assert isinstance(drafter, WindowDrafter)
        torch.testing.assert_close(draft_laws(drafter, TEXT, FORCED), expected, atol=1e-5, rtol=0)


def test_a_draft_of_eight_bits_drafts_almost_the_same(folder: Path, target: Decoder, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    made = saved(a_draft(target), folder, tmp_path / "draft")
    laws = []
    for spec in (f"spire:model={made}", f"spire:model={made}+weights=int8"):
        config = drafter_config(spec)
        assert config is not None
        drafter = config.build(around(target, attention_backend(CPU)))
        assert isinstance(drafter, WindowDrafter)
        laws.append(draft_laws(drafter, TEXT, FORCED))
    gap = (laws[0] - laws[1]).abs().max()
    assert 1e-5 < gap < 0.05


def test_a_draft_of_another_target_is_refused(folder: Path, target: Decoder, tmp_path: Path) -> None:
    out = saved(a_draft(target), folder, tmp_path / "spire")
    other = load_decoder(tiny_model(tmp_path / "other", layers=3, seed=6), dtype=torch.float32, device="cpu")
    with pytest.raises(ConfigError, match=r"its keys are not those of this target's layer 1; .*steeple train spire"):
        SpireDraftConfig(model=str(out)).build(around(other, ReferenceAttention()))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"own_keys": True, "dense": True}, "dense = True is for comparing"),
        ({"target_activations": False}, "target_activations = False is for comparing"),
        ({"target_layers": (0, 2)}, r"target_layers = \(0, 2\) is for comparing"),
        ({"target_layers": (2,)}, r"target_layers = \(2,\) names 1 layers, but the draft has 2"),
        ({"target_layers": (2, 3)}, "the target has 3 layers"),
    ],
)
def test_a_draft_that_the_engine_cannot_run_is_refused(
    target: Decoder, fields: dict[str, object], message: str
) -> None:
    shape = dataclasses.replace(SpireShape(target_layers=(1, 2)), **fields)
    with pytest.raises(ConfigError, match=message):
        check_draft(shape, a_draft(target), target, Path("some"))


def test_a_missing_draft_says_how_to_get_one(folder: Path, target: Decoder) -> None:
    with pytest.raises(ConfigError, match=r"no trained draft beside it; train one \(steeple train spire\)"):
        SpireDraftConfig().build(around(target, ReferenceAttention(), folder))
    with pytest.raises(StorageError, match=r"spire\.json cannot be read"):
        SpireDraftConfig(model=str(hf.resolve(str(folder)))).build(around(target, ReferenceAttention(), folder))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("sparse_self:window=0", r"sparse_self\.window = 0 is out of range"),
        ("sparse_self:k=32+width=2", r"sparse_self\.k = 32 times sparse_self\.width = 2 are more than 63 nodes"),
        ("sparse_self:windo=3", "Did you mean 'window'"),
        ("sparse_self:window=3+k", "'k' is no setting"),
        ("spire:weights=int4", r"spire\.weights = 'int4'.*Did you mean 'int8'"),
        ("spire:width=0", r"spire\.width = 0 is out of range"),
        ("auto-k:k=0", r"auto-k\.k = 0 is out of range"),
    ],
)
def test_bad_settings_are_refused_by_name(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        drafter_config(spec)


def test_settings_in_a_spec_reach_the_drafter() -> None:
    assert drafter_config("sparse_self:window=32+sink=4", k=7) == SparseSelfConfig(window=32, sink=4, k=7)
    assert drafter_config("sparse_self:k=3", k=7) == SparseSelfConfig(k=3)
    assert drafter_config("spire:some/dir") == SpireDraftConfig(model="some/dir")
