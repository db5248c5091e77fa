"""Our step-time model: work counted by hand, phases, links, rounds, memory; fits that find what made the times."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest

from steeple.errors import ConfigError
from steeple.plan import paper
from steeple.plan.fit import fit
from steeple.plan.machines import find_machine
from steeple.plan.ours import Precision, StepModel, Work, pass_work, ragged_work
from steeple.plan.rounds import (
    Deployment,
    DraftForm,
    draft_devices,
    form_of,
    memory_bytes,
    ragged_round_of,
    round_of,
)
from steeple.plan.shapes import SHAPES, ModelShape, find_shape

TINY = ModelShape(name="tiny", layers=3, hidden=8, heads=4, kv_heads=2, head_dim=4, intermediate=16, vocab=50)
BYTES = Precision(weights=1.0, keys=2.0, activations=4.0)
MODEL = StepModel(bytes_per_second=1e3, flops_per_second=1e4)


def work(**values: float) -> Work:
    """Nothing but ``values``."""
    zeros = {field.name: np.zeros(()) for field in fields(Work)}
    return Work(**zeros | {name: np.asarray(value, dtype=np.float64) for name, value in values.items()})


def joined(works: list[Work]) -> Work:
    flat = [one.flat() for one in works]
    return Work(**{f.name: np.concatenate([getattr(one, f.name) for one in flat]) for f in fields(Work)})


def test_work_by_hand() -> None:
    got = pass_work(TINY, batch=5, context=100, rows=3, logit_rows=2, precision=BYTES)
    rows, logits = 15, 10
    assert TINY.linear_parameters == 3 * (8 * 16 + 2 * 8 * 8 + 16 * 8 + 3 * 8 * 16)  # q, k and v, o, gated mlp
    widths = 4 * (2 * 4 + 2 * 2) + 4 * 8 + 3 * 16
    assert got.linear_bytes == TINY.body_parameters + rows * (3 * widths + 8) * 4.0
    assert got.linear_flops == 2 * TINY.linear_parameters * rows
    keys = 3 * 2 * 2 * 4
    assert got.attention_bytes == (5 * 100 * keys + rows * keys) * 2.0
    # scores and sums: 2 + 2 operations per element of 4 query heads of 4, over 100 positions, in 3 layers
    assert got.attention_flops == rows * 100 * 3 * 4 * 4 * 4
    assert got.head_bytes == 50 * 8 + logits * 50 * 4.0
    assert got.head_flops == 2 * 50 * 8 * logits
    assert (got.rows, got.requests, got.layers, got.link_bytes, got.messages) == (rows, 5, 3, 0, 0)
    assert got.bytes == got.linear_bytes + got.attention_bytes + got.head_bytes
    assert got.flops == got.linear_flops + got.attention_flops + got.head_flops


def test_a_pass_without_logits_does_not_read_the_head() -> None:
    got = pass_work(TINY, 5, 100, 3, logit_rows=0, precision=BYTES)
    assert got.head_bytes == got.head_flops == 0


def test_a_uniform_batch_is_a_ragged_one() -> None:
    options: dict[str, Any] = {"window": 70, "precision": BYTES, "devices": 2}
    uniform, ragged = pass_work(TINY, 6, 100, 3, **options), ragged_work(TINY, [[100] * 6], 3, **options)
    for field in fields(Work):
        assert getattr(ragged, field.name).ravel() == pytest.approx(getattr(uniform, field.name).ravel()), field.name


def test_ragged_batches_are_sums_over_requests() -> None:
    lengths, rows = [10, 200, 3000], [1, 4, 2]
    whole = ragged_work(TINY, lengths, rows, precision=BYTES)
    parts = [pass_work(TINY, 1, length, depth, precision=BYTES) for length, depth in zip(lengths, rows, strict=True)]
    for name in ("attention_bytes", "attention_flops", "linear_flops", "head_flops", "rows", "requests"):
        assert getattr(whole, name) == pytest.approx(sum(getattr(part, name) for part in parts)), name
    weights = TINY.body_parameters * BYTES.weights
    assert whole.linear_bytes - weights == pytest.approx(sum(part.linear_bytes - weights for part in parts))


def test_windows_bound_what_is_read() -> None:
    near, far = (pass_work(TINY, 4, context, window=64) for context in (64, 10_000))
    assert near.attention_bytes == far.attention_bytes
    assert pass_work(TINY, 4, 32, window=64).attention_bytes < near.attention_bytes


def test_tensor_parallel_work() -> None:
    one, two, four = (pass_work(TINY, 4, 100, 2, precision=BYTES, devices=n) for n in (1, 2, 4))
    assert two.linear_flops == one.linear_flops / 2
    assert two.head_bytes == one.head_bytes / 2
    assert two.attention_bytes == one.attention_bytes / 2
    assert four.attention_bytes == two.attention_bytes  # two kv heads: beyond two devices keys are copied
    assert four.attention_flops == one.attention_flops / 4
    # a ring: every device sends 2 (n - 1) / n of what is reduced, twice a layer, and its share of the logits
    rows = 8
    reduced, logits = 2 * 3 * rows * 8 * 4.0, rows * 50 * 4.0
    assert two.link_bytes == pytest.approx(2 * 0.5 * reduced + 0.5 * logits)
    assert four.link_bytes == pytest.approx(2 * 0.75 * reduced + 0.75 * logits)
    assert (one.messages, two.messages) == (0, 7)
    with pytest.raises(ConfigError, match="devices = 3 do not divide the 4 heads"):
        pass_work(TINY, 1, 1, devices=3)


def test_phases_overlap_or_follow() -> None:
    memory = work(linear_bytes=1000.0, linear_flops=4000.0)  # 1 s and 0.4 s
    arithmetic = work(linear_bytes=500.0, linear_flops=20_000.0)  # 0.5 s and 2 s
    assert [float(MODEL.predict(w)) for w in (memory, arithmetic)] == pytest.approx([1.0, 2.0])
    apart = replace(MODEL, overlap=0.0)
    assert [float(apart.predict(w)) for w in (memory, arithmetic)] == pytest.approx([1.4, 2.5])
    half = replace(MODEL, overlap=0.5)
    assert float(half.predict(memory)) == pytest.approx(1.2)
    # two phases do not hide behind each other
    both = work(linear_bytes=1000.0, head_flops=10_000.0, attention_bytes=2000.0)
    assert float(MODEL.predict(both)) == pytest.approx(4.0)
    assert MODEL.bound(work(linear_bytes=1000.0, linear_flops=5000.0)) == pytest.approx(2.0)


def test_overheads_add_up() -> None:
    model = replace(MODEL, seconds_per_row=0.1, seconds_per_request=0.01, seconds_per_layer=2.0, fixed_seconds=5.0)
    assert float(model.predict(work(rows=3.0, requests=2.0, layers=4.0))) == pytest.approx(0.3 + 0.02 + 8.0 + 5.0)


def test_attention_has_rates_and_an_efficiency_of_its_own() -> None:
    keys = work(attention_bytes=1000.0, attention_flops=30_000.0, rows=8.0, requests=2.0)
    assert float(MODEL.predict(keys)) == pytest.approx(3.0)
    assert float(replace(MODEL, attention_flops_per_second=1e5).predict(keys)) == pytest.approx(1.0)
    assert float(replace(MODEL, attention_bytes_per_second=100.0).predict(keys)) == pytest.approx(10.0)
    model = replace(MODEL, attention_efficiency=((1.0, 1.0), (16.0, 0.5)))
    assert model.efficiency([0.5, 1, 4, 16, 99]).tolist() == pytest.approx([1.0, 1.0, 0.75, 0.5, 0.5])
    assert float(model.predict(keys)) == pytest.approx(3.0 / 0.75)


def test_links() -> None:
    sent = work(link_bytes=50.0, messages=3.0)
    model = replace(MODEL, link_bytes_per_second=100.0, seconds_per_message=0.25)
    assert float(model.predict(sent)) == pytest.approx(0.5 + 0.75)
    with pytest.raises(ConfigError, match="link_bytes_per_second = 0"):
        MODEL.predict(sent)


def test_stored_and_loaded() -> None:
    model = replace(MODEL, flops_per_second=math.inf, attention_efficiency=((1.0, 1.0), (4.0, 0.5)), overlap=0.25)
    text = json.dumps(model.to_dict(), allow_nan=False)
    assert StepModel.from_dict(json.loads(text)) == model
    with pytest.raises(ConfigError, match="Did you mean 'overlap'"):
        StepModel.from_dict({**model.to_dict(), "overlop": 1.0})


@pytest.mark.parametrize(
    "values",
    [
        {"bytes_per_second": 0.0},
        {"overlap": 1.5},
        {"seconds_per_row": -1.0},
        {"attention_efficiency": ((1.0, 0.0),)},
        {"fixed_seconds": float("nan")},
    ],
)
def test_impossible_models(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        replace(MODEL, **values)


def test_datasheets_are_taken_as_they_are() -> None:
    machine = find_machine("h200")
    model = StepModel.of_machine(machine, "float8", fixed_seconds=1e-3)
    assert (model.bytes_per_second, model.flops_per_second) == (4.8e12, 1978.9e12)
    assert (model.overlap, model.seconds_per_row, model.fixed_seconds) == (1.0, 0.0, 1e-3)
    assert Precision.of("bfloat16", "int4") == Precision(weights=0.5, keys=2.0, activations=2.0)
    assert Precision.of("float8") == Precision(weights=1.0, keys=1.0, activations=2.0)
    with pytest.raises(ConfigError, match="dtype = 'bf16' is unknown"):
        Precision.of("bf16")


def test_without_what_the_paper_leaves_out_it_is_the_papers_model() -> None:
    """Where memory binds every phase, no activations, no head, bytes of one."""
    shape, draft = SHAPES["spire-target"], SHAPES["spire-draft"]
    plain = Precision(weights=1.0, keys=1.0, activations=0.0)
    model = StepModel(bytes_per_second=1.0, flops_per_second=paper.HOI)
    times = [
        float(model.predict(pass_work(one, 64, 512, precision=plain, window=window)))
        for one, window in ((shape, math.inf), (draft, 65))
    ]
    theirs = [float(paper.pass_time(one, 64, 64 * keys)) / paper.HOI for one, keys in ((shape, 513), (draft, 66))]
    assert times == pytest.approx(theirs)


WHERE = Deployment(target=TINY, step=MODEL, precision=BYTES)


def test_rounds_are_k_drafts_and_a_verification() -> None:
    small = replace(TINY, name="small", layers=1)
    form = DraftForm(name="s", shape=small, window=30, sink=2)
    got = round_of(WHERE, form, [4, 8], 100, 3)
    for place, batch in enumerate((4, 8)):
        draft = MODEL.predict(pass_work(small, batch, 100, 1, window=32, precision=BYTES))
        verify = MODEL.predict(pass_work(TINY, batch, 100, 4, precision=BYTES))
        plain = MODEL.predict(pass_work(TINY, batch, 100, 1, precision=BYTES))
        assert got.seconds[place] == pytest.approx(float(3 * draft + verify))
        assert got.dt[place] == pytest.approx(float((3 * draft + verify) / plain))
    free = round_of(WHERE, DraftForm(name="n"), 4, 100, 3)
    assert free.draft == 0
    assert free.seconds == free.verify > free.plain


def test_ragged_rounds() -> None:
    small = replace(TINY, name="small", layers=1)
    form = DraftForm(name="s", shape=small, window=30, sink=2)
    uniform, ragged = round_of(WHERE, form, 4, 100, 3), ragged_round_of(WHERE, form, [100] * 4, 3)
    assert [float(ragged.draft), float(ragged.verify)] == pytest.approx([float(uniform.draft), float(uniform.verify)])
    mixed = ragged_round_of(WHERE, form, [100, 40], [2, 0])
    alone = MODEL.predict(pass_work(small, 1, 100, 1, window=32, precision=BYTES))
    assert float(mixed.draft) == pytest.approx(2 * float(alone))
    costly = replace(WHERE, step=replace(MODEL, seconds_per_request=7.0))  # only those that still draft are paid for
    assert float(ragged_round_of(costly, form, [100, 40], [2, 0]).draft) == pytest.approx(2 * (float(alone) + 7.0))
    assert float(mixed.verify) == pytest.approx(
        float(MODEL.predict(ragged_work(TINY, [100, 40], [3, 1], precision=BYTES)))
    )
    batches = ragged_round_of(WHERE, form, [[100, 40], [100, 40]], [[2, 0], [0, 0]])
    assert batches.draft.tolist() == pytest.approx([float(mixed.draft), 0.0])
    idle = ragged_round_of(WHERE, form, [100, 40], [0, 0])
    assert float(idle.draft) == 0.0
    assert float(idle.seconds) == float(idle.plain)


def test_memory_by_hand() -> None:
    batch, context, k = 4, 100, 3
    keys, logits = batch * (context + k + 1) * 3 * 2 * 2 * 4 * 2.0, batch * (k + 1) * 50 * 4.0
    base = TINY.parameters * 1.0 + keys + logits
    assert memory_bytes(WHERE, None, batch, context, k) == base
    assert memory_bytes(WHERE, DraftForm(name="self", shape=TINY, window=8), batch, context, k) == base
    small = replace(TINY, name="small", layers=1)
    own = DraftForm(name="s", shape=small, own_weights=True, own_keys=True)
    assert memory_bytes(WHERE, own, batch, context, k) == base + small.parameters + keys / 3
    assert memory_bytes(replace(WHERE, devices=4), None, batch, context, k) == base + keys  # two copies of the keys


def test_drafts_go_on_as_many_devices_as_divide_their_heads() -> None:
    assert draft_devices(replace(TINY, heads=6), replace(WHERE, devices=4)) == 2


def test_forms() -> None:
    demo, large = find_shape("demo"), SHAPES["llama-3-70b"]
    assert form_of("small_lm", large).shape is SHAPES["llama-3-8b"]  # type: ignore[union-attr]
    assert form_of("small_lm", TINY) is None
    assert form_of("small_lm", TINY, demo).shape is demo  # type: ignore[union-attr]
    sparse = form_of("sparse_self:choose=pillar+window=64+budget=32+sink=8", large)
    assert sparse is not None
    assert (sparse.shape, sparse.window, sparse.sink, sparse.positions) == (large, 96, 8, 104)
    assert sparse.with_window(10).positions == 18
    pruned, trained = form_of("spire", large), form_of("spire", demo)
    assert pruned is not None
    assert trained is not None
    assert (pruned.shape.layers, trained.shape.name) == (20, "demo/spire")  # type: ignore[union-attr]
    lookup = form_of("ngram", large)
    assert lookup is not None
    assert (lookup.shape, lookup.positions) == (None, math.inf)
    with pytest.raises(ConfigError, match="Did you mean 'spire'"):
        form_of("spyre", large)
    with pytest.raises(ConfigError, match="must be numbers"):
        form_of("spire:window=x", large)


def passes() -> Work:
    """Three models over a grid of batch, context and rows."""
    batch, context = np.array([1, 8, 64])[:, None, None], np.array([256, 1024, 3968])[None, :, None]
    models = (find_shape(name) for name in ("demo", "demo/small", "demo/spire"))
    return joined([pass_work(shape, batch, context, np.array([1, 3, 7])) for shape in models])


@pytest.mark.parametrize("overlap", [1.0, 0.0])
def test_a_fit_finds_the_model_behind_noisy_times(overlap: float) -> None:
    truth = StepModel(
        bytes_per_second=4e10,
        flops_per_second=5e11,
        attention_bytes_per_second=2.5e10,
        attention_flops_per_second=1.5e11,
        overlap=overlap,
        seconds_per_request=5e-6,
        seconds_per_layer=2e-5,
        fixed_seconds=3e-4,
    )
    every = passes()
    exact = truth.predict(every)
    times = exact * np.exp(np.random.default_rng(0).normal(0.0, 0.02, exact.shape))
    found = fit(every, times)
    assert np.abs(found.model.predict(every) / exact - 1).max() < 0.05
    assert found.summary()["measurements"] == times.size
    assert found.summary()["p90"] < 0.06
    assert found.residuals == pytest.approx(found.predicted / times - 1)
    stored = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert StepModel.from_dict(stored["model"]) == found.model
    assert len(stored["residuals"]) == times.size


def test_a_fit_on_one_model_predicts_another() -> None:
    truth = StepModel(bytes_per_second=4e10, flops_per_second=5e11, seconds_per_layer=2e-5, fixed_seconds=3e-4)
    small, pruned = find_shape("demo/small"), find_shape("demo/spire")
    learned = joined(
        [pass_work(one, [[1], [16]], [256, 2048, 3968]) for one in (small, pruned, small.last_layers(1))]
    )  # three depths and widths: with two, weights, layers and the fixed part could not be told apart
    found = fit(learned, truth.predict(learned), overlaps=(1.0,))
    other = pass_work(find_shape("demo"), [[1], [16]], [256, 2048, 3968])
    assert found.model.predict(other) == pytest.approx(truth.predict(other), rel=0.03)


def test_a_fit_of_attention_by_rows() -> None:
    truth = StepModel(
        bytes_per_second=4e10, flops_per_second=5e11, attention_efficiency=((1.0, 1.0), (3.0, 0.6), (7.0, 0.3))
    )
    every = passes()
    found = fit(every, truth.predict(every), overlaps=(1.0,), by_rows=True)
    assert [rows for rows, _ in found.model.attention_efficiency] == [1.0, 3.0, 7.0]
    assert found.summary()["max"] < 0.02
    assert fit(every, truth.predict(every), overlaps=(1.0,)).summary()["max"] > 0.05


def test_fits_that_cannot_be() -> None:
    every = pass_work(TINY, [1, 2], 10)
    with pytest.raises(ConfigError, match="2 measurements; give at least"):
        fit(every, [1.0, 2.0])
    with pytest.raises(ConfigError, match="times above 0"):
        fit(passes(), np.zeros(81))
    many = pass_work(TINY, 1, 10, np.arange(1, 40))
    with pytest.raises(ConfigError, match="39 kinds of rows"):
        fit(joined([many, many]), np.ones(78), by_rows=True)
