// The operator's numbers: figures, charts, tenants and requests, from one snapshot after the other.

import { Chart } from "./chart.js";
import { byId, row } from "./dom.js";
import { showTimeline } from "./timeline.js";

const STATUS_LOST = "no connection";

export class Overview {
  #charts;
  #events;

  // Shows snapshots until it is closed; `onLost` is called when they stop coming.
  open(onLost) {
    byId("operator").hidden = false;
    this.#events = new EventSource("events");
    this.#events.onmessage = (event) => this.#show(JSON.parse(event.data));
    this.#events.onerror = () => {
      showStatus(STATUS_LOST, false);
      onLost();
    };
  }

  close() {
    this.#events?.close();
    byId("operator").hidden = true;
  }

  #show(snapshot) {
    showChecks(snapshot.checks);
    showFigures(snapshot);
    this.#charts ??= makeCharts(snapshot);
    this.#charts.batch.add(snapshot.at, [snapshot.running, snapshot.waiting]);
    this.#charts.tokens.add(snapshot.at, [snapshot.decode_tokens_per_s, snapshot.prefill_tokens_per_s]);
    this.#charts.cache.add(snapshot.at, [kvPercent(snapshot)]);
    showTenants(snapshot.tenants);
    showTimeline(byId("requests"), snapshot.requests, snapshot.at);
  }
}

function makeCharts(snapshot) {
  const parent = byId("charts");
  return {
    batch: new Chart(parent, {
      title: "Batch",
      series: ["running", "waiting"],
      ceiling: snapshot.max_running,
      format: ([running, waiting]) => [`${running} running`, `${waiting} waiting`],
    }),
    tokens: new Chart(parent, {
      title: "Tokens/s",
      series: ["decode", "prefill"],
      ceiling: 10,
      format: ([decode, prefill]) => [`${short(decode)} generated`, `${short(prefill)} prefilled`],
    }),
    cache: new Chart(parent, {
      title: "KV cache",
      series: ["cache"],
      ceiling: 100,
      format: ([percent]) => [`${short(percent)} %`],
    }),
  };
}

function showChecks(checks) {
  const failing = Object.keys(checks).filter((name) => !checks[name]);
  showStatus(failing.length ? `not ready: ${failing.join(", ")}` : "ready", !failing.length);
}

function showStatus(text, good) {
  const status = byId("status");
  if (status.textContent !== text) status.textContent = text; // else it would be read out again and again
  status.className = good ? "good" : "bad";
}

function showFigures(snapshot) {
  const figures = {
    running: [snapshot.running, `of ${snapshot.max_running}`],
    waiting: [snapshot.waiting, "requests"],
    decode: [short(snapshot.decode_tokens_per_s), "tokens/s"],
    prefill: [short(snapshot.prefill_tokens_per_s), "tokens/s"],
    kv: [`${short(kvPercent(snapshot))} %`, `of ${snapshot.kv_blocks.toLocaleString()} blocks`],
    step: [`${short(1000 * snapshot.step_s)} ms`, `${snapshot.rows} rows`],
    preemptions: [snapshot.preemptions.toLocaleString(), "so far"],
  };
  for (const [name, [value, note]] of Object.entries(figures)) {
    const place = document.querySelector(`[data-figure=${name}]`);
    const small = document.createElement("small");
    small.textContent = note;
    place.replaceChildren(`${value} `, small);
  }
}

function showTenants(tenants) {
  const most = Math.max(1, ...tenants.map((tenant) => tenant.service));
  const rows = tenants.map((tenant) => {
    const made = row("td", [
      tenant.tenant, short(tenant.weight), tenant.running, tenant.waiting, short(tenant.tokens_per_s), "",
    ]);
    const meter = made.cells[5].appendChild(document.createElement("span"));
    meter.className = "meter";
    meter.style.setProperty("--share", tenant.service / most);
    meter.textContent = Math.round(tenant.service).toLocaleString();
    return made;
  });
  byId("tenants").tBodies[0].replaceChildren(...rows);
}

function kvPercent(snapshot) {
  return 100 * snapshot.kv_blocks_used / snapshot.kv_blocks;
}

function short(value) {
  return value.toLocaleString(undefined, { maximumFractionDigits: value < 100 ? 1 : 0 });
}
