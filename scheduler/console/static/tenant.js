// A tenant's own connection to the broker: MQTT 5.0 over WebSockets, topics and bodies as in docs/protocol.md.

import mqtt from "./vendor/mqtt-5.16.0.js";

const ROOT = "tokenbus/v1";
const RESEND_MS = 3000;
const SENT_AT_MOST = 10;
const CONNECT_MS = 10000;
const TERMINAL = ["result", "cancelled", "expired", "error"];

export class Tenant {
  #name;
  #client;
  #inbox;
  #pending = new Map();

  static async connect(url, name, password) {
    const client = await mqtt.connectAsync(url, {
      protocolVersion: 5,
      clientId: `tokenbus-page-${randomName()}`,
      username: name,
      password: password || undefined,
      connectTimeout: CONNECT_MS,
      timerVariant: "native", // the other makes a worker of a blob, which the page's policy forbids
    }, false);
    const tenant = new Tenant(name, client);
    await client.subscribeAsync(`${tenant.#inbox}/+`, { qos: 1 });
    return tenant;
  }

  constructor(name, client) {
    this.#name = name;
    this.#client = client;
    this.#inbox = `${ROOT}/${name}/out/${randomName()}`;
    client.on("message", (topic, payload) => this.#pending.get(topic)?.take(JSON.parse(payload.toString())));
    // It came back after it was lost: the broker may have forgotten requests, or replies to them.
    client.on("connect", () => this.#pending.forEach(({ send }) => send()));
    client.on("error", (error) => {
      if (typeof error.code === "number") this.#failAll(error.message); // refused, not just unreachable
    });
  }

  get name() {
    return this.#name;
  }

  // Yields the replies to one request, chunks in order and once each, the terminal one last. Not accepted, or after a new
  // connection, the request is sent again under the same id, which the service answers with what it has of it.
  async *ask(model, body, id) {
    const topic = `${this.#inbox}/${id}`;
    const send = () => this.#publish(`${ROOT}/${this.#name}/req/${model}/${id}`, JSON.stringify(body), topic);
    const replies = new ReadableStream({
      start: (controller) => this.#pending.set(topic, { send, take: (reply) => controller.enqueue(reply) }),
    }).getReader();
    let sent = 1;
    const resending = setInterval(() => {
      if (sent++ < SENT_AT_MOST) send();
      else this.#pending.get(topic).take(failed(`request ${id} wasn't accepted: the service didn't answer`));
    }, RESEND_MS);
    send();
    try {
      for (let expected = 0; ;) {
        const { value: reply } = await replies.read();
        clearInterval(resending);
        if (reply.type === "chunk" && reply.seq !== expected) continue;
        if (reply.type === "chunk") expected += 1;
        yield reply;
        if (TERMINAL.includes(reply.type)) return;
      }
    } finally {
      clearInterval(resending);
      this.#pending.delete(topic);
    }
  }

  cancel(id) {
    this.#publish(`${ROOT}/${this.#name}/cancel/${id}`, "");
  }

  close() {
    this.#failAll("the connection was closed");
    this.#client.end(true);
  }

  #failAll(message) {
    this.#pending.forEach(({ take }) => take(failed(message)));
  }

  #publish(topic, payload, responseTopic) {
    const properties = responseTopic ? { responseTopic } : {};
    // A refusal comes as a reason code, which no reply would follow.
    this.#client.publish(topic, payload, { qos: 1, properties }, (error) => {
      if (error && responseTopic) this.#pending.get(responseTopic)?.take(failed(`the broker refused it: ${error.message}`));
    });
  }
}

export function randomName() {
  return Array.from(crypto.getRandomValues(new Uint8Array(8)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

function failed(message) {
  return { type: "error", error: { message } };
}
