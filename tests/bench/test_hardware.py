"""Measuring the machine: the best of several competitors counts, and only what is measured is reported."""

from __future__ import annotations

import itertools

import pytest
import torch

from steeple import hardware
from steeple.hardware import ReadProbe, measure


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine measured with little work."""
    monkeypatch.setattr(hardware, "READ_BYTES", 1 << 16)
    monkeypatch.setattr(hardware, "CPU_SIZES", (16, 32))
    monkeypatch.setattr(hardware, "TRIES", 1)


def test_the_best_competitor_counts_and_the_first_try_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two works take 0.1 s to warm up, then 4 and 5 s, then 8 and 2 s, for 8 and 20 units."""
    clock = itertools.accumulate([0.0, 0.1, 0, 0.1, 0, 4, 0, 5, 0, 8, 0, 2])
    monkeypatch.setattr(hardware.time, "perf_counter", lambda: next(clock))
    assert hardware._best([(8.0, lambda: None), (20.0, lambda: None)], 2) == 10.0


def test_a_machine_has_a_peak_for_every_dtype_asked() -> None:
    found = measure(torch.device("cpu"), torch.bfloat16, torch.float32)
    assert list(found.flops_per_second) == ["bfloat16", "float32"]
    assert found.threads == torch.get_num_threads()
    assert all(value > 0 for value in (found.read_bytes_per_second, *found.flops_per_second.values()))


def test_a_reading_counts_all_bytes_of_both_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    probe = ReadProbe(torch.device("cpu"))
    clock = iter([1.0, 3.0])
    monkeypatch.setattr(hardware.time, "perf_counter", lambda: next(clock))
    assert probe.now() == (1 << 16) * 2 / 2.0
