"use strict";
// The live numbers: /stats is asked once a second, and what it says is shown.

const EVERY = 1000, SLOWEST = 8000, WINDOW = 60;

// Sums of the engine's life, of which the page shows what was added within the last minute.
function sumsOf(stats) {
  const { rounds, tokens_per_round: tau, drafted, accepted } = stats.speculation;
  return { at: stats.uptime_seconds, rounds, written: tau * rounds, drafted, accepted,
    draft: stats.engine.draft_seconds, rest: stats.engine.verify_seconds + stats.engine.other_seconds };
}

// tau, dt = a round in plain steps if checking took no longer than a plain step, and the gain that follows.
function estimate(now, before) {
  const rounds = now.rounds - before.rounds, rest = now.rest - before.rest;
  if (!(rounds > 0 && rest > 0)) return null;
  const drafting = (now.draft - before.draft) / (now.draft - before.draft + rest);
  const tau = (now.written - before.written) / rounds, dt = 1 / (1 - drafting);
  return { tau, dt, drafting, gain: tau / dt };
}

const numbers = (() => {
  const NOTHING = { rounds: 0, written: 0, drafted: 0, accepted: 0, draft: 0, rest: 0 };
  let history = [], timer = 0, pause = EVERY, asking = false;

  function estimated(stats) {
    const now = sumsOf(stats);
    if (history.length && now.at < history.at(-1).at) history = [];  // another server by now
    history.push(now);
    while (history.length > 1 && now.at - history[1].at >= WINDOW) history.shift();
    return estimate(now, history[0]) ?? estimate(now, NOTHING);
  }

  function showPace(stats, found) {
    const list = stats.seconds;
    const now = Math.floor(stats.now ?? (list.length ? list.at(-1).at + 1 : 0));
    const recent = list.filter((s) => s.at < now && now - s.at <= SPAN);  // the running second is not over yet
    pace.show(recent.map((s) => ({ at: now - s.at, own: s.tokens - s.accepted, accepted: s.accepted,
      plain: found ? s.tokens / found.gain : null })));
  }

  function showTiles(stats, found) {
    const speed = stats.rate.tokens_per_second;
    put("speed", rate(speed));
    put("plain", found ? rate(speed / found.gain) : "–");
    put("gain", found ? `gain at most ${found.gain.toFixed(2)}x` : "no rounds yet");
    put("tau", found ? found.tau.toFixed(2) : "–");
    put("tau-all", `since the start: ${stats.speculation.rounds ? stats.speculation.tokens_per_round.toFixed(2) : "–"}`);
    put("running", `${stats.queue.running} of ${stats.batch_size}`);
    put("waiting", `waiting: ${whole(stats.queue.waiting)}`);
    const { blocks, held, block_size: size } = stats.kv;
    put("kv", percent(held / blocks));
    put("kv-sub", `of ${whole(blocks * size)} positions`);
    const ended = Object.values(stats.outcomes).reduce((sum, count) => sum + count, 0);
    const bad = ["error", "timeout", "refused"].reduce((sum, name) => sum + (stats.outcomes[name] ?? 0), 0);
    put("done", whole(ended));
    put("bad", `errors: ${whole(bad)}`);
    byId("bad").classList.toggle("warn", bad > 0);
    put("split", found ? `Now: tau = ${found.tau.toFixed(2)}, drafting ${percent(found.drafting)} of the decode steps' `
      + `time, dt = ${found.dt.toFixed(2)}.` : "");
  }

  function showTables(stats) {
    showAcceptance(stats.speculation.acceptance_by_position);
    fill(byId("drafters"), Object.entries(stats.by_drafter).map(([name, one]) => [name, one.tokens_per_round.toFixed(2),
      one.drafted ? percent(one.accepted / one.drafted) : "–", whole(one.rounds)]));
    const ends = Object.entries(stats.outcomes).map(([name, count]) => `${name} ${whole(count)}`);
    if (stats.failures) ends.push(`failed steps ${whole(stats.failures)}`);
    if (stats.turned_away) ends.push(`turned away by a full queue ${whole(stats.turned_away)}`);
    put("outcomes", ends.length ? `Since the start: ${ends.join(", ")}.` : "None yet.");
    showMemory(stats.memory);
  }

  function showMemory(memory) {
    byId("memory-parts").hidden = !memory;
    if (!memory) return put("memory", "This engine was built without a plan of its memory.");
    const { allocated, predicted } = memory;
    put("memory", `${bytes(memory.allocated_bytes)} held, ${bytes(memory.predicted_bytes)} planned; at most `
      + `${bytes(memory.most_bytes)} in the costliest step${memory.budget_bytes
        ? `, of a budget of ${bytes(memory.budget_bytes)}` : ""}. ${memory.warning ?? ""}`);
    const names = Object.keys({ ...predicted, ...allocated });
    const rows = names.filter((name) => predicted[name] || allocated[name]);
    fill(byId("memory-parts"), rows.map((name) => [name.replaceAll("_", " "), bytes(predicted[name] ?? 0),
      name in allocated ? bytes(allocated[name]) : "–"]));
  }

  function health(state, text) {
    byId("health").dataset.state = state;
    put("health", text);
  }

  function show(stats) {
    const found = estimated(stats);
    health(stats.trouble ? "bad" : stats.ready ? "good" : "wait", stats.trouble || (stats.ready ? "ready" : "shutting down"));
    showTiles(stats, found);
    showPace(stats, found);
    showTables(stats);
    timeline.show(stats.recent);
    document.body.dataset.polls = String(Number(document.body.dataset.polls ?? 0) + 1);
  }

  async function poll() {
    clearTimeout(timer);
    if (asking || document.hidden) return;
    asking = true;
    let again = true;
    try {
      const response = await api.ask("stats", { signal: AbortSignal.timeout(10000) });
      if (response.ok) {
        show(await response.json());
        pause = EVERY;
      } else {
        health("bad", await api.refusal(response));
        again = response.status !== 401;  // not before there is a key
        pause = Math.min(2 * pause, SLOWEST);
      }
    } catch {
      health("bad", "no connection");
      pause = Math.min(2 * pause, SLOWEST);
    }
    asking = false;
    if (again) timer = setTimeout(poll, pause);
  }

  document.addEventListener("visibilitychange", poll);
  put("serving", `${FACTS.model}, ${FACTS.nodes ? `drafter ${FACTS.drafter}, up to ${FACTS.nodes} a round` : "plain"}`);
  document.title = `${FACTS.model} · Steeple`;
  return { poll };
})();
