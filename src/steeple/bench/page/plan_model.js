// The arithmetic of steeple.plan for one cell at a time: ours.py, rounds.py, acceptance.py, search.py, paper.py.
// A test holds it equal to Python. Units: bytes, operations, seconds. Names are those of the Python files.
"use strict";

const PlanModel = (() => {
  const HALVINGS = 60; // as in acceptance.py

  // --- acceptance.py

  function iidTau(rate, k) {
    if (rate >= 1) return k + 1;
    if (rate <= 0) return 1;
    return -Math.expm1((k + 1) * Math.log(rate)) / (1 - rate);
  }

  function iidRate(tau, k) {
    let low = 0, high = 1;
    for (let i = 0; i < HALVINGS; i++) {
      const middle = (low + high) / 2;
      if (iidTau(middle, k) < tau) low = middle; else high = middle;
    }
    return (low + high) / 2;
  }

  // A tau that holds at k, wherever: an acceptance of one context.
  function ofTau(tau, k, source) {
    return {contexts: [1], survival: [[iidRate(tau, k)]], source};
  }

  function survivalAt(row, position) {
    if (position < row.length) return row[position];
    const last = row[row.length - 1];
    const ratio = last ? last / (row.length > 1 ? row[row.length - 2] : 1) : 0;
    return last * Math.pow(ratio, position + 1 - row.length);
  }

  function interpolate(x, xs, ys) {
    if (x <= xs[0]) return ys[0];
    for (let i = 1; i < xs.length; i++) {
      if (x <= xs[i]) return ys[i - 1] + ((ys[i] - ys[i - 1]) * (x - xs[i - 1])) / (xs[i] - xs[i - 1]);
    }
    return ys[ys.length - 1];
  }

  function tauAt(acceptance, context, k) {
    const known = acceptance.contexts.map(Math.log);
    let tau = 1;
    for (let j = 0; j < k; j++) {
      tau += interpolate(Math.log(context), known, acceptance.survival.map((row) => survivalAt(row, j)));
    }
    return tau;
  }

  // --- ours.py

  function keysRead(shape, seen) {
    const sliding = shape.window ? shape.sliding_layers : 0;
    const near = sliding ? Math.min(seen, shape.window) : seen;
    return shape.kv_elements_per_layer * ((shape.layers - sliding) * seen + sliding * near);
  }

  function passWork(shape, batch, context, rowsEach, window, precision, devices) {
    const rows = batch * rowsEach;
    const read = batch * keysRead(shape, Math.min(context, window));
    let widths = shape.head_dim * (2 * shape.heads + 2 * shape.kv_heads) + 4 * shape.hidden;
    widths += (shape.gated ? 3 : 2) * shape.intermediate;
    const activations = rows * ((shape.layers * widths) / devices + shape.hidden) * precision.activations;
    const stored = (read + rows * shape.layers * shape.kv_elements_per_layer) * precision.keys;
    const gathered = rows * shape.vocab * precision.activations;
    const reduced = 2 * shape.layers * rows * shape.hidden * precision.activations;
    const share = (devices - 1) / devices;
    return {
      linear_bytes: (shape.body_parameters * precision.weights) / devices + activations,
      linear_flops: (2 * shape.linear_parameters * rows) / devices,
      attention_bytes: stored / Math.min(devices, shape.kv_heads),
      attention_flops: (2 * rowsEach * read * shape.heads) / shape.kv_heads / devices,
      head_bytes: (shape.head_parameters * precision.weights + gathered) / devices,
      head_flops: (2 * shape.head_parameters * rows) / devices,
      rows, requests: batch, layers: shape.layers, logits: rows * shape.vocab,
      link_bytes: 2 * share * reduced + share * gathered,
      messages: devices > 1 ? 2 * shape.layers + (shape.vocab ? 1 : 0) : 0,
    };
  }

  function phase(step, memory, arithmetic) {
    return Math.max(memory, arithmetic) + (1 - step.overlap) * Math.min(memory, arithmetic);
  }

  function efficiency(step, rowsEach) {
    const points = [...step.attention_efficiency].sort((a, b) => a[0] - b[0]);
    if (!points.length) return 1;
    return interpolate(Math.log(rowsEach), points.map((p) => Math.log(p[0])), points.map((p) => p[1]));
  }

  // In JSON an infinite rate, a term that costs nothing, is null.
  function rate(value) { return value === null ? Infinity : value; }

  function bytesOf(work) { return work.linear_bytes + work.attention_bytes + work.head_bytes; }

  // The share of what is read that the caches still hold.
  function kept(step, amount) {
    return step.cache_bytes ? Math.pow(Math.min(1, step.cache_bytes / Math.max(amount, 1)), 2) : 0;
  }

  function phases(step, work, between) {
    const flops = rate(step.flops_per_second), bytes = rate(step.bytes_per_second);
    const share = kept(step, bytesOf(work) + between);
    const perByte = (speed) => (1 - share) / speed + share / (rate(step.cache_bytes_per_second) || speed);
    const weights = perByte(bytes), keys = perByte(rate(step.attention_bytes_per_second) || bytes);
    const keyFlops = rate(step.attention_flops_per_second) || flops;
    return phase(step, work.linear_bytes * weights, work.linear_flops / flops)
      + phase(step, work.head_bytes * weights, work.head_flops / flops)
      + phase(step, work.attention_bytes * keys, work.attention_flops / keyFlops)
        / efficiency(step, work.rows / Math.max(work.requests, 1));
  }

  function linkSeconds(step, work) {
    const moved = work.link_bytes ? work.link_bytes / rate(step.link_bytes_per_second) : 0;
    return moved + work.messages * step.seconds_per_message;
  }

  function predict(step, work) {
    return phases(step, work, 0) + linkSeconds(step, work)
      + work.rows * step.seconds_per_row + work.requests * step.seconds_per_request
      + work.layers * step.seconds_per_layer + step.fixed_seconds
      + (work.rows > work.requests ? step.verify_seconds : 0)
      + (step.drawn ? work.logits * step.seconds_per_logit : 0);
  }

  // The k passes of a draft; between: bytes that the target's pass reads between two drafts.
  function drafting(step, work, k, between) {
    const terms = step.draft;
    if (!terms) return k * predict(step, work);
    const each = terms.seconds_per_pass + work.requests * terms.seconds_per_row
      + work.layers * step.seconds_per_layer + linkSeconds(step, work)
      + (step.drawn ? work.logits * terms.seconds_per_logit : 0);
    const once = terms.seconds_per_round + work.requests * terms.seconds_per_request;
    return once + k * each + phases(step, work, between) + (k - 1) * phases(step, work, 0);
  }

  // --- rounds.py

  function gcd(a, b) { return b ? gcd(b, a % b) : a; }

  function positions(form) { return form.window ? form.sink + form.window : Infinity; }

  function withWindow(form, window) { return form.window && window ? {...form, window} : form; }

  function roundOf(where, form, batch, context, k) {
    const {target, step, precision, devices} = where;
    const [deep, single] = [k + 1, 1].map(
      (rows) => passWork(target, batch, context, rows, Infinity, precision, devices));
    const verify = predict(step, deep), plain = predict(step, single);
    if (!form || !form.shape) return {draft: 0, verify, plain};
    const own = gcd(form.shape.heads, devices);
    const work = passWork(form.shape, batch, context, 1, positions(form), precision, own);
    return {draft: drafting(step, work, k, bytesOf(deep)), verify, plain};
  }

  function memoryBytes(where, form, batch, context, k) {
    const {target, precision, devices} = where;
    const held = batch * (context + k + 1);
    const keys = (shape) => held * shape.layers * shape.kv_elements_per_layer * precision.keys;
    let total = target.parameters * precision.weights;
    total += Math.max(1, Math.floor(devices / target.kv_heads)) * keys(target);
    total += batch * (k + 1) * target.vocab * precision.activations;
    if (!form || !form.shape) return total;
    const copies = Math.floor(devices / gcd(form.shape.heads, devices));
    if (form.own_weights) total += copies * form.shape.parameters * precision.weights;
    if (form.own_keys) total += Math.max(copies, Math.floor(devices / form.shape.kv_heads)) * keys(form.shape);
    return total;
  }

  // --- search.py; form = null is plain decoding, price is of all devices for an hour

  function evaluate(where, form, acceptance, batch, context, k, price) {
    const depth = form ? k : 0;
    const times = roundOf(where, form, batch, context, depth);
    const seconds = times.draft + times.verify;
    const tau = form ? tauAt(acceptance, context, depth) : 1;
    const speed = (batch * tau) / seconds;
    return {
      k: depth, tau, dt: seconds / times.plain,
      throughput_multiplier: (tau * times.plain) / seconds,
      tokens_per_second: speed, seconds_per_token: batch / speed,
      memory_bytes: memoryBytes(where, form, batch, context, depth),
      cost_per_million_tokens: ((price / 3600) * 1e6) / speed,
    };
  }

  // --- paper.py: times in operations, one byte per element

  function paperKeys(window, context) {
    if (!window) return context;
    const latest = window.share ? context * window.share : window.positions;
    return Math.min(context, window.sink + latest);
  }

  function paperPass(shape, rows, keys, hoi, extra) {
    const elements = shape.body_parameters + shape.layers * shape.kv_elements_per_layer * keys;
    return Math.max(2 * shape.body_parameters * rows + extra, elements * hoi);
  }

  // One cell of a published heatmap. draft = null is plain decoding; seconds are in plain steps at batch 1.
  function paperCell(preset, draft, acceptance, batch, context, k) {
    const {target, hoi} = preset, keys = batch * context;
    const plain = paperPass(target, batch, keys, hoi, 0);
    const unit = paperPass(target, 1, context, hoi, 0);
    let time = plain, tau = 1;
    if (draft) {
      const drafting = paperPass(
        draft.shape, batch, batch * paperKeys(draft.window, context), hoi, draft.extra_flops_per_token * batch);
      time = k * drafting + paperPass(target, (k + 1) * batch, keys, hoi, 0);
      tau = tauAt(acceptance, context, k);
    }
    return {
      k: draft ? k : 0, tau, dt: time / plain, throughput_multiplier: (tau * plain) / time,
      tokens_per_second: (batch * tau * unit) / time, seconds_per_token: time / tau / unit,
    };
  }

  return {iidTau, iidRate, ofTau, tauAt, passWork, predict, withWindow, evaluate, memoryBytes, paperCell, gcd};
})();

if (typeof module !== "undefined") module.exports = PlanModel;
