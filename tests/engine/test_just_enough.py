"""No larger than needed: a forward has room for the prompts that may come, not for all that ``step_tokens`` allows."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from steeple.draft import drafter_config
from steeple.engine import Engine, EngineConfig, build, build_engine, load_model
from steeple.request import Request
from steeple.types import SamplingParams

CONTEXT, BATCH = 64, 3


def an_engine(folder: Path, **settings: object) -> Engine:
    config = EngineConfig(**{"batch_size": BATCH, "max_context": CONTEXT, "kv_tokens": 512, **settings})
    return build_engine(load_model(str(folder), config), config, drafter_config("sparse_self:sink=1+window=8", k=4))


@pytest.mark.parametrize(
    ("settings", "rows"),
    [({}, BATCH * CONTEXT), ({"memory_budget": "64MiB"}, BATCH * CONTEXT), ({"step_tokens": 20}, 20)],
)
def test_the_room_is_as_large_as_the_prompts_can_be(
    target_folder: Path, settings: dict[str, object], rows: int
) -> None:
    engine = an_engine(target_folder, **settings)
    assert engine.parts.step_tokens == rows
    assert engine.parts.plan is not None
    assert engine.parts.plan.load.rows == max(BATCH * 5, rows + (BATCH - 1) * 4)
    assert engine.memory is not None
    assert engine.memory.warning is None


def test_all_prompts_of_a_batch_are_still_read_in_one_step(target_folder: Path) -> None:
    engine = an_engine(target_folder)
    params = SamplingParams(max_tokens=1, ignore_eos=True)
    prompts = [list(range(5 + number, 5 + number + CONTEXT - 1)) for number in range(BATCH)]
    for number, prompt in enumerate(prompts):
        engine.add(Request(str(number), prompt, params))
    assert len(engine.step()) == BATCH
    assert engine.idle


CHILD = """
from live_bytes import resident_bytes
from steeple.ops.memory import give_back
full = resident_bytes()
parts = [b"x" * ((64 << 10) + n) for n in range(1024)]  # below what the C library asks the system for piece by piece
last = b"x" * (64 << 10)
del parts
held = resident_bytes()
give_back()
print(held - full, resident_bytes() - full)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc")
def test_what_was_freed_goes_back_to_the_system() -> None:
    found = subprocess.run(
        [sys.executable, "-c", CHILD],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
        capture_output=True,
        text=True,
        check=True,
    )
    held, left = map(int, found.stdout.split())
    assert held > 32 << 20
    assert left < 8 << 20


def test_an_engine_gives_back_what_building_its_drafter_left(
    target_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(build, "give_back", lambda: seen.append("given back"))
    an_engine(target_folder)
    assert seen == ["given back"]
