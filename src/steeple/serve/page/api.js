"use strict";
// What the page asks of its server. The API key lives here and nowhere else.

const FACTS = JSON.parse(document.getElementById("facts").textContent);

const api = (() => {
  let key = "";
  let onKey = () => {};

  // Paths are relative, so that the page works behind a proxy that puts the server into a folder.
  function ask(path, options = {}) {
    const headers = { ...options.headers };
    if (key) headers.Authorization = `Bearer ${key}`;
    return fetch(path, { ...options, headers, cache: "no-store", redirect: "error" });
  }

  async function refusal(response) {
    let message = "";
    try {
      const body = await response.json();
      if (body.error && typeof body.error.message === "string") message = body.error.message;
    } catch { /* no JSON: a proxy's answer; the status must do */ }
    const wait = response.headers.get("Retry-After");
    if (response.status === 401) askForKey();
    return `${response.status}: ${message || response.statusText || "no reason given"}`
      + (wait && !message.includes(wait) ? ` Try again in ${wait} s.` : "");
  }

  function askForKey() {
    document.getElementById("key-form").hidden = false;
  }

  document.getElementById("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const field = document.getElementById("key");
    key = field.value.trim();
    // Headers hold bytes; anything else would make fetch throw before it asks.
    if (/[^\x21-\x7e]/.test(key)) key = "";
    field.value = "";
    event.currentTarget.hidden = key !== "";
    onKey();
  });

  return { ask, refusal, whenKeyed: (then) => { onKey = then; } };
})();

// Events of a stream, as they come. Throws what the connection throws, an abort included.
async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const pieces = (rest + value).split("\n\n");
    rest = pieces.pop();
    for (const piece of pieces) {
      if (!piece.startsWith("data: ")) continue;
      const data = piece.slice(6);
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}
