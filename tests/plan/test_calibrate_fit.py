"""Step models with caches and drafting: what they say, fits that find what made the times, files that are read back."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from steeple.errors import ConfigError, StorageError
from steeple.plan.calibration import read_calibration
from steeple.plan.fit_rounds import Drafts, Steps, fit_rounds, summary
from steeple.plan.loaded import shape_of_config
from steeple.plan.memory_parts import config_of
from steeple.plan.ours import DraftTerms, StepModel, Work, pass_work
from steeple.plan.rounds import Deployment, DraftForm, Precision, ragged_round_of, round_of
from steeple.plan.shapes import ModelShape, find_shape

BIG = ModelShape(name="big", layers=6, hidden=640, heads=5, kv_heads=5, head_dim=128, intermediate=1792, vocab=8192)
DEEP = ModelShape(name="deep", layers=10, hidden=384, heads=6, kv_heads=2, head_dim=64, intermediate=1024, vocab=8192)
SMALL = ModelShape(name="small", layers=3, hidden=256, heads=4, kv_heads=4, head_dim=64, intermediate=704, vocab=8192)

TRUTH = StepModel(
    bytes_per_second=5e10,
    flops_per_second=6e11,
    attention_bytes_per_second=4e10,
    attention_flops_per_second=4e11,
    seconds_per_row=1e-6,
    seconds_per_request=6e-6,
    seconds_per_layer=3e-5,
    fixed_seconds=4e-4,
    verify_seconds=2e-4,
    cache_bytes=3e7,
    cache_bytes_per_second=1.5e11,
    seconds_per_logit=2e-9,
    draft=DraftTerms(
        seconds_per_pass=2e-4,
        seconds_per_row=4e-6,
        seconds_per_round=3e-4,
        seconds_per_request=1e-5,
        seconds_per_logit=5e-9,
    ),
    overlap=0.5,
)


def joined(works: list[Work]) -> Work:
    flat = [one.flat() for one in works]
    return Work(**{f.name: np.concatenate([getattr(one, f.name) for one in flat]) for f in fields(Work)})


def measured(noise: float = 0.0) -> tuple[Steps, Drafts]:
    """Steps and drafts of three models as a machine like ``TRUTH`` takes them, its memory now slow and now fast."""
    numbers = np.random.default_rng(5)
    steps, drafts, ks, between = [], [], [], []
    for shape in (BIG, DEEP, SMALL):
        for batch in (1, 8, 32, 64):
            for context in (256, 1024, 4096):
                for k in (0, 2, 4, 8):
                    work = pass_work(shape, batch, context, k + 1)
                    steps.append(work if k == 4 else replace(work, logits=np.zeros(())))
                    if not k:
                        continue
                    own = pass_work(shape.last_layers(2), batch, context, window=80)
                    drafts.append(own if k == 4 else replace(own, logits=np.zeros(())))
                    ks.append(float(k))
                    between.append(float(work.bytes))
    work, draft_work, depth, others = joined(steps), joined(drafts), np.array(ks), np.array(between)
    memory, draft_memory = (numbers.uniform(0.6, 1.5, size) for size in (len(steps), len(drafts)))
    model = replace(TRUTH, drawn=True)
    wobble, draft_wobble = (np.exp(noise * numbers.standard_normal(size)) for size in (len(steps), len(drafts)))
    return (
        Steps(work=work, seconds=model.predict(work, memory) * wobble, memory=memory),
        Drafts(
            work=draft_work,
            k=depth,
            between=others,
            seconds=model.drafting(draft_work, depth, others, draft_memory) * draft_wobble,
            memory=draft_memory,
        ),
    )


def test_caches_hold_what_fits() -> None:
    model = StepModel(bytes_per_second=1e3, flops_per_second=1e30, cache_bytes=100.0, cache_bytes_per_second=1e4)
    assert model.kept([50.0, 100.0, 200.0]).tolist() == [1.0, 1.0, 0.25]
    nothing = {field.name: np.zeros(()) for field in fields(Work)} | {"requests": np.ones(()), "rows": np.ones(())}
    fitting = Work(**nothing | {"linear_bytes": np.array(60.0), "attention_bytes": np.array(40.0)})
    assert float(model.predict(fitting)) == pytest.approx(100 / 1e4)
    twice = Work(**nothing | {"linear_bytes": np.array(120.0), "attention_bytes": np.array(80.0)})
    assert float(model.predict(twice)) == pytest.approx(200 * (0.75 / 1e3 + 0.25 / 1e4))
    assert float(model.predict(twice, 2.0)) == pytest.approx(200 * (0.75 / 2e3 + 0.25 / 1e4))
    assert float(model.attention_seconds(twice)) == pytest.approx(80 * (0.75 / 1e3 + 0.25 / 1e4))


def test_the_first_pass_of_a_draft_finds_the_caches_cold() -> None:
    work, verification = pass_work(SMALL, 1, 64, window=64), pass_work(BIG, 1, 64, 5)
    model = replace(TRUTH, draft=DraftTerms(seconds_per_pass=1.0, seconds_per_round=10.0))
    cold = float(model.phases(work, verification.bytes))
    warm = float(model.phases(work))
    assert cold > 1.5 * warm
    launches = 3 * model.seconds_per_layer
    assert float(model.drafting(work, 4, verification.bytes)) == pytest.approx(
        10 + cold + 3 * warm + 4 * (1 + launches)
    )
    assert float(model.drafting(work, 0, verification.bytes)) == 0.0


def test_drawing_costs_only_where_tokens_are_drawn() -> None:
    work = pass_work(SMALL, 8, 256, 3)
    assert float(work.logits) == 8 * 3 * 8192
    more = float(TRUTH.at_temperature(1.0).predict(work) - TRUTH.predict(work))
    assert more == pytest.approx(8 * 3 * 8192 * 2e-9)
    more = float(TRUTH.at_temperature(0.5).drafting(work, 2) - TRUTH.drafting(work, 2))
    assert more == pytest.approx(2 * 8 * 3 * 8192 * 5e-9)
    assert TRUTH.at_temperature(1.0).at_temperature(0.0) == TRUTH


def test_rounds_use_the_terms_of_drafting() -> None:
    where = Deployment(target=BIG, step=TRUTH, precision=Precision())
    form = DraftForm(name="small", shape=SMALL)
    uniform = round_of(where, form, 6, 300, 3)
    work, target = pass_work(SMALL, 6, 300), pass_work(BIG, 6, 300, 4)
    assert float(uniform.draft) == pytest.approx(float(TRUTH.drafting(work, 3, target.bytes)))
    assert float(uniform.verify) == pytest.approx(float(TRUTH.predict(target)))
    ragged = ragged_round_of(where, form, [[300] * 6], 3)
    assert float(ragged.draft[0]) == pytest.approx(float(uniform.draft))
    shorter = ragged_round_of(where, form, [[300] * 6], [3, 3, 3, 1, 1, 0])
    assert float(shorter.draft[0]) < float(uniform.draft)


def test_a_fit_finds_the_machine() -> None:
    steps, drafts = measured()
    found = fit_rounds(steps, drafts, bytes_per_second=3e10, flops_per_second=9e11)
    assert np.abs(found.step_residuals).max() < 0.02
    assert np.abs(found.draft_residuals).max() < 0.03
    assert found.model.overlap == TRUTH.overlap
    assert found.model.bytes_per_second == pytest.approx(TRUTH.bytes_per_second, rel=0.05)
    assert found.model.cache_bytes == pytest.approx(TRUTH.cache_bytes, rel=0.1)
    assert found.model.draft is not None
    assert found.model.draft.seconds_per_pass == pytest.approx(2e-4, rel=0.2)
    assert not found.model.drawn


def test_a_noisy_fit_predicts_another_model() -> None:
    steps, drafts = measured(noise=0.1)
    broken = replace(steps, seconds=np.where(np.arange(len(steps.seconds)) % 9 == 3, 4.0, 1.0) * steps.seconds)
    model = fit_rounds(broken, drafts, bytes_per_second=3e10, flops_per_second=9e11, overlaps=(0.5,)).model
    demo, draft = find_shape("demo"), find_shape("demo/spire")
    for batch in (1, 8, 64):
        for k in (0, 4):
            work = pass_work(demo, batch, 2000, k + 1)
            assert float(model.predict(work) / TRUTH.predict(work)) == pytest.approx(1, abs=0.12)
        own = pass_work(draft, batch, 2000, window=80)
        ratio = model.drafting(own, 4, work.bytes) / TRUTH.drafting(own, 4, work.bytes)
        assert float(ratio) == pytest.approx(1, abs=0.15)


def test_terms_that_nothing_depends_on_are_left_out() -> None:
    steps, drafts = measured()
    one = steps.work.layers == 6
    picked = Work(**{f.name: getattr(steps.work, f.name)[one] for f in fields(Work)})
    own = Steps(work=replace(picked, logits=np.zeros(one.sum())), seconds=steps.seconds[one], memory=steps.memory[one])
    model = fit_rounds(own, None, bytes_per_second=3e10, flops_per_second=9e11, overlaps=(0.5,)).model
    assert (model.seconds_per_layer, model.seconds_per_logit, model.draft) == (0.0, 0.0, None)
    with pytest.raises(ConfigError, match="measurements; give at least"):
        fit_rounds(replace(own, work=picked.flat(), seconds=np.zeros(3)), None, bytes_per_second=1, flops_per_second=1)
    bad = replace(drafts, seconds=-drafts.seconds)
    with pytest.raises(ConfigError, match="all with times above 0"):
        fit_rounds(steps, bad, bytes_per_second=3e10, flops_per_second=9e11)


def test_summaries_count() -> None:
    found = summary(np.array([0.05, -0.15, 0.3, 0.0]))
    assert found["measurements"] == 4
    assert (found["within_10_percent"], found["within_20_percent"], found["max"]) == (0.5, 0.75, 0.3)
    assert summary(np.zeros(0)) == {"measurements": 0.0}


def test_models_survive_being_stored(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    stored = {
        "kind": "calibration",
        "model": TRUTH.to_dict(),
        "memory": {"read_bytes_per_second": 4e10},
        "shapes": [{"name": "big"}, {"name": "deep"}],
    }
    path.write_text(json.dumps(stored))
    found = read_calibration(path)
    assert found.step == TRUTH
    assert found.read_bytes_per_second == 4e10
    assert found.models == ("big", "deep")
    free = StepModel(bytes_per_second=1.0, flops_per_second=math.inf)
    path.write_text(json.dumps(free.to_dict()))
    assert read_calibration(path).step == free


def test_files_that_are_no_calibration(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    with pytest.raises(StorageError, match="make one with steeple plan calibrate"):
        read_calibration(path)
    for text, message in (
        ("{", "no valid JSON"),
        ("[1]", "holds no step model"),
        ('{"rows": 1}', "holds no step model"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_calibration(path)
    path.write_text(json.dumps({"model": TRUTH.to_dict() | {"bytes_per_secnd": 1}}))
    with pytest.raises(ConfigError, match="bytes_per_second"):
        read_calibration(path)
    with pytest.raises(ConfigError, match=r"DraftTerms.seconds_per_pass = -1"):
        DraftTerms(seconds_per_pass=-1)


def test_the_shape_of_a_loaded_model() -> None:
    for name in ("demo", "llama-3.1-8b", "qwen3-4b"):
        shape = find_shape(name)
        assert replace(shape_of_config(config_of(shape), name), max_context=shape.max_context) == shape
    sliding = replace(config_of(find_shape("demo")), windows=(0, 64, 0, 64, 0, 64, 0, 64))
    assert (shape_of_config(sliding, "x").window, shape_of_config(sliding, "x").sliding_layers) == (64, 4)
