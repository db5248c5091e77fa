"""Bytes of a configuration and their inverse: exact, monotone, and what is given up in which order."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steeple.errors import CapacityError, ConfigError, UnsupportedModel
from steeple.plan.memory_fit import (
    Load,
    Setting,
    Wish,
    capacity,
    capacity_requests,
    fit,
    largest,
    least_budget,
    least_memory,
    loads,
    memory,
    total,
)
from steeple.plan.memory_parts import DraftMemory, Lay, config_of, linear_bytes, loading_bytes, weight_bytes
from steeple.plan.memory_units import parse_bytes, show_bytes
from steeple.plan.shapes import ModelShape, find_shape

SMALL = config_of(
    ModelShape(name="s", layers=2, hidden=64, heads=4, kv_heads=2, head_dim=16, intermediate=160, vocab=500), 512
)
DRAFTER = replace(SMALL, num_layers=1)
LAY = Lay(element=2, panel=64, fused=True, threads=2)


def a_setting(lay: Lay = LAY, *, drafts: bool = True) -> Setting:
    own = DraftMemory(held=weight_bytes(DRAFTER, lay), keys=256, runs=DRAFTER, reads_text=True, draws=True)
    return Setting(target=SMALL, lay=lay, draft=own if drafts else None)


LAYS = st.builds(
    Lay,
    element=st.sampled_from([2, 4]),
    panel=st.sampled_from([0, 16, 64]),
    int8=st.booleans(),
    fused=st.booleans(),
    threads=st.integers(1, 8),
    gpu=st.booleans(),
    recorded=st.booleans(),
)
LOADS = st.builds(
    Load,
    requests=st.integers(1, 300),
    blocks=st.integers(1, 20_000),
    chunk=st.integers(1, 4096),
    portion=st.integers(0, 500),
    k=st.integers(0, 8),
    width=st.integers(1, 4),
)


@given(LAYS, LOADS)
@settings(max_examples=60, deadline=None)
def test_capacity_is_the_exact_inverse_of_bytes(lay: Lay, load: Load) -> None:
    setting = a_setting(lay)
    # Where loading takes more than running, more blocks are free: the most of them is what capacity finds.
    ran = sum(memory(setting, load).values())
    if ran < total(setting, load):
        load = replace(load, blocks=capacity(setting, load, total(setting, load)))
    budget = total(setting, load)
    assert capacity(setting, load, budget) == load.blocks
    assert capacity(setting, load, budget - 1) < load.blocks
    assert total(setting, replace(load, blocks=load.blocks + 1)) > budget


@given(LAYS, LOADS, st.integers(0, 1 << 34))
@settings(max_examples=60, deadline=None)
def test_what_fits_takes_no_more_than_the_budget(lay: Lay, load: Load, budget: int) -> None:
    setting = a_setting(lay)
    blocks = capacity(setting, load, budget)
    if blocks:
        assert total(setting, replace(load, blocks=blocks)) <= budget
    requests = capacity_requests(setting, load, budget)
    if requests:
        assert total(setting, replace(load, requests=requests, blocks=requests * setting.full)) <= budget


@given(LAYS, LOADS, st.sampled_from(["requests", "blocks", "chunk", "k", "width"]))
@settings(max_examples=100, deadline=None)
def test_more_of_anything_takes_no_less(lay: Lay, load: Load, what: str) -> None:
    setting = a_setting(lay)
    more = replace(load, **{what: getattr(load, what) + 1})
    assert total(setting, more) >= total(setting, load)
    assert (sum(memory(setting, more).values()) > sum(memory(setting, load).values())) or what in (
        "chunk",
        "width",
        "k",
    )


def richness(load: Load) -> tuple[int, ...]:
    """What is given up last stands first."""
    return (load.requests, int(load.k > 0), load.k, load.width)


@given(st.integers(10, 300), st.integers(10, 300))
@settings(max_examples=40, deadline=None)
def test_a_larger_budget_gives_up_no_more(first: int, second: int) -> None:
    setting = a_setting()
    wish = Wish(
        load=Load(requests=16, blocks=16 * setting.full, chunk=512, k=4, width=3), most_blocks=16 * setting.full
    )
    low, high = sorted((first, second))
    least = least_budget(setting)
    poor, rich = (fit(setting, wish, least * size // 10) for size in (low, high))
    assert poor.bytes <= least * low // 10
    assert richness(poor.load) <= richness(rich.load)


def test_the_order_of_sacrifice_is_width_then_k_then_drafter_then_batch() -> None:
    setting = a_setting()
    wish = Wish(
        load=Load(requests=16, blocks=16 * setting.full, chunk=256, k=4, width=3), most_blocks=16 * setting.full
    )
    seen: list[tuple[int, int, int]] = []
    budget = total(setting, wish.load)
    assert fit(setting, wish, budget).sacrificed == ()
    while True:
        found = fit(setting, wish, budget)
        seen.append((found.load.width, found.load.k, found.load.requests))
        if found.load.requests == 1:
            break
        budget = found.bytes - 1 - (found.bytes // 400 if found.load.k == 0 else 0)
    assert {(w, 4, 16) for w in (3, 2, 1)} <= set(seen)
    assert {(1, k, 16) for k in (3, 2, 1, 0)} <= set(seen), "k goes once width is 1, and the batch is whole"
    for width, k, requests in seen:
        assert k == 4 or width == 1
        assert k == 0 or requests == 16
    assert len({r for _, _, r in seen}) > 3, "requests go one by one"


def test_what_was_given_up_is_said() -> None:
    setting = a_setting()
    full = setting.full
    wish = Wish(load=Load(requests=4, blocks=4 * full, chunk=64, k=4, width=2), most_blocks=4 * full)
    plain = replace(wish.load, k=0, width=1)
    found = fit(setting, wish, total(setting, plain))
    assert found.sacrificed == ("drafter dropped: plain decoding",)
    found = fit(setting, wish, total(setting, replace(plain, requests=2, blocks=2 * full, portion=64)))
    assert found.sacrificed[:2] == ("drafter dropped: plain decoding", "batch 4 -> 2")
    found = fit(setting, wish, least_budget(setting))
    assert "prompt chunk 64 -> 1 rows" in found.sacrificed
    assert any(what.startswith(f"cache {4 * 512} -> 16 positions") for what in found.sacrificed)


def test_less_than_the_least_is_refused_with_the_least() -> None:
    setting = a_setting()
    wish = Wish(load=Load(requests=4, blocks=8, k=4), most_blocks=8)
    least = least_budget(setting)
    assert fit(setting, wish, least).bytes == least
    with pytest.raises(CapacityError, match=rf"the least that would work is {least} bytes"):
        fit(setting, wish, least - 1)


def test_memory_that_is_left_over_goes_to_the_cache() -> None:
    setting = a_setting(drafts=False)
    wish = Wish(load=Load(requests=2, blocks=10, chunk=16), most_blocks=1000)
    budget = total(setting, wish.load) + 100 * setting.key_bytes_per_token * 16
    found = fit(setting, wish, budget)
    assert 90 < found.load.blocks <= 110
    assert found.bytes <= budget < total(setting, replace(found.load, blocks=found.load.blocks + 1))
    assert fit(setting, wish, budget * 1000).load.blocks == 1000


def test_the_free_number_of_requests_is_what_fits_at_full_length() -> None:
    setting = a_setting(drafts=False)
    wish = Wish(
        load=Load(requests=256, blocks=setting.full, chunk=16), most_blocks=64 * setting.full, free_requests=True
    )
    few = fit(setting, wish, total(setting, Load(requests=5, blocks=5 * setting.full, chunk=16, portion=64)))
    assert few.load.requests == 5
    assert few.sacrificed == ()
    assert fit(setting, wish, 1 << 40).load.requests == 256


def test_least_memory_that_keeps_a_speed_up() -> None:
    setting = a_setting()
    base = Load(requests=1, blocks=64, chunk=16)
    options = list(loads(base, {"k": (0, 1, 2, 4), "requests": (1, 2, 8)}))
    assert len(options) == 12

    def speedup(load: Load) -> float:
        return 1.0 + load.k * 0.2 + (0.1 if load.requests > 1 else 0.0)

    found = least_memory(setting, options, speedup, 1.4)
    assert (found.load.k, found.load.requests) == (2, 1)
    reached = [load for load in options if speedup(load) >= 1.4]
    assert found.bytes == min(total(setting, load) for load in reached)
    assert found.speedup == pytest.approx(1.4)
    with pytest.raises(ConfigError, match=r"speed-up = 3 is reached by no configuration; the best reaches 1\.90"):
        least_memory(setting, options, speedup, 3.0)


def test_weights_by_hand() -> None:
    plain = Lay(element=2)
    shape = find_shape("llama-3.1-8b")
    config = config_of(shape, 1024)
    tables = 2 * 1024 * 64 * 4
    assert weight_bytes(config, plain) == shape.parameters * 2 + tables
    assert linear_bytes(100, 10, plain) == 2000
    assert linear_bytes(100, 10, replace(plain, panel=64)) == 128 * 10 * 2, "the last panel is filled up"
    assert linear_bytes(100, 10, replace(plain, panel=64), sections=2, bias=True) == 2 * 64 * 10 * 2 + 200
    assert linear_bytes(100, 11, replace(plain, panel=64)) == 2200, "odd inputs are not packed in two bytes"
    assert linear_bytes(100, 10, replace(plain, int8=True)) == 1000 + 400
    tied = replace(config, tie_embeddings=True)
    assert weight_bytes(config, plain) - weight_bytes(tied, plain) == shape.embedding_parameters * 2, "tied: once"
    packed = replace(plain, panel=64)
    assert weight_bytes(tied, packed) == weight_bytes(config, packed), "packed, the head lies beside the embedding"


def test_loading_counts_where_it_takes_more_than_running() -> None:
    setting = a_setting(Lay(element=4, panel=64, int8=True), drafts=False)
    load = Load(requests=1, blocks=1, chunk=1)
    whole = SMALL.body_parameters() + (2 * 500 + 1 + 2 * 2) * 64
    stored = whole * 4 + 2 * 512 * 8 * 4
    assert total(setting, load) == loading_bytes(SMALL, setting.lay) == stored + 500 * 64 * 4
    assert total(setting, load) > sum(memory(setting, load).values())


def test_a_network_without_a_gate_is_refused() -> None:
    shape = ModelShape(name="x", layers=1, hidden=8, heads=1, kv_heads=1, head_dim=8, intermediate=8, gated=False)
    with pytest.raises(UnsupportedModel, match="x: the engine has gated"):
        config_of(shape)


@given(st.integers(0, 200), st.integers(1, 200))
def test_the_largest_that_fits(edge: int, high: int) -> None:
    assert largest(lambda n: n <= edge, 1, high) == min(edge, high)


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("512MiB", 512 << 20),
        ("4GiB", 4 << 30),
        ("4 gib", 4 << 30),
        ("2G", 2 << 30),
        ("2GB", 2 * 10**9),
        ("1.5KiB", 1536),
        ("1e9", 10**9),
        ("123456789123456789", 123456789123456789),
        ("7B", 7),
    ],
)
def test_amounts_as_people_write_them(text: str, amount: int) -> None:
    assert parse_bytes(text, "x") == amount


@pytest.mark.parametrize("text", ["", "MiB", "12 parsecs", "-1", "0", "1e400", "1..2", "nan", "2000PiB", "1 2"])
def test_bad_amounts_name_their_owner_and_a_remedy(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^budget = .*(write it like 512MiB|give from 1 byte)"):
        parse_bytes(text, "budget")


def test_amounts_are_shown_with_a_unit() -> None:
    assert [show_bytes(n) for n in (0, 1023, 1536, 5 << 20, 3 << 40)] == [
        "0 bytes",
        "1023 bytes",
        "1.50 KiB",
        "5.00 MiB",
        "3.00 TiB",
    ]


def test_the_planner_needs_no_torch() -> None:
    code = "import sys; import steeple.plan.memory_fit; sys.exit('torch' in sys.modules)"
    # the package's own face imports torch, so only its parts are looked at
    code = (
        "import sys, types; package = types.ModuleType('steeple'); "
        f"package.__path__ = {[str(p) for p in __import__('steeple').__path__]!r}; sys.modules['steeple'] = package; "
        + code
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
