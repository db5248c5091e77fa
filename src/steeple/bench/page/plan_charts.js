// The three charts of the page. They take what was computed; nothing is computed here but places and colours.
"use strict";

const PlanCharts = (() => {
  const TICKS = [0.12, 0.25, 0.5, 0.71, 1, 1.4, 2, 2.8, 4, 8, 16];
  const LEAST_HALF = 1; // octaves to each side of 1 that the colours span at least
  const CONFIG = {displayModeBar: false, responsive: true};
  const ROOM = 52; // pixels that a tile needs for its number

  function theme() {
    const dark = matchMedia("(prefers-color-scheme: dark)").matches;
    const value = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
    return {
      ink: value("--ink"), soft: value("--soft"), line: value("--line"), paper: value("--paper"),
      // red below 1, blue above it, the page's own ground between
      scale: dark
        ? [[0, "#ff8f78"], [0.25, "#a3473a"], [0.5, "#2a2d34"], [0.75, "#2f6fa3"], [1, "#86c8ff"]]
        : [[0, "#a5152a"], [0.25, "#e58a6f"], [0.5, "#f4f4f4"], [0.75, "#74b0d8"], [1, "#135a9c"]],
    };
  }

  function layout(look, more) {
    return {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, dragmode: false,
      font: {family: "system-ui, sans-serif", size: 13, color: look.ink},
      hoverlabel: {bgcolor: look.paper, bordercolor: look.soft, font: {color: look.ink}},
      ...more,
    };
  }

  function axis(look, title, more) {
    return {title: {text: title, standoff: 8}, gridcolor: look.line, linecolor: look.line, zeroline: false,
      automargin: true, fixedrange: true, ...more};
  }

  function times(value) { return value.toFixed(2); }

  // A drafter's settings on lines of their own.
  function broken(name) { return name.replace(":", ":<br>").replaceAll("+", "<br>+"); }

  // rows: [{name, colour, value}], the first one on top
  function bars(place, rows) {
    const look = theme(), top = Math.max(1, ...rows.map((row) => row.value));
    const lines = Math.max(...rows.map((row) => broken(row.name).split("<br>").length));
    place.style.height = `${Math.max(34, 17 * lines) * rows.length + 66}px`;
    Plotly.react(place, [{
      type: "bar", orientation: "h", y: rows.map((row) => broken(row.name)), x: rows.map((row) => row.value),
      marker: {color: rows.map((row) => row.colour)}, text: rows.map((row) => times(row.value)),
      textposition: "outside", cliponaxis: false, hoverinfo: "skip", width: 0.62,
    }], layout(look, {
      margin: {l: 10, r: 20, t: 4, b: 44},
      xaxis: axis(look, "throughput, times plain decoding", {range: [0, top * 1.14]}),
      yaxis: axis(look, "", {autorange: "reversed", type: "category", ticksuffix: " "}),
      shapes: [{type: "line", x0: 1, x1: 1, yref: "paper", y0: 0, y1: 1, line: {color: look.soft, width: 1, dash: "dash"}}],
    }), CONFIG);
  }

  // Where value lies among the rising values of an axis, in tiles, log-interpolated; NaN outside.
  function tile(values, value) {
    if (value < values[0] || value > values[values.length - 1]) return NaN;
    const next = Math.max(1, values.findIndex((known) => known >= value));
    const [low, high] = [Math.log(values[next - 1]), Math.log(values[next])];
    return next - 1 + (Math.log(value) - low) / (high - low);
  }

  function short(value) {
    if (value >= 1 << 20 && value % (1 << 20) === 0) return `${value >> 20}Mi`;
    return value >= 1024 && value % 1024 === 0 ? `${value >> 10}Ki` : `${value}`;
  }

  // A discrete scale: one colour from each edge to the next.
  function steps(colours) {
    return colours.flatMap((colour, i) => [[i / colours.length, colour], [(i + 1) / colours.length, colour]]);
  }

  function ratioTrace(grid, look) {
    const known = grid.cells.flat().filter((cell) => cell).map((cell) => Math.abs(Math.log2(cell.value)));
    const half = Math.max(LEAST_HALF, ...known);
    const ticks = TICKS.filter((tick) => Math.abs(Math.log2(tick)) <= half);
    return {
      z: grid.cells.map((row) => row.map((cell) => (cell ? Math.log2(cell.value) : null))),
      zmin: -half, zmax: half, colorscale: look.scale,
      colorbar: {tickvals: ticks.map(Math.log2), ticktext: ticks.map(String)},
    };
  }

  function choiceTrace(grid) {
    const count = grid.choices.length;
    return {
      z: grid.cells.map((row) => row.map((cell) => (cell ? cell.choice : null))),
      zmin: -0.5, zmax: count - 0.5, colorscale: steps(grid.choices.map((choice) => choice.colour)), showscale: false,
    };
  }

  // grid: {batches, contexts, cells[batch][context]: {value, choice, text} or null, choices or null}
  function heatmap(place, grid, point) {
    const look = theme(), narrow = place.clientWidth < 600;
    const trace = grid.choices ? choiceTrace(grid) : ratioTrace(grid, look);
    const roomy = place.clientWidth / grid.contexts.length > ROOM;
    const labels = (values) => ({tickvals: values.map((_, i) => i), ticktext: values.map(short),
      range: [-0.5, values.length - 0.5], showgrid: false, ticks: "", tickangle: 0,
      tickfont: {size: narrow ? 10 : 12}});
    Plotly.react(place, [{
      type: "heatmap", ...trace, xgap: 1, ygap: 1, hoverongaps: false, hoverinfo: "text",
      text: grid.cells.map((row) => row.map((cell) => (cell ? times(cell.value) : ""))),
      hovertext: grid.cells.map((row) => row.map((cell) => (cell ? cell.text : ""))),
      hovertemplate: "%{hovertext}<extra></extra>",
      texttemplate: roomy ? "%{text}" : "", textfont: {size: 11},
      colorbar: {...trace.colorbar, thickness: 12, len: 1, outlinewidth: 0, tickfont: {color: look.ink, size: narrow ? 10 : 12}},
    }, {
      type: "scatter", mode: "markers", hoverinfo: "skip",
      x: [tile(grid.contexts, point.context)], y: [tile(grid.batches, point.batch)],
      marker: {symbol: "circle-open", size: 32, color: look.ink, line: {width: 2.5, color: look.ink}},
    }], layout(look, {
      margin: {l: 10, r: 10, t: 8, b: 44},
      xaxis: axis(look, "context, tokens of each request", labels(narrow ? thinned(grid.contexts) : grid.contexts)),
      yaxis: axis(look, "batch, requests", labels(grid.batches)),
    }), CONFIG);
  }

  // Every second label; the places stay.
  function thinned(values) {
    return values.map((value, i) => (i % 2 ? "" : value));
  }

  // 1, 2, 5 in every decade, or the decades alone where there would be more than most of them.
  function logTicks(values, most) {
    const low = Math.floor(Math.log10(Math.min(...values))), high = Math.ceil(Math.log10(Math.max(...values)));
    if (!Number.isFinite(low + high)) return {};
    const decades = Array.from({length: high - low + 1}, (_, i) => low + i);
    const every = decades.flatMap((power) => [1, 2, 5].map((digit) => digit * 10 ** power));
    const inside = every.filter((tick) => tick >= Math.min(...values) / 2 && tick <= Math.max(...values) * 2);
    const ticks = inside.length > most ? inside.filter((tick) => tick.toExponential(0).startsWith("1")) : inside;
    const words = (tick) => Number(tick.toPrecision(1)).toLocaleString("en-US", {maximumFractionDigits: 9});
    return {tickvals: ticks, ticktext: ticks.map(words)};
  }

  // lines: [{name, colour, points: [{x, y, batch}], now: {x, y} or null}]
  function front(place, lines, pareto, units) {
    const look = theme(), narrow = place.clientWidth < 600;
    const symbols = ["circle", "square", "diamond", "triangle-up", "cross", "x"];
    const traces = lines.map((line, i) => ({
      type: "scatter", mode: "lines+markers", name: broken(line.name), x: line.points.map((p) => p.x),
      y: line.points.map((p) => p.y), customdata: line.points.map((p) => p.batch),
      hovertemplate: `${line.name}, batch %{customdata}<br>%{x:.3g} ${units.x}<br>%{y:.4g} ${units.y}<extra></extra>`,
      line: {color: line.colour, width: 2}, marker: {symbol: symbols[i % symbols.length], size: 6},
    }));
    const steps = {
      type: "scatter", mode: "lines", name: "Pareto front", x: pareto.map((p) => p.x), y: pareto.map((p) => p.y),
      line: {color: look.ink, width: 1.5, dash: "dot", shape: "hv"}, hoverinfo: "skip",
    };
    const now = lines.map((line, i) => ({line, i})).filter(({line}) => line.now).map(({line, i}) => ({
      type: "scatter", mode: "markers", showlegend: false, hoverinfo: "skip", x: [line.now.x], y: [line.now.y],
      marker: {symbol: symbols[i % symbols.length], size: 14, color: line.colour, line: {color: look.ink, width: 2}},
    }));
    const known = lines.flatMap((line) => line.points);
    const log = (values, most) => ({type: "log", tickangle: 0, ...logTicks(values, most)});
    Plotly.react(place, [...traces, steps, ...now], layout(look, {
      margin: {l: 10, r: 14, t: 8, b: 44}, showlegend: true,
      legend: narrow
        ? {orientation: "h", y: -0.24, x: 0, font: {size: 12}}
        : {x: 1.01, y: 1, font: {size: 13}},
      xaxis: axis(look, units.xTitle, log(known.map((p) => p.x), narrow ? 5 : 12)),
      yaxis: axis(look, units.yTitle, log(known.map((p) => p.y), 12)),
    }), CONFIG);
  }

  return {bars, heatmap, front};
})();
