// Controls, table and what is drawn. State is one object; every change computes everything again.
"use strict";

(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const TAU_K = 4, STEPS = 4; // slider steps in an octave
  const KS = Array.from({length: 16}, (_, i) => i + 1);
  const BATCHES = Array.from({length: 11}, (_, i) => 2 ** i);
  const CONTEXTS = Array.from({length: 14}, (_, i) => 2 ** (i + 7));
  const WINDOWS = [0, ...Array.from({length: 13}, (_, i) => 2 ** (i + 4))]; // 0: each drafter's own
  const RANGES = {batch: [1, 1024], context: [32, 1 << 20]};
  const PLAIN = {name: "plain decoding", draft: null, colour: data.colours.plain};
  const state = {...data.start, taus: {}};

  const number = new Intl.NumberFormat("en-US", {maximumFractionDigits: 0});
  const figures = (value, digits = 3) => (value >= 10 ** digits ? number.format(value) : `${Number(value.toPrecision(digits))}`);
  const named = (list, name) => list.find((item) => item.name === name);

  // --- what is computed, for the state as it is

  function acceptanceOf(drafter) {
    const own = state.taus[drafter.name];
    return own === undefined ? drafter.acceptance : PlanModel.ofTau(own, TAU_K, "set here");
  }

  function precision() {
    const size = data.dtypes[state.dtype];
    return {weights: data.dtypes[state.weights || state.dtype], keys: size, activations: Math.max(size, 2)};
  }

  // The fewest of a power of two that hold plain decoding here, as in answer.py.
  function fewest(where, machine) {
    const {heads} = where.target;
    while (machine.linked && heads % (2 * where.devices) === 0) {
      if (PlanModel.memoryBytes(where, null, state.batch, state.context, 0) <= where.devices * machine.memory_bytes) break;
      where.devices *= 2;
    }
  }

  function paperWorld(preset) {
    const drafters = preset.drafters.map((draft, i) => {
      const window = draft.window && state.window ? {sink: 1, positions: state.window, share: 0} : draft.window;
      const words = window ? (window.share ? `1/${Math.round(1 / window.share)} of context` : `${window.positions}`) : "all";
      return {...draft, draft: {...draft, window}, words, acceptance: acceptanceOf(draft), colour: colour(i)};
    });
    const one = (item, batch, context, k) => PlanModel.paperCell(preset, item.draft, item.acceptance, batch, context, k);
    return {one, drafters, preset, memory: 0, batches: preset.batches, contexts: preset.contexts};
  }

  function world() {
    const preset = named(data.presets, state.preset);
    if (preset) return paperWorld(preset);
    const target = named(data.models, state.model), machine = named(data.machines, state.hardware);
    const where = {target, step: machine.steps[state.dtype], precision: precision(), devices: state.devices || 1};
    if (!state.devices) fewest(where, machine);
    const drafters = target.drafters.map((form, i) => {
      const draft = PlanModel.withWindow(form, state.window);
      const words = form.shape ? (draft.window ? `${draft.window}` : "all") : "";
      return {name: form.name, draft, words, acceptance: acceptanceOf(form), colour: colour(i)};
    }).filter((item) => item.acceptance.source); // those without a tau wait until there is one
    const price = state.price * where.devices;
    const one = (item, batch, context, k) =>
      PlanModel.evaluate(where, item.draft, item.acceptance, batch, context, k, price);
    return {one, drafters, preset: null, where, machine, memory: machine.memory_bytes * where.devices,
      batches: BATCHES, contexts: CONTEXTS};
  }

  function colour(place) { return data.colours.drafters[place % data.colours.drafters.length]; }

  // The drafter at the chosen k, or at its fastest one.
  function cell(here, item, batch, context) {
    if (!item.draft || !state.best_k) return here.one(item, batch, context, state.k);
    return KS.map((k) => here.one(item, batch, context, k))
      .reduce((best, found) => (found.tokens_per_second > best.tokens_per_second ? found : best));
  }

  function fits(here, found) { return !here.memory || found.memory_bytes <= here.memory; }

  function fastest(rows) {
    return rows.reduce((best, row) => (row.found.tokens_per_second > best.found.tokens_per_second ? row : best));
  }

  // --- the table

  const COLUMNS = [
    ["k", (row) => row.found.k, (row) => `${row.found.k || "-"}`],
    ["window, tokens", (row) => row.item.words || "", (row) => row.item.words || "-"],
    ["tau, tokens per round", (row) => row.found.tau, (row) => row.found.tau.toFixed(2)],
    ["dt, plain steps", (row) => row.found.dt, (row) => row.found.dt.toFixed(2)],
    ["multiplier", (row) => row.found.throughput_multiplier, (row) => row.found.throughput_multiplier.toFixed(2)],
    ["tokens/s", (row) => row.found.tokens_per_second, (row) => figures(row.found.tokens_per_second)],
    ["ms per token", (row) => row.found.seconds_per_token * 1e3, (row) => figures(row.found.seconds_per_token * 1e3)],
    ["memory, GB", (row) => row.found.memory_bytes / 1e9, (row) => figures(row.found.memory_bytes / 1e9)],
    ["cost per million tokens", (row) => row.found.cost_per_million_tokens,
      (row) => figures(row.found.cost_per_million_tokens)],
  ];

  function element(kind, text, attributes = {}) {
    const made = document.createElement(kind);
    made.textContent = text;
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    return made;
  }

  function swatch(item) {
    const made = element("span", "", {class: "swatch"});
    made.style.background = item.colour;
    return made;
  }

  function showTable(here, rows, best) {
    // the paper's model has a unit of time of its own, and neither memory nor money; without a price nothing costs
    const columns = here.preset ? COLUMNS.slice(0, 5) : COLUMNS.slice(0, state.price ? 9 : 8);
    const head = element("tr", "");
    head.append(...["drafter", ...columns.map(([name]) => name)].map((name) => element("th", name, {scope: "col"})));
    $("table").tHead.replaceChildren(head);
    $("table").tBodies[0].replaceChildren(...rows.map((row) => {
      const line = element("tr", "", {"data-drafter": row.item.name});
      line.classList.toggle("best", row === best);
      line.classList.toggle("over", !fits(here, row.found));
      const name = element("th", "", {scope: "row"});
      name.append(swatch(row.item), row.item.name);
      line.append(name, ...columns.map(([label, value, text]) =>
        element("td", text(row), {"data-label": label, "data-value": value(row)})));
      return line;
    }));
    $("table-note").textContent = "tau: " + rows.filter((row) => row.item.draft)
      .map((row) => `${row.item.name}: ${row.item.acceptance.source}`).join("; ") + ".";
  }

  function showWords(here, best) {
    const {found, item} = best;
    const who = found.k ? `${item.name}, k = ${found.k}` : "plain decoding";
    const speed = here.preset ? "" : `, ${figures(found.tokens_per_second)} tokens/s`;
    const devices = here.preset ? "" : ` on ${here.where.devices} x ${here.machine.name}`;
    $("headline").textContent = `Fastest: ${who}: ${found.throughput_multiplier.toFixed(2)} times plain decoding${speed} `
      + `at batch ${number.format(state.batch)}, context ${number.format(state.context)}${devices}.`;
    const warnings = [];
    if (!here.preset && !fits(here, found)) {
      warnings.push(`This does not fit: ${figures(found.memory_bytes / 1e9)} GB of ${figures(here.memory / 1e9)} GB.`);
    }
    const most = here.preset ? 0 : here.where.target.max_context;
    if (most && state.context > most) {
      warnings.push(`${state.model} was made for ${number.format(most)} tokens; more is arithmetic only.`);
    }
    $("warning").textContent = warnings.join(" ");
  }

  // --- the charts

  function showMap(here, items) {
    const wanted = $("shown").value, all = [PLAIN, ...items];
    const tried = wanted === "" ? all : all.filter((item) => item.name === wanted);
    const cells = here.batches.map((batch) => here.contexts.map((context) => {
      const rows = tried.map((item) => ({item, found: cell(here, item, batch, context)}))
        .filter((row) => fits(here, row.found));
      if (!rows.length) return null;
      const {item, found} = fastest(rows);
      const value = found.throughput_multiplier;
      const how = found.k ? `k = ${found.k}, tau ${found.tau.toFixed(2)}, dt ${found.dt.toFixed(2)}` : "";
      const text = `batch ${batch}, context ${number.format(context)}<br>${item.name}: ${value.toFixed(2)}<br>${how}`;
      return {value, choice: all.indexOf(item), text};
    }));
    const grid = {batches: here.batches, contexts: here.contexts, cells, choices: wanted === "" ? all : null};
    PlanCharts.heatmap($("map"), grid, state);
    $("map-legend").replaceChildren(...(wanted === "" ? all : []).map((item) => {
      const entry = element("span", "", {class: "entry"});
      entry.append(swatch(item), item.name);
      return entry;
    }));
    const empty = here.memory ? ` Empty tiles need more than ${figures(here.memory / 1e9)} GB.` : "";
    $("map-note").textContent = "Tiles: tokens per second over plain decoding at the same batch; the ring is the chosen "
      + `point, and a click on a tile moves it.${empty}`;
  }

  function showFront(here, items) {
    const point = (found) => ({x: found.seconds_per_token * (here.preset ? 1 : 1e3), y: found.tokens_per_second});
    const lines = [PLAIN, ...items].map((item) => {
      const points = BATCHES.map((batch) => ({batch, found: cell(here, item, batch, state.context)}))
        .filter((row) => fits(here, row.found)).map((row) => ({batch: row.batch, ...point(row.found)}));
      const now = cell(here, item, state.batch, state.context);
      return {...item, points, now: fits(here, now) ? point(now) : null};
    });
    const everything = lines.flatMap((line) => line.points).sort((a, b) => a.x - b.x || b.y - a.y);
    const pareto = [];
    for (const p of everything) if (!pareto.length || p.y > pareto[pareto.length - 1].y) pareto.push(p);
    const units = here.preset
      ? {x: "plain steps per token", y: "tokens per plain step", xTitle: "latency, plain steps at batch 1 per token",
        yTitle: "tokens of the batch per plain step at batch 1"}
      : {x: "ms per token", y: "tokens/s", xTitle: "latency, ms per token of a request", yTitle: "tokens/s of the batch"};
    PlanCharts.front($("front"), lines, pareto, units);
    $("front-note").textContent = everything.length ? "" : "Nothing fits into the memory at this context.";
  }

  // --- controls

  function options(select, rows, chosen) {
    select.replaceChildren(...rows.map(([value, text]) => element("option", text, {value})));
    select.value = rows.some(([value]) => `${value}` === `${chosen}`) ? `${chosen}` : `${rows[0][0]}`;
    return select.value;
  }

  function showControls(here) {
    $("machinery").hidden = Boolean(here.preset);
    for (const name of ["batch", "context"]) {
      $(name).value = Math.round(STEPS * Math.log2(state[name] / RANGES[name][0]));
      $(name).setAttribute("aria-valuetext", number.format(state[name]));
      if (document.activeElement !== $(`${name}-number`)) $(`${name}-number`).value = state[name];
    }
    $("k").value = state.k;
    $("k").disabled = state.best_k;
    $("k-text").textContent = state.best_k ? "best" : state.k;
    $("best-k").checked = state.best_k;
    $("window").value = Math.max(0, WINDOWS.findIndex((window) => window >= state.window));
    const own = here.preset ? "as published" : "its own";
    $("window-text").textContent = state.window ? number.format(state.window) : own;
    $("window").setAttribute("aria-valuetext", $("window-text").textContent);
    for (const item of (here.preset || here.where.target).drafters) {
      const slider = $(`tau-${item.name}`), acceptance = acceptanceOf(item);
      slider.value = PlanModel.tauAt(acceptance, state.context, TAU_K);
      const words = acceptance.source ? Number(slider.value).toFixed(2) : "not known";
      slider.parentElement.querySelector("output").textContent = words;
      slider.setAttribute("aria-valuetext", words);
    }
  }

  // What depends on the model, the hardware or the figures: lists, and a slider for each drafter.
  function fillLists() {
    const machine = named(data.machines, state.hardware), target = named(data.models, state.model);
    state.dtype = options($("dtype"), Object.keys(machine.steps).map((dtype) => [dtype, dtype]), state.dtype);
    const sizes = Object.keys(data.dtypes).map((dtype) => [dtype, dtype]);
    state.weights = options($("weights"), [["", "the same"], ...sizes], state.weights);
    const counts = [...new Set([1, 2, 4, 8, 16, 32, 64, state.devices || 1])]
      .filter((n) => n === 1 || (machine.linked && target.heads % n === 0));
    state.devices = Number(options($("devices"), [[0, "fewest"], ...counts.map((n) => [n, n])], state.devices));
    const preset = named(data.presets, state.preset), drafters = (preset || target).drafters;
    options($("shown"), [["", "the fastest drafter"], ...drafters.map((item) => [item.name, item.name])], $("shown").value);
    $("taus").replaceChildren(...drafters.map((item) => {
      const box = element("div", "", {class: "slider"}), id = `tau-${item.name}`;
      const slider = element("input", "", {id, type: "range", min: 1, max: TAU_K + 1, step: "any"});
      slider.addEventListener("input", () => { state.taus[item.name] = Number(slider.value); update(); });
      box.append(element("label", item.name, {for: id}), element("output", "", {for: id}), slider);
      // the arrow keys of a slider without steps move it too far
      slider.step = 0.01;
      return box;
    }));
    $("sources").textContent = preset
      ? `${preset.title}. Verification is bound by memory from ${number.format(preset.critical_context)} tokens on. `
        + `${preset.hoi} operations per byte. ${preset.note}`
      : `${machine.name}: ${machine.source}.`;
  }

  function lists() { fillLists(); update(); }

  let asked = 0;
  function update() {
    cancelAnimationFrame(asked);
    asked = requestAnimationFrame(draw);
  }

  function draw() {
    const here = world();
    showControls(here);
    const rows = [PLAIN, ...here.drafters].map((item) => ({item, found: cell(here, item, state.batch, state.context)}));
    const possible = rows.filter((row) => fits(here, row.found));
    const best = fastest(possible.length ? possible : rows);
    showTable(here, rows, best);
    showWords(here, best);
    PlanCharts.bars($("bars"), rows.map(({item, found}) =>
      ({name: item.name, colour: item.colour, value: found.throughput_multiplier})));
    showMap(here, here.drafters);
    showFront(here, here.drafters);
    document.body.dataset.drawn = `${Number(document.body.dataset.drawn || 0) + 1}`;
  }

  function place(name, value) {
    const [low, high] = RANGES[name];
    if (Number.isFinite(value) && value >= low) state[name] = Math.min(Math.round(value), high);
    update();
  }

  function listen() {
    for (const name of ["batch", "context"]) {
      const [low, high] = RANGES[name];
      Object.assign($(name), {min: 0, max: STEPS * Math.log2(high / low), step: 1});
      $(name).addEventListener("input", (event) => place(name, low * 2 ** (event.target.value / STEPS)));
      $(`${name}-number`).addEventListener("input", (event) => place(name, event.target.valueAsNumber));
      $(`${name}-number`).addEventListener("blur", update);
    }
    $("window").max = WINDOWS.length - 1;
    $("window").addEventListener("input", (event) => { state.window = WINDOWS[event.target.value]; update(); });
    $("k").addEventListener("input", (event) => { state.k = Number(event.target.value); update(); });
    $("best-k").addEventListener("change", (event) => { state.best_k = event.target.checked; update(); });
    $("price").addEventListener("input", (event) => { state.price = Math.max(0, event.target.valueAsNumber || 0); update(); });
    for (const name of ["hardware", "dtype", "weights"]) {
      $(name).addEventListener("change", (event) => { state[name] = event.target.value; lists(); });
    }
    for (const name of ["model", "preset"]) {
      $(name).addEventListener("change", (event) => { state[name] = event.target.value; state.taus = {}; lists(); });
    }
    $("preset").addEventListener("change", published);
    $("devices").addEventListener("change", (event) => { state.devices = Number(event.target.value); update(); });
    $("shown").addEventListener("change", update);
    $("reset").addEventListener("click", () => { state.taus = {}; update(); });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", update);
    addEventListener("resize", update);
  }

  // Figures are looked at as they were published: their k and window, and a point on their map.
  function published() {
    const preset = named(data.presets, state.preset);
    if (!preset) return;
    const within = (value, values) => Math.min(Math.max(value, values[0]), values[values.length - 1]);
    Object.assign(state, {k: preset.k, best_k: false, window: 0, batch: within(state.batch, preset.batches),
      context: within(state.context, preset.contexts)});
    update();
  }

  options($("preset"), [["", "Steeple's step model"], ...data.presets.map((p) => [p.name, p.title.split(":")[0]
    + (p.title.includes("70B") ? " (70B)" : "")])], state.preset);
  options($("model"), data.models.map((m) => [m.name, m.name]), state.model);
  options($("hardware"), data.machines.map((m) => [m.name, m.name]), state.hardware);
  $("price").value = state.price || "";
  listen();
  fillLists();
  draw();
  $("map").on("plotly_click", (event) => {
    const {x, y} = event.points[0], here = world();
    if (Number.isInteger(x) && Number.isInteger(y)) Object.assign(state, {batch: here.batches[y], context: here.contexts[x]});
    update();
  });
})();
