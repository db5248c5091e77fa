"use strict";
// The last requests, a row each: what they waited for, their prompt, and every round as a bar.

const timeline = (() => {
  const MOST = 50, HEIGHT = 30;
  const NAMES = { a: "accepted", r: "recovered", b: "bonus", p: "plain" };
  const body = byId("timeline").tBodies[0], heads = byId("timeline").tHead.rows[0].cells;
  const rows = new Map();  // id -> {row, canvas, request, rounds}
  let scale = 0, width = 0;

  // The letters of a round end with the model's own token, or with the text.
  const roundsOf = (letters) => letters.match(/a*[rbp]|a+$/g) ?? [];

  function add(request) {
    const rounds = roundsOf(request.origins);
    const canvas = make("canvas", { role: "img", "aria-label": words(request, rounds) });
    const texts = [request.outcome, request.drafter || "–", whole(request.prompt_tokens), whole(request.completion_tokens),
      request.tokens_per_round ? request.tokens_per_round.toFixed(2) : "–", seconds(request.seconds)];
    const row = make("tr", { title: request.id, "data-request": request.id });
    texts.forEach((text, place) => row.append(make(place ? "td" : "th",
      place ? { "data-label": heads[place].textContent } : { scope: "row" }, text)));
    row.append(make("td", {}, canvas));
    rows.set(request.id, { row, canvas, request, rounds });
    body.prepend(row);
  }

  function words(request, rounds) {
    const first = request.first_token_seconds, wait = request.waiting_seconds;
    return [wait == null ? "" : `waited ${seconds(wait)}, `,
      first == null ? "no token was written" : `first token after ${seconds(first)}, then ${Math.max(rounds.length - 1, 0)} rounds`,
      `, ended after ${seconds(request.seconds)}`].join("");
  }

  // Ends of the rounds in seconds from arrival: as the server tells them, else evenly between first token and end.
  function times({ request, rounds }) {
    if (request.round_seconds) return request.round_seconds;
    const first = request.first_token_seconds ?? request.seconds;
    const shown = request.origins.length / Math.max(request.completion_tokens, 1);
    const step = (request.seconds - first) * Math.min(shown, 1) / Math.max(rounds.length - 1, 1);
    return rounds.map((_, place) => first + place * step);
  }

  function draw(entry, colours) {
    const { canvas, request, rounds } = entry;
    const dots = window.devicePixelRatio || 1;
    canvas.width = width * dots;
    canvas.height = HEIGHT * dots;
    canvas.style.height = `${HEIGHT}px`;
    const pen = canvas.getContext("2d");
    pen.scale(dots, dots);
    const x = (time) => width * time / scale;
    const box = (colour, from, to, low, high) => {
      pen.fillStyle = colours[colour];
      pen.fillRect(x(from), HEIGHT * (1 - high), Math.max(x(to) - x(from), 0.75), HEIGHT * (high - low));
    };
    const ends = times(entry), first = ends[0] ?? request.seconds;
    const wait = Math.min(request.waiting_seconds ?? 0, first);
    box("waiting", 0, wait, 0, 0.35);
    box("prompt", wait, first, 0, 0.35);
    const most = Math.max(1, FACTS.nodes + 1);
    // On a line of their own where a round is narrower than a pixel, so that the highest of a pixel shows.
    for (let place = 1; place < rounds.length && place < ends.length; place += 1) {
      const letters = rounds[place], from = ends[place - 1], to = ends[place];
      const gap = x(to) - x(from) > 3 ? 1 : 0;
      const last = x(to) - gap < x(from) ? to : to - gap * scale / width;
      [...letters].forEach((letter, depth) => box(NAMES[letter], from, last, depth / most, (depth + 1) / most));
    }
  }

  function redraw() {
    const style = getComputedStyle(document.documentElement);
    const colours = Object.fromEntries([...Object.values(NAMES), "waiting", "prompt"].map(
      (name) => [name, style.getPropertyValue(`--${name}`).trim()]));
    for (const entry of rows.values()) draw(entry, colours);
  }

  function measure() {
    const any = rows.values().next().value;
    const now = any ? Math.floor(any.canvas.parentElement.clientWidth) - 8 : 0;
    const changed = now > 0 && now !== width;
    if (changed) width = now;
    return changed;
  }

  function show(recent) {
    const shown = recent.slice(-MOST), ids = new Set(shown.map((request) => request.id));
    let changed = false;
    for (const [id, entry] of rows) {
      if (ids.has(id)) continue;
      entry.row.remove();
      rows.delete(id);
    }
    for (const request of shown) {
      if (rows.has(request.id)) continue;
      add(request);
      changed = true;
    }
    const wanted = ceiling(Math.max(0, ...shown.map((request) => request.seconds)));
    if (wanted !== scale) {
      scale = wanted;
      changed = true;
    }
    put("scale", rows.size ? `(the whole width is ${scale < 1 ? `${whole(1000 * scale)} ms` : `${scale} s`})` : "");
    if (measure() || changed) redraw();
  }

  const again = () => { if (rows.size) { measure(); redraw(); } };
  addEventListener("resize", again);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
  return { show };
})();
