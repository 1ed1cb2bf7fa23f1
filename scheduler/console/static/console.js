// The page: who asks decides what it shows.

import { AskBox } from "./ask.js";
import { byId } from "./dom.js";
import { Overview } from "./overview.js";

const RETRY_MS = 2000;

const overview = new Overview();
const ask = new AskBox();

async function start() {
  overview.close();
  const answer = await fetch("settings").catch(() => null);
  if (!answer?.ok) {
    setTimeout(start, RETRY_MS);
    return;
  }
  const settings = await answer.json();
  byId("model").textContent = settings.model;
  byId("login").hidden = settings.operator;
  byId("logout").hidden = !(settings.operator && settings.login);
  ask.use(settings);
  if (settings.operator) overview.open(() => setTimeout(start, RETRY_MS));
  else showTenantView();
}

function showTenantView() {
  byId("status").textContent = "tenant view";
  byId("status").className = "";
}

byId("login-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const form = event.target;
  const password = new FormData(form).get("password");
  const answer = await fetch("login", { method: "POST", body: JSON.stringify({ password }) });
  form.querySelector(".error").textContent = answer.ok ? "" : await answer.text();
  form.reset();
  if (answer.ok) start();
});

byId("logout").addEventListener("click", async () => {
  await fetch("logout", { method: "POST" });
  start();
});

start();
