// Requests as rows of a table, each with a bar for every phase of it in the last minute.

import { key, row, tag } from "./dom.js";

const SPAN_S = 60;
const STAGES = ["waiting", "prefill", "decode", "preempted"];

// `requests` are as in a snapshot, `now` is on the same clock.
export function showTimeline(table, requests, now) {
  const shown = requests.filter((request) => !request.outcome || lastMoment(request) > now - SPAN_S);
  shown.sort((one, other) => Boolean(one.outcome) - Boolean(other.outcome) || place(one) - place(other));
  const body = tag("tbody", "");
  body.append(...shown.map((request) => line(request, now)));
  table.replaceChildren(legend(), heading(), body);
}

// Those that go on by when they came, those that ended the latest first.
function place(request) {
  return request.outcome ? -lastMoment(request) : request.phases[0].since;
}

function lastMoment(request) {
  return request.phases.at(-1).until;
}

function legend() {
  const caption = tag("caption", "");
  caption.append(...STAGES.map((stage) => key(stage, stage)));
  return caption;
}

function heading() {
  const head = tag("thead", "");
  head.append(row("th", ["tenant", "request", "prompt", "out", "now", "−60 s … now"]));
  for (const cell of head.querySelectorAll("th")) cell.scope = "col";
  return head;
}

function line(request, now) {
  const standing = request.outcome ?? request.phases.at(-1).stage;
  const made = row("td", [
    request.tenant, request.request_id, request.prompt_tokens ?? "", request.generated_tokens ?? "", standing, "",
  ]);
  made.cells[1].title = request.request_id;
  made.cells[4].className = `standing ${standing}`;
  const track = made.cells[5].appendChild(document.createElement("div"));
  track.className = "track";
  track.setAttribute("aria-hidden", "true");
  for (const phase of request.phases) {
    const since = Math.max(phase.since, now - SPAN_S);
    const until = phase.until ?? now;
    if (until <= since) continue;
    const bar = track.appendChild(document.createElement("i"));
    bar.className = phase.stage;
    bar.title = `${phase.stage}, ${(until - phase.since).toFixed(2)} s`;
    bar.style.left = `${100 * (1 - (now - since) / SPAN_S)}%`;
    bar.style.width = `${100 * (until - since) / SPAN_S}%`;
  }
  return made;
}
