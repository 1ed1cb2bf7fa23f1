// The prompt box: sends a prompt as a tenant, streams the answer, and shows what became of the tenant's own requests.

import { byId } from "./dom.js";
import { Tenant, randomName } from "./tenant.js";
import { showTimeline } from "./timeline.js";

const MOST_OWN = 8;
const REDRAW_MS = 500;

export class AskBox {
  #settings;
  #tenant;
  #credentials;
  #running;
  #own = [];

  constructor() {
    byId("ask-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#send(new FormData(event.target));
    });
    byId("cancel").addEventListener("click", () => this.#tenant.cancel(this.#running));
    setInterval(() => this.#draw(), REDRAW_MS);
  }

  // Where the broker is may change with who is logged in.
  use(settings) {
    if (this.#settings?.broker !== settings.broker) this.#disconnect();
    this.#settings = settings;
    const missing = byId("no-broker");
    missing.hidden = settings.broker !== null;
    missing.textContent = settings.operator
      ? "Set console.broker_websocket_url to where browsers find the broker."
      : "The broker here is the operator's: log in to use it.";
    byId("ask-form").hidden = settings.broker === null;
  }

  async #send(form) {
    const button = byId("ask-form").querySelector("[type=submit]");
    button.disabled = true;
    showError("");
    try {
      await this.#connect(form.get("tenant"), form.get("password"));
      await this.#stream({
        messages: [{ role: "user", content: form.get("prompt") }],
        max_tokens: Number(form.get("max_tokens")),
        temperature: Number(form.get("temperature")),
        stream: true,
      });
    } catch (error) {
      showError(error.message || "the broker can't be reached");
    } finally {
      button.disabled = false;
      byId("cancel").disabled = true;
    }
  }

  async #connect(tenant, password) {
    const credentials = JSON.stringify([tenant, password]);
    if (this.#tenant && this.#credentials === credentials) return;
    this.#disconnect();
    this.#tenant = await Tenant.connect(socketUrl(this.#settings.broker), tenant, password);
    this.#credentials = credentials;
  }

  #disconnect() {
    this.#tenant?.close();
    this.#tenant = undefined;
    this.#own = [];
  }

  async #stream(body) {
    const answer = byId("answer");
    const note = byId("answer-note");
    const id = this.#running = randomName();
    const own = new OwnRequest(this.#tenant.name, id);
    this.#own = [own, ...this.#own].slice(0, MOST_OWN);
    answer.textContent = note.textContent = "";
    answer.setAttribute("aria-busy", "true");
    byId("cancel").disabled = false;
    for await (const reply of this.#tenant.ask(this.#settings.model, body, id)) {
      own.take(reply);
      show(reply, answer, note);
    }
    answer.removeAttribute("aria-busy"); // every request ends in a terminal reply, if only one of ours
  }

  #draw() {
    showTimeline(byId("own-requests"), this.#own, now());
  }
}

// One request as the timeline shows it, from what its tenant is told.
class OwnRequest {
  outcome = null;

  constructor(tenant, id) {
    this.tenant = tenant;
    this.request_id = id;
    this.phases = [{ stage: "waiting", since: now(), until: null }];
  }

  take(reply) {
    const last = this.phases.at(-1);
    if (reply.type === "chunk" && last.stage === "waiting") {
      last.until = now();
      this.phases.push({ stage: "decode", since: now(), until: null });
    } else if (reply.type === "result") {
      this.#settle(reply);
    } else if (reply.type !== "accepted" && reply.type !== "chunk") {
      last.until = now();
      this.outcome = reply.type;
    }
  }

  #settle({ data, timings }) {
    const first = this.phases[0].since;
    const times = [first, first + timings.queued_s, first + timings.ttft_s, first + timings.total_s];
    const stages = ["waiting", "prefill", "decode"];
    this.phases = stages.map((stage, index) => ({ stage, since: times[index], until: times[index + 1] }));
    this.prompt_tokens = data.usage.prompt_tokens;
    this.generated_tokens = data.usage.completion_tokens;
    this.outcome = data.choices[0].finish_reason;
  }
}

function show(reply, answer, note) {
  if (reply.type === "chunk") {
    answer.append(reply.data.choices[0].delta.content ?? "");
  } else if (reply.type === "result") {
    answer.textContent = reply.data.choices[0].message.content; // makes lost chunks good
    note.textContent = told(reply);
  } else if (reply.type === "error") {
    showError(reply.error.message);
  } else if (reply.type !== "accepted") {
    note.textContent = reply.type;
  }
}

function told({ data, timings }) {
  const tokens = `${data.usage.prompt_tokens} prompt tokens, ${data.usage.completion_tokens} generated`;
  return `${tokens}; waited ${timings.queued_s.toFixed(2)} s, first token after ${timings.ttft_s.toFixed(2)} s, `
    + `all after ${timings.total_s.toFixed(2)} s`;
}

function socketUrl(broker) {
  const url = new URL(broker, location.href);
  url.protocol = url.protocol.replace("http", "ws");
  return url.href;
}

function showError(message) {
  byId("ask-form").querySelector(".error").textContent = message;
}

function now() {
  return performance.now() / 1000;
}
