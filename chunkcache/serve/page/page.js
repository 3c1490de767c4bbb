"use strict";
const POLL_MS = 1000;
const STAGES = ["queue", "tokenise", "lookup", "compute", "load", "rerotate", "select", "recompute", "head", "other"];
const STATES = {
  exact: "exact: full prefill would compute the same",
  reused: "reused: stored elsewhere, put in place as it is",
  recomputed: "recomputed: put in place, then computed again",
  computed: "computed with the prompt",
};
const at = (id) => document.getElementById(id);
const make = (tag, properties = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
};
const duration = (s) => s >= 1 ? `${s.toPrecision(3)} s` : s >= 0.01 ? `${Math.round(s * 1000)} ms` : `${(s * 1000).toFixed(1)} ms`;
const bytes = (n) => {
  const unit = Math.min(4, n > 0 ? Math.floor(Math.log2(n) / 10) : 0);
  return `${(n / 1024 ** unit).toFixed(unit && n / 1024 ** unit < 100 ? 1 : 0)} ${["B", "KiB", "MiB", "GiB", "TiB"][unit]}`;
};
const entries = (n) => n === 1 ? "1 entry" : `${n.toLocaleString()} entries`;
const percent = (share) => `${(share * 100).toFixed(share < 0.1 ? 2 : 0)} %`;
const clock = (seconds) => new Date(seconds * 1000).toLocaleTimeString();

// --- what the server is asked

const KEY = "chunkcache-key";
const ask = async (path, options = {}) => {
  const key = sessionStorage.getItem(KEY);
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const response = await fetch(`dashboard/api/${path}`, { ...options, headers });
  const body = await response.json();
  if (!response.ok) throw Object.assign(new Error(body.error?.message ?? response.statusText), { status: response.status });
  return body;
};

const locked = (refused) => {
  at("login").hidden = !refused;
  at("main").hidden = at("facts").hidden = refused;
  if (refused && sessionStorage.getItem(KEY)) {
    at("refused").textContent = "This key is not known to the server.";
    sessionStorage.removeItem(KEY);
  }
};

// --- requests

const rows = new Map();
let chosen = null;

const segments = (request, longest) => {
  const stages = STAGES.map((name) => [name, Math.max(0, request.stages_s?.[name] ?? 0)]);
  const told = stages.filter(([, seconds]) => seconds > 0).map(([name, seconds]) => `${name} ${duration(seconds)}`);
  const bar = make("div", { className: "ttft", role: "img", ariaLabel: `Time to the first token: ${told.join(", ")}` });
  for (const [name, seconds] of stages) {
    const part = make("i", { className: name, title: `${name}: ${duration(seconds)}` });
    part.style.width = `${(100 * seconds) / longest}%`;
    if (seconds > 0) bar.append(part);
  }
  return bar;
};

const line = (request, longest) => {
  const failed = request.error || request.status >= 400;
  const end = request.error ?? (request.state !== "done" ? request.state : request.client_gone ? "client gone" : request.finish?.join(", "));
  const top = make("div", { className: "top" },
    make("b", { textContent: clock(request.at) }),
    make("span", { textContent: `${(request.cached_tokens ?? 0).toLocaleString()} of ${(request.prompt_tokens ?? 0).toLocaleString()} tokens cached` }));
  if (request.chunks) top.append(make("span", { textContent: `${request.hits} of ${request.chunks} chunks found` }));
  if (request.completion_tokens) top.append(make("span", { textContent: `${request.completion_tokens} out` }));
  top.append(make("span", { className: failed ? "end failed" : "end", textContent: request.ttft_s ? `${duration(request.ttft_s)} · ${end}` : end ?? "" }));
  return [top, ...(request.stages_s ? [segments(request, longest)] : [])];
};

const showRequests = (requests) => {
  const longest = Math.max(1e-6, ...requests.map((request) => request.ttft_s ?? 0));
  const list = at("requests");
  const seen = new Set();
  requests.forEach((request, index) => {
    seen.add(request.number);
    const said = JSON.stringify([request.state === "done" ? { ...request, duration_s: 0 } : request, longest]);
    let row = rows.get(request.number);
    if (!row) {
      const button = make("button", { type: "button" });
      button.onclick = () => open(request.number);
      row = { item: make("li", {}, button), button, said: "" };
      rows.set(request.number, row);
    }
    if (row.said !== said) {
      row.button.replaceChildren(...line(request, longest));
      row.said = said;
    }
    row.button.disabled = !request.text;
    row.button.ariaCurrent = String(request.number === chosen);
    if (list.children[index] !== row.item) list.insertBefore(row.item, list.children[index] ?? null);
  });
  for (const [number, row] of rows) {
    if (!seen.has(number)) {
      row.item.remove();
      rows.delete(number);
    }
  }
  at("idle").hidden = requests.length > 0;
};

const cells = (values, numeric) => make("tr", {}, ...values.map((value, index) =>
  make(index ? "td" : "th", { textContent: value, className: numeric.includes(index) ? "num" : "", ...(index ? {} : { scope: "row" }) })));

const showState = (state) => {
  const facts = { Model: state.model, Policy: state.policy, ...(state.tenant ? { Tenant: state.tenant } : {}) };
  at("facts").replaceChildren(...Object.entries(facts).map(([name, value]) =>
    make("div", {}, make("dt", { textContent: name }), make("dd", { textContent: value }))));
  showRequests(state.requests);
  const chunks = state.sources.reduce((sum, each) => sum + each.chunks, 0);
  at("sources").replaceChildren(...state.sources.map((each) =>
    cells([each.source, each.chunks.toLocaleString(), percent(each.chunks / chunks), each.tokens.toLocaleString()], [1, 2, 3])));
};

// --- one prompt

let tokens = [];
let current = -1;

const describe = (index) => {
  const token = tokens[index];
  const looked = token.attention === null ? "" : `, ${percent(token.attention)} of the question’s attention`;
  return `Token ${index + 1}: ${STATES[token.state]}${looked}`;
};

const move = (index) => {
  tokens[current]?.element.classList.remove("at");
  current = Math.max(0, Math.min(tokens.length - 1, index));
  tokens[current].element.classList.add("at");
  tokens[current].element.scrollIntoView({ block: "nearest" });
  at("token").textContent = describe(current);
};

const spans = (shown) => {
  const states = shown.states.flatMap(([state, length]) => Array(length).fill(state));
  const inChunks = new Set(shown.chunks.flatMap((chunk) => Array.from({ length: chunk.tokens }, (_, n) => chunk.start + n)));
  const seen = (shown.attention ?? []).filter((_, index) => inChunks.has(index)).sort((one, other) => one - other);
  const high = Math.max(1e-9, seen[Math.floor(seen.length * 0.99)] ?? 0);  // first tokens have far more than all others
  return shown.tokens.map((text, index) => {
    const attention = shown.attention === null ? null : shown.attention[index];
    const element = make("span", { className: states[index], textContent: text });
    if (attention !== null) element.style.setProperty("--a", Math.sqrt(Math.min(1, attention / high)).toFixed(3));
    return { element, state: states[index], attention };
  });
};

const about = (chunk) => {
  const name = chunk.document ? ` (${chunk.document})` : "";
  const done = [["reused", chunk.reused_tokens], ["recomputed", chunk.recomputed_tokens]].filter(([, n]) => n).map(([what, n]) => `${n} ${what}`);
  const guard = chunk.guard ? `, guard ${chunk.guard}` : "";
  return `Chunk ${chunk.index + 1}${name}: ${chunk.tokens} tokens from ${chunk.source}${done.length ? `, ${done.join(", ")}` : ""}, ${chunk.exact ? "exact" : "approximate"}${guard}`;
};

const piece = (title, from, to) => make("div", { className: "piece" },
  make("p", { textContent: title }), make("div", {}, ...tokens.slice(from, to).map((token) => token.element)));

let opening = null;
const open = async (number) => {
  opening = number;
  const shown = await ask(`requests/${number}`).catch((error) => { at("status").textContent = error.message; });
  if (!shown || opening !== number) return;
  chosen = number;
  current = -1;
  tokens = spans(shown);
  const parts = [];
  let end = 0;
  for (const chunk of shown.chunks) {
    if (chunk.start > end) parts.push(piece(end ? "Between chunks" : "Before the chunks", end, chunk.start));
    parts.push(piece(about(chunk), chunk.start, chunk.start + chunk.tokens));
    end = chunk.start + chunk.tokens;
  }
  if (end < tokens.length) {
    const asked = piece(shown.chunks.length ? "The question" : "The prompt", end, tokens.length);
    asked.onmouseenter = () => attend(true);
    asked.onmouseleave = () => attend(at("attend").ariaPressed === "true");
    parts.push(asked);
  }
  at("text").replaceChildren(...parts);
  at("about").textContent = `${shown.id}: ${shown.prompt_tokens.toLocaleString()} tokens, policy ${shown.policy}, ${percent(shown.recomputed_share)} computed`;
  at("attend").disabled = shown.attention === null;
  at("attend").title = shown.attention === null ? "This request’s policy did not look at the question." : "Also while the pointer is on the question.";
  at("attend").ariaPressed = "false";
  attend(false);
  at("token").textContent = "";
  at("prompt").hidden = false;
  for (const [other, row] of rows) row.button.ariaCurrent = String(other === number);
  at("h-prompt").focus();
  at("prompt").scrollIntoView({ block: "start" });
};

const attend = (on) => at("text").classList.toggle("attention", on && !at("attend").disabled);

at("attend").onclick = () => {
  at("attend").ariaPressed = String(at("attend").ariaPressed !== "true");
  attend(at("attend").ariaPressed === "true");
};
at("close").onclick = () => {
  at("prompt").hidden = true;
  rows.get(chosen)?.button.focus();
  chosen = null;
  tokens = [];
  at("text").replaceChildren();
};
at("text").onmouseover = (event) => {
  const index = tokens.findIndex((token) => token.element === event.target);
  if (index < 0) return;
  event.target.title = describe(index);
  at("token").textContent = describe(index);
};
at("text").onkeydown = (event) => {
  const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10 };
  if (!(event.key in steps) || !tokens.length) return;
  event.preventDefault();
  move(current + steps[event.key]);
};

// --- the store

let searched = "";

const showStore = async () => {
  const asked = searched;
  const store = await ask(`store?document=${encodeURIComponent(asked)}`);
  if (asked !== searched) return; // another search was made meanwhile, whose answer may be there already
  at("tiers").replaceChildren(...store.tiers.map((tier) => cells([tier.tier, tier.entries.toLocaleString(), bytes(tier.nbytes)], [1, 2])));
  at("entries").replaceChildren(...store.entries.map((entry) => {
    const row = cells([entry.key, entry.tokens, bytes(entry.nbytes), entry.tiers.join(", "), new Date(entry.created * 1000).toLocaleString()], [1, 2]);
    row.firstChild.className = "mono";
    return row;
  }));
  at("found").textContent = `${entries(store.total)}${searched ? ` of document ${searched}` : ""}`
    + (store.total > store.entries.length ? `, the last ${store.entries.length} below` : "");
  at("delete").disabled = !searched || !store.total;
};

const told = (work) => work.catch((error) => { at("found").textContent = error.message; });

at("search").onsubmit = (event) => {
  event.preventDefault();
  searched = at("document").value.trim();
  told(showStore());
};
at("delete").onclick = () => {
  at("sure-text").textContent = `Delete all KV that were computed from document ${searched}, from every tier?`;
  at("sure").returnValue = "no";
  at("sure").showModal();
};
at("sure").onclose = () => {
  if (at("sure").returnValue !== "yes") return;
  told(ask(`store?document=${encodeURIComponent(searched)}`, { method: "DELETE" }).then(async ({ deleted }) => {
    await showStore();
    at("found").textContent = `${entries(deleted)} of document ${searched} deleted`;
  }));
};

// --- the page

const root = document.documentElement;
const system = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (root.style.colorScheme || (system.matches ? "dark" : "light")) === "dark";
const label = () => { at("theme").textContent = isDark() ? "Light theme" : "Dark theme"; };
at("theme").onclick = () => { root.style.colorScheme = isDark() ? "light" : "dark"; label(); };
system.onchange = label;
label();
at("stages").append(...STAGES.map((name) => make("li", {}, make("i", { className: name }), name)));
at("states").append(...Object.entries(STATES).map(([name, text]) => make("li", { title: text }, make("i", { className: `s-${name}` }), name)));

let stored = false;
const poll = async () => {
  if (document.visibilityState === "visible" && at("login").hidden) {
    try {
      showState(await ask("state"));
      locked(false);
      at("status").textContent = "";
      if (!stored) await told(showStore());
      stored = true;
    } catch (error) {
      if (error.status === 401) locked(true);
      else at("status").textContent = error.status ? error.message : "The server does not answer.";
    }
  }
  setTimeout(poll, POLL_MS);
};
at("login").onsubmit = (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, at("key").value.trim());
  at("key").value = at("refused").textContent = "";
  stored = false;
  at("login").hidden = true;
};
poll();
