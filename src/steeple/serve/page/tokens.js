"use strict";
// One text that is being written: a span per token, coloured by how it came, and the counts of it.

const ORIGINS = {
  accepted: "drafted, and accepted by the model",
  recovered: "the model's own, where it refused the draft",
  bonus: "the model's own, behind a draft that was accepted to its end",
  plain: "the model's own; nothing was drafted",
};

const infos = new WeakMap();  // span -> what its token was

class Run {
  // place: the element that gets the spans.
  constructor(place) {
    this.place = place;
    this.text = "";       // as the server says it, certain so far
    this.pieces = "";     // the texts of all tokens
    this.spans = [];
    this.rounds = 0;
    this.counts = { accepted: 0, recovered: 0, bonus: 0, plain: 0 };
    this.firstAt = this.lastAt = 0;
    this.later = 0;       // tokens behind those of the first step
  }

  // A chunk is what one step wrote for this request.
  add(text, tokens) {
    this.text += text;
    if (!tokens.length) return;
    this.lastAt = performance.now();
    if (this.rounds === 0) this.firstAt = this.lastAt;
    else this.later += tokens.length;
    this.rounds += 1;
    const accepted = tokens.filter((token) => token.origin === "accepted").length;
    const fresh = document.createDocumentFragment();
    for (const token of tokens) fresh.append(this.span(token, accepted));
    this.place.append(fresh);
  }

  span({ id, text, origin }, accepted) {
    const known = Object.hasOwn(ORIGINS, origin) ? origin : "plain";
    const span = make("span", { "data-origin": known, title: ORIGINS[known] }, text);
    if (text.startsWith("\n")) span.classList.add("break");
    this.counts[known] += 1;
    this.pieces += text;
    this.spans.push(span);
    infos.set(span, { id, text, origin: known, number: this.spans.length, round: this.rounds, accepted });
    return span;
  }

  // The text ends where the server says: a stop string cuts the tokens, and half a character stays in the last one.
  finish() {
    if (this.text === this.pieces) return;
    let same = 0;
    while (same < this.text.length && this.text[same] === this.pieces[same]) same += 1;
    let left = same;
    for (const span of this.spans) {
      const own = span.textContent;
      if (own.length > left) put(span, own.slice(0, left));
      left = Math.max(left - own.length, 0);
    }
    (this.spans.at(-1) ?? this.place).append(this.text.slice(same));
  }

  get tokens() { return this.spans.length; }

  // Per round behind the step that read the prompt, which always writes one token.
  get tau() { return this.rounds > 1 ? this.later / (this.rounds - 1) : null; }

  get speed() { return this.lastAt > this.firstAt ? 1000 * this.later / (this.lastAt - this.firstAt) : null; }
}

function showCounts(run) {
  put("count-tokens", String(run.tokens));
  put("count-tau", run.tau === null ? "–" : run.tau.toFixed(2));
  put("count-speed", run.speed === null ? "–" : rate(run.speed));
  for (const [name, count] of Object.entries(run.counts)) put(`count-${name}`, String(count));
}

// Pointing at a token, or going there by arrow keys, tells how it came.
(() => {
  const talk = byId("talk");
  let chosen = null;

  function choose(span) {
    if (!span || span === chosen) return;
    chosen?.classList.remove("chosen");
    chosen = span;
    chosen.classList.add("chosen");
    const info = infos.get(span);
    const shown = info.text.replaceAll("\n", "\u21B5").replaceAll("\t", "\u21E5");
    put("token", `Token ${info.number}, \u201C${shown}\u201D (id ${info.id}): ${ORIGINS[info.origin]}. `
      + `Round ${info.round}, in which ${info.accepted} drafted ${info.accepted === 1 ? "token was" : "tokens were"} accepted.`);
  }

  const under = (event) => event.target instanceof Element ? event.target.closest("span[data-origin]") : null;
  talk.addEventListener("mouseover", (event) => choose(under(event)));
  talk.addEventListener("click", (event) => choose(under(event)));
  talk.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const spans = [...talk.querySelectorAll("span[data-origin]")].filter((span) => span.textContent);
    const place = chosen ? spans.indexOf(chosen) + step : 0;
    choose(spans[Math.min(Math.max(place, 0), spans.length - 1)]);
    chosen?.scrollIntoView({ block: "nearest" });
  });
})();
