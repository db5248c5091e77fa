"""Micro-batches on a GPU: drafts on a stream of their own, beside the target's forward."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from steeple.draft import drafter_config
from steeple.engine import EngineConfig, build_engine, load_model
from steeple.request import Request
from steeple.types import SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: streams are not tested on one"),
]


@pytest.mark.parametrize("spec", ["ngram", "sparse_self:window=16+sink=0", "small_lm"])
def test_outputs_are_those_of_the_plain_engine(spec: str, target_folder: Path, draft_folder: Path) -> None:
    spec = f"{spec}:{draft_folder}" if spec == "small_lm" else spec
    outputs = []
    for count in (1, 2, 3):
        config = EngineConfig(device="cuda", micro_batches=count, kv_tokens=4096, batch_size=8, graphs=False)
        engine = build_engine(load_model(str(target_folder), config), config, drafter_config(spec))
        params = SamplingParams(max_tokens=40, ignore_eos=True)
        requests = [Request(f"r{i}", [3 + i, 4, 5] * (4 + i), params) for i in range(8)]
        for request in requests:
            engine.add(request)
        while not engine.idle:
            engine.step()
        engine.check_integrity()
        outputs.append([r.output.tolist() for r in requests])
    assert outputs[1] == outputs[0]
    assert outputs[2] == outputs[0]
