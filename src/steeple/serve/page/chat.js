"use strict";
// The form: one request at a time, streamed, with the origin of every token; it can be stopped.

const chat = (() => {
  const EXAMPLES = { completion: "def area(", chat: "Write a function that adds two numbers." };
  const form = byId("ask"), prompt = byId("prompt"), talk = byId("talk");
  let messages = [], running = null;

  const mode = () => form.elements.mode.value;
  const number = (id) => byId(id).value.trim() === "" ? null : Number(byId(id).value);

  function body(text) {
    const drafter = byId("drafter").value, k = number("k");
    const speculative = { origins: true };
    if (drafter) speculative.drafter = drafter;
    if (k !== null && drafter !== FACTS.plain) speculative.k = k;
    const wanted = { stream: true, max_tokens: number("max"), temperature: number("temperature"), speculative };
    if (number("seed") !== null) wanted.seed = number("seed");
    return mode() === "chat"
      ? { ...wanted, messages: [...messages, { role: "user", content: text }] } : { ...wanted, prompt: text };
  }

  function open(text) {
    const given = make("span", { class: "given" }, text);
    const written = make("pre", { class: "text" });
    const part = make("article", { "data-mode": mode() });
    if (mode() === "chat") part.append(make("p", { class: "who" }, "You"), make("pre", {}, given), make("p", { class: "who" }, "Model"));
    else written.append(given);
    const place = make("span", { class: "answer" });
    written.append(place);
    part.append(written);
    talk.append(part);
    talk.scrollTop = talk.scrollHeight;
    return new Run(place);
  }

  // Follow the text unless somebody has scrolled back.
  function follow(change) {
    const near = talk.scrollHeight - talk.scrollTop - talk.clientHeight < 40;
    change();
    if (near) talk.scrollTop = talk.scrollHeight;
  }

  async function stream(text, run, signal) {
    const path = mode() === "chat" ? "v1/chat/completions" : "v1/completions";
    const response = await api.ask(path, { method: "POST", signal, body: JSON.stringify(body(text)),
      headers: { "Content-Type": "application/json" } });
    if (!response.ok) throw new Error(await api.refusal(response));
    let finish = null;
    for await (const event of eventsOf(response)) {
      if (event.error) throw new Error(String(event.error.message));
      for (const choice of event.choices ?? []) {
        follow(() => run.add(choice.text ?? choice.delta?.content ?? "", choice.speculative?.tokens ?? []));
        finish = choice.finish_reason ?? finish;
      }
      showCounts(run);
    }
    if (finish === null) throw new Error("the connection ended before the text did.");
    run.finish();
    return finish;
  }

  function busy(now) {
    byId("send").disabled = now;
    byId("clear").disabled = now;
    for (const radio of form.elements.mode) radio.disabled = now;
    byId("stop").disabled = !now;
    talk.setAttribute("aria-busy", String(now));
  }

  function say(text, bad = false) {
    put("status", text);
    byId("status").classList.toggle("warn", bad);
  }

  const ENDS = { length: "as many tokens as were asked for", stop: "the model ended the text" };

  async function write(text) {
    const run = open(text);
    running = new AbortController();
    busy(true);
    say("Writing.");
    showCounts(run);
    try {
      const finish = await stream(text, run, running.signal);
      say(`Done: ${run.tokens} tokens; ${ENDS[finish] ?? finish}.`);
    } catch (error) {
      if (running.signal.aborted) say(`Stopped after ${run.tokens} tokens.`);
      else say(error instanceof TypeError ? "No connection to the server." : error.message, true);
    }
    if (!run.tokens) talk.lastChild.remove();
    else if (mode() === "chat") {
      messages.push({ role: "user", content: text }, { role: "assistant", content: run.text });
      prompt.value = "";
    }
    running = null;
    busy(false);
  }

  function clear() {
    messages = [];
    talk.replaceChildren();
    say("");
  }

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (!running && prompt.value) write(prompt.value);
  });
  form.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") running?.abort(); });
  byId("stop").addEventListener("click", () => running?.abort());
  byId("clear").addEventListener("click", clear);
  for (const radio of form.elements.mode) {
    radio.addEventListener("change", () => {
      clear();
      if (Object.values(EXAMPLES).includes(prompt.value) || !prompt.value) prompt.value = EXAMPLES[mode()];
    });
  }

  prompt.value = EXAMPLES[mode()];
  byId("drafter").append(make("option", { value: "" }, FACTS.nodes ? FACTS.drafter : "none"));
  if (FACTS.nodes) byId("drafter").append(make("option", { value: FACTS.plain }, "none (plain)"));
  byId("k").max = String(Math.max(FACTS.nodes, 1));
  byId("k").disabled = !FACTS.nodes;
  byId("max").max = String(FACTS.context);
  api.whenKeyed(() => { say(""); numbers.poll(); });
  numbers.poll();
  return { write };
})();
