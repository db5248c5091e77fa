"""The schedule and the groups of the optimisers."""

from __future__ import annotations

import pytest
import torch

from steeple.errors import ConfigError
from steeple.model.decoder import Decoder
from steeple.model.families import model_config
from steeple.train.optim import Optimizers, Rates, wsd
from steeple.train.shape import SHAPES, init_weights, llama_config


def test_schedule_warms_stays_and_decays_to_nothing() -> None:
    scales = [wsd(s, 100, 10, 0.4) for s in range(100)]
    assert scales[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert scales[9:61] == [1.0] * 52
    assert scales[80] == pytest.approx(0.5)
    assert 0 < scales[99] < 0.03
    assert wsd(800, 1000, 10, 0.4) == pytest.approx(0.5)


def test_a_smaller_total_changes_nothing_before_its_decay() -> None:
    assert [wsd(s, 1000, 10, 0.4) for s in range(60)] == [wsd(s, 100, 10, 0.4) for s in range(60)]


def test_every_weight_is_stepped_once() -> None:
    model = Decoder(model_config(llama_config(SHAPES["tiny"], 0)))
    init_weights(model, 0)
    optimizers = Optimizers(model, Rates())
    stepped = [id(p) for o in optimizers.each for g in o.param_groups for p in g["params"]]
    assert sorted(stepped) == sorted(id(p) for p in model.parameters())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizers.step(0.5)
    assert all(not torch.equal(before[name], p) for name, p in model.named_parameters())
    assert [g["lr"] for g in optimizers.each[1].param_groups] == [1e-2, 1.5e-3, 1.5e-3]
    assert all(p.grad is None for p in model.parameters())


def test_a_rate_out_of_range_is_named() -> None:
    with pytest.raises(ConfigError, match=r"Rates\.embed = -1"):
        Rates(embed=-1.0)
