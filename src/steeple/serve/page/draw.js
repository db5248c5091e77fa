"use strict";
// Elements, numbers as text, and two small charts. Text of the server only ever becomes text nodes.

const byId = (id) => document.getElementById(id);

function put(id, text) {
  const node = typeof id === "string" ? byId(id) : id;
  if (node.textContent !== text) node.textContent = text;
}

function make(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

function drawn(name, attributes) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  return node;
}

const whole = (value) => Math.round(value).toLocaleString("en");
const rate = (value) => value >= 100 ? whole(value) : value.toFixed(1);
const percent = (share) => `${(100 * share).toFixed(share < 0.0995 && share > 0 ? 1 : 0)} %`;

function bytes(count) {
  for (const [unit, size] of [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]]) {
    if (count >= size) return `${(count / size).toFixed(count >= 100 * size ? 0 : 1)} ${unit}`;
  }
  return `${count} B`;
}

function seconds(value) {
  return value < 1 ? `${(1000 * value).toFixed(value < 0.01 ? 1 : 0)} ms` : `${value.toFixed(value < 10 ? 2 : 1)} s`;
}

// The next of 1, 2, 5, 10, ... that is not below value, so that a scale stays as it is for a while.
function ceiling(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((step) => step * power).find((step) => step >= value * (1 - 1e-9));
}

// Rows of a table, kept and changed in place. cells: [[text, ...], ...]; the first of a row names it.
function fill(table, cells) {
  const body = table.tBodies[0];
  while (body.rows.length > cells.length) body.deleteRow(-1);
  cells.forEach((texts, place) => {
    if (place === body.rows.length) {
      const row = body.insertRow();
      texts.forEach((_, column) => row.append(make(column ? "td" : "th", column ? {} : { scope: "row" })));
    }
    texts.forEach((text, column) => put(body.rows[place].cells[column], text));
  });
}

// A chart of the last SPAN seconds. series: [{at, own, accepted, plain}], at in seconds before now.
const SPAN = 120;
const pace = (() => {
  const image = drawn("svg", { viewBox: `0 0 ${SPAN} 100`, preserveAspectRatio: "none", "aria-hidden": "true" });
  const parts = ["own", "accepted", "plain"].map((name) => drawn("path", { "data-series": name }));
  const top = make("span", { class: "top" }), text = make("p", { class: "hidden" });
  image.append(...parts);
  byId("pace").append(image, top, make("span", { class: "left" }, "2 min ago"), make("span", { class: "right" }, "now"), text);

  function show(series) {
    const most = ceiling(Math.max(1, ...series.map((s) => Math.max(s.own + s.accepted, s.plain ?? 0))));
    const y = (value) => (100 - 100 * value / most).toFixed(2);
    const box = (s, low, high) => `M${SPAN - s.at},${y(low)}h-.92V${y(high)}h.92z`;
    parts[0].setAttribute("d", series.map((s) => box(s, 0, s.own)).join(""));
    parts[1].setAttribute("d", series.map((s) => s.accepted ? box(s, s.own, s.own + s.accepted) : "").join(""));
    parts[2].setAttribute("d", series.map((s) => s.plain === null ? "" : `M${SPAN - s.at},${y(s.plain)}h-1`).join(""));
    put(top, `${whole(most)} tokens/s`);
    const total = series.reduce((sum, s) => sum + s.own + s.accepted, 0);
    put(text, `${whole(total)} tokens were written in the last two minutes.`);
  }
  return { show };
})();

// Bars of shares by place in the draft.
function showAcceptance(shares) {
  const list = byId("acceptance");
  list.classList.toggle("many", shares.length > 12);
  while (list.children.length > shares.length) list.lastChild.remove();
  shares.forEach((share, place) => {
    if (place === list.children.length) {
      const bar = make("li", {}, make("span", { class: "value" }), make("span", { class: "bar" }));
      bar.append(make("span", { class: "place" }, String(place + 1)));
      list.append(bar);
    }
    const [value, bar] = list.children[place].children;
    put(value, percent(share));
    bar.style.height = `${(75 * share).toFixed(2)}%`;
    list.children[place].title = `place ${place + 1}: ${percent(share)} of all rounds`;
  });
}
